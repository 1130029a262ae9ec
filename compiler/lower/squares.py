"""Pointwise kernels that read across the rows they write, by way of scratch.

Where the elements of an operand lie next to each other along another axis than the last one of the
result, a step takes a square of both axes: it reads the square along the operand's rows, and writes
along those of the result.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import reduce

from stagefuse.compiler.cpu.turns import place_of
from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.kernel_ir import (
    Alloc,
    Checked,
    Const,
    Fold,
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
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.dtypes import BOOL, I64
from stagefuse.dsl.frozen import frozen

from .blocks import Parallel
from .expressions import all_of
from .values import Lowering


@frozen
class Squares:
    """How squares are taken. `size`: elements of a side, and in scratch `gap` more from row to row.
    `least`: elements of an axis from which on it is worth it. `most_bytes`: of all operands'
    elements that are read this way. `whole`: whether loops go over all of a square: without a test
    where all of it is inside, so that no load waits for another, and else testing its elements."""

    size: int
    gap: int
    least: int
    most_bytes: int
    whole: bool = False


CPU_SQUARES = Squares(64, 0, 16, 16)
"""A line of bytes, and a square of f32 in the first-level cache."""


def in_squares(low: Lowering, made: Parallel, how: Squares) -> Parallel:
    """A pointwise kernel that was made, in squares if that helps."""
    parallel, work = made
    body = low.scopes[0].body
    loop = body[0] if len(body) == 1 else None
    if low.flat or not isinstance(loop, For) or not loop.vector or loop.lo != const(0):
        return parallel, work
    if not all(isinstance(s, Let | Store) for s in loop.body):
        return parallel, work
    for axis, (name, extent) in reversed(list(enumerate(parallel))):
        if not is_long(low, extent, how) or not is_long(low, loop.hi, how):
            continue
        loads = _that_fit(_across(low, loop, name, how), how)
        if loads:
            low.scopes[0].body[:] = _squares(low, loop, name, extent, loads, how)
            count = [floordiv(e + (how.size - 1), how.size) for e in (extent, loop.hi)]
            outer = [*parallel[:axis], (f"{name}s", count[0]), *parallel[axis + 1 :]]
            outer.append((f"{loop.index}s", count[1]))
            low.bind(outer)
            return outer, const(how.size * how.size) * max(1, low.cost())
    return parallel, work


def _that_fit(loads: list[Load], how: Squares) -> list[Load]:
    """The first of them that there is room for."""
    found: list[Load] = []
    for load in loads:
        if sum(x.stored.itemsize for x in (*found, load)) <= how.most_bytes:
            found.append(load)
    return found


def is_long(low: Lowering, extent: Expr, how: Squares) -> bool:
    most = low.graph.facts.bounds(extent)[1]
    return most is None or most >= how.least


def _across(low: Lowering, loop: For, name: str, how: Squares) -> list[Load]:
    """Loads, from what the kernel only reads, that step by one with an index outside the loop, and
    by more with the loop's; guarded ones if a corner of a square tells whether all is read."""
    read = {b.name: b.shape for b in low.buffers.values() if b.mode == "in"}
    found: dict[Load, None] = {}
    for s in loop.body:
        assert isinstance(s, Let | Store)
        values = (*s.indices, s.value) if isinstance(s, Store) else (s.value,)
        for part in (p for v in values for p in post_order(v)):
            if not isinstance(part, Load) or part.buffer not in read:
                continue
            first = _begins(loop, name, how.size)
            if part.guard and not how.whole or None in (_least(g, first, 1) for g in part.guard):
                continue
            place = place_of(part, read)
            if place is not None:
                along, own = place.coefficient(name), place.coefficient(loop.index)
                if along == const(1) and own is not None and own not in (const(0), const(1)):
                    found[part] = None
    return list(found)


def _least(guard: KernelValue, first: Mapping[str, Expr], size: int) -> Expr | None:
    """What a test asks to be at least 0, where it is least in the square that begins there; None if
    it is no sum of multiples of indices."""
    if not isinstance(guard, Op) or guard.fn != "ge" or guard.args[1] != Const(0, I64):
        return None
    if not isinstance(guard.args[0], Index):
        return None
    expr, corner = guard.args[0].expr, {}
    for name, start in first.items():
        step = expr.coefficient(name)
        times = None if step is None else step.as_int()
        if times is None:
            return None
        corner[name] = start if times >= 0 else start + (size - 1)
    return expr.substitute(corner)


def _begins(loop: For, name: str, size: int) -> dict[str, Expr]:
    """Where a square begins along both axes."""
    return {x: sym(f"{x}s") * size for x in (name, loop.index)}


def _squares(
    low: Lowering, loop: For, name: str, extent: Expr, loads: list[Load], how: Squares
) -> list[Statement]:
    """The step of a square: reads it, and then does what the loop did."""
    size = how.size
    first = _begins(loop, name, size)
    ends = {name: extent, loop.index: loop.hi}

    def tests(relation: str, rest: Iterable[Expr]) -> list[KernelValue]:
        return [Op(relation, (Index(e), Const(0, I64)), BOOL) for e in rest]

    def square(outer: str, inner: str, body: list[Statement], tested: bool) -> For:
        def over(index: str, body: tuple[Statement, ...], vector: bool) -> For:
            stop = first[index] + size
            stop = stop if how.whole else minimum(stop, ends[index], low.facts)
            return For(index, first[index], stop, body, vector)

        inside = all_of(tests("ge", (e - 1 - sym(x) for x, e in ends.items())))
        own = (If(inside, tuple(body)),) if tested else tuple(body)
        return over(outer, (over(inner, own, True),), how.whole)

    found: list[Statement] = []
    place = (Index(sym(loop.index) - first[loop.index]), Index(sym(name) - first[name]))
    stands: dict[Load, Load] = {}
    fills: list[Store] = []
    for load in loads:
        scratch = low.name("square")
        found.append(Alloc(scratch, load.stored, (const(size), const(size + how.gap))))
        fills.append(Store(scratch, place, load))
        stands[load] = Load(scratch, place, load.stored)
    body = [with_loads(s, stands) for s in loop.body]

    plain = [replace(s, value=replace(x, guard=())) for s, x in zip(fills, loads, strict=True)]

    def both(tested: bool) -> tuple[Statement, ...]:
        return (
            square(loop.index, name, [*(fills if tested or not how.whole else plain)], tested),
            square(name, loop.index, body, tested),
        )

    facts = low.graph.facts
    corners = [_least(g, first, size) for x in loads for g in x.guard]
    behind = [e - first[x] - size for x, e in ends.items() if not facts.divides(e, size)]
    behind += [e for e in dict.fromkeys(corners) if e is not None]
    if not how.whole or not behind:
        return [*found, *both(False)]
    if any((facts.bounds(e)[1] or size) < size for e in ends.values()):
        return [*found, *both(True)]
    partial = reduce(lambda a, b: Op("or", (a, b), BOOL), tests("lt", behind))
    return [*found, If(all_of(tests("ge", behind)), both(False)), If(partial, both(True))]


def with_loads(s: Statement, stands: dict[Load, Load]) -> Statement:
    """A statement that reads others in place of some loads."""
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

    if isinstance(s, Let | Fold):
        return replace(s, value=of(s.value))
    assert isinstance(s, Store)
    return replace(s, indices=tuple(map(of, s.indices)), value=of(s.value))
