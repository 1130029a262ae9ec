"""Left operands of products that are windows of a tensor whose channels are last.

Row m of such an operand is a place in an image, its depth the elements that a window sees there.
Where the elements lie is a part that depends on the row plus one that depends on the depth, and
some at a time are adjacent. Kernels for GPUs bring them into shared memory as they multiply.
"""

from __future__ import annotations

from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.frozen import frozen

from .graph import Contract, Graph, Node, Ref, View, flatten_index
from .windows import cuts_of

ADJACENT = 4
"""Elements that must be adjacent: eight bytes of 16-bit ones, which asynchronous copies move."""


@frozen
class Gathered:
    """Where the elements of a left operand are in `source`, over the symbols of the batch `lead`,
    of the `row` and of the `depth`; 0 unless every guard is at least 0."""

    source: Ref
    lead: tuple[str, ...]
    row: str
    depth: str
    indices: tuple[Expr, ...]
    guard: tuple[Expr, ...]


def gathered_of(graph: Graph, node: Node) -> Gathered | None:
    """How a product's left operand can be gathered, if it can."""
    product, left = node.primitive, graph.nodes[node.operands[0].node]
    view = left.primitive
    if not isinstance(product, Contract) or not isinstance(view, View) or len(view.symbols) < 2:
        return None
    *lead, row, depth = view.symbols
    if len(lead) != len(product.batch) or (view.guard and view.fill != 0):
        return None
    if not _is_dense(graph, node, product):
        return None
    found = Gathered(left.operands[0], tuple(lead), row, depth, view.indices, view.guard)
    return found if is_gathered(graph, found) else None


def is_gathered(graph: Graph, rows: Gathered) -> bool:
    """Whether elements lie where a row says plus where the depth says, some at a time adjacent."""
    depth, place = rows.depth, flatten_index(rows.indices, graph.type(rows.source).shape)
    for expr in (place, *rows.indices, *rows.guard):
        moved = (expr - expr.substitute({depth: 0})).symbols()
        if rows.row in moved or not _in_fours(expr, depth):
            return False
    return all(
        expr.substitute({depth: 1}) - expr.substitute({depth: 0}) == const(step)
        for expr, step in ((place, 1), *((g, 0) for g in rows.guard))
    )


def _is_dense(graph: Graph, node: Node, product: Contract) -> bool:
    """Whether the rows of a product's left operand follow each other, batch after batch."""
    *lead, rows, depth = graph.type(node.operands[0]).shape
    base = flatten_index([sym(f"i{a}") for a in product.batch], lead) * rows * depth
    same = graph.facts.prove_eq
    return same(product.row_stride, depth) and same(product.base, base)


def _in_fours(expr: Expr, name: str) -> bool:
    """Whether four elements from a multiple of four on have the same quotients of a symbol."""
    cuts = cuts_of(expr, name)
    return cuts is not None and all(cut % ADJACENT == 0 for cut in cuts)
