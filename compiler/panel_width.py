"""Columns of a panel, and the time that panels take for a number of columns."""

from __future__ import annotations

from stagefuse.dsl.dims import Expr

PANELS = {48: 1.0, 64: 1.0, 32: 1.05, 16: 1.3}
"""Columns that a packed panel may have, and the time that a product of one takes for each. 48 is
three AVX-512 vectors of f32 and six of AVX2; the fewer vectors a row of the panel has, the more
broadcasts its multiply-adds need."""
LANES = 16
"""Columns of the narrowest panel: an AVX-512 vector of f32."""


def panel_width(columns: Expr) -> int:
    """The width that pads a number of columns least; 48 if that is not known."""
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
