"""Pointwise kernels for a GPU: as the CPU's, but panels of windows are packed some columns a lane.

Where a panel's elements lie in the source of a convolution is a matter of many divisions: of the
column, and of the row of the panel, into a channel and a place in its window. A lane has adjacent
columns and writes several rows of them, so that the former is done once for all these and, where
rows are taken by whole windows, the latter while compiling.
"""

from __future__ import annotations

from collections.abc import Callable

from stagefuse.compiler.graph import Contract, Ref
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.pointwise import lower_pointwise as plain
from stagefuse.compiler.lower.values import Lowering
from stagefuse.compiler.patterns.windows import windows_of
from stagefuse.dsl.dims import const, floordiv, minimum, sym

MOST_ROWS = 9
"""Rows of a panel that a lane writes: a window of 3 x 3."""
COLUMNS = 128
"""Columns of a step: a vector of four for each lane of a warp."""


def lower_pointwise(low: Lowering) -> Parallel:
    """Panels of windows by groups of rows, anything else as on the CPU."""
    roots = low.group.roots
    if len(roots) != 1 or low.group.placed or not _are_windows(low, roots[0]):
        return plain(low)
    *_, depth, width = low.group.domain
    deep, wide = depth.as_int(), width.as_int()
    if not deep or not wide:
        return plain(low)
    rows = max(n for n in range(1, MOST_ROWS + 1) if deep % n == 0)
    if rows == 1:
        return plain(low)
    return rows_of_panels(low, rows, lambda *at: low.store(at))


def rows_of_panels(
    low: Lowering, rows: int, put: Callable[..., None], columns: int = COLUMNS
) -> Parallel:
    """Panels, or what comes of them: so many rows by columns a step, each element stored by `put`,
    given the position in the panels."""
    *lead, panels, depth, width = low.group.domain
    rank, wide = len(low.group.domain), width.as_int()
    assert wide is not None
    group = max(columns // wide, 1)
    blocks = floordiv(panels + (group - 1), group, low.facts)
    deep = floordiv(depth, rows, low.facts)
    parallel = [*low.axes(range(len(lead))), ("kb", deep), ("pb", blocks)]
    low.bind(parallel)
    outer = [sym(f"d{a}") for a in range(len(lead))]
    panel, column = f"d{rank - 3}", f"d{rank - 1}"

    def column_of_rows() -> None:
        for n in range(rows):
            put(*outer, sym(panel), sym("kb") * rows + n, sym(column))

    first = sym("pb") * group
    low.loop(
        panel, first, minimum(first + group, panels),
        lambda: low.loop(column, const(0), width, column_of_rows, vector=True), vector=True,
    )  # fmt: skip
    return parallel, const(rows * group * wide * max(1, low.cost()))


def _are_windows(low: Lowering, ref: Ref) -> bool:
    """Whether products read a value as their panels, whose elements are windows of a tensor."""
    readers = [low.graph.nodes[n] for n in low.graph.uses().get(ref, ())]
    products = (isinstance(n.primitive, Contract) and n.operands[1] == ref for n in readers)
    if not readers or not all(products):
        return False
    windows = windows_of(low.graph, readers[0].id)
    return windows is not None and any(a.shifts for a in windows.axes)
