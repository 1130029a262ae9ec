"""Products whose rows are reduced where their tiles are, and are not stored before.

- *reduced*: a product whose rows a kernel reduces leaves what each tile's part of a row comes to,
  and the kernel of the reduction has those to reduce. For GPUs.
- *finished*: norms and softmax of a product's rows are computed where a tile has whole rows. For
  GPUs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stagefuse.compiler.graph import Contract, Graph, Node, Reduce
from stagefuse.dsl.dims import Expr, const, sym

from .groups import Access, Group
from .join_chosen import ChosenJoiner
from .join_narrow import is_coded

DEEPEST = 2048
"""Depth up to which what is saved is some part of the time."""
WIDEST = 256
"""Columns of the widest tile."""
FINISHED = (
    "norms and softmax of its rows are computed in its tiles, which have whole rows, so that it is "
    "not stored, where there are enough tiles without splitting its depth"
)
REASON = (
    "tiles reduce their rows and a second kernel what they leave, so that it is not stored, where "
    "it has 1,048,576 elements and 65 rows at least and, in 16 or 8 bits on sm_90a, a depth of 256 "
    "at most"
)


def reductions_of(graph: Graph, group: Group) -> list[tuple[Node, Reduce]]:
    """The reductions of a group that stores nothing for each element of a row, if all are along
    the same axes of as many elements."""
    if group.kind != "row" or any(group.domain[a].as_int() != 1 for a in group.row_axes or ()):
        return []
    nodes = [graph.nodes[m] for m in sorted(group.members)]
    found = [(n, n.primitive) for n in nodes if isinstance(n.primitive, Reduce)]
    forms = {(graph.type(n.operands[0]).shape, reduce.axes) for n, reduce in found}
    return found if len(forms) == 1 else []


def reduction_of(graph: Graph, group: Group) -> tuple[Node, Reduce] | None:
    """The same if there is but one."""
    found = reductions_of(graph, group)
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
        product, last = self._product_of(group, shape), len(shape) - 1
        if product is None or reduce.axes != (last,) or any(e.as_int() == 1 for e in shape):
            return
        own = (*(sym(f"d{n}") for n in range(last)), sym(f"f{last}"))
        if group.accesses.get(product.roots[0].node) != [own]:
            return
        members = product.members | group.members
        joined = replace(product, roots=group.roots, members=members, apart=(product, group))
        (ref,) = product.roots
        self._replace([product, group], joined)
        del self.maker[ref]
        self._say(ref, REASON)

    def _finished(self, group: Group) -> None:
        last = len(group.domain) - 1
        if group.kind != "row" or group.row_axes != (last,) or group.nest or group.placed:
            return
        product = self._product_of(group, group.domain)
        if product is None or (group.domain[last].as_int() or WIDEST + 1) > WIDEST:
            return
        (ref,) = product.roots
        reads = group.accesses.get(ref.node, [])
        if not reads or not all(along_row(a, group.domain) for a in reads):
            return
        if any(self.graph.type(r).shape != group.domain for r in group.roots):
            return
        self._reduce(product, group, FINISHED)

    def _reduce(self, product: Group, group: Group, why: str) -> None:
        """Has a product's kernel store what a kernel of rows makes of it."""
        rows, (ref,) = rows_between(product, group), product.roots
        joined = replace(
            product, roots=group.roots, members=rows.members, rows=rows, apart=(product, group)
        )
        self._replace([product, group], joined)
        del self.maker[ref]
        self._say(ref, why)

    def _product_of(self, rows: Group, shape: tuple[Expr, ...] | None) -> Group | None:
        """The product of this shape, or of any, its columns along the last axis, that a kernel
        alone reads."""
        made = [self.maker.get(ref) for ref in sorted(rows.loads(self.graph))]
        found = [g for g in made if g is not None and g.kind == "contract"]
        found = [g for g in found if shape in (None, g.domain)]
        if len(found) != 1 or found[0].apart or not self._private(found[0], rows):
            return None
        (product,) = found
        shape, last = product.domain, len(product.domain) - 1
        anchor = self.graph.nodes[-1 if product.anchor is None else product.anchor]
        contract = anchor.primitive
        assert isinstance(contract, Contract)
        panels = anchor.operands[1]
        if product.placed or (panels in product.packs and is_coded(self.graph, panels)):
            return None
        if contract.columns != (last,) or anchor.type.shape != shape:
            return None
        return product if (contract.depth.as_int() or DEEPEST + 1) <= DEEPEST else None


def rows_between(first: Group, middle: Group) -> Group:
    """The row kernel between two products, with what the first product is of."""
    return replace(
        middle,
        members=first.members | middle.members,
        accesses={**first.accesses, **middle.accesses},
        anchor=first.anchor,
        placed={},
    )


def along_row(access: Access, domain: Sequence[Expr]) -> bool:
    """Whether an access reads the kernel's own row: each axis in step, the last one anywhere."""
    if access is None:
        return False
    last = len(domain) - 1
    *lead, column = access
    own = all(
        e == sym(f"d{n}") or (e == const(0) and domain[n].as_int() == 1) for n, e in enumerate(lead)
    )
    return own and column in (sym(f"d{last}"), sym(f"f{last}"))
