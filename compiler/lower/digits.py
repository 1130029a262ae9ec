"""Pointwise kernels whose innermost position is taken apart by a number, as in windows.

An index such as `d // 16` or `d % 28` costs a division, and a gather, at each element. A loop over
quotients with one over remainders inside has neither: what is read lies side by side.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

from stagefuse.compiler.cpu.values import renamed
from stagefuse.compiler.kernel_ir import For, Statement, Store
from stagefuse.compiler.patterns.windows import cuts_of
from stagefuse.dsl.dims import const, sym

from .blocks import Parallel
from .expressions import exprs_of
from .values import Lowering

LONG, SHORT = 8, 4
"""Remainders from which on they are a loop, and up to which they are written out side by side."""
WRITTEN = 32
"""Up to which they are where they are taken apart again, as the rows and columns of a window: the
guards of each are the same for all quotients."""


def in_digits(low: Lowering, made: Parallel) -> Parallel:
    """A pointwise kernel that was made, its loop along a row over quotients and remainders."""
    body = low.scopes[0].body
    loop = body[0] if len(body) == 1 else None
    if not isinstance(loop, For) or not loop.vector or loop.lo != const(0):
        return made
    size, cuts = loop.hi.as_int(), set[int]()
    for expr in exprs_of(loop.body):
        found = cuts_of(expr, loop.index)
        if found is None:
            return made
        cuts |= found
    if not cuts or not size or size % min(cuts) or any(cut % min(cuts) for cut in cuts):
        return made
    (by, *others), stores = sorted(cuts), all(isinstance(s, Store) for s in loop.body)
    if LONG <= by < size and stores:
        body[:] = [_nested(low, loop, by, size // by)]
    elif stores and (by <= SHORT if not others else _is_chain([*sorted(cuts), size])):
        last = max(cuts)
        body[:] = [_side_by_side(low, loop, last, size // last)]
    return made


def _is_chain(cuts: list[int]) -> bool:
    """Whether numbers take a position apart one after the other, into few remainders of all; the
    last one is the size of the loop."""
    return cuts[-2] <= WRITTEN and all(b % a == 0 for a, b in pairwise(cuts))


def _nested(low: Lowering, loop: For, by: int, count: int) -> For:
    """A loop over the remainders in one over the quotients."""
    quotient, rest = f"{loop.index}q", f"{loop.index}r"
    inside = _at(low, loop, quotient, count, by, rest)
    inner = For(rest, const(0), const(by), inside, vector=True)
    return For(quotient, const(0), const(count), (inner,))


def _side_by_side(low: Lowering, loop: For, by: int, count: int) -> For:
    """A loop over the quotients, with all remainders of each."""
    quotient = f"{loop.index}q"
    inside = tuple(
        s for rest in range(by) for s in _at(low, loop, quotient, count, by, rest)
    )
    return replace(loop, index=quotient, hi=const(count), body=inside)


def _at(
    low: Lowering, loop: For, quotient: str, count: int, by: int, rest: str | int
) -> tuple[Statement, ...]:
    """The loop's stores at a quotient and a remainder."""
    ranges = {quotient: (0, count - 1)}
    if isinstance(rest, str):
        ranges[rest] = (0, by - 1)
    facts = low.facts.with_ranges(ranges)
    place = sym(quotient) * by + (sym(rest) if isinstance(rest, str) else rest)
    found = list[Statement]()
    for s in loop.body:
        assert isinstance(s, Store)
        value, *indices = (renamed(v, {loop.index: place}, facts) for v in (s.value, *s.indices))
        found.append(replace(s, indices=tuple(indices), value=value))
    return tuple(found)
