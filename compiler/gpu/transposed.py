"""Pointwise kernels for a GPU whose rows are short, or that read across the rows they write.

What is read across goes by way of shared memory: a warp takes a square, whose rows there are one
longer than it is, so that its columns lie in different banks.
"""

from __future__ import annotations

from stagefuse.compiler.cpu.merging import as_one
from stagefuse.compiler.kernel_ir import For, Store
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.squares import Squares, in_squares
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import const, floordiv, maximum, minimum, sym

from .packing import lower_pointwise

SQUARES = Squares(32, 1, 9, 8, whole=True)
"""Squares of eight warps lie in shared memory, and two f32 take 67 KB of it."""
LONG, ROWS = 256, 128
"""Elements of rows from which on a step has one; and the most rows that others have."""
ELEMENTS = {True: 2048, False: 8192}
"""About as many does a step of several rows have, if it is known how long they are, or not: then
a block finds out by quotients which rows it has."""


def lower_elements(low: Lowering) -> Parallel:
    """A pointwise kernel, in squares, or some rows at a time, if that helps."""
    made = lower_pointwise(low)
    turned = in_squares(low, made, SQUARES)
    return turned if turned is not made and turned != made else _in_rows(low, made)


def _in_rows(low: Lowering, made: Parallel) -> Parallel:
    """Rows that may be short, such as those of images, some at a time where they lie behind each
    other in all that is read and written: their elements are those of one row then. A step of a
    recurrence has few elements, and its rows stay apart."""
    parallel, work = made
    if low.group.nest:
        return made
    match low.scopes[0].body:
        case [For(vector=True) as loop] if loop.lo == const(0) and parallel and not low.flat:
            pass
        case _:
            return made
    name, extent = parallel[-1]
    shapes = {b.name: b.shape for b in low.buffers.values()}
    if (low.facts.bounds(loop.hi)[0] or 0) >= LONG or extent == const(1):
        return made
    joined = as_one(For(name, const(0), extent, (loop,)), loop, shapes)
    if joined is None and loop.hi.as_int() is None:
        return made
    stored = [s.buffer for s in loop.body if isinstance(s, Store)]
    if len(set(stored)) < len(stored):  # channels of a place are computed together
        return made
    elements = const(ELEMENTS[loop.hi.as_int() is not None])
    rows = minimum(maximum(floordiv(elements, maximum(loop.hi, 1)), 1), ROWS)
    rows = low.facts.simplify(rows)
    first = sym(f"{name}s") * rows
    body = For(name, first, minimum(first + rows, extent), (loop,), True)
    low.scopes[0].body[:] = [body]
    outer = [*parallel[:-1], (f"{name}s", floordiv(extent + (rows - 1), rows, low.facts))]
    low.bind(outer)
    return outer, work * rows
