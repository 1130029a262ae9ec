"""How products take their operands where these lie, rather than from kernels that prepare them.

- *packed*: the panels of a product are packed in the kernel that multiplies by them, where they
  would be larger than what they come from (a convolution's patches, quantised weights) or are used
  once (a product in a batch).
- *thin*: a product whose panels are packed for many rows has a second kernel, for few.
- *gathered*: rows that are windows of a tensor are read where that lies. For GPUs.
- *direct*: panels whose elements lie in steps are not packed at all. For GPUs.
- *halved*: operands that are converted from 16 or 8 bits are multiplied as they are stored. For
  GPUs.
- *coded*: panels that are computed of constants are computed in the kernels that multiply by them,
  a stage at a time. For GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stagefuse.dsl.dims import const, maximum, minimum
from stagefuse.dsl.dtypes import BF16, F16, F32

from .byte_operands import codes_of, is_byte
from .gathered import gathered_of
from .graph import Constant, Contract, Graph, Map, Node, Ref, View, Weight
from .groups import Decision, Group, Partition
from .steps import BYTES, CHUNK, count_of, lies_in_chunks, lines_of, steps_of
from .windows import converted, is_worth_it, step_in_place, windows_of

PACKED_BYTES = 1 << 20
"""All panels of a batch, packed by a chain of products itself, must fit the second-level cache."""

PACKED = "tensor cores take 8-bit operands along the depth, from rows of whole 16 bytes"
FEW_ROWS = 1024
THIN = 36
"""Rows of a product that read the other matrix faster in place than packed: one tile."""


class OperandJoiner:
    """Kernels, and joins of those that make operands into those of products."""

    def __init__(self, graph: Graph, found: Partition, longest: int | None) -> None:
        self.graph, self.longest = graph, longest
        self.groups = list(found.groups)
        self.decisions = list(found.decisions)
        self.maker = {root: g for g in self.groups for root in g.roots}
        self.users = {ref: frozenset(users) for ref, users in graph.uses().items()}

    # What the joins share

    def _readers(self, ref: Ref) -> list[Group]:
        """The kernels that read a stored result; members compute their operands' positions."""
        users, maker = self.users.get(ref, frozenset()), self.maker.get(ref)
        return [
            g
            for g in self.groups
            if g is not maker
            and ref not in g.packs
            and ref.node not in g.members
            and (not users.isdisjoint(g.members) or (g.placed and ref in g.reads(self.graph)))
        ]

    def _private(self, group: Group, reader: Group) -> bool:
        """Whether one kernel alone reads the only result of another, at the same steps."""
        (ref, *others) = group.roots
        if others or ref in self.graph.results or group.nest != reader.nest:
            return False
        return self._readers(ref) == [reader]

    def _replace(self, old: Sequence[Group], new: Group) -> None:
        """Puts a kernel in the place of the last of several."""
        place = max(self.groups.index(g) for g in old)
        self.groups[place] = new
        self.groups = [g for g in self.groups if g not in old]
        for root in new.roots:
            self.maker[root] = new

    def _say(self, ref: Ref, reason: str, fused: bool = True) -> None:
        self.decisions = [d for d in self.decisions if d.node != ref.node]
        self.decisions.append(Decision(ref.node, fused, reason))

    # The joins

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
        self._replace([packer, group], joined)
        return joined

    def _thin(self, group: Group) -> None:
        """A product that may have few rows, or a chain of them, gets another kernel for those,
        which packs nothing."""
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
        least, most = self.graph.facts.bounds(rows)
        if least is not None and least > THIN:
            return
        if group.kind == "chain" and self.graph.facts.prove_le(columns, rows):
            return  # the panels are as few
        found = [packer for packer in packers if packer is not None]
        packs = dict(zip((self.graph.nodes[a].operands[1] for a in anchors), found, strict=True))
        stored = [packer for packer in found if packer in self.groups]
        always = most is not None and most <= THIN
        few = const(1) if always else minimum(maximum(THIN + 1 - rows, 0), 1)
        members = group.members.union(*(packer.members for packer in found))
        thin = replace(group, members=members, packs=packs, when=few, thin=True)
        if always:
            return self._replace([*stored, group], thin)
        many = {id(g): replace(g, when=1 - few) for g in (*stored, group)}
        place = self.groups.index(group)
        self.groups[place : place + 1] = [group, thin]
        self.groups = [many.get(id(g), g) for g in self.groups]
        for g in many.values():
            self.maker.update((root, g) for root in g.roots)
        for panels in packs:
            self._say(panels, f"its panels are packed, but for up to {THIN} rows")

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
            made = (g for g in packs.values() if g in self.groups)
            unused = [g for g in made if all(self._readers(r) == [group] for r in g.roots)]
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
        if codes is not None:
            made[1] = self._with_conversion(made[1], panels, codes[1], group)
        half, packer = sources[0], made[1]
        if packer is None:
            return
        apart = packer.members != own[1]
        if apart and (codes is not None or half is None):
            return
        if apart and half is not None and not self._packs_halves(node, half, packer, group):
            return
        if made[0] is not None and made[0].members != own[0]:
            made[0] = self._unconverted(made[0], left, group)
        if made[0] is None or made[0].members != own[0]:
            return
        if apart:  # weights in another order are stored so, in 16 bits
            self._stored(self._halves(self._viewed(panels)) or panels, panels, packer)
            made[1] = part = self._part(panels, half)
            self._replace([packer], part)
        makers = [m for m in made if m is not None]
        joined = replace(
            group,
            members=group.members.union(*(m.members for m in makers)),
            packs=dict(zip((left, panels), makers, strict=True)),
        )
        unused = [m for m in makers if m in self.groups and self._private(m, group)]
        self._replace([*unused, group], joined)
        self._drop_unread(left, self._viewed(panels))
        for ref in (left, panels):
            self._say(ref, "its elements are multiplied as they are stored")
        for ref in codes or ():
            if isinstance(self.graph.nodes[ref.node].primitive, View):
                self._say(ref, PACKED, fused=False)

    def _with_conversion(
        self, packer: Group | None, panels: Ref, code: Ref, reader: Group
    ) -> Group | None:
        """The kernel that would pack panels, with the conversion of what it packs, where another
        kernel converts that: also for others, such as the left operand."""
        maker = self.maker.get(self._viewed(panels))
        alone = packer is not None and packer.members == {panels.node} and maker is not None
        if packer is None or not alone or not self._private(packer, reader):
            return packer
        part = self._part(panels, code)
        self._replace([packer], part)
        return part

    def _drop_unread(self, *refs: Ref) -> None:
        """Drops kernels that only make what all others compute for themselves."""
        for ref in refs:
            maker, kept = self.maker.get(ref), ref in self.graph.results
            if maker in self.groups and maker.roots == [ref] and not kept:
                if all(ref.node in reader.members for reader in self._readers(ref)):
                    self.groups.remove(maker)

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
        if half is None or packer is None or not self._packs_halves(node, half, packer, group):
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

    def _part(self, ref: Ref, half: Ref | None) -> Group:
        """A kernel that would make an operand, of 16-bit elements or as it is."""
        node = self.graph.nodes[ref.node]
        members = {ref.node, node.operands[0].node} if half is not None else {ref.node}
        return Group("pointwise", [ref], node.type.shape, members, nest=self.maker[ref].nest)

    def _packs_halves(self, node: Node, half: Ref, packer: Group, reader: Group) -> bool:
        """Whether a kernel packs panels of elements stored in the same 16 bits, or in 8, in
        steps."""
        panels, codes = node.operands[1], codes_of(self.graph, node)
        viewed = self._viewed(panels)
        stored = self._halves(viewed) if codes is None else codes[1]
        if stored is None or not self._private(packer, reader):
            return False
        if viewed.node not in packer.members or packer.placed or packer.kind != "pointwise":
            return False
        same = self.graph.type(stored).dtype == self.graph.type(half).dtype
        if codes is not None:
            return lies_in_chunks(self.graph, node, BYTES)
        return same and lies_in_chunks(self.graph, node)

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
        self.groups.insert(self.groups.index(reader), made)
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
        roots, members = list(dict.fromkeys((wanted, *maker.roots))), maker.members
        if source not in self.graph.results and self._readers(source) == [reader]:
            roots.remove(source)
            del self.maker[source]
            if not any(source in self.graph.nodes[m].operands for m in members):
                members = members - {source.node}
        self._replace([maker], replace(maker, roots=roots, members=members))
        return True

    def _unconverted(self, maker: Group, ref: Ref, reader: Group) -> Group | None:
        """The kernel that would convert what another one makes: that one then stores it as it is
        before. None if others read what is converted."""
        (source,) = self.graph.nodes[ref.node].operands
        if ref in self.graph.results or self._readers(ref) != [reader]:
            return None
        if source.node not in maker.members or maker.placed or maker.kind == "update":
            return None
        used = any(ref in self.graph.nodes[m].operands for m in maker.members)
        roots = [source if r == ref else r for r in maker.roots]
        stored = replace(
            maker,
            roots=list(dict.fromkeys(roots)),
            members=maker.members if used else maker.members - {ref.node},
        )
        self._replace([maker], stored)
        del self.maker[ref]
        return Group("pointwise", [ref], maker.domain, {ref.node}, nest=maker.nest)

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

    def _is_aligned(self, product: Node, chunk: int) -> bool:
        """Whether so many elements of both operands are adjacent and aligned."""
        contract = product.primitive
        assert isinstance(contract, Contract)
        ends = (contract.base, contract.row_stride)
        aligned = all(self.graph.facts.divides(e, chunk) for e in ends)
        return aligned and lies_in_chunks(self.graph, product, chunk)

    def _packs_well(self, packer: Group, panels: Ref, anchor: int, reader: Group) -> bool:
        if packer.kind != "pointwise" or not self._private(packer, reader):
            return False
        node = self.graph.nodes[anchor]
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

    def _ordered_anyway(self, packer: Group, panels: Ref, node: Node) -> bool:
        """Whether panels lie in lines of bytes: the product puts them in order itself."""
        bytes_ = is_byte(self.graph.type(panels).dtype) and packer.members == {panels.node}
        return bytes_ and lines_of(self.graph, node) is not None

    def _holds_codes(self, packer: Group) -> bool:
        """Whether panels are computed of constants alone: then they were kept small."""
        nodes = (self.graph.nodes[ref.node] for ref in packer.loads(self.graph))
        return all(isinstance(node.primitive, Constant | Weight) for node in nodes)

    def _few_rows(self, product: Contract, node: Node) -> bool:
        """Whether panels would be packed only a few times."""
        rows = count_of([node.type.shape[a] for a in product.rows])
        most = self.graph.facts.bounds(rows)[1]
        return most is not None and most <= FEW_ROWS

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
