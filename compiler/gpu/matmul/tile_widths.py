"""Which tiles a product is cut into on Hopper: by the time that its tiles take on all SMs.

SMs take tiles in turn, so that a product takes as many rounds as its tiles go to each SM, rounded
up. Wide tiles read each operand less often, and narrow ones leave fewer SMs idle in the last
round. Where the sizes of a call decide it, there is a kernel for each of a few widths, and the
grids of all but one are empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum
from stagefuse.dsl.facts import Facts

from .epilogue import ROWS
from .persistent import BLOCKS
from .wgmma_tiles import MOST_ROUGH_COLUMNS

WIDTHS = (256, 240, 224, 208, 192, 160, 144, 128, 96, 64)
"""Columns of a tile."""
FEW_WIDTHS = (256, 64)
"""The same where columns are not known."""
SAMPLES = (1, 2, 4, 8, 16, 32, 64)
"""Tiles below each other for which two widths are chosen where they are not known."""
FIXED, PER_COLUMN = 48, 0.59
"""The time that a tile takes for each of its depth: what its rows take, and each column. Fitted to
tiles of 64, 128 and 256 columns on an H100, products of 1024, 2048 and 4096 rows and columns."""
ROUGH_FIXED = 12
"""The same of f8, of tiles of 128 and 192 columns on an H200: at 4096 x 4096 x 4096 the narrow ones
took 0.9 of the time of the wide ones, at twice the size 1.06."""


def widths(
    rows: Expr,
    columns: Expr,
    batch: Sequence[Expr],
    cluster: int,
    facts: Facts,
    widest: int | None = None,
) -> list[tuple[int, Expr]]:
    """The widths that may be the best, each with a factor that is 1 for sizes where it is, else 0;
    of equal ones the widest. `cluster`: blocks that take tiles together; `widest`: the most columns
    that a tile may have, if it is of f8."""
    known = all(e.as_int() is not None for e in (rows, columns, *batch))
    most = facts.bounds(columns)[1]
    times: dict[int, Expr] = {}
    for width in WIDTHS if known else few_widths(columns.as_int()):
        width = min(width, widest or width)
        if most is not None:  # in whole steps of tensor copies
            width = min(width, max(-(-most // 16) * 16, 16))
        cost = _cost(width, widest is not None)
        times[width] = _rounds(rows, columns, batch, width, cluster) * cost
    return best_of(times, facts)


def widths_of(columns: Expr, facts: Facts, rough: bool) -> list[int]:
    """Every width that a tile may have, widest first. `rough`: of f8."""
    most = facts.bounds(columns)[1]
    limit = MOST_ROUGH_COLUMNS if rough else WIDTHS[0]
    if most is not None:
        limit = min(limit, max(-(-most // 16) * 16, 16))
    return sorted({min(width, limit) for width in WIDTHS}, reverse=True)


def rounds_of(
    batch: int, rows: int, columns: int, width: int, cluster: int, rough: bool = False
) -> int:
    """What the tiles of a width are predicted to take, in units of their own. `rough`: of f8."""
    tiles = -(-rows // (ROWS * cluster)) * -(-columns // width) * batch
    return -(-tiles // (BLOCKS // cluster)) * _cost(width, rough)


def few_widths(columns: int | None) -> tuple[int, ...]:
    """The two widths that lose least against the best one, on average over numbers of rows."""
    if columns is None:
        return FEW_WIDTHS
    every = [{w: -(-n * -(-columns // w) // BLOCKS) * _cost(w) for w in WIDTHS} for n in SAMPLES]
    return min(
        combinations(WIDTHS, 2),
        key=lambda pair: sum(min(times[w] for w in pair) / min(times.values()) for times in every),
    )


def _cost(width: int, rough: bool = False) -> int:
    return round((ROUGH_FIXED if rough else FIXED) + PER_COLUMN * width)


def best_of(times: Mapping[int, Expr], facts: Facts) -> list[tuple[int, Expr]]:
    """The widths that may take least, with factors that are 1 for the sizes where they do, else 0;
    of equals the widest."""
    found = []
    for width, time in times.items():
        best = const(1)
        for other, its in times.items():
            if other != width:
                least = its - time + (1 if other < width else 0)
                best = best * minimum(maximum(least, 0), 1)
        best = facts.simplify(best)
        if best == const(1):
            return [(width, best)]
        if best != const(0):
            found.append((width, best))
    return found


def _rounds(rows: Expr, columns: Expr, batch: Sequence[Expr], width: int, cluster: int) -> Expr:
    tiles = _over(_over(rows, ROWS), cluster) * _over(columns, width)
    for extent in batch:
        tiles = tiles * extent
    return _over(tiles, BLOCKS // cluster)


def _over(size: Expr, by: int) -> Expr:
    return floordiv(size + (by - 1), by)
