"""How products take narrow or turned operands as they are stored, rather than as other kernels
prepare them. For GPUs.

- *gathered*: rows that are windows of a tensor are read where that lies.
- *turned*: a left operand of which columns are adjacent is read so, and not copied.
- *halved*: operands that are converted from 16 or 8 bits are multiplied as they are stored.
- *coded*: panels that are computed of constants are computed in the kernels that multiply by them,
  a stage at a time.
"""

from __future__ import annotations

from dataclasses import replace

from stagefuse.compiler.graph import Constant, Contract, Graph, Map, Node, Ref, View, Weight
from stagefuse.compiler.patterns.byte_operands import codes_of
from stagefuse.compiler.patterns.gathered import Turned, gathered_of, turned_of
from stagefuse.compiler.patterns.half_products import HALVES
from stagefuse.compiler.patterns.steps import BYTES, CHUNK, count_of, lies_in_chunks
from stagefuse.dsl.dtypes import F32

from .groups import Group
from .join_stored import Storing

TURNED = "its columns are read where they lie"
PACKED = "tensor cores take 8-bit operands along the depth, from rows of whole 16 bytes"


class NarrowJoiner(Storing):
    """Joins of what converts, gathers or turns operands into the products that take them."""

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

    def _halved(self, group: Group) -> None:
        """A product whose operands are both converted from one 16-bit dtype, or from 8-bit ones,
        takes them as they are, if 16 bytes of either are adjacent and aligned."""
        if group.kind != "contract" or group.anchor is None or group.packs:
            return
        node = self.graph.nodes[group.anchor]
        codes = codes_of(self.graph, node)
        if not self._is_aligned(node, BYTES if codes else CHUNK):
            return
        makers = self._converters(group, node, codes)
        if makers is None:
            return
        left, panels, *_ = node.operands
        turned = self._reads_turned(node)
        unused = [m for m in makers if m in self.groups.present and self._private(m, group)]
        rows, packer = makers
        if turned is not None:
            rows = replace(rows, members={left.node, turned.view.node})
        members = group.members | rows.members | packer.members
        packs = {left: rows, panels: packer}
        self._replace([*unused, group], replace(group, members=members, packs=packs))
        self._drop_unread(left, self._viewed(panels))
        for ref in (left, panels):
            self._say(ref, "its elements are multiplied as they are stored")
        if turned is not None:
            self._not_copied(turned)
        for ref in codes or ():
            if isinstance(self.graph.nodes[ref.node].primitive, View):
                self._say(ref, PACKED, fused=False)

    def _converters(
        self, group: Group, product: Node, codes: tuple[Ref, Ref] | None
    ) -> tuple[Group, Group] | None:
        """The kernels that do no more than convert the rows of a product, and the panels, from what
        both are stored in; others may be split for it. None if there are none."""
        left, panels, *_ = product.operands
        viewed = self._viewed(panels)
        half, stored = self._halves(left), codes[1] if codes else self._halves(viewed)
        if stored is None or codes is None and not self._are_alike(half, stored):
            return None
        rows, packer = self.maker.get(left), self.maker.get(panels)
        if any(m is not None and m.nest != group.nest for m in (rows, packer)):
            return None
        if not self._may_convert(rows, left):
            return None
        packer = self._with_conversion(packer, panels, stored, group)
        if packer is None:
            return None
        apart = packer.members != {panels.node, viewed.node}
        if apart and (codes or half is None or not self._packs_halves(product, half, packer)):
            return None
        rows = self.maker.get(left)  # which stores what panels are of since, if it makes both
        if rows is not None and rows.members != {left.node}:
            rows = self._unconverted(rows, left, group)
        if rows is None:
            return None
        if apart:  # weights in another order are stored so, in 16 bits
            self._stored(stored, panels, packer)
            part = self._part(panels, half)
            self._replace([packer], part)
            packer = part
        return rows, packer

    def _are_alike(self, *stored: Ref | None) -> bool:
        """Whether what values are converted from is there, and of one dtype."""
        return None not in stored and len({self.graph.type(x).dtype for x in stored if x}) == 1

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
        if not self._are_alike(half, right):
            return {}
        ends = (contract.base, contract.row_stride)
        if maker is None or maker.nest != group.nest:
            return {}
        if not all(self.graph.facts.divides(e, 8) for e in ends):
            return {}
        if maker.members != {left.node}:
            maker = self._unconverted(maker, left, group)
        return {} if maker is None or maker.members != {left.node} else {left: maker}

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
        return self._are_alike(*sources) and self._is_aligned(node, CHUNK)

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

    def _holds_codes(self, packer: Group) -> bool:
        """Whether panels are computed of constants alone: then they were kept small."""
        nodes = (self.graph.nodes[ref.node] for ref in packer.loads(self.graph))
        return all(isinstance(node.primitive, Constant | Weight) for node in nodes)


def is_coded(graph: Graph, panels: Ref) -> bool:
    """Whether panels are computed, and not just elements of a tensor in another order."""
    node = graph.nodes[panels.node]
    return isinstance(node.primitive, Map) and node.type.dtype == F32
