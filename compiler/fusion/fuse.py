"""Decides which kernel computes each node: producers are pulled into the kernels of their users.

Nodes are visited from the results back. A node whose users all sit in one kernel joins it when
the rules below allow; otherwise it becomes the root of a kernel of its own, or a second result
of a kernel that computes it anyway. What is not a root is never stored. Every decision keeps
its reason.
"""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.folded_views import TANGLED, divisions
from stagefuse.compiler.graph import (
    Concat,
    Contract,
    Gather,
    Graph,
    Indirect,
    Map,
    Node,
    Position,
    Reduce,
    Ref,
    Scalar,
    Scan,
    Scatter,
    Sort,
    Update,
    View,
    Within,
)
from stagefuse.compiler.patterns.byte_operands import is_code
from stagefuse.compiler.recurrence import Held, held_values
from stagefuse.dsl.dims import Expr, sym

from .fuse_rules import DEPTH_LIMIT, Rules
from .groups import (
    SOURCES,
    Access,
    Decision,
    Group,
    Partition,
    is_free,
    own_position,
)
from .kernel_order import ordered_groups

MOST_TIMES = 16
"""Places that a kernel may write a gather or a concat at."""


def partition(graph: Graph, apart: frozenset[int] = frozenset()) -> Partition:
    """The kernels of a graph; what the updates in `apart` store is computed in other kernels."""
    return _Partitioner(graph, apart).run()


class _Partitioner(Rules):
    def __init__(self, graph: Graph, apart: frozenset[int]) -> None:
        super().__init__(graph)
        self.apart = apart
        self.keeps = any(
            isinstance(n.primitive, Update) and n.primitive.state for n in graph.nodes.values()
        )
        self.place = {number: place for place, number in enumerate(graph.nodes)}
        self.groups: list[Group] = []
        self.of: dict[int, list[Group]] = {}  # the kernels that compute a node
        self.decisions: list[Decision] = []
        self.stored: set[Ref] = set()
        self.depth: dict[int, int] = {}  # of a node, from the nearest stored node that uses it
        self.times: dict[int, int] = {}  # places that a kernel writes a node at
        self.held = held_values(graph, self.nests)

    def run(self) -> Partition:
        for node in reversed(list(self.graph.nodes.values())):
            self.of[node.id] = []
            if isinstance(node.primitive, SOURCES):
                self.depth[node.id], self.times[node.id] = 0, 1
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
                    group.accesses[node.id] = [own_position(type.shape)]
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
        self.times[node.id] = self._times(users)
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
        again = is_free(node) or self._is_position(node)
        if again and not result and not demanded and self._free_fits(node, groups):
            return self._join(node, groups)
        if len(groups) == 1 and not result and not demanded:
            reason = self.refusal(node, groups[0])
            if reason is None:
                self._say(node, True, self.why(node, groups[0]))
                return self._join(node, groups)
            self._say(node, False, reason)
        elif groups:
            second = None
            if isinstance(node.primitive, Map | Reduce | Contract):
                second = self._second_result(node, groups, demanded)
            if second is not None:
                second.roots.append(Ref(node.id))
                self._say(node, True, "computed in this kernel and stored for the others")
                return self._join(node, [second])
            self._say(node, False, "several kernels or the caller need the whole of it")
        else:
            self._say(node, False, "nothing but the caller needs it")
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
        return isinstance(reader.primitive, Contract) or is_code(self.graph, self.uses, node, user)

    def _times(self, users: Sequence[int]) -> int:
        """How many places a kernel would write a node at: each view, gather and concat reads it at
        positions of its own."""
        apart = [self.times[u] for u in users if is_free(self.graph.nodes[u])]
        return max(sum(apart), *(self.times[u] for u in users), 1)

    def _multiplies(self, node: Node, users: Sequence[int]) -> bool:
        """Whether a node would be computed anew for each use, and so would what it reads.

        Where every node of a chain is used twice, that is a power of two.
        """
        if not is_free(node) or not isinstance(node.primitive, Gather | Concat):
            return False
        kinds = [self.graph.nodes[user].primitive for user in users]
        joined = len(users) > 1 and any(isinstance(kind, Gather | Concat) for kind in kinds)
        return joined or self.times[node.id] > MOST_TIMES

    def _is_position(self, node: Node) -> bool:
        """Whether a node is a position in another dtype, which nobody need store either."""
        primitive = node.primitive
        of = (self.graph.nodes[ref.node].primitive for ref in node.operands)
        return primitive == Map("cast") and all(isinstance(p, Position) for p in of)

    def _is_tangled(self, node: Node, group: Group) -> bool:
        """Whether what a view reads would lie at a position that takes many divisions."""
        if not isinstance(node.primitive, View):
            return False
        accesses = (self._operand_access(node, 0, a) for a in group.accesses.get(node.id, []))
        return any(access is not None and divisions(access) > TANGLED for access in accesses)

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
            full = node.type.shape == group.domain
            if Ref(node.id) in group.roots:
                identity = own_position(group.domain)
                access = identity if full else self._row_access(node, group)
                if access not in at:
                    at.insert(0, access)
            of_rows = isinstance(node.primitive, Map) and not full and Ref(node.id) in group.roots
            if group.kind == "pointwise" and (of_rows or isinstance(node.primitive, Reduce)):
                group.kind = "row"
                group.row_axes = self.inner_axes(group, at[0])
            if isinstance(node.primitive, Reduce):
                self.reduced.setdefault(group, []).append(self.arithmetic(node))
            if isinstance(node.primitive, Contract):
                group.kind, group.anchor = "contract", node.id
            else:
                self._push(node, group)

    def _row_access(self, node: Node, group: Group) -> Access:
        existing = group.accesses[node.id]
        return existing[0] if existing else None

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

    # Kernels

    def _second_result(self, node: Node, groups: list[Group], demanded: bool) -> Group | None:
        """A kernel that can store this node besides its own result, without a cycle; of a reduction
        one that goes over its rows rather than one that needs what they come to alone."""
        rows = self.graph.type(node.operands[0]).shape
        for group in sorted(groups, key=lambda g: g.domain != rows):
            if group.kind not in ("pointwise", "row") or self.refusal(node, group):
                continue
            accesses = group.accesses.get(node.id, [])
            if isinstance(node.primitive, Map | Contract):
                identity = own_position(group.domain)
                whole = node.type.shape == group.domain and identity in accesses
                if not whole and not self._is_of_rows(node, group):
                    continue
            if not self._depends(group, [other for other in groups if other is not group]):
                return group
        return None

    def _is_of_rows(self, node: Node, group: Group) -> bool:
        """Whether a node has one element for each of the rows that a kernel goes over, computed of
        what a reduction of them comes to."""
        accesses = group.accesses.get(node.id, [])
        if not isinstance(node.primitive, Map) or len(accesses) != 1:
            return False
        inner, reached = self.inner_axes(group, accesses[0]), {node.id: accesses[0]}
        if not inner or group.row_axes not in (None, inner):
            return False
        pending = [node.id]
        while pending and len(reached) < DEPTH_LIMIT:
            number = pending.pop()
            here, access = self.graph.nodes[number], reached[number]
            if isinstance(here.primitive, Reduce):
                rows = self.graph.type(here.operands[0]).shape == group.domain
                alone = group.accesses.get(number, [access]) == [access]
                return rows and alone and self._reduce_refusal(here, group, [access]) is None
            if isinstance(here.primitive, Map | View):
                for place, ref in enumerate(here.operands):
                    if ref.node not in reached:
                        reached[ref.node] = self._operand_access(here, place, access)
                        pending.append(ref.node)
        return False

    def _depends(self, group: Group, others: Sequence[Group]) -> bool:
        """Whether a kernel needs what others compute."""
        ends = {r.node for r in group.roots}
        last = max(self.place[end] for end in ends)  # nothing after it leads there
        pending = [n for g in others for n in (*(r.node for r in g.roots), *g.members)]
        seen = set(pending)
        while pending:
            here = pending.pop()
            if here in ends:
                return True
            fresh = [
                n for n in self.graph.topology.successors(here)
                if n not in seen and self.place[n] <= last
            ]  # fmt: skip
            seen.update(fresh)
            pending += fresh
        return False

    def _root(self, node: Node) -> None:
        self.depth[node.id], self.times[node.id] = 0, 1
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
            group.accesses[node.id] = [own_position(domain)]
        else:
            group.accesses[node.id] = [None]
            group.anchor = node.id
        self._join(node, [group])

    def _say(self, node: Node, fused: bool, reason: str) -> None:
        self.decisions.append(Decision(node.id, fused, reason))


def _place_root(group: Group, ref: Ref, held: Held) -> None:
    """Has a kernel store a value of its domain, or of part of it, where a recurrence holds it."""
    group.roots.append(held.root)
    group.placed[held.root] = (ref, (held.place, *own_position(held.shape)))


def _written(update: Update, at: dict[str, Expr], graph: Graph) -> Access:
    """Where in its base an update writes."""
    if any(isinstance(index, Indirect) for index in update.indices):
        return None
    exprs = [index for index in update.indices if isinstance(index, Expr)]
    return tuple(e.substitute(at, graph.facts) for e in exprs)
