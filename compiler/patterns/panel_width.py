"""Columns of a panel, and the time that panels take for a number of columns."""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.dsl.dims import Expr

PANELS = {48: 1.0, 64: 1.0, 32: 1.05, 16: 1.3}
"""Columns that a packed panel may have, and the time that a product of one takes for each. 48 is
three AVX-512 vectors of f32 and six of AVX2; the fewer vectors a row of the panel has, the more
broadcasts its multiply-adds need."""
THIN = 1
"""Rows that want more sums side by side than a panel of 16 columns has: with AVX2 one row by 1024 x
1024 takes 1.3 times as long with these as with those of 64, two take 0.66, three 0.74."""
LANES = 16
"""Columns of the narrowest panel: an AVX-512 vector of f32."""


def width_for(levels: Sequence[str]) -> int | None:
    """The width of all panels where code is for AVX2 alone, None elsewhere.

    Its tiles are 16 columns wide, so that of wider panels they read every fourth line, or third: on
    Zen 4 products of 512 x 384 x 1536, 1024 and 2048 each way take 0.84 to 0.89 of the time.
    """
    return LANES if tuple(levels) == ("v3",) else None


def has_many(rows: Expr) -> bool:
    """Whether a product has rows for narrow panels, or may have them."""
    known = rows.as_int()
    return known is None or known > THIN


def panel_width(columns: Expr, only: int | None = None) -> int:
    """The width that pads a number of columns least, unless there is `only` one; 48 if that is not
    known."""
    if only is not None:
        return only
    known = columns.as_int()
    if known is None:
        return next(iter(PANELS))
    return min(PANELS, key=lambda width: -(-known // width) * width * PANELS[width])


def panels_time(columns: int, width: int = 0) -> float:
    """The time of panels of a width for some columns, in those of a vector in a full panel; of the
    quickest width, unless one is given."""
    if not width:
        return min(panels_time(columns, wide) for wide in PANELS)
    whole, rest = divmod(columns, width)
    vectors = -(-rest // LANES)
    last = width // LANES * PANELS[width] if vectors * LANES == width else vectors * PANELS[LANES]
    return whole * (width // LANES) * PANELS[width] + last
