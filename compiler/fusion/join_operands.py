"""How products take their operands where these lie, rather than from kernels that prepare them.

- *packed*: the panels of a product are packed in the kernel that multiplies by them, where they
  would be larger than what they come from (a convolution's patches, quantised weights) or are used
  once (a product in a batch).
- *thin*: a product whose panels are packed for many rows has a second kernel, for few, and for one
  column.
- *gathered*: rows that are windows of a tensor are read where that lies. For GPUs.
- *turned*: a left operand of which columns are adjacent is read so, and not copied. For GPUs.
- *direct*: panels whose elements lie in steps are not packed at all. For GPUs.
- *halved*: operands that are converted from 16 or 8 bits are multiplied as they are stored. For
  GPUs.
- *coded*: panels that are computed of constants are computed in the kernels that multiply by them,
  a stage at a time. For GPUs.
"""

from __future__ import annotations

from dataclasses import replace

from stagefuse.compiler.graph import Constant, Contract, Graph, Map, Node, Ref, View, Weight
from stagefuse.compiler.patterns.byte_operands import codes_of, is_byte
from stagefuse.compiler.patterns.gathered import Turned, gathered_of, turned_of
from stagefuse.compiler.patterns.half_products import HALVES
from stagefuse.compiler.patterns.panel_width import LANES
from stagefuse.compiler.patterns.steps import (
    BYTES,
    CHUNK,
    count_of,
    lies_in_chunks,
    lines_of,
    steps_of,
)
from stagefuse.compiler.patterns.windows import converted, is_worth_it, step_in_place, windows_of
from stagefuse.dsl.dims import const, maximum, minimum
from stagefuse.dsl.dtypes import F32

from .groups import Group
from .join_stored import Storing

PACKED_BYTES = 1 << 20
"""All panels of a batch, packed by a chain of products itself, must fit the second-level cache."""

TURNED = "its columns are read where they lie"
PACKED = "tensor cores take 8-bit operands along the depth, from rows of whole 16 bytes"
FEW_ROWS, TWICE = 1024, 384
THIN = 36
"""Rows of a product that read the other matrix faster in place than packed: one tile."""
THIN_CONVERTED = 15
"""The same where the kernel that multiplies converts it, for which packing costs no more."""
CONVERTED_ONCE = 32
"""The same where another kernel converts and packs it: rows of two tiles would convert it twice."""


class OperandJoiner(Storing):
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
        most = self.graph.facts.bounds(rows)[1]
        converts = all(len(p.members) > 1 for p in packers if p)
        inside = all(p in group.packs.values() for p in packers)
        limit = THIN if not converts else THIN_CONVERTED if inside else CONVERTED_ONCE
        size = limit + 1 - rows
        facts = self.graph.facts
        if group.kind == "contract" and not converts and not facts.prove_le(const(2), columns):
            size = maximum(size, 2 - columns)
        if facts.prove_le(size, const(0)):
            return
        if group.kind == "chain" and self.graph.facts.prove_le(columns, rows):
            return  # the panels are as few
        found = [packer for packer in packers if packer is not None]
        packs = dict(zip((self.graph.nodes[a].operands[1] for a in anchors), found, strict=True))
        stored = [packer for packer in found if packer in self.groups.present]
        always = most is not None and most <= limit
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
        windows = windows_of(self.graph, anchor) if group.kind == "contract" else None
        stored = self.graph.type(node.operands[1]).dtype
        if windows is None or self.graph.type(windows.source).dtype != stored:
            return False
        if converts and len(windows.axes) > 1:
            return False
        return step_in_place(self.graph, windows) is not None

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

    def _coded(self, group: Group) -> None:
        """Panels that are computed of codes are never stored. Where both operands are converted
        from one 16-bit dtype, the left one is taken as it is, and the panels are in that dtype."""
        if group.kind not in ("contract", "chain"):
            return
        rows = group.rows.anchor if group.rows is not None else None
        for anchor in (group.anchor, rows):
            node = None if anchor is None else self.graph.nodes[anchor]
            packer = None if node is None else self.maker.get(node.operands[1])
            if node is None or packer is None:
                continue
            left, panels, *_ = node.operands
            if not is_coded(self.graph, panels) or not self._holds_codes(packer):
                continue
            if packer.members & group.members or panels in self.graph.results:
                continue
            if left in group.packs and self.graph.type(self._viewed(left)).dtype != F32:
                continue  # windows of narrow elements, by which panels would be rounded
            packs = {**group.packs, panels: packer}
            if group.kind == "contract" and left not in packs and self._halves(left) is not None:
                packs.update(self._half_rows(group, node))
            joined = replace(
                group,
                members=group.members.union(*(g.members for g in packs.values())),
                packs=packs,
            )
            made = (g for g in packs.values() if g in self.groups.present)
            unused = [g for g in made if all(self._reads_alone(group, r) for r in g.roots)]
            self._replace([*unused, group], joined)
            self._say(panels, "its panels are computed where they are multiplied")
            group = joined

    def _half_rows(self, group: Group, product: Node) -> dict[Ref, Group]:
        """Who converts the rows of a product from the 16-bit dtype that its panels are in; empty if
        they are in another one, or if not 16 bytes of rows are adjacent and aligned."""
        left, panels, *_ = product.operands
        half, right = self._halves(left), self._halves(panels)
        contract, maker = product.primitive, self.maker.get(left)
        assert isinstance(contract, Contract)
        if half is None or right is None:
            return {}
        if self.graph.type(half).dtype != self.graph.type(right).dtype:
            return {}
        ends = (contract.base, contract.row_stride)
        if maker is None or maker.nest != group.nest:
            return {}
        if not all(self.graph.facts.divides(e, 8) for e in ends):
            return {}
        if maker.members != {left.node}:
            maker = self._unconverted(maker, left, group)
        return {} if maker is None or maker.members != {left.node} else {left: maker}

    def _halved(self, group: Group) -> None:
        """A product whose operands are both converted from one 16-bit dtype, or from 8-bit ones,
        takes them as they are, if 16 bytes of either are adjacent and aligned."""
        if group.kind != "contract" or group.anchor is None or group.packs:
            return
        node = self.graph.nodes[group.anchor]
        left, panels, *_ = node.operands
        made = [self.maker.get(ref) for ref in (left, panels)]
        sources = [self._halves(ref) for ref in (left, self._viewed(panels))]
        dtypes = {self.graph.type(ref).dtype for ref in sources if ref is not None}
        codes = codes_of(self.graph, node)
        if codes is None and (None in sources or len(dtypes) != 1):
            return
        own = [{left.node}, {panels.node, self._viewed(panels).node}]
        if any(m is not None and m.nest != group.nest for m in made):
            return
        if not self._is_aligned(node, BYTES if codes else CHUNK):
            return
        half, stored = sources[0], sources[1] if codes is None else codes[1]
        if stored is None or not self._may_convert(made[0], left):
            return
        made[1] = packer = self._with_conversion(made[1], panels, stored, group)
        if packer is None:
            return
        apart = packer.members != own[1]
        if apart and (codes is not None or half is None):
            return
        if apart and half is not None and not self._packs_halves(node, half, packer):
            return
        made[0] = self.maker.get(left)  # which stores what panels are of since, if it makes both
        if made[0] is not None and made[0].members != own[0]:
            made[0] = self._unconverted(made[0], left, group)
        if made[0] is None:
            return
        if apart:  # weights in another order are stored so, in 16 bits
            self._stored(stored, panels, packer)
            made[1] = part = self._part(panels, half)
            self._replace([packer], part)
        makers, turned = [m for m in made if m is not None], self._reads_turned(node)
        unused = [m for m in makers if m in self.groups.present and self._private(m, group)]
        if turned is not None:
            makers[0] = replace(makers[0], members={left.node, turned.view.node})
        joined = replace(
            group,
            members=group.members.union(*(m.members for m in makers)),
            packs=dict(zip((left, panels), makers, strict=True)),
        )
        self._replace([*unused, group], joined)
        self._drop_unread(left, self._viewed(panels))
        for ref in (left, panels):
            self._say(ref, "its elements are multiplied as they are stored")
        if turned is not None:
            self._not_copied(turned)
        for ref in codes or ():
            if isinstance(self.graph.nodes[ref.node].primitive, View):
                self._say(ref, PACKED, fused=False)

    def _takes_turned(self, reader: int, turned: Ref) -> bool:
        """Whether a node is a product that reads a left operand where it lies before it is turned,
        or converts it for such products alone."""
        node = self.graph.nodes[reader]
        if node.primitive == Map("cast"):
            users = self.users.get(Ref(reader), frozenset())
            return bool(users) and all(
                self.graph.nodes[n].operands[0] == Ref(reader)
                and isinstance(self.graph.nodes[n].primitive, Contract)
                and self._is_aligned(self.graph.nodes[n], CHUNK)
                and self._reads_turned(self.graph.nodes[n]) is not None
                for n in users
            )
        if not isinstance(node.primitive, Contract) or node.operands[0] != turned:
            return False
        coded = is_coded(self.graph, node.operands[1])
        return not coded and self._reads_turned(node) is not None

    def _takes_halves(self, reader: int, panels: Ref) -> bool:
        """Whether a node is a product whose operands are both converted from one 16-bit dtype, by
        panels that lie in steps."""
        node = self.graph.nodes[reader]
        if not isinstance(node.primitive, Contract) or node.operands[1] != panels:
            return False
        sources = [self._halves(ref) for ref in (node.operands[0], self._viewed(panels))]
        dtypes = {ref and self.graph.type(ref).dtype for ref in sources}
        return None not in dtypes and len(dtypes) == 1 and self._is_aligned(node, CHUNK)

    def _with_conversion(
        self, packer: Group | None, panels: Ref, stored: Ref, reader: Group
    ) -> Group | None:
        """The kernel that would pack panels, with the conversion of what it packs, where another
        kernel converts that: also for others, such as the left operand. That one then stores what
        it converts."""
        viewed = self._viewed(panels)
        alone = packer is not None and packer.members == {panels.node}
        if packer is None or not alone or viewed not in self.maker or panels in self.graph.results:
            return packer
        if not self._may_store(stored, viewed, packer):
            return packer
        part = self._part(panels, stored)
        if self._private(packer, reader):
            self._replace([packer], part)
        self._stored(stored, viewed, part)
        return part

    def _gathered(self, group: Group) -> None:
        """Rows that are windows of a tensor are never stored: the product reads the tensor, and as
        it is stored in 16 or 8 bits where both operands are."""
        if group.kind != "contract" or group.anchor is None or group.packs:
            return
        node = self.graph.nodes[group.anchor]
        left, panels, *_ = node.operands
        found, maker = gathered_of(self.graph, node), self.maker.get(left)
        if found is None or maker is None or maker.kind != "pointwise":
            return
        codes, dtype = codes_of(self.graph, node), self.graph.type(found.source).dtype
        if not self._private(maker, group) or (dtype != F32 and codes is None):
            return
        half = self._halves(found.source) if codes is None else codes[0]
        packer = self.maker.get(panels)
        if half is None or packer is None or not self._private(packer, group):
            half = None
        elif not self._packs_halves(node, half, packer):
            half = None
        if not self._stored(half or found.source, found.source, maker):
            return
        packs = {left: self._part(left, half)}
        if half is not None and packer is not None:
            stored = self._halves(self._viewed(panels)) if codes is None else codes[1]
            self._stored(stored or panels, panels, packer)
            packs[panels] = self._part(panels, half)
        members = group.members.union(*(p.members for p in packs.values()))
        used = [self.maker[ref] for ref in packs]
        self._replace([*used, group], replace(group, members=members, packs=packs))
        self._say(left, "its rows are gathered where they are multiplied")
        if half is not None:
            self._say(panels, "its elements are multiplied as they are stored")

    def _packs_halves(self, node: Node, half: Ref, packer: Group) -> bool:
        """Whether a kernel packs panels of elements stored in the same 16 bits, or in 8, in
        steps."""
        panels, codes = node.operands[1], codes_of(self.graph, node)
        viewed = self._viewed(panels)
        stored = self._halves(viewed) if codes is None else codes[1]
        if stored is None or packer.roots != [panels] or panels in self.graph.results:
            return False
        if viewed.node not in packer.members or packer.placed or packer.kind != "pointwise":
            return False
        same = self.graph.type(stored).dtype == self.graph.type(half).dtype
        if codes is not None:
            return lies_in_chunks(self.graph, node, BYTES)
        return same and lies_in_chunks(self.graph, node)

    def _turned(self, group: Group) -> None:
        """A left operand of f32 of which columns are adjacent is not copied."""
        if group.kind != "contract" or group.anchor is None:
            return
        node = self.graph.nodes[group.anchor]
        left, panels, *_ = node.operands
        found = self._reads_turned(node)
        if found is None or left in group.packs or group.nest or is_coded(self.graph, panels):
            return
        made = self._part(left, None)
        members, packs = group.members | made.members, {**group.packs, left: made}
        joined = replace(group, members=members, packs=packs)
        self._replace([group], joined)
        self._not_copied(found)

    def _not_copied(self, turned: Turned) -> None:
        """Has in memory what a product reads turned, and what is turned only for others."""
        self._stored(turned.source, turned.source, self.maker[turned.view])
        self._drop_unread(turned.view)
        self._say(turned.view, TURNED)

    def _reads_turned(self, product: Node) -> Turned | None:
        """How a product's left operand lies if 16 bytes of its columns are adjacent and aligned, in
        the dtype that is multiplied, and may be in memory."""
        left, found = product.operands[0], turned_of(self.graph, product)
        if found is None:
            return None
        maker = self.maker.get(found.view) or self.maker.get(left)
        if maker is None or maker.nest:
            return None
        if found.source.node in maker.members and (maker.kind != "pointwise" or maker.placed):
            return None
        contract, stored = product.primitive, self.graph.type(found.source).dtype
        assert isinstance(contract, Contract)
        chunk = 4 if stored == F32 else CHUNK
        if (left == found.view) != (stored == F32) or stored not in (F32, *HALVES):
            return None
        rows = count_of([product.type.shape[a] for a in contract.rows])
        ends = (found.first, found.along, rows)
        return found if all(self.graph.facts.divides(e, chunk) for e in ends) else None

    def _is_aligned(self, product: Node, chunk: int) -> bool:
        """Whether so many elements of both operands are adjacent and aligned."""
        contract = product.primitive
        assert isinstance(contract, Contract)
        ends = (contract.base, contract.row_stride)
        aligned = all(self.graph.facts.divides(e, chunk) for e in ends)
        if not aligned and (chunk != CHUNK or self._reads_turned(product) is None):
            return False
        return lies_in_chunks(self.graph, product, chunk)

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

    def _holds_codes(self, packer: Group) -> bool:
        """Whether panels are computed of constants alone: then they were kept small."""
        nodes = (self.graph.nodes[ref.node] for ref in packer.loads(self.graph))
        return all(isinstance(node.primitive, Constant | Weight) for node in nodes)

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


def is_coded(graph: Graph, panels: Ref) -> bool:
    """Whether panels are computed, and not just elements of a tensor in another order."""
    node = graph.nodes[panels.node]
    return isinstance(node.primitive, Map) and node.type.dtype == F32
