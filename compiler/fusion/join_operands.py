"""How products take their panels where these lie, rather than from kernels that pack them.

- *packed*: the panels of a product are packed in the kernel that multiplies by them, where they
  would be larger than what they come from (a convolution's patches, quantised weights) or are used
  once (a product in a batch).
- *thin*: a product whose panels are packed for many rows has a second kernel, for few, and for one
  column.
- *direct*: panels whose elements lie in steps are not packed at all. For GPUs.
- what `join_narrow` does, for GPUs.
"""

from __future__ import annotations

from dataclasses import replace

from stagefuse.compiler.graph import Contract, Node, Ref
from stagefuse.compiler.patterns.byte_operands import codes_of, is_byte
from stagefuse.compiler.patterns.panel_width import LANES
from stagefuse.compiler.patterns.steps import count_of, lines_of, steps_of
from stagefuse.compiler.patterns.windows import converted, is_worth_it, step_in_place, windows_of
from stagefuse.dsl.dims import const, floordiv, maximum, minimum

from .groups import Group
from .join_narrow import NarrowJoiner

PACKED_BYTES = 1 << 20
"""All panels of a batch, packed by a chain of products itself, must fit the second-level cache."""
FEW_ROWS, TWICE = 1024, 384
THIN = 36
"""Rows of a product that read the other matrix faster in place than packed: one tile."""
THIN_NARROW = 256
"""The same by narrow panels, of which bands are copied. AMX may multiply wide ones, if packed."""
THIN_DEPTH = 4
"""Steps of the sum for each row, at least, where the other matrix's rows lie along the depth: dot
products of fewer are mostly their vectors' own sums."""
THIN_CONVERTED = 15
"""The same where the kernel that multiplies converts it, for which packing costs no more."""
CONVERTED_ONCE = 32
"""The same where another kernel converts and packs it: two tiles would convert it twice."""


class OperandJoiner(NarrowJoiner):
    """Kernels, and joins of those that make operands into those of products."""

    def _packed(self, group: Group) -> None:
        for anchor in reversed(self._anchors(group)):
            panels = self.graph.nodes[anchor].operands[1]
            packer = self.maker.get(panels)
            if packer is None or not self._packs_well(packer, panels, anchor, group):
                continue
            group = self._take(group, panels, packer)
            self._say(panels, "its panels are packed where they are used")

    def _take(self, group: Group, panels: Ref, packer: Group) -> Group:
        """A product together with what packs its panels."""
        packs = {**group.packs, panels: packer}
        joined = replace(group, members=group.members | packer.members, packs=packs)
        unused = [packer] if self._reads_alone(group, panels) else []
        self._replace([*unused, group], joined)
        return joined

    def _thin(self, group: Group) -> None:
        """A product that may have few rows, or a chain of them, gets another kernel for those,
        which packs nothing; so does one that may have a single column."""
        anchors = self._anchors(group)
        packers = [self._packer(group, anchor) for anchor in anchors]
        if not anchors or not all(packers):
            return
        node = self.graph.nodes[anchors[0]]
        assert isinstance(node.primitive, Contract)
        if not all(self._lies(group, anchor) for anchor in anchors):
            return
        rows, columns = (
            count_of([node.type.shape[a] for a in axes])
            for axes in (node.primitive.rows, node.primitive.columns)
        )
        converts = all(len(p.members) > 1 for p in packers if p)
        inside = all(p in group.packs.values() for p in packers)
        narrow = group.kind == "contract" and node.primitive.panel == LANES
        limit = THIN_NARROW if narrow and self._lies_in_lines(node) else THIN
        if converts:
            limit = THIN_CONVERTED if inside else CONVERTED_ONCE
        size, facts = limit + 1 - rows, self.graph.facts
        lines = None if converts or group.kind != "contract" else lines_of(self.graph, node)
        if lines is not None and lines[1] == const(1):
            deep = maximum(floordiv(node.primitive.depth, THIN_DEPTH, facts), 1, facts)
            size = minimum(size, deep + 1 - rows, facts)
        if group.kind == "contract" and not converts and not facts.prove_le(const(2), columns):
            size = maximum(size, 2 - columns)
        if facts.prove_le(size, const(0)):
            return
        if group.kind == "chain" and self.graph.facts.prove_le(columns, rows):
            return  # the panels are as few
        found = [packer for packer in packers if packer is not None]
        packs = dict(zip((self.graph.nodes[a].operands[1] for a in anchors), found, strict=True))
        stored = [packer for packer in found if packer in self.groups.present]
        always = facts.prove_le(const(1), size)
        few = const(1) if always else minimum(maximum(size, 0), 1)
        members = group.members.union(*(packer.members for packer in found))
        thin = replace(group, members=members, packs=packs, when=few, thin=True)
        if always:
            return self._replace([*stored, group], thin)
        many = replace(group, when=1 - few)
        self.groups.replace([group], many, thin)
        self.maker.update((root, many) for root in many.roots)
        for packer in dict.fromkeys(stored):
            self._replace([packer], replace(packer, when=1 - few))
        for panels in packs:
            self._say(panels, f"its panels are packed, but for up to {limit} rows")

    def _anchors(self, group: Group) -> list[int]:
        """The products of a kernel, first the one whose rows go into the other."""
        if group.kind not in ("contract", "chain"):
            return []
        rows = group.rows.anchor if group.rows is not None else None
        return [anchor for anchor in (rows, group.anchor) if anchor is not None]

    def _packer(self, group: Group, anchor: int) -> Group | None:
        """The kernel, or part of this one, that does no more than pack a product's panels, or also
        converts what it packs."""
        panels = self.graph.nodes[anchor].operands[1]
        packer = group.packs.get(panels) or self.maker.get(panels)
        if packer is None or packer.placed:
            return None
        if packer.members not in ({panels.node}, converted(self.graph, panels)):
            return None
        return packer if panels in group.packs or self._private(packer, group) else None

    def _lies(self, group: Group, anchor: int) -> bool:
        """Whether a product reads its panels as fast where they lie, if it has few rows."""
        node, packer = self.graph.nodes[anchor], self._packer(group, anchor)
        converts = packer is not None and len(packer.members) > 1
        lines = lines_of(self.graph, node)
        if lines is not None and (not converts or (group.kind, lines[1]) == ("contract", const(1))):
            return True
        return group.kind == "contract" and self._lies_in_lines(node, 1 if converts else 2)

    def _lies_in_lines(self, node: Node, axes: int = 1) -> bool:
        """Whether columns, along so many axes, are adjacent in a tensor of the panels' dtype."""
        windows, stored = windows_of(self.graph, node.id), self.graph.type(node.operands[1]).dtype
        if windows is None or self.graph.type(windows.source).dtype != stored:
            return False
        return len(windows.axes) <= axes and step_in_place(self.graph, windows) is not None

    def _direct(self, group: Group) -> None:
        """Panels that are elements of a tensor in steps need not be packed at all."""
        if group.kind not in ("contract", "chain"):
            return
        rows = group.rows.anchor if group.rows is not None else None
        for anchor in (group.anchor, rows):
            panels = None if anchor is None else self.graph.nodes[anchor].operands[1]
            packer = None if panels is None else self.maker.get(panels)
            if panels is None or packer is None or not self._private(packer, group):
                continue
            node = self.graph.nodes[anchor or 0]
            if packer.members != {panels.node} or packer.placed or codes_of(self.graph, node):
                continue  # codes are read before they are converted
            if steps_of(self.graph, panels, node) is None:
                continue
            group = self._take(group, panels, packer)
            self._say(panels, "its panels are read where they lie")

    def _packs_well(self, packer: Group, panels: Ref, anchor: int, reader: Group) -> bool:
        if packer.kind != "pointwise" or packer not in self.groups:
            return False
        node = self.graph.nodes[anchor]
        if not self._private(packer, reader):
            return self._sees_windows(packer, panels, anchor, reader)
        product = node.primitive
        assert isinstance(product, Contract)
        facts = self.graph.facts
        if reader.kind == "contract":
            if self._holds_codes(packer) or self._ordered_anyway(packer, panels, node):
                return True
            windows = windows_of(self.graph, anchor)
            if windows is not None and is_worth_it(self.graph, anchor, windows):
                return True
            return (
                bool(product.batch)
                or self._few_rows(product, node)
                or (self._expands(packer, panels))
            )
        size = product.depth * (product.panel * node.type.dtype.itemsize)
        most = facts.bounds(size * self.graph.type(panels).shape[-3])[1]
        return most is not None and most <= PACKED_BYTES

    def _sees_windows(self, packer: Group, panels: Ref, anchor: int, reader: Group) -> bool:
        """Whether panels are windows that overlap, of which each of several convolutions copies
        its own stripe: stored, they would be as many times as large as the image."""
        if panels in self.graph.results or packer.nest != reader.nest:
            return False
        if reader.kind != "contract" or packer.placed or packer.members != {panels.node}:
            return False
        windows = windows_of(self.graph, anchor)
        return windows is not None and windows.share

    def _ordered_anyway(self, packer: Group, panels: Ref, node: Node) -> bool:
        """Whether panels lie in lines of bytes: the product puts them in order itself."""
        bytes_ = is_byte(self.graph.type(panels).dtype) and packer.members == {panels.node}
        return bytes_ and lines_of(self.graph, node) is not None

    def _few_rows(self, product: Contract, node: Node) -> bool:
        """Whether panels would be packed only a few times; if they are narrow, twice: reading
        64 bytes of each row of a matrix is as slow as reading 256."""
        rows, columns = (
            count_of([node.type.shape[a] for a in axes]) for axes in (product.rows, product.columns)
        )
        narrow = product.panel == LANES and not self.graph.facts.prove_le(columns, const(LANES))
        most = self.graph.facts.bounds(rows)[1]
        return most is not None and most <= (TWICE if narrow else FEW_ROWS)

    def _expands(self, packer: Group, panels: Ref) -> bool:
        """Whether panels repeat the elements that they are packed from."""
        read = {
            ref
            for m in packer.members
            for ref in self.graph.nodes[m].operands
            if ref.node not in packer.members
        }
        total, source = count_of(self.graph.type(panels).shape), const(0)
        for ref in read:
            source = source + count_of(self.graph.type(ref).shape)
        return self.graph.facts.prove_le(source * 2, total)
