"""Pointwise kernels that read across the rows they write, by way of shared memory.

Where the elements of an operand lie next to each other along another axis than the last one of the
result, a warp takes a square of both axes: it reads the square along the operand's rows, and
writes along those of the result. Rows of the square in shared memory are one element longer than
it is, so that its columns lie in different banks.
"""

from __future__ import annotations

from dataclasses import replace

from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.kernel_ir import (
    Alloc,
    Checked,
    Const,
    For,
    If,
    Index,
    Let,
    Load,
    Op,
    Statement,
    Store,
)
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.expressions import all_of
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, floordiv, sym
from stagefuse.dsl.dtypes import BOOL, I64

from .packing import lower_pointwise

SQUARE = 32
LEAST = 9
"""Elements of an axis from which on it is worth taking as squares."""
MOST_BYTES = 8
"""Bytes of all operands' elements that are read this way: squares of eight warps lie in shared
memory, and two f32 take 67 KB of it."""


def lower_elements(low: Lowering) -> Parallel:
    """A pointwise kernel, in squares if that helps."""
    parallel, work = lower_pointwise(low)
    body = low.scopes[0].body
    loop = body[0] if len(body) == 1 else None
    if low.flat or not isinstance(loop, For) or not loop.vector or loop.lo != const(0):
        return parallel, work
    if not all(isinstance(s, Let | Store) for s in loop.body):
        return parallel, work
    for axis, (name, extent) in reversed(list(enumerate(parallel))):
        if not _is_long(low, extent) or not _is_long(low, loop.hi):
            continue
        loads = _that_fit(_across(low, loop, name))
        if loads:
            low.scopes[0].body[:] = _squares(low, loop, name, extent, loads)
            outer = [*parallel[:axis], (f"{name}s", _squares_of(extent)), *parallel[axis + 1 :]]
            outer.append((f"{loop.index}s", _squares_of(loop.hi)))
            low.bind(outer)
            return outer, const(SQUARE * SQUARE) * max(1, low.cost())
    return parallel, work


def _that_fit(loads: list[Load]) -> list[Load]:
    """The first of them that shared memory has room for."""
    found: list[Load] = []
    for load in loads:
        if sum(x.stored.itemsize for x in (*found, load)) <= MOST_BYTES:
            found.append(load)
    return found


def _squares_of(extent: Expr) -> Expr:
    return floordiv(extent + (SQUARE - 1), SQUARE)


def _is_long(low: Lowering, extent: Expr) -> bool:
    most = low.graph.facts.bounds(extent)[1]
    return most is None or most >= LEAST


def _across(low: Lowering, loop: For, name: str) -> list[Load]:
    """Loads, from what the kernel only reads, that step by one with an index outside the loop, and
    by more with the loop's."""
    read = {b.name: b for b in low.buffers.values() if b.mode == "in"}
    found: dict[Load, None] = {}
    for s in loop.body:
        assert isinstance(s, Let | Store)
        values = (*s.indices, s.value) if isinstance(s, Store) else (s.value,)
        for part in (p for v in values for p in post_order(v)):
            if not isinstance(part, Load) or part.buffer not in read or part.guard:
                continue
            place, step = const(0), const(1)
            for index, extent in reversed(
                list(zip(part.indices, read[part.buffer].shape, strict=True))
            ):
                if not isinstance(index, Index):
                    break
                place, step = place + index.expr * step, step * extent
            else:
                along, own = place.coefficient(name), place.coefficient(loop.index)
                if along == const(1) and own is not None and own not in (const(0), const(1)):
                    found[part] = None
    return list(found)


def _squares(
    low: Lowering, loop: For, name: str, extent: Expr, loads: list[Load]
) -> list[Statement]:
    """The step of a square: reads it, and then does what the loop did."""
    row, column = sym(name), sym(loop.index)
    first_row, first_column = sym(f"{name}s") * SQUARE, sym(f"{loop.index}s") * SQUARE
    tests = [(row, extent), (column, loop.hi)]
    inside = all_of([Op("ge", (Index(e - 1 - x), Const(0, I64)), BOOL) for x, e in tests])

    def square(outer: tuple[str, Expr], inner: tuple[str, Expr], body: list[Statement]) -> For:
        (a, first_a), (b, first_b) = outer, inner
        own = For(b, first_b, first_b + SQUARE, (If(inside, tuple(body)),), True)
        return For(a, first_a, first_a + SQUARE, (own,), True)

    found: list[Statement] = []
    place = (Index(column - first_column), Index(row - first_row))
    stands: dict[Load, Load] = {}
    fills: list[Statement] = []
    for load in loads:
        scratch = low.name("square")
        found.append(Alloc(scratch, load.stored, (const(SQUARE), const(SQUARE + 1))))
        fills.append(Store(scratch, place, load))
        stands[load] = Load(scratch, place, load.stored)
    rows, columns = (name, first_row), (loop.index, first_column)
    found.append(square(columns, rows, fills))
    body = [_with(s, stands) for s in loop.body]
    found.append(square(rows, columns, body))
    return found


def _with(s: Statement, stands: dict[Load, Load]) -> Statement:
    """A statement that reads squares instead."""
    known: dict[int, KernelValue] = {}

    def of(value: KernelValue) -> KernelValue:
        for part in post_order(value):  # without recursion: values may be deep
            known[id(part)] = changed(part)
        return known[id(value)]

    def all_of_them(values: tuple[KernelValue, ...]) -> tuple[KernelValue, ...]:
        return tuple(known[id(v)] for v in values)

    def changed(value: KernelValue) -> KernelValue:
        if isinstance(value, Load):
            indices, guard = all_of_them(value.indices), all_of_them(value.guard)
            return stands.get(value) or replace(value, indices=indices, guard=guard)
        if isinstance(value, Op):
            return replace(value, args=all_of_them(value.args))
        return replace(value, value=known[id(value.value)]) if isinstance(value, Checked) else value

    if isinstance(s, Let):
        return replace(s, value=of(s.value))
    assert isinstance(s, Store)
    return replace(s, indices=tuple(map(of, s.indices)), value=of(s.value))
