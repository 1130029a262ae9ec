"""What may be computed inside a kernel, and why not: the rules of fusion."""

from __future__ import annotations

from stagefuse.compiler.graph import (
    Concat,
    Contract,
    Graph,
    Map,
    Node,
    Reduce,
    Ref,
    Scan,
    Scatter,
    Sort,
    Update,
    Within,
)
from stagefuse.compiler.recurrence import Nests
from stagefuse.dsl.dims import Expr, const

from .groups import Access, Group, count_of, flops, is_free, own_position

CHEAP_FLOPS = 2
FEW_PARTS = 8
"""Of concatenations that are computed in the kernel that joins them."""
DEPTH_LIMIT = 64
"""Nodes on a path inside one kernel; later phases recurse along it."""
MANY, MOST_REDUCED, MOST_ARITHMETIC = 6, 16, 200
"""Reductions of rows in one kernel at most, and the arithmetic of an element of theirs, as the
scalar table counts it, if there are many: registers hold what each comes to until all are there,
and the time of ptxas and LLVM grows with the square of what is in one kernel."""
ROW_LIMIT = 1 << 16
"""Elements of a whole-tensor reduction that one thread may still handle with its users."""


class Rules:
    """The rules for the nodes of a graph and the kernels that they may become part of."""

    def __init__(self, graph: Graph) -> None:
        self.graph, self.nests, self.uses = graph, Nests(graph), graph.uses()
        self.reduced: dict[Group, list[int]] = {}  # the arithmetic of each reduction of a kernel

    def inner_axes(self, group: Group, access: Access) -> tuple[int, ...]:
        """The axes that a reduction runs along, read there; one of size 1 only if all are, and the
        last one is."""
        used = {e.as_symbol() for e in access or ()}
        inner = tuple(i for i in range(len(group.domain)) if f"d{i}" not in used)
        long = tuple(i for i in inner if group.domain[i].as_int() != 1)
        return long or (inner if len(group.domain) - 1 in inner else ())

    def refusal(self, node: Node, group: Group) -> str | None:
        """Why a node may not be computed inside a kernel, or None if it may."""
        primitive = node.primitive
        accesses = group.accesses.get(node.id, [])
        if self.nests.of(node.id) != group.nest:
            return "it is the same at every step"
        if isinstance(primitive, Map | Within):
            return self._map_refusal(node, group, accesses)
        if isinstance(primitive, Reduce):
            return self._reduce_refusal(node, group, accesses)
        if isinstance(primitive, Contract):
            return self._contract_refusal(node, group, accesses)
        return "its elements depend on each other"

    def _map_refusal(self, node: Node, group: Group, accesses: list[Access]) -> str | None:
        cheap = self._chain_flops(node) <= CHEAP_FLOPS
        if cheap:
            return None
        if group.kind in ("scan", "sort", "scatter"):
            return None if group.kind != "scatter" else "a scatter reads it by position"
        last = len(group.domain) - 1
        other = group.kind == "contract"
        turned = group.kind == "pointwise" and accesses != [own_position(node.type.shape)]
        if (other or turned) and self._finishes_product(node):
            return "it finishes a product of another kernel"
        for access in accesses:
            if access is None and self._part_of(node, group) is not None:
                continue
            if access is None:
                return "it is read at positions that depend on data"
            if self._once(node, group, access):
                continue
            symbols = frozenset[str]().union(*(e.symbols() for e in access))
            if any(s.startswith("f") for s in symbols) or f"d{last}" in symbols:
                return "it would be computed again for every use"
        plain = {tuple(str(e).replace("f", "d") for e in a) for a in accesses if a is not None}
        if len(plain) > 1:
            return "it is read at several places"
        return None

    def _part_of(self, node: Node, group: Group) -> tuple[int, int] | None:
        """The concatenation and the number of its part that alone reads a node, through maps, if
        each element of it is written once: there its loop, or one for few parts, computes it."""
        found: set[tuple[int, int] | None] = set()
        reached = [node.id]
        for of in reached:  # grows; each map once, however many ways lead to it
            users = dict.fromkeys(self.uses.get(Ref(of), ()))
            if not users or len(reached) > DEPTH_LIMIT:
                return None
            for user in users:
                if not isinstance(self.graph.nodes[user].primitive, Map):
                    found.add(self._place_in(self.graph.nodes[user], of, group))
                elif user not in reached:
                    reached.append(user)
        return found.pop() if len(found) == 1 else None

    def _place_in(self, reader: Node, part: int, group: Group) -> tuple[int, int] | None:
        """A concatenation and which of its few parts a node is, if it is one alone and each element
        is written once."""
        places = [n for n, ref in enumerate(reader.operands) if ref.node == part]
        joins = isinstance(reader.primitive, Concat) and len(reader.operands) <= FEW_PARTS
        accesses = group.accesses.get(reader.id, [])
        once = all(at is not None and self._once(reader, group, at) for at in accesses)
        whole = joins and group.kind == "pointwise" and once and len(accesses) == 1
        return (reader.id, places[0]) if whole and len(places) == 1 else None

    def _finishes_product(self, node: Node) -> bool:
        """Whether a node's elements are those of a product, one for one."""
        steps = 0
        while isinstance(node.primitive, Map) and steps < DEPTH_LIMIT:
            operands = [self.graph.nodes[ref.node] for ref in node.operands]
            products = [n for n in operands if isinstance(n.primitive, Contract | Map)]
            if not products:
                return False
            node, steps = products[0], steps + 1
        return isinstance(node.primitive, Contract)

    def _chain_flops(self, node: Node) -> int:
        """Arithmetic of a node and of what it would pull in through other maps."""
        total, pending, steps = 0, [node.id], 0
        while pending and total <= CHEAP_FLOPS:
            steps += 1
            if steps > DEPTH_LIMIT:
                return CHEAP_FLOPS + 1
            here = self.graph.nodes[pending.pop()]
            if isinstance(here.primitive, Reduce | Contract | Scan | Sort | Scatter | Update):
                return CHEAP_FLOPS + 1
            total += flops(here)
            if isinstance(here.primitive, Map | Within) or is_free(here):
                pending.extend(ref.node for ref in here.operands)
        return total

    def _once(self, node: Node, group: Group, access: tuple[Expr, ...]) -> bool:
        """Whether each element is computed once per pass: sizes agree and axes are distinct.

        A pass over a row (an axis f0, f1...) computes it once if it differs from row to row.
        """
        names = [e.as_symbol() for e in access if e != const(0)]
        if any(n is None for n in names) or len(set(names)) != len(names):
            window = any(s.startswith("f") for e in access for s in e.symbols())
            return not window and self._same_size(node, group)
        inner = group.row_axes if any(str(n).startswith("f") for n in names) else ()
        needed = {
            f"d{i}"
            for i, d in enumerate(group.domain)
            if d.as_int() != 1 and i not in (inner or ())
        }
        return needed <= set(names)

    def _same_size(self, node: Node, group: Group) -> bool:
        return count_of(node.type.shape) == count_of(group.domain)

    def _reduce_refusal(self, node: Node, group: Group, accesses: list[Access]) -> str | None:
        if group.kind not in ("pointwise", "row"):
            return f"a {group.kind} kernel holds no row reduction"
        if len(accesses) != 1 or accesses[0] is None:
            return "it is read at several places"
        names = [e.as_symbol() for e in accesses[0] if e.as_int() != 0]
        if any(n is None or not n.startswith("d") for n in names):
            return "it would be computed again for every use"
        if len(set(names)) != len(names):
            return "it is read along a diagonal"
        for place, size in zip(accesses[0], node.type.shape, strict=True):
            name = place.as_symbol()
            if name is not None and group.domain[int(name[1:])] != size:
                return "only a part of it is read"
            if name is None and size.as_int() != 1:
                return "only a part of it is read"
        inner = self.inner_axes(group, accesses[0])
        if group.row_axes is not None and set(inner) != set(group.row_axes):
            return "its rows run along other axes"
        operand = self.graph.type(node.operands[0]).shape
        rows = [d for i, d in enumerate(group.domain) if i not in inner and d.as_int() != 1]
        most = self.graph.facts.bounds(count_of(operand))[1]
        if not rows and (most is None or most > ROW_LIMIT):
            return "one thread would do all of it"
        others = self.reduced.get(group, [])
        work = sum(others) + self.arithmetic(node)
        if len(others) >= MOST_REDUCED or (len(others) >= MANY and work > MOST_ARITHMETIC):
            return "the kernel would hold too many reductions"
        return None

    def arithmetic(self, node: Node) -> int:
        """Arithmetic of an element that a node makes of what is stored, looked at up to
        `MOST_ARITHMETIC`."""
        total, pending, seen = 0, [node.id], {node.id}
        while pending and total <= MOST_ARITHMETIC >= len(seen):
            here = self.graph.nodes[pending.pop()]
            total += flops(here)
            for ref in here.operands:
                above = self.graph.nodes[ref.node]
                if ref.node not in seen and (isinstance(above.primitive, Map) or is_free(above)):
                    seen.add(ref.node)
                    pending.append(ref.node)
        return total

    def _contract_refusal(self, node: Node, group: Group, accesses: list[Access]) -> str | None:
        identity = own_position(group.domain)
        if group.kind != "pointwise":
            return f"a {group.kind} kernel reads it, and those hold no matrix products"
        if node.type.shape != group.domain:
            return "its tiles are not those of the result"
        if any(a != identity for a in accesses):
            return "it is read in another order than it is computed"
        return None

    def why(self, node: Node, group: Group) -> str:
        if isinstance(node.primitive, Contract):
            return "what follows works on its tiles while they are in cache"
        if isinstance(node.primitive, Reduce):
            return "its row is in cache when the users need the result"
        return "each element is used where it is computed"
