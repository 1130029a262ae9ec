"""Matrix products for a GPU: a block computes a tile of rows by a few adjacent panels.

The tile goes to scratch, where all lanes take its elements in the order of the result and finish
them with what follows the product.
"""

from __future__ import annotations

from stagefuse.compiler.kernel_ir import Alloc, Index, Load
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.products import _emit_product as emit_product
from stagefuse.compiler.lower.products import _Matrix as Matrix
from stagefuse.compiler.lower.products import _product as product_of
from stagefuse.compiler.lower.products import _stored_panels as stored_panels
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym

PANELS = {48: 2, 64: 2, 32: 2, 16: 4}
"""Panels of a width that make a tile."""
PADDING = 8
"""Elements between the rows of a tile, so that eight rows lie in different banks."""


def lower_contract(low: Lowering) -> Parallel:
    """Tiles of rows by panels: computed, then stored with what follows."""
    p = product_of(low, low.group.anchor)
    known = p.panels.as_int()
    group = PANELS[p.panel] if known is None else min(PANELS[p.panel], known)
    rows = p.row_tile
    blocks = floordiv(p.rows + (rows - 1), rows, low.facts)
    groups = floordiv(p.panels + (group - 1), group, low.facts)
    parallel = [*p.batch, ("mb", blocks), ("nb", groups)]
    low.bind(parallel)
    width = group * p.panel + PADDING
    tile = low.name("tile")
    low.emit(Alloc(tile, p.dtype, (const(rows), const(width))))
    matrix = Matrix(low.buffer(p.operands[0], "in").name, p.base, p.primitive.row_stride)
    panels = stored_panels(low, p)
    first = sym("nb") * group
    start = sym("mb") * rows
    count = minimum(p.rows - start, const(rows))

    def multiply() -> None:
        target = (tile, (sym("p") - first) * p.panel, const(width))
        emit_product(low, p, target, matrix, panels, start, count)

    def finish() -> None:
        low.facts = low.facts.with_ranges({"r": (0, rows - 1)})
        low.loop("c", const(0), const(group * p.panel), column, vector=True)

    def column() -> None:
        at = first * p.panel + sym("c")
        low.when([p.columns - 1 - at], lambda: element(at))

    def element(at: Expr) -> None:
        # only columns of the product get here, which split_index may use
        inside = Load(tile, (Index(sym("r")), Index(sym("c"))), p.dtype)
        with low.part(low.group, {p.ref: lambda _: inside}):
            low.store(p.place(low, start + sym("r"), at))

    low.loop("p", first, minimum(first + group, p.panels), multiply)
    low.loop("r", const(0), count, finish, vector=True)
    return parallel, p.depth * (rows * group * p.panel)
