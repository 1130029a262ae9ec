"""Products of few rows by panels whose columns lie along the depth, as keys do: dot products."""

from __future__ import annotations

from stagefuse.compiler.graph import View
from stagefuse.compiler.kernel_ir import Alloc, Index, Store
from stagefuse.compiler.patterns.windows import converted
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym

from .blocks import Parallel
from .expressions import as_dtype, at_least_one
from .product import Depth, Lines, Matrix, Product
from .products import emit_product, finish_tile, lying, row_blocks, tile_of
from .values import Lowering

STRETCH = 256
"""Elements of a column that are converted at a time: those of a panel take 48 KB."""


def is_converted(low: Lowering, p: Product) -> bool:
    """Whether a kernel converts what its panels are packed from."""
    panels = p.operands[1]
    return panels in low.group.packs and low.group.packs[panels].members == converted(
        low.graph, panels
    )


def lower_few_rows(low: Lowering, p: Product) -> Parallel | None:
    """A panel of columns where they lie, or of stretches of them that are converted to scratch."""
    converts = is_converted(low, p)
    lines = None if converts else lying(low, p)
    if lines is None and not converts:
        return None
    low.bind(parallel := [*p.batch, row_blocks(low, p, p.row_tile), ("nb", p.panels)])
    tile, start = tile_of(low, p), sym("mb") * p.row_tile
    matrix = Matrix(low.buffer(p.operands[0], "in").name, p.base, p.primitive.row_stride)
    count = minimum(p.rows - start, const(p.row_tile))
    target = (tile, const(0), const(p.panel))
    if lines is not None:
        emit_product(low, p, target, matrix, lines, start, count, "nb")
    else:
        scratch = low.name("lines")
        low.emit(Alloc(scratch, p.dtype, (const(p.panel), const(STRETCH))))

        def stretch(begin: Expr, adds: bool) -> None:
            piece = Depth(begin, minimum(p.depth - begin, const(STRETCH)), adds=adds)
            _convert(low, p, scratch, piece)
            at = Lines(scratch, -begin - sym("nb") * (p.panel * STRETCH), const(1), const(STRETCH))
            emit_product(low, p, target, matrix, at, start, count, "nb", piece)

        stretch(const(0), False)
        stretches = floordiv(p.depth + (STRETCH - 1), STRETCH, low.facts)
        low.loop("kb", const(1), stretches, lambda: stretch(sym("kb") * STRETCH, True))
    finish_tile(low, p, tile, const(0), start, count, sym("nb"))
    return parallel, at_least_one(p.depth) * p.panel


def _convert(low: Lowering, p: Product, scratch: str, piece: Depth) -> None:
    """Fills scratch with a stretch of each column of the panel `nb`."""
    node = low.graph.nodes[p.operands[1].node]
    view = node.primitive
    assert isinstance(view, View)
    lead = [*(sym(n) for n, _ in p.batch), sym("nb"), piece.begin + sym("k"), sym("c")]
    place = dict(zip(view.symbols, map(Index, lead), strict=True))

    def element() -> None:
        at = tuple(low.index(e, place) for e in view.indices)
        value = as_dtype(low.value(node.operands[0], at, ()), p.dtype)
        low.emit(Store(scratch, (Index(sym("c")), Index(sym("k"))), value))

    def one_column() -> None:
        low.loop("k", const(0), piece.length, element, vector=True)

    with low.part(low.group.packs[p.operands[1]], {}):
        low.loop("c", const(0), p.width(sym("nb")), one_column)
