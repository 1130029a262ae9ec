"""Two products with row reductions between them (attention) as one kernel for a GPU.

A block takes 32 rows of one matrix of the batch: their products with every column go to scratch,
where a warp a row reduces them; the second product reads them there.
"""

from __future__ import annotations

from stagefuse.compiler.gpu.matmul.lowering import PADDING, PANELS
from stagefuse.compiler.gpu.matmul.operands import Left, multiply
from stagefuse.compiler.kernel_ir import Alloc, Index, Load
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.product import product_of_group
from stagefuse.compiler.lower.products import row_between
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym

ROWS = 32
LONGEST = 512
"""Elements of a row between two products: 32 such rows fit the shared memory of every arch."""


def lower_chain(low: Lowering) -> Parallel:
    """Blocks of rows: a product into scratch, its row reductions there, the next product."""
    group, rows = low.group, low.group.rows
    assert rows is not None
    first, last = product_of_group(low, rows.anchor), product_of_group(low, group.anchor)
    blocks = floordiv(first.rows + (ROWS - 1), ROWS, low.facts)
    parallel = [*first.batch, ("mb", blocks)]
    low.bind(parallel)
    wide = PANELS[first.panel]
    groups = floordiv(first.panels + (wide - 1), wide, low.facts)
    width = groups * (wide * first.panel) + 4  # rows in different banks
    scores = low.name("scores")
    low.emit(Alloc(scores, first.dtype, (const(ROWS), width)))
    known = last.panels.as_int()
    some = known if known is not None and known * last.panel == 32 else PANELS[last.panel]
    across = some * last.panel + PADDING
    tile = low.name("tile")
    low.emit(Alloc(tile, last.dtype, (const(ROWS), const(across))))
    matrix = Left(low.buffer(first.operands[0], "in").name, first.base, first.primitive.row_stride)
    start = sym("mb") * ROWS
    count = minimum(first.rows - start, const(ROWS))

    def score() -> None:
        multiply(low, first, (scores, sym("p") * first.panel, width), matrix, start, count)

    def score_group() -> None:
        begin = sym("pg") * wide
        low.loop("p", begin, minimum(begin + wide, first.panels), score)

    low.loop("pg", const(0), groups, score_group)
    low.loop("r", const(0), count, lambda: row_between(low, first, scores, start), vector=True)
    inside = Left(scores, -start * width, width)

    def weigh() -> None:
        place = (sym("p") - sym("qg") * some) * last.panel
        multiply(low, last, (tile, place, const(across)), inside, start, count)

    def column() -> None:
        at = sym("qg") * (some * last.panel) + sym("c")
        low.when([last.columns - 1 - at], lambda: element(at))

    def element(at: Expr) -> None:
        value = Load(tile, (Index(sym("r")), Index(sym("c"))), last.dtype)
        with low.part(low.group, {last.ref: lambda _: value}):
            low.store(last.place(low, start + sym("r"), at))

    def finish() -> None:
        low.facts = low.facts.with_ranges({"r": (0, ROWS - 1)})
        low.loop("c", const(0), const(some * last.panel), column, vector=True)

    def weigh_group() -> None:
        begin = sym("qg") * some
        low.loop("p", begin, minimum(begin + some, last.panels), weigh)
        low.loop("r", const(0), count, finish, vector=True)

    out = floordiv(last.panels + (some - 1), some, low.facts)
    low.loop("qg", const(0), out, weigh_group)
    return parallel, (first.depth + last.depth) * ROWS
