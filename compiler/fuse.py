"""Decides which kernel computes each node: producers are pulled into the kernels of their users.

Nodes are visited from the results back. A node whose users all sit in one kernel joins it when
the rules below allow; otherwise it becomes the root of a kernel of its own, or a second result
of a kernel that computes it anyway. What is not a root is never stored. Every decision keeps
its reason.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

import networkx as nx

from stagefuse.dsl.dims import Expr, const, sym

from .attention import Softmax
from .contract import is_tangled
from .graph import (
    Carried,
    Concat,
    Constant,
    Contract,
    Gather,
    Graph,
    Indirect,
    Input,
    Map,
    Node,
    Position,
    Recurrence,
    Reduce,
    Ref,
    Scalar,
    Scan,
    Scatter,
    Sort,
    State,
    Update,
    View,
    Weight,
    Within,
)
from .kernel_order import ordered_groups
from .recurrence import Held, Nests, held_values
from .scalar import FUNCTIONS

Access: TypeAlias = tuple[Expr, ...] | None  # None: at positions read from data
SOURCES = (Input, State, Weight, Constant, Carried, Recurrence)
FREE = (View, Position, Gather, Concat)
CHEAP_FLOPS = 2
DEPTH_LIMIT = 64
"""Nodes on a path inside one kernel; later phases recurse along it."""
ROW_LIMIT = 1 << 16
"""Elements of a whole-tensor reduction that one thread may still handle with its users."""


@dataclass(eq=False)
class Group:
    """A kernel to be: roots are stored, members computed inside; `domain` is the loop space.

    `placed`: a root that holds another value in another order, as that value and the place of
    its element d0, d1... `rows`: in a chain, the row kernel between its two products. `packs`:
    panels that the kernel packs itself, as the kernel that would. `nest`: the recurrences at whose
    steps the kernel runs, outermost first. `when`: 1 at sizes at which the kernel runs and 0 at
    others, where another one has the same results. `softmax`: in attention, what the row kernel
    computes.
    """

    kind: str  # pointwise, row, contract, chain, attention, scan, sort, scatter, update
    roots: list[Ref]
    domain: tuple[Expr, ...]
    members: set[int] = field(default_factory=set)
    accesses: dict[int, list[Access]] = field(default_factory=dict)
    row_axes: tuple[int, ...] | None = None
    anchor: int | None = None
    placed: dict[Ref, tuple[Ref, tuple[Expr, ...]]] = field(default_factory=dict)
    rows: Group | None = None
    packs: dict[Ref, Group] = field(default_factory=dict)
    nest: tuple[str, ...] = ()
    when: Expr = const(1)
    softmax: Softmax | None = None

    def source(self, root: Ref) -> Ref:
        """The value that a root holds."""
        return self.placed[root][0] if root in self.placed else root

    def reads(self, graph: Graph) -> set[Ref]:
        """The values that members read, and stored ones that roots hold."""
        found = {ref for member in self.members for ref in graph.nodes[member].operands}
        return found | {ref for ref, _ in self.placed.values() if ref.node not in self.members}

    def loads(self, graph: Graph) -> set[Ref]:
        """What the kernel reads from memory, but for the base of an update."""
        found = {ref for ref, _ in self.placed.values() if ref.node not in self.members}
        for member in self.members:
            node = graph.nodes[member]
            operands = node.operands[1:] if isinstance(node.primitive, Update) else node.operands
            found |= {ref for ref in operands if ref.node not in self.members}
        for part in (*self.packs.values(), *([self.rows] if self.rows else [])):
            found |= part.loads(graph)
        return found


@dataclass(frozen=True)
class Decision:
    """Why a node was fused into a kernel, or was not."""

    node: int
    fused: bool
    reason: str


@dataclass
class Partition:
    """The kernels in an order in which each comes after what it reads."""

    groups: list[Group]
    decisions: list[Decision]


def is_free(node: Node) -> bool:
    """Whether a node is only an index map: it is computed again wherever it is read."""
    return isinstance(node.primitive, FREE)


def flops(node: Node) -> int:
    """Arithmetic per element, as the scalar table counts it."""
    return FUNCTIONS[node.primitive.fn].flops if isinstance(node.primitive, Map) else 0


def partition(graph: Graph, apart: frozenset[int] = frozenset()) -> Partition:
    """The kernels of a graph; what the updates in `apart` store is computed in other kernels."""
    return _Partitioner(graph, apart).run()


class _Partitioner:
    def __init__(self, graph: Graph, apart: frozenset[int]) -> None:
        self.graph, self.apart = graph, apart
        self.keeps = any(
            isinstance(n.primitive, Update) and n.primitive.state for n in graph.nodes.values()
        )
        self.uses = graph.uses()
        self.groups: list[Group] = []
        self.of: dict[int, list[Group]] = {}  # the kernels that compute a node
        self.decisions: list[Decision] = []
        self.stored: set[Ref] = set()
        self.depth: dict[int, int] = {}  # of a node, from the nearest stored node that uses it
        self.nests = Nests(graph)
        self.held = held_values(graph, self.nests)

    def run(self) -> Partition:
        for node in reversed(list(self.graph.nodes.values())):
            self.of[node.id] = []
            if isinstance(node.primitive, SOURCES):
                self.depth[node.id] = 0
                self._copies(node)
            else:
                self._place(node)
        self._hold()
        ordered = ordered_groups(self.graph, self.groups)
        return Partition(ordered, self.decisions[::-1])

    # What recurrences hold

    def _is_direct(self, node: Node, held: Held) -> bool:
        """Whether the kernel that computes a node can store it where a recurrence holds it."""
        held_apart = (*SOURCES, Scalar, Scan, Sort, Scatter, Update)
        apart = is_free(node) or isinstance(node.primitive, held_apart)
        return not apart and held.nest == self.nests.of(node.id)

    def _copies(self, node: Node) -> list[Group]:
        """Kernels that store what recurrences hold of a node that no kernel of theirs computes."""
        made = []
        for number, type in enumerate(node.types):
            ref = Ref(node.id, number)
            for held in self.held.get(ref, ()):
                if not self._is_direct(node, held):
                    group = Group("pointwise", [], type.shape, nest=held.nest)
                    group.accesses[node.id] = [_identity(type.shape)]
                    _place_root(group, ref, held)
                    made.append(group)
        self.groups.extend(made)
        return made

    def _hold(self) -> None:
        """Has kernels store their roots where recurrences hold them, and nowhere else if
        nothing else reads them."""
        for group in list(self.groups):
            for ref in list(group.roots):
                node = self.graph.nodes[ref.node]
                wanted = self.held.get(ref, ())
                direct = [held for held in wanted if self._is_direct(node, held)]
                for held in direct:
                    _place_root(group, ref, held)
                readers = [g for user in self.uses.get(ref, ()) for g in self.of[user]]
                read = any(g is not group for g in readers) or ref in self.graph.results
                if direct and not read and len(direct) == len(wanted):
                    group.roots.remove(ref)

    # Placing one node

    def _place(self, node: Node) -> None:
        refs = [Ref(node.id, i) for i in range(len(node.types))]
        users = [u for ref in refs for u in self.uses.get(ref, [])]
        groups: list[Group] = []
        for user in users:
            groups.extend(g for g in self.of[user] if g not in groups)
        groups.extend(self._copies(node))
        result = any(ref in self.graph.results for ref in refs)
        result = result or any(
            self._is_direct(node, held) for ref in refs for held in self.held.get(ref, ())
        )
        self.depth[node.id] = 1 + max((self.depth[user] for user in users), default=0)
        demanded = any(self._must_store(user, node.id) for user in users)
        if not groups and not result:
            return
        large = self.depth[node.id] > DEPTH_LIMIT or self._multiplies(node, users)
        large = large or any(self._is_tangled(node, group) for group in groups)
        if large and not isinstance(node.primitive, Scalar):
            self._say(node, False, "the kernel would grow too large")
            return self._root(node)
        if isinstance(node.primitive, Scalar) and not result:
            return self._join(node, groups)
        if is_free(node) and not result and not demanded and self._free_fits(node, groups):
            return self._join(node, groups)
        if len(groups) == 1 and not result and not demanded:
            reason = self._refusal(node, groups[0])
            if reason is None:
                self._say(node, True, self._why(node, groups[0]))
                return self._join(node, groups)
            self._say(node, False, reason)
        elif groups and isinstance(node.primitive, Map | Reduce):
            second = self._second_result(node, groups, demanded)
            if second is not None:
                second.roots.append(Ref(node.id))
                self._say(node, True, "computed in this kernel and stored for the others")
                return self._join(node, [second])
            self._say(node, False, "several kernels or the caller need the whole of it")
        self._root(node)

    def _must_store(self, user: int, node: int) -> bool:
        """Whether a user reads this node from memory: products do, and updates their base and
        their positions; where there are states, all do that read checked positions."""
        reader = self.graph.nodes[user]
        if self.keeps and isinstance(self.graph.nodes[node].primitive, Within):
            return True
        if isinstance(reader.primitive, Update):
            base, value, *tensors = reader.operands
            stored = {base.node, *(ref.node for ref in tensors)}
            return node in stored or (user in self.apart and node == value.node)
        return isinstance(reader.primitive, Contract)

    def _multiplies(self, node: Node, users: Sequence[int]) -> bool:
        """Whether a node would be computed anew for each use, and so would what it reads.

        Where every node of a chain is used twice, that is a power of two.
        """
        if not is_free(node) or len(users) < 2:
            return False
        kinds = [self.graph.nodes[user].primitive for user in users]
        return any(isinstance(kind, Gather | Concat) for kind in kinds) and isinstance(
            node.primitive, Gather | Concat
        )

    def _is_tangled(self, node: Node, group: Group) -> bool:
        """Whether what a view reads would lie at a position that takes many divisions."""
        if not isinstance(node.primitive, View):
            return False
        accesses = (self._operand_access(node, 0, a) for a in group.accesses.get(node.id, []))
        return any(access is not None and is_tangled(access) for access in accesses)

    def _free_fits(self, node: Node, groups: list[Group]) -> bool:
        if isinstance(node.primitive, Gather | Concat):
            nest = self.nests.of(node.id)
            if any(group.nest != nest for group in groups):
                return False
        if isinstance(node.primitive, Concat):
            return len(groups) == 1 and groups[0].kind in ("pointwise", "row", "update")
        return True

    def _join(self, node: Node, groups: Sequence[Group]) -> None:
        self.of[node.id] = list(groups)
        for group in groups:
            group.members.add(node.id)
            at = group.accesses.setdefault(node.id, [])
            if Ref(node.id) in group.roots:
                identity = _identity(group.domain)
                full = node.type.shape == group.domain
                access = identity if full else self._row_access(node, group)
                if access not in at:
                    at.insert(0, access)
            if isinstance(node.primitive, Reduce) and group.kind == "pointwise":
                group.kind = "row"
                group.row_axes = self._inner_axes(group, at[0])
            if isinstance(node.primitive, Contract):
                group.kind, group.anchor = "contract", node.id
            else:
                self._push(node, group)

    def _row_access(self, node: Node, group: Group) -> Access:
        existing = group.accesses[node.id]
        return existing[0] if existing else None

    def _inner_axes(self, group: Group, access: Access) -> tuple[int, ...]:
        """The axes that a reduction runs along, read there; one of size 1 only if all are."""
        used = {e.as_symbol() for e in access or ()}
        inner = tuple(i for i in range(len(group.domain)) if f"d{i}" not in used)
        return tuple(i for i in inner if group.domain[i].as_int() != 1) or inner

    def _push(self, node: Node, group: Group) -> None:
        """Notes where the node's operands are read."""
        for access in group.accesses[node.id]:
            for place, ref in enumerate(node.operands):
                at = self._operand_access(node, place, access)
                known = group.accesses.setdefault(ref.node, [])
                if at not in known:
                    known.append(at)

    def _operand_access(self, node: Node, place: int, access: Access) -> Access:
        primitive = node.primitive
        if isinstance(primitive, Map):
            return access
        if access is None:
            return None
        if isinstance(primitive, View):
            at = dict(zip(primitive.symbols, access, strict=True))
            return tuple(e.substitute(at, self.graph.facts) for e in primitive.indices)
        if isinstance(primitive, Reduce):
            kept = iter(access)
            rank = len(access) + len(primitive.axes)
            return tuple(sym(f"f{a}") if a in primitive.axes else next(kept) for a in range(rank))
        if isinstance(primitive, Within):
            return access
        if isinstance(primitive, Gather | Update):
            at = dict(zip(primitive.symbols, access, strict=True))
            if isinstance(primitive, Update) and place == 1:
                return access
            if place == 0:
                if isinstance(primitive, Gather):
                    return None
                return _written(primitive, at, self.graph)
            for index in primitive.indices:
                if isinstance(index, Indirect) and index.operand == place:
                    return tuple(e.substitute(at, self.graph.facts) for e in index.indices)
        return None

    # Rules

    def _refusal(self, node: Node, group: Group) -> str | None:
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
        for access in accesses:
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
        return _count(node.type.shape) == _count(group.domain)

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
        inner = self._inner_axes(group, accesses[0])
        if group.row_axes is not None and set(inner) != set(group.row_axes):
            return "its rows run along other axes"
        operand = self.graph.type(node.operands[0]).shape
        rows = [d for i, d in enumerate(group.domain) if i not in inner and d.as_int() != 1]
        most = self.graph.facts.bounds(_count(operand))[1]
        if not rows and (most is None or most > ROW_LIMIT):
            return "one thread would do all of it"
        return None

    def _contract_refusal(self, node: Node, group: Group, accesses: list[Access]) -> str | None:
        identity = _identity(group.domain)
        if group.kind != "pointwise":
            return f"a {group.kind} kernel holds no matrix product"
        if node.type.shape != group.domain:
            return "its tiles are not those of the result"
        if any(a != identity for a in accesses):
            return "it is read in another order than it is computed"
        return None

    def _why(self, node: Node, group: Group) -> str:
        if isinstance(node.primitive, Contract):
            return "what follows works on its tiles while they are in cache"
        if isinstance(node.primitive, Reduce):
            return "its row is in cache when the users need the result"
        return "each element is used where it is computed"

    def _second_result(self, node: Node, groups: list[Group], demanded: bool) -> Group | None:
        """A kernel that can store this node besides its own result, without a cycle."""
        for group in groups:
            if group.kind not in ("pointwise", "row") or self._refusal(node, group):
                continue
            accesses = group.accesses.get(node.id, [])
            if isinstance(node.primitive, Map):
                identity = _identity(group.domain)
                if node.type.shape != group.domain or identity not in accesses:
                    continue
            after: set[int] = set()
            for other in groups:
                if other is not group:
                    after |= {r.node for r in other.roots} | other.members
            for start in list(after):
                after |= nx.descendants(self.graph.topology, start)
            if not after & {r.node for r in group.roots}:
                return group
        return None

    def _root(self, node: Node) -> None:
        self.depth[node.id] = 0
        kind = {
            Contract: "contract", Scan: "scan", Sort: "sort", Scatter: "scatter", Update: "update",
        }.get(type(node.primitive), "pointwise")  # fmt: skip
        domain = node.type.shape
        if kind == "update":
            domain = self.graph.type(node.operands[1]).shape
        roots = [Ref(node.id, i) for i in range(len(node.types))]
        group = Group("pointwise" if kind == "contract" else kind, roots, domain)
        group.nest = self.nests.of(node.id)
        self.groups.append(group)
        if kind in ("pointwise", "contract", "update"):
            group.accesses[node.id] = [_identity(domain)]
        else:
            group.accesses[node.id] = [None]
            group.anchor = node.id
        self._join(node, [group])

    def _say(self, node: Node, fused: bool, reason: str) -> None:
        self.decisions.append(Decision(node.id, fused, reason))


def _place_root(group: Group, ref: Ref, held: Held) -> None:
    """Has a kernel store a value of its domain, or of part of it, where a recurrence holds it."""
    group.roots.append(held.root)
    group.placed[held.root] = (ref, (held.place, *_identity(held.shape)))


def _written(update: Update, at: dict[str, Expr], graph: Graph) -> Access:
    """Where in its base an update writes."""
    if any(isinstance(index, Indirect) for index in update.indices):
        return None
    exprs = [index for index in update.indices if isinstance(index, Expr)]
    return tuple(e.substitute(at, graph.facts) for e in exprs)


def _identity(domain: Sequence[Expr]) -> tuple[Expr, ...]:
    """A kernel's own position; along an axis of size 1 there is only 0."""
    return tuple(const(0) if d.as_int() == 1 else sym(f"d{i}") for i, d in enumerate(domain))


def _count(shape: Sequence[Expr]) -> Expr:
    total = const(1)
    for size in shape:
        total = total * size
    return total
