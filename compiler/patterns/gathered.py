"""Left operands of products that are no rows in memory: windows of a tensor whose channels are
last, and matrices of which columns are adjacent.

Row m of such an operand is a place in an image, its depth the elements that a window sees there.
Where the elements lie is a part that depends on the row plus one that depends on the depth, and
some at a time are adjacent. Kernels for GPUs bring them into shared memory as they multiply, and
so they do with a matrix that is turned.
"""

from __future__ import annotations

from stagefuse.compiler.graph import Contract, Graph, Map, Node, Ref, View, flatten_index
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.frozen import frozen

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


@frozen
class Turned:
    """A left operand of which the elements of a column, not of a row, are adjacent in `source`:
    where the first one lies, over the result's symbols of the batch, and the step along the depth.
    `view`: what turns it."""

    source: Ref
    view: Ref
    first: Expr
    along: Expr


def turned_of(graph: Graph, node: Node) -> Turned | None:
    """How a product's left operand lies if it is turned, and perhaps converted then."""
    product, ref = node.primitive, node.operands[0]
    if graph.nodes[ref.node].primitive == Map("cast"):
        (ref,) = graph.nodes[ref.node].operands
    view = graph.nodes[ref.node].primitive
    if not isinstance(product, Contract) or not isinstance(view, View) or view.guard:
        return None
    if len(view.symbols) != len(product.batch) + 2 or not _is_dense(graph, node, product):
        return None
    *lead, row, depth = view.symbols
    source = graph.nodes[ref.node].operands[0]
    place = flatten_index(view.indices, graph.type(source).shape)
    along = place.coefficient(depth)
    if place.coefficient(row) != const(1) or along is None or along.symbols() & set(lead):
        return None
    here = {name: sym(f"i{a}") for name, a in zip(lead, product.batch, strict=True)}
    first = place.substitute({**here, row: const(0), depth: const(0)})
    return None if along == const(1) else Turned(source, ref, first, along)


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
