"""Row kernels for a GPU: as the CPU's, but reductions over outer axes take 32 columns a block.

Memory runs along the kept axis, so that the lanes of a warp take adjacent columns, and the warps
of the block share the rows.
"""

from __future__ import annotations

from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.rows import _is_column as is_column
from stagefuse.compiler.lower.rows import lower_row
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import const, floordiv, minimum, sym

COLUMNS = 32


def lower_rows(low: Lowering) -> Parallel:
    """Rows, or blocks of columns whose reductions are folds of their own."""
    if low.group.row_axes or not is_column(low):
        return lower_row(low)
    domain = low.group.domain
    last = len(domain) - 1
    blocks = floordiv(domain[last] + (COLUMNS - 1), COLUMNS, low.facts)
    parallel = [*low.axes(range(last)), ("block", blocks)]
    low.bind(parallel)
    lo = sym("block") * COLUMNS
    hi = minimum(lo + COLUMNS, domain[last])
    position = [sym(f"d{a}") for a in range(len(domain))]
    low.loop(f"d{last}", lo, hi, lambda: low.store(position), vector=True)
    return parallel, const(COLUMNS * 16)
