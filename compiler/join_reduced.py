"""Products of which only reductions of rows are wanted, which then store no more than these.

- *reduced*: a product whose rows a kernel reduces leaves what each tile's part of a row comes to,
  and the kernel of the reduction has those to reduce. For GPUs.
"""

from __future__ import annotations

from dataclasses import replace

from stagefuse.dsl.dims import Expr, sym

from .graph import Contract, Graph, Node, Reduce
from .groups import Group
from .join_chosen import ChosenJoiner
from .join_operands import is_coded

DEEPEST = 2048
"""Depth up to which what is saved is some part of the time."""
REASON = (
    "tiles reduce their rows and a second kernel what they leave, so that it is not stored, where "
    "it has 1,048,576 elements and 65 rows at least and, in 16 or 8 bits on sm_90a, a depth of 256 "
    "at most"
)


def reduction_of(graph: Graph, group: Group) -> tuple[Node, Reduce] | None:
    """The reduction of a group that stores nothing for each element of a row, if it has one."""
    if group.kind != "row" or any(group.domain[a].as_int() != 1 for a in group.row_axes or ()):
        return None
    nodes = [graph.nodes[m] for m in group.members]
    found = [(n, n.primitive) for n in nodes if isinstance(n.primitive, Reduce)]
    return found[0] if len(found) == 1 else None


def rows_reduced(group: Group) -> Group | None:
    """The kernel that reduces the rows of a product, of which that stores nothing else."""
    found = group.apart[-1] if group.kind == "contract" and group.apart else None
    return found if found is not None and found.kind == "row" else None


class ReducedJoiner(ChosenJoiner):
    """Joins of products and the reductions of their rows."""

    def _reduced(self, group: Group) -> None:
        found = reduction_of(self.graph, group)
        if found is None or group.nest or group.placed:
            return
        node, reduce = found
        shape = self.graph.type(node.operands[0]).shape
        product = self._product_of(group, shape)
        if product is None or reduce.axes != (len(shape) - 1,):
            return
        members = product.members | group.members
        joined = replace(product, roots=group.roots, members=members, apart=(product, group))
        (ref,) = product.roots
        self._replace([product, group], joined)
        del self.maker[ref]
        self._say(ref, REASON)

    def _product_of(self, rows: Group, shape: tuple[Expr, ...]) -> Group | None:
        """The product of this shape that a kernel reads each element of once, and no other does."""
        made = [self.maker.get(ref) for ref in rows.loads(self.graph)]
        found = [g for g in made if g is not None and g.kind == "contract" and g.domain == shape]
        if len(found) != 1 or found[0].apart or not self._private(found[0], rows):
            return None
        (product,) = found
        (ref,), last = product.roots, len(shape) - 1
        anchor = self.graph.nodes[-1 if product.anchor is None else product.anchor]
        contract = anchor.primitive
        assert isinstance(contract, Contract)
        panels = anchor.operands[1]
        if product.placed or (panels in product.packs and is_coded(self.graph, panels)):
            return None
        if contract.columns != (last,) or anchor.type.shape != shape:
            return None
        if (contract.depth.as_int() or DEEPEST + 1) > DEEPEST:
            return None
        if any(extent.as_int() == 1 for extent in shape):
            return None
        own = (*(sym(f"d{n}") for n in range(last)), sym(f"f{last}"))
        return product if rows.accesses.get(ref.node) == [own] else None
