"""Pointwise kernels of short rows that are read from far apart, as packing panels is.

Rows that follow each other in the result are then lines of as many rows of what is read, which the
hardware asks for one at a time, in a page each; but beside each lies what an axis further out has.
"""

from __future__ import annotations

from stagefuse.compiler.cpu.turns import place_of
from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.kernel_ir import For, Let, Load, Store
from stagefuse.compiler.kernel_text import values_of
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.facts import Facts

from .blocks import Parallel
from .values import Lowering

ROWS, BESIDE = 8, 64
"""Rows of what is read that a step takes, and how many stretches of each that lie side by side. On
Zen 4 a copy of 1024 x 1024 f32 to panels of 16 columns took 0.35 ms a panel after the other, 0.15
by bands of 8 rows, 0.18 of 4, 0.23 of 16 and 0.31 of 32."""
FEWEST, WIDEST = 4, 64
"""Stretches that lie side by side, at least, and elements of one, at most. Two take 1.15 of the
time by bands; longer ones are read as fast one by one."""


def in_bands(low: Lowering, made: Parallel) -> Parallel:
    """A pointwise kernel that was made, by bands of rows of what it reads if that helps."""
    parallel, work = made
    body = low.scopes[0].body
    loop = body[0] if len(body) == 1 else None
    if not isinstance(loop, For) or not loop.vector or loop.lo != const(0) or len(parallel) < 2:
        return made
    (outer, many), (name, extent) = parallel[-2:]
    known, facts = loop.hi.as_int(), low.graph.facts
    if known not in range(2, WIDEST + 1) or _at_most(facts, many, FEWEST - 1):
        return made
    if _at_most(facts, extent, ROWS) or not any(
        _lies_beside(low, load, loop, outer, name) for load in _loads(loop)
    ):
        return made
    bands = (f"{name}s", floordiv(extent + (ROWS - 1), ROWS, low.facts))
    first = sym(bands[0]) * ROWS
    lines = (f"{outer}s", floordiv(many + (BESIDE - 1), BESIDE, low.facts))
    begin = sym(lines[0]) * BESIDE
    rows = For(name, first, minimum(first + ROWS, extent, low.facts), (loop,))
    body[:] = [For(outer, begin, minimum(begin + BESIDE, many, low.facts), (rows,))]
    outside = [*parallel[:-2], bands, lines]
    low.bind(outside)
    return outside, work * ROWS * minimum(many, const(BESIDE))


def _at_most(facts: Facts, size: Expr, number: int) -> bool:
    most = facts.bounds(size)[1]
    return most is not None and most <= number


def _loads(loop: For) -> list[Load]:
    statements = [s for s in loop.body if isinstance(s, Let | Store)]
    values = (v for s in statements for v in values_of(s))
    return [part for value in values for part in post_order(value) if isinstance(part, Load)]


def _lies_beside(low: Lowering, load: Load, loop: For, outer: str, name: str) -> bool:
    """Whether what a row of the loop reads goes on where that of the next `outer` begins, and that
    of the next `name` lies elsewhere."""
    shapes = {b.name: b.shape for b in low.buffers.values() if b.mode == "in"}
    place = place_of(load, shapes) if load.buffer in shapes else None
    if place is None:
        return False
    along, beside, apart = (place.coefficient(x) for x in (loop.index, outer, name))
    near: tuple[Expr, ...] = (const(0), const(1), loop.hi)
    return along == const(1) and beside == loop.hi and apart is not None and apart not in near
