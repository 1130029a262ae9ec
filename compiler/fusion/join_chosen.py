"""Products that read what indices choose in the table itself, rather than gathered by a kernel.

- *chosen*: matrices of the right operand, one for each of a batch, are taken from where indices say
  that they lie; so are rows of the left operand. For GPUs.
"""

from __future__ import annotations

from dataclasses import replace

from stagefuse.compiler.graph import Gather, Map, Node, Position, Ref, Scalar, View
from stagefuse.compiler.patterns.byte_operands import is_byte
from stagefuse.compiler.patterns.chosen import chosen_rows, chosen_steps, stored_before
from stagefuse.compiler.patterns.steps import BYTES, CHUNK

from .groups import Group, flops
from .join_operands import OperandJoiner

MATRICES = "its matrices are read where indices say"
ROWS = (
    "its rows are gathered where they are multiplied; but on sm_90a, if they are more than 32, a "
    "kernel gathers them before: tensor copies, which are quicker, bring no chosen rows"
)
WORK = 8
"""Operations on an index that may be done again by every tile."""
INDEXING = (Gather, Map, Position, Scalar, View)


class ChosenJoiner(OperandJoiner):
    """Joins of gathers into the products of what they gather."""

    def _chosen(self, group: Group) -> None:
        if group.kind != "contract" or group.anchor is None or group.nest:
            return
        node = self.graph.nodes[group.anchor]
        left, panels, *_ = node.operands
        group = self._chosen_matrices(group, node, panels)
        self._chosen_rows(group, node, left)

    def _chosen_matrices(self, group: Group, node: Node, panels: Ref) -> Group:
        ref, steps = stored_before(self.graph, panels), chosen_steps(self.graph, node)
        whole = panels in group.packs or self._viewed(panels) == ref
        maker = self._gatherer(ref, ref if panels in group.packs else panels, group)
        if maker is None or steps is None or not whole:
            return group
        dtype = self.graph.type(ref).dtype
        chunk = BYTES if is_byte(dtype) else CHUNK if dtype.bits == 16 else 1
        if not self.graph.facts.divides(steps[0], chunk):
            return group
        return self._take_table(group, panels, ref, maker, MATRICES)

    def _chosen_rows(self, group: Group, node: Node, left: Ref) -> None:
        halved = self.graph.nodes[left.node].primitive == Map("cast") and left in group.packs
        if left in group.packs and not halved:
            return
        ref = self.graph.nodes[left.node].operands[0] if halved else left
        maker, rows = self._gatherer(ref, ref, group), chosen_rows(self.graph, node)
        if maker is None or rows is None or (not halved and self._converts(left)):
            return
        joined = self._take_table(group, left, ref, maker, ROWS)
        self._replace([joined], replace(joined, apart=(maker, group)))

    def _converts(self, left: Ref) -> bool:
        """Whether an operand is converted from what is gathered, by a kernel of its own."""
        return self.graph.nodes[left.node].primitive == Map("cast")

    def _gatherer(self, ref: Ref, root: Ref, reader: Group) -> Group | None:
        """The kernel that gathers a value, and stores it as `root`, for a product alone, and does
        little else."""
        maker, node = self.maker.get(root), self.graph.nodes[ref.node]
        if maker is None or maker.kind != "pointwise" or ref.node not in maker.members:
            return None
        if maker.placed or maker.packs:
            return None
        if not isinstance(node.primitive, Gather) or not self._private(maker, reader):
            return None
        nodes = [self.graph.nodes[m] for m in maker.members]
        if not all(isinstance(n.primitive, INDEXING) for n in nodes):
            return None
        work = sum(flops(n) for n in nodes)
        return maker if node.operands[0].node not in maker.members and work <= WORK else None

    def _take_table(self, group: Group, operand: Ref, ref: Ref, maker: Group, reason: str) -> Group:
        """A product that reads the table that an operand of it is gathered from."""
        before = group.packs.get(operand)
        members = maker.members | (before.members if before is not None else set())
        shape = self.graph.type(operand).shape
        part = Group("pointwise", [operand], shape, members, nest=group.nest)
        joined = replace(
            group, members=group.members | members, packs={**group.packs, operand: part}
        )
        self._replace([maker, group], joined)
        for root in maker.roots:
            del self.maker[root]
        self._say(ref, reason)
        return joined
