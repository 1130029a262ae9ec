"""Kernels beside each other that read the same, as one: what both read comes from memory once.

- Kernels of the same elements, or of the same rows, none of which needs what the other makes.
- On GPUs what there is one of for each row, beside the kernel that goes over the rows: computed
  of the same rows, or of what they come to in that kernel, which then need not be stored. On the
  CPU the rows are in a cache then, and loops over elements stay as simple as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import networkx as nx

from stagefuse.compiler.graph import Graph, Map, Node, Position, Reduce, Ref, Scalar, View
from stagefuse.compiler.lower.expressions import product_of
from stagefuse.compiler.lower.pointwise import is_flat
from stagefuse.dsl.dims import Expr, const, sym

from .fuse_rules import DEPTH_LIMIT
from .groups import Access, Decision, Group, Partition, flops
from .join_reduced import reductions_of
from .kernel_order import ordered_groups

PLAIN = (Map, Position, Reduce, Scalar, View)
MOST_STORED, MOST_READ = 8, 12
"""Tensors of one kernel: of more, registers hold fewer loads that are under way."""
MOST_FLOPS = 200
"""Arithmetic of an element, which ptxas keeps in registers for several at a time."""
MOST_REDUCED = 6
"""Reductions of rows: of many more ptxas takes seconds."""
NEAR = 8
"""Kernels before one that reads the same with which it is compared."""
VECTOR = 16
"""Elements that lanes take at a time, at most."""
SHORTEST = 32
"""Elements of rows whose elements are stored one row at a time."""
REASON = "computed beside a kernel that reads the same"
Places = Mapping[int, list[Access]]


def beside(graph: Graph, found: Partition, cut: int | None = None) -> Partition:
    """The kernels, with those joined that read the same. On GPUs `cut` is how many elements rows
    have that are cut into parts; on the CPU it is None."""
    return _Joining(graph, found, cut).run()


class _Joining:
    def __init__(self, graph: Graph, found: Partition, cut: int | None) -> None:
        self.graph, self.groups, self.cut = graph, list(found.groups), cut
        self.decisions = list(found.decisions)
        self.order = nx.DiGraph()
        self.order.add_nodes_from(self.groups)
        self.plain = {g for g in self.groups if self._is_plain(g)}
        self.readers: dict[Ref, list[Group]] = {}
        maker = {root: g for g in self.groups for root in g.roots}
        for group in self.groups:
            # What is computed in both, as a constant, is enough for GPUs: it is a launch less.
            own = group.members if cut is None else frozenset[int]()
            reads = {ref for ref in group.reads(graph) if ref.node not in own}
            for ref in reads | group.loads(graph):
                self.readers.setdefault(ref, []).append(group)
                if maker.get(ref, group) is not group:
                    self.order.add_edge(maker[ref], group)

    def run(self) -> Partition:
        """Goes over the tensors in order, and joins who reads each."""
        before = len(self.groups)
        for ref in sorted(self.readers, key=lambda ref: (ref.node, ref.result)):
            self._join_readers(ref)
        if len(self.groups) < before:
            self.groups = ordered_groups(self.graph, self.groups)
        return Partition(self.groups, self.decisions)

    def _join_readers(self, ref: Ref) -> None:
        known: list[Group] = []
        for group in [g for g in self.readers[ref] if g in self.plain]:
            for other in known[-NEAR:]:
                joined = self._joined(ref, other, group)
                if joined is not None:
                    known[known.index(other)] = joined
                    break
            else:
                known.append(group)

    def _is_plain(self, group: Group) -> bool:
        """Whether a kernel computes elements, or rows, where it reads them."""
        if group.kind not in ("pointwise", "row") or group.when != const(1):
            return False
        if group.placed or group.packs or group.apart or group.nest:
            return False
        nodes = (self.graph.nodes[m] for m in group.members)
        loads = (group.accesses.get(ref.node, [None]) for ref in group.loads(self.graph))
        return all(isinstance(n.primitive, PLAIN) for n in nodes) and all(
            _is_straight(access) for accesses in loads for access in accesses
        )

    # Pairs

    def _joined(self, ref: Ref, a: Group, b: Group) -> Group | None:
        """Two kernels that read a tensor as one, if that is right and worth it; in their place."""
        for whole, other in ((a, b), (b, a)):
            moved = self._moved(whole, other)
            if moved is None or not self._reads_alike(ref, whole, moved, other):
                continue
            if self._is_small(whole, other) and self._is_apart(whole, other):
                return self._replaced(whole, other, moved)
        return None

    def _moved(self, whole: Group, other: Group) -> Places | None:
        """Where a kernel's values are in the steps of another; None if its steps are not among
        them."""
        if other.domain == whole.domain:
            if whole.kind == other.kind and whole.row_axes != other.row_axes:
                return None
            if not self._inner(whole) and "row" in (whole.kind, other.kind):
                alike = self._reduced(whole) == self._reduced(other) != ()
                return other.accesses if alike else None
            if other.kind == "row" != whole.kind or self._are_uneven(whole, other):
                return None
            return other.accesses
        if self.cut is None:
            return None
        inner = self._inner(whole) or self._inner_of(whole, other)
        outer = [a for a in range(len(whole.domain)) if a not in inner]
        long = [[a for a in axes if of[a].as_int() != 1] for axes, of in
                ((outer, whole.domain), (range(len(other.domain)), other.domain))]  # fmt: skip
        if not inner or [whole.domain[a] for a in long[0]] != [other.domain[a] for a in long[1]]:
            return None
        if any(not self._is_over(m, whole, inner) for m in other.members):
            return None
        names = {f"d{b}": sym(f"d{a}") for a, b in zip(*long, strict=True)}
        return {node: [_at(a, names) for a in found] for node, found in other.accesses.items()}

    def _reduced(self, group: Group) -> tuple[object, ...]:
        """What is reduced by a kernel that does no more: its shape, the axes, and across memory
        whether places are found, which is done another way."""
        found = reductions_of(self.graph, group)
        if not found:
            return ()
        node, reduce = found[0]
        shape = self.graph.type(node.operands[0]).shape
        places = {r.kind.startswith("arg") for _, r in found}
        return shape, reduce.axes, len(shape) - 1 in reduce.axes or tuple(places)

    def _inner(self, group: Group) -> tuple[int, ...]:
        """The axes that a kernel's rows go along, with an element for each place of them."""
        axes = group.row_axes or ()
        return axes if any(group.domain[a].as_int() != 1 for a in axes) else ()

    def _inner_of(self, whole: Group, other: Group) -> tuple[int, ...]:
        """The last axes of a kernel's elements that another one reduces, of rows that are long."""
        if whole.kind != "pointwise" or not whole.domain:
            return ()
        for member in sorted(other.members):
            primitive = self.graph.nodes[member].primitive
            if isinstance(primitive, Reduce):
                rank = len(whole.domain)
                size = whole.domain[-1].as_int()
                last = primitive.axes == (rank - 1,) and (size is None or size >= SHORTEST)
                return primitive.axes if last else ()
        return ()

    def _is_over(self, member: int, whole: Group, inner: tuple[int, ...]) -> bool:
        """Whether a node is no reduction, or one of the rows of a kernel."""
        node = self.graph.nodes[member]
        if not isinstance(node.primitive, Reduce):
            return True
        if self.graph.type(node.operands[0]).shape != whole.domain:
            return False
        long = {a for a in inner if whole.domain[a].as_int() != 1}
        return long == {a for a in node.primitive.axes if whole.domain[a].as_int() != 1}

    def _reads_alike(self, ref: Ref, whole: Group, moved: Places, other: Group) -> bool:
        """Whether two kernels read a tensor, an element for each step at least, at the same places,
        or one what the other makes, and have what both compute at the same."""
        for member in sorted(whole.members & other.members):
            reduces = isinstance(self.graph.nodes[member].primitive, Reduce)
            both = whole.accesses.get(member, []), moved.get(member, [])
            if not _same(*both, exactly=reduces):
                return False
        places = moved.get(ref.node, [])
        if not _same(whole.accesses.get(ref.node, []), places):
            return False
        needed = {a for a, size in enumerate(whole.domain) if size.as_int() != 1}
        return ref in whole.roots or all(needed <= set(_axes(at)) for at in places)

    def _is_small(self, whole: Group, other: Group) -> bool:
        """Whether registers hold what both have under way, and long rows can be cut as before."""
        nodes = [self.graph.nodes[m] for m in whole.members | other.members]
        read = {ref for g in (whole, other) for ref in g.loads(self.graph)}
        return (
            sum(map(flops, nodes)) <= MOST_FLOPS
            and len(nodes) <= DEPTH_LIMIT
            and len(whole.roots) + len(other.roots) <= MOST_STORED
            and len(read) <= MOST_READ
            and sum(isinstance(n.primitive, Reduce) for n in nodes) <= MOST_REDUCED
            and (not self._inner(whole) or not any(self._finds_far(n) for n in nodes))
        )

    def _finds_far(self, node: Node) -> bool:
        """Whether a node gives places in rows that may be cut if nothing else is made of them."""
        if self.cut is None or not isinstance(node.primitive, Reduce):
            return False
        if not node.primitive.kind.startswith("arg"):
            return False
        shape = self.graph.type(node.operands[0]).shape
        most = self.graph.facts.bounds(product_of([shape[a] for a in node.primitive.axes]))[1]
        return most is None or most >= self.cut

    def _are_uneven(self, *groups: Group) -> bool:
        """Whether only some of them take their elements in one stretch, and rows are no whole
        vectors."""
        flat = [is_flat(self.graph, g.domain, g.members) for g in groups if g.kind == "pointwise"]
        size = groups[0].domain[-1].as_int() if groups[0].domain else 0
        return len(flat) == 2 and flat[0] != flat[1] and (size is None or size % VECTOR != 0)

    def _is_apart(self, whole: Group, other: Group) -> bool:
        """Whether neither needs the other, but for what `other` itself reads."""
        behind = self.order.has_edge(whole, other)
        if behind:
            self.order.remove_edge(whole, other)
        apart = not nx.has_path(self.order, whole, other)
        if behind:
            self.order.add_edge(whole, other)
        return apart and not nx.has_path(self.order, other, whole)

    def _replaced(self, whole: Group, other: Group, moved: Places) -> Group:
        both = {*whole.accesses, *moved}
        accesses = {
            n: list(dict.fromkeys((*whole.accesses.get(n, ()), *moved.get(n, ())))) for n in both
        }
        members = whole.members | other.members
        kind = "row" if "row" in (whole.kind, other.kind) else "pointwise"
        axes = self._inner(whole) or self._inner_of(whole, other) or whole.row_axes
        made = replace(whole, roots=[*whole.roots, *other.roots], members=members, kind=kind,
                       accesses=accesses, row_axes=axes)  # fmt: skip
        for readers in self.readers.values():
            if whole in readers or other in readers:
                readers[:] = dict.fromkeys(made if g in (whole, other) else g for g in readers)
        made.roots = [r for r in made.roots if r in self.graph.results or self._is_read(r, made)]
        self.plain.add(made)
        self._contract(whole, other, made)
        place = self.groups.index(other)
        self.groups[place] = made
        self.groups.remove(whole)
        for root in other.roots:
            self.decisions = [d for d in self.decisions if d.node != root.node]
            self.decisions.append(Decision(root.node, True, REASON))
        return made

    def _is_read(self, ref: Ref, by: Group) -> bool:
        """Whether others than a kernel itself read its result."""
        return any(g is not by for g in self.readers.get(ref, ()))

    def _contract(self, whole: Group, other: Group, made: Group) -> None:
        self.order.add_node(made)
        for end in (whole, other):
            self.order.add_edges_from([(g, made) for g in self.order.predecessors(end)])
            self.order.add_edges_from([(made, g) for g in self.order.successors(end)])
            self.order.remove_node(end)


def _at(access: Access, names: Mapping[str, Expr]) -> Access:
    return None if access is None else tuple(e.substitute(names) for e in access)


def _axes(access: Access, kinds: str = "df") -> list[int]:
    """The axes along which an element is read, for every step (d) or within one (f)."""
    names = [n for e in access or () for n in sorted(e.symbols())]
    return [int(n[1:]) for n in names if n[0] in kinds and n[1:].isdigit()]


def _same(some: list[Access], others: list[Access], exactly: bool = False) -> bool:
    """Whether places are the same, whatever loop of a step goes over them unless `exactly`."""
    if exactly:
        return some == others
    texts = [{str(a).replace("f", "d") for a in found} for found in (some, others)]
    return texts[0] == texts[1] and None not in some


def _is_straight(access: Access) -> bool:
    """Whether axes are read in order, each along one of a kernel's steps or at one place."""
    for expr in access or ():
        names = expr.symbols()
        if len(names) > 1 or any(expr.coefficient(n) != const(1) for n in names):
            return False
    both = [_axes(access, kind) for kind in "df"]
    return access is not None and all(axes == sorted(set(axes)) for axes in both)
