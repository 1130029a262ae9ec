"""Reductions of short rows, many side by side by way of scratch.

A row of a few elements fills its vectors badly, and what they hold in the end has to be added up
across each. Where rows lie one after the other, a step copies a block of them so that the elements
of a row lie below each other (`cpu.turns` does so in registers), and reduces all rows at once.
"""

from __future__ import annotations

import math

from stagefuse.compiler.cpu.bodies import is_unrolled
from stagefuse.compiler.cpu.turns import SIZES, place_of
from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.graph import flatten_index
from stagefuse.compiler.kernel_ir import Alloc, Fold, For, Index, Let, Load, Statement, Store
from stagefuse.dsl.dims import const, floordiv, minimum, sym

from .blocks import Parallel
from .expressions import symbols_of
from .squares import CPU_SQUARES, is_long, with_loads
from .values import Lowering

ROWS = 64
"""Of a block."""
LEAST = 9
"""Elements of a row from which on it is worth it: of up to 8 LLVM makes shuffles by itself."""
SHARED, LEAST_SHARED = 16, 8
"""Steps along an axis that turned rows do not depend on, as of pairs of rows: they are turned once
for so many, which is worth it from so many elements on."""


def in_turned_rows(low: Lowering, made: Parallel) -> Parallel:
    """A kernel of reductions that was made; its rows in turned blocks, if that helps."""
    parallel, work = made
    body = low.scopes[0].body
    folds = [s for s in body if isinstance(s, Fold)]
    axes = [axis for axis in parallel if axis[1].as_int() != 1]
    if not axes or not folds or not all(isinstance(s, Let | Store | Fold) for s in body):
        return made
    name, extent = axes[-1]
    loads = {load: fold for fold in folds for load in _rows_of(low, fold, name)}
    if not is_long(low, extent, CPU_SQUARES) or any(f not in loads.values() for f in folds):
        return made
    shared = [a for a in axes[:-1] if not any(a[0] in symbols_of((load,)) for load in loads)]
    if any(_size(fold) < (LEAST_SHARED if shared else LEAST) for fold in folds):
        return made
    first = sym(f"{name}s") * ROWS
    stop = minimum(first + ROWS, extent, low.facts)
    turned, stands = list[Statement](), dict[Load, Load]()
    for load, fold in loads.items():
        scratch = low.name("rows")
        indices, extents = zip(*fold.loops, strict=True)
        place = (Index(flatten_index(list(map(sym, indices)), extents)), Index(sym(name) - first))
        copy: Statement = Store(scratch, place, load)
        for index, size in reversed(fold.loops):
            copy = For(index, const(0), size, (copy,), isinstance(copy, Store))
        turned.append(Alloc(scratch, load.stored, (const(_size(fold)), const(ROWS))))
        turned.append(For(name, first, stop, (copy,)))
        stands[load] = Load(scratch, place, load.stored)
    rows: Statement = For(name, first, stop, tuple(with_loads(s, stands) for s in body), True)
    blocks = [axis for axis in parallel if axis != axes[-1]]
    if shared:
        other, times = shared[-1]
        begin = sym(f"{other}s") * SHARED
        rows = For(other, begin, minimum(begin + SHARED, times, low.facts), (rows,), False)
        count = floordiv(times + (SHARED - 1), SHARED, low.facts)
        blocks[blocks.index(shared[-1])] = (f"{other}s", count)
        work = work * SHARED
    body[:] = [*turned, rows]
    blocks.append((f"{name}s", floordiv(extent + (ROWS - 1), ROWS, low.facts)))
    low.bind(blocks)
    return blocks, work * ROWS


def _size(fold: Fold) -> int:
    """Elements of a fold of known size, 0 of others."""
    return math.prod(extent.as_int() or 0 for _, extent in fold.loops)


def _rows_of(low: Lowering, fold: Fold, name: str) -> list[Load]:
    """What a fold reads along rows that lie apart by the index `name`; nothing where it reads what
    cannot be turned, or its rows are of no fitting length."""
    read = {b.name: b.shape for b in low.buffers.values() if b.mode == "in"}
    loops = [loop for loop in fold.loops if loop[1].as_int() != 1]
    along = flatten_index([sym(n) for n, _ in loops], [size for _, size in loops])
    found: dict[Load, None] = {}
    if not is_unrolled(fold):
        return []
    for part in post_order(fold.value):
        if not isinstance(part, Load) or name not in symbols_of((part,)):
            continue
        place = place_of(part, read) if part.buffer in read else None
        if place is None or part.guard or part.stored.itemsize not in SIZES:
            return []
        if part.stored != part.dtype or place.coefficient(name) in (None, const(0), const(1)):
            return []
        if any(place.coefficient(n) != along.coefficient(n) for n, _ in loops):
            return []
        found[part] = None
    return list(found)
