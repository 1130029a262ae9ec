"""Attention whose keys and values are computed of codes, or of whatever is narrower than they are,
or joined of a cache and what is new.

- *decoded*: for few queries keys and values are computed where they are brought, rather than stored
  by a kernel and read again: attention of few queries takes as long as that. For GPUs.
"""

from __future__ import annotations

from dataclasses import replace

from stagefuse.compiler.graph import Concat, Contract, Map, Node, Position, Ref, Scalar, View
from stagefuse.compiler.patterns.attention import CHEAP_FLOPS
from stagefuse.compiler.patterns.steps import CHUNK, steps_of
from stagefuse.dsl.dims import Expr, const, sym

from .groups import Group, count_of, flops
from .join_stored import Storing

REASON = (
    "it is computed where attention brings its keys, of few queries; for more of them a kernel "
    "stores it"
)
COMPUTED = (Map, Position, Scalar, View)
NARROWER = 0.75
"""The bytes that are read for an element, of its own, up to which lanes compute it."""
WIDE, WIDEST = 128, 256
"""Features of which a lane's registers hold what is under way, and the sums of those of values; and
those of which they hold so half at a time."""
TIMES = (1 << 10, 16, 8, 4, 2)
"""How often an element of a smaller tensor is read at least, if that can be proved."""


class DecodedJoiner(Storing):
    """Joins of attention and what makes its keys and values."""

    def _decoded(self, group: Group) -> None:
        if group.kind != "attention" or group.nest or group.anchor is None or group.rows is None:
            return
        products = [self.graph.nodes[n or 0] for n in (group.rows.anchor, group.anchor)]
        half = products[0].operands[0] in group.packs
        found: list[Group] = []
        for product, keys in zip(products, (True, False), strict=True):
            maker = self._decoder(group, product, keys, half)
            if maker is not None and maker not in found:
                found.append(maker)
        if not found:
            return
        members = group.members.union(*(maker.members for maker in found))
        joined = replace(group, members=members, apart=(*found, group))
        self._replace([*found, group], joined)
        for maker in found:
            for root in maker.roots:
                del self.maker[root]
                self._say(root, REASON)

    def _decoder(self, group: Group, product: Node, keys: bool, half: bool) -> Group | None:
        """The kernel that makes the keys, or the values, of an attention alone, of fewer bytes than
        it stores, with the features beside each other."""
        panels = ref = product.operands[1]
        view = self.graph.nodes[panels.node]
        if panels in group.packs:  # where they lie
            ref = view.operands[0]
        if half:
            (ref,) = self.graph.nodes[ref.node].operands
        steps, maker = steps_of(self.graph, panels, product), self.maker.get(ref)
        if steps is None or maker is None or not _numbers_columns(view):
            return None
        across, contract = steps[1] if keys else steps[2], product.primitive
        assert isinstance(contract, Contract)
        features = contract.depth if keys else product.type.shape[-1]
        facts = self.graph.facts
        unit = CHUNK if facts.prove_le(features, const(WIDE)) else 2 * CHUNK
        if across != const(1) or not facts.divides(features, unit):
            return None
        if not facts.prove_le(features, const(WIDEST)):
            return None
        count = product.type.shape[-1] if keys else contract.depth
        return maker if self._decodes(maker, group, count) else None

    def _decodes(self, maker: Group, reader: Group, count: Expr) -> bool:
        """Whether a kernel does little, of little, for a reader alone, which has so many keys."""
        if maker.kind != "pointwise" or maker.placed or maker.packs or maker.nest != reader.nest:
            return False
        if any(r in self.graph.results or not self._reads_alone(reader, r) for r in maker.roots):
            return False
        nodes = [self.graph.nodes[m] for m in maker.members]
        if sum(map(flops, nodes)) > CHEAP_FLOPS * len(maker.roots):
            return False
        joined = [n for n in nodes if isinstance(n.primitive, Concat)]
        if not all(isinstance(n.primitive, COMPUTED) or n in joined for n in nodes):
            return False
        root, own = maker.roots[0], sum(self.graph.type(r).dtype.bits for r in maker.roots)
        read = self._reads(maker, joined, root, count)
        if joined:  # which a kernel would read and write besides
            return self._are_in_two(maker, joined) and read <= own
        return read <= own * NARROWER

    def _are_in_two(self, maker: Group, joined: list[Node]) -> bool:
        """Whether concatenations are of two parts, the first in memory, with whole keys or values
        each."""
        for node in joined:
            first = self.graph.nodes[node.operands[0].node]
            while first.id in maker.members and isinstance(first.primitive, View):
                first = self.graph.nodes[first.operands[0].node]
            assert isinstance(node.primitive, Concat)
            rank = self.graph.type(maker.roots[0]).rank
            along = node.primitive.axis == rank - 1
            if len(node.operands) != 2 or along or first.id in maker.members:
                return False
        return True

    def _reads(self, maker: Group, joined: list[Node], beside: Ref, count: Expr) -> float:
        """Bits that are read for each element; one of several parts has it."""
        bits = {r: self._bits(r, beside, count) for r in maker.loads(self.graph)}
        parts = [[bits.pop(r) for r in n.operands if r in bits] for n in joined]
        return sum(bits.values()) + sum(max(found) for found in parts if found)

    def _bits(self, ref: Ref, beside: Ref, count: Expr) -> float:
        """Bits of a tensor for each element of another; none of one that is the same for keys,
        which are so many."""
        type, most = self.graph.type(ref), count_of(self.graph.type(beside).shape)
        own, prove = count_of(type.shape), self.graph.facts.prove_le
        if count.symbols() - own.symbols():
            return 0.0
        return type.dtype.bits / next((n for n in TIMES if prove(own * n, most)), 1)


def _numbers_columns(node: Node) -> bool:
    """Whether panels are cut from columns that a view numbers from one panel to the next."""
    view = node.primitive
    assert isinstance(view, View)
    panel, _, column = view.symbols[-3:]
    width = node.type.shape[-1]
    whole = {panel: const(0), column: sym(panel) * width + sym(column)}
    single = node.type.shape[-3].as_int() == 1
    return single or all(e.substitute(whole) == e for e in view.indices)
