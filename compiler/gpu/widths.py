"""Which tiles a product is cut into on Hopper: by the time that its tiles take on all SMs.

SMs take tiles in turn, so that a product takes as many rounds as its tiles go to each SM, rounded
up. Wide tiles read each operand less often, and narrow ones leave fewer SMs idle in the last
round. The sizes of a call may decide it: then there is a kernel for each width that may be the
best, and the grids of the others are empty.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum
from stagefuse.dsl.facts import Facts

from .persistent import BLOCKS, CLUSTER, ROWS

COSTS = {256: 200, 128: 112, 64: 70}
"""The columns of a tile, and the time that it takes for each of its depth."""


def widths(
    rows: Expr, columns: Expr, batch: Sequence[Expr], facts: Facts
) -> list[tuple[int, Expr]]:
    """The widths that may be the best, each with a factor that is 1 for sizes where it is, else 0;
    of equal ones the widest. If all may be, only the widest and the narrowest are taken."""
    times: dict[int, Expr] = {}
    most = facts.bounds(columns)[1]
    for width, cost in COSTS.items():
        if not times or most is None or width // 2 < most:
            times[width] = _rounds(rows, columns, batch, width) * cost
    found = _best_of(times, facts)
    if len(found) < 3:
        return found
    return _best_of({width: times[width] for width in (max(times), min(times))}, facts)


def _best_of(times: Mapping[int, Expr], facts: Facts) -> list[tuple[int, Expr]]:
    """The widths that may take least, with their factors."""
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


def _rounds(rows: Expr, columns: Expr, batch: Sequence[Expr], width: int) -> Expr:
    tiles = _over(_over(rows, ROWS), CLUSTER) * _over(columns, width)
    for extent in batch:
        tiles = tiles * extent
    return _over(tiles, BLOCKS // CLUSTER)


def _over(size: Expr, by: int) -> Expr:
    return floordiv(size + (by - 1), by)
