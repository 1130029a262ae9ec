"""Kernels that are joined, what they store for each other, and why."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from stagefuse.compiler.graph import Graph, Map, Ref, View
from stagefuse.dsl.dtypes import BF16, F16

from .groups import Decision, Group, Partition
from .kernel_list import KernelList


class Storing:
    """Kernels, and changes of what they store."""

    def __init__(self, graph: Graph, found: Partition, longest: int | None) -> None:
        self.graph, self.longest = graph, longest
        self.groups = KernelList(found.groups)
        self.decisions = {d.node: d for d in found.decisions}
        self.maker = {root: g for g in self.groups for root in g.roots}
        self.users = {ref: frozenset(users) for ref, users in graph.uses().items()}

    def _readers(self, ref: Ref) -> Iterator[Group]:
        """The kernels that read a stored result, in no order, and some several times; members
        compute their operands' positions."""
        maker = self.maker.get(ref)
        for group in self.groups.reading(ref, self.users.get(ref, ())):
            if group is not maker and ref not in group.packs and ref.node not in group.members:
                yield group

    def _reads_alone(self, reader: Group, ref: Ref) -> bool:
        """Whether one kernel reads a stored result, and no other."""
        first = next(self._readers(ref), None)
        return first is reader and all(group is reader for group in self._readers(ref))

    def _private(self, group: Group, reader: Group) -> bool:
        """Whether one kernel alone reads the only result of another, at the same steps."""
        (ref, *others) = group.roots
        if others or ref in self.graph.results or group.nest != reader.nest:
            return False
        return self._reads_alone(reader, ref)

    def _replace(self, old: Sequence[Group], new: Group) -> None:
        """Puts a kernel in the place of the last of several."""
        self.groups.replace(old, new)
        for root in new.roots:
            self.maker[root] = new

    def _say(self, ref: Ref, reason: str, fused: bool = True) -> None:
        self.decisions.pop(ref.node, None)
        self.decisions[ref.node] = Decision(ref.node, fused, reason)

    def _drop_unread(self, *refs: Ref) -> None:
        """Has no kernel make what all others compute for themselves."""
        for ref in refs:
            maker = self.maker.get(ref)
            if maker not in self.groups.present or ref in self.graph.results:
                continue
            if any(self._readers(ref)):
                continue
            if maker.roots == [ref]:
                self.groups.replace([maker])
            elif not maker.placed and maker.kind != "update":
                self._replace([maker], self._without(maker, ref))

    def _part(self, ref: Ref, half: Ref | None) -> Group:
        """A kernel that would make an operand, of 16-bit elements or as it is."""
        node = self.graph.nodes[ref.node]
        members = {ref.node, node.operands[0].node} if half is not None else {ref.node}
        return Group("pointwise", [ref], node.type.shape, members, nest=self.maker[ref].nest)

    def _stored(self, wanted: Ref, source: Ref, reader: Group) -> bool:
        """Has a value in memory that a kernel reads, or computes for itself by the way; `source` is
        what it is converted to, or itself."""
        maker = self.maker.get(source)
        if maker not in (None, reader) and source != wanted and wanted.node in maker.members:
            return self._stored_before(wanted, source, maker, reader)
        if wanted.node not in reader.members or wanted in self.maker:
            return True
        members, pending = set[int](), [wanted.node]
        while pending:
            here = pending.pop()
            if here in reader.members and here not in members:
                members.add(here)
                pending += [ref.node for ref in self.graph.nodes[here].operands]
        shape = self.graph.type(wanted).shape
        made = Group("pointwise", [wanted], shape, members, nest=reader.nest)
        self.groups.insert(made, reader)
        self.maker[wanted] = made
        return True

    def _may_store(self, wanted: Ref, source: Ref, reader: Group) -> bool:
        """Whether `_stored` would succeed."""
        maker = self.maker.get(source)
        if maker in (None, reader) or wanted.node not in maker.members:
            return True
        return not maker.placed and maker.kind != "update"

    def _stored_before(self, wanted: Ref, source: Ref, maker: Group, reader: Group) -> bool:
        """Has a kernel store what it converts, and what comes of that only for other readers."""
        if maker.placed or maker.kind == "update":
            return False
        more = replace(maker, roots=list(dict.fromkeys((wanted, *maker.roots))))
        if source not in self.graph.results and self._reads_alone(reader, source):
            del self.maker[source]
            more = self._without(more, source)
        self._replace([maker], more)
        return True

    def _without(self, maker: Group, root: Ref) -> Group:
        """A kernel that does not store one of its results."""
        used = any(root in self.graph.nodes[m].operands for m in maker.members)
        members = maker.members if used else maker.members - {root.node}
        return replace(maker, roots=[r for r in maker.roots if r != root], members=members)

    def _may_convert(self, maker: Group | None, ref: Ref) -> bool:
        """Whether a kernel does no more than convert a value, or can store it unconverted."""
        if maker is None or maker.members == {ref.node}:
            return maker is not None
        node = self.graph.nodes[ref.node]
        if node.primitive != Map("cast"):
            return False
        apart = node.operands[0].node not in maker.members
        return apart or not (maker.placed or maker.kind == "update")

    def _unconverted(self, maker: Group, ref: Ref, reader: Group) -> Group | None:
        """The kernel that would convert what another one makes: that one then stores it as it is
        before, and what it is converted to only for other readers."""
        (source,) = self.graph.nodes[ref.node].operands
        if source.node in maker.members and not self._stored_before(source, ref, maker, reader):
            return None
        return Group("pointwise", [ref], self.graph.type(ref).shape, {ref.node}, nest=maker.nest)

    def _viewed(self, panels: Ref) -> Ref:
        """What panels are packed from."""
        node = self.graph.nodes[panels.node]
        return node.operands[0] if isinstance(node.primitive, View) else panels

    def _halves(self, ref: Ref) -> Ref | None:
        """The f16 or bf16 tensor that a value is converted from."""
        node = self.graph.nodes[ref.node]
        if node.primitive != Map("cast"):
            return None
        source = node.operands[0]
        return source if self.graph.type(source).dtype in (F16, BF16) else None
