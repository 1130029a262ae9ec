"""Proofs that a kernel stores every element of its results, for all sizes.

A store in loops covers boxes of its buffer: an interval along each axis. Statements are walked from
the inside out: where the intervals of successive iterations meet, a loop makes one of them, and
boxes that lie side by side become one. What covers the whole buffer in the end is proved; anything
else is not, which says nothing of the kernel. `inout` buffers are not asked about: they hold what
was there before.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import product

from stagefuse.compiler.kernel_ir import (
    Buffer,
    Const,
    For,
    If,
    Index,
    Kernel,
    Op,
    Statement,
    Store,
    Value,
)
from stagefuse.compiler.proofs.bounds import Bounds, size_of
from stagefuse.dsl.dims import Expr, const, maximum, minimum, sym
from stagefuse.dsl.dtypes import I64
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen

Interval = tuple[Expr, Expr]
"""From the first to the second, which is not in it."""


@frozen
class Box:
    """Elements of a buffer that are stored where every condition is at least 0."""

    sides: tuple[Interval, ...]
    conditions: tuple[Expr, ...] = ()


def uncovered(kernel: Kernel, facts: Facts, given: tuple[Expr, ...] = ()) -> list[str]:
    """The `out` buffers of which it is not proved that every element is stored."""
    return [
        buffer.name
        for buffer in kernel.buffers
        if buffer.mode == "out"
        and not any(
            _Cover(kernel, facts, given, buffer, joins).is_whole()
            for joins in product((False, True), repeat=max(len(buffer.shape) - 1, 0))
        )
    ]


class _Cover:
    """What one buffer's stores cover; `joins` says of each axis after the first whether it is taken
    as one with the axis before, in which whole rows meet."""

    def __init__(
        self, kernel: Kernel, facts: Facts, given: tuple[Expr, ...], buffer: Buffer,
        joins: tuple[bool, ...],
    ) -> None:  # fmt: skip
        self.kernel, self.facts, self.given = kernel, facts, given
        self.buffer, self.joins = buffer, joins
        sizes: list[list[Expr]] = []
        for size, join in zip(buffer.shape, (False, *joins), strict=False):
            if join:
                sizes[-1].append(size)
            else:
                sizes.append([size])
        self.shape = tuple(map(size_of, sizes))

    def is_whole(self) -> bool:
        loops = [(name, const(0), extent) for name, extent in self.kernel.parallel]
        facts = self.facts
        for name, lo, hi in loops:
            facts = facts.with_ranges({name: (lo, hi - 1)})
        boxes = list(self._block(self.kernel.body, facts))
        for name, lo, hi in reversed(loops):
            facts = self.facts
            for outer, low, high in loops[: [n for n, _, _ in loops].index(name)]:
                facts = facts.with_ranges({outer: (low, high - 1)})
            boxes = self._joined(self._over(boxes, name, lo, hi, facts), facts)
        return any(self._fills(box) for box in boxes)

    def _fills(self, box: Box) -> bool:
        sides = zip(box.sides, self.shape, strict=True)
        return not box.conditions and all(
            self._proves(-low, self.facts) and self._proves(high - extent, self.facts)
            for (low, high), extent in sides
        )

    def _proves(self, goal: Expr, facts: Facts, guards: Sequence[Expr] = ()) -> bool:
        bounds = Bounds(self.given)
        return bounds.broken(goal, facts, guards, str) is None and not bounds.open

    def _block(self, body: Sequence[Statement], facts: Facts) -> Iterator[Box]:
        found: list[Box] = []
        for s in body:
            match s:
                case Store() if s.buffer == self.buffer.name and not s.by:
                    found += self._stored(s)
                case For():
                    inner = facts.with_ranges({s.index: (s.lo, s.hi - 1)})
                    found += self._over(self._block(s.body, inner), s.index, s.lo, s.hi, facts)
                case If():
                    conditions = _conditions(s.condition)
                    if conditions is not None:
                        for box in self._block(s.body, facts):
                            found.append(Box(box.sides, (*box.conditions, *conditions)))
        yield from self._joined(found, facts)

    def _stored(self, s: Store) -> Iterator[Box]:
        places = [place.expr for place in s.indices if isinstance(place, Index)]
        if len(places) != len(s.indices):
            return
        found: list[Expr] = []
        for place, extent, join in zip(
            places, self.buffer.shape, (False, *self.joins), strict=False
        ):
            found.append(found.pop() * extent + place if join else place)
        yield Box(tuple((place, place + 1) for place in found))

    def _over(
        self, boxes: Iterator[Box] | Sequence[Box], name: str, lo: Expr, hi: Expr, facts: Facts
    ) -> Iterator[Box]:
        """What boxes cover once an index has gone over its range."""
        for box in boxes:
            range_of = self._narrowed(box, name, lo, hi)
            moving = [i for i, (a, b) in enumerate(box.sides) if name in a.symbols() | b.symbols()]
            if range_of is None or len(moving) > 1:
                continue
            low, high, conditions = range_of
            if not moving:
                if self._proves(high - low - 1, facts):
                    yield Box(box.sides, conditions)
                continue
            first, last = box.sides[moving[0]]
            back = {name: low + high - 1 - sym(name)}
            for side in ((first, last), (first.substitute(back), last.substitute(back))):
                if self._meets(side, name, (low, high), facts):
                    ends = side[0].substitute({name: low}), side[1].substitute({name: high - 1})
                    at = moving[0]
                    yield Box((*box.sides[:at], ends, *box.sides[at + 1 :]), conditions)
                    break

    def _meets(self, side: Interval, name: str, over: Interval, facts: Facts) -> bool:
        """Whether intervals of an index and of the next meet or overlap, in rising order; those
        that end at most at one place need do so before it. No iterations have to make nothing."""
        low, high = over
        first, last = side
        within = facts.with_ranges({name: (low, high - 2)})
        following = first.substitute({name: sym(name) + 1})
        nothing = first.substitute({name: low}) - last.substitute({name: high - 1})
        return (
            self._proves(following - first, within, [high - 2 - low])
            and any(
                self._proves(end - following, within, [high - 2 - low])
                for end in (last, *_unlimited(last, lambda limit: name not in limit.symbols()))
            )
            and (self._proves(high - low - 1, facts) or self._proves(nothing, facts, [low - high]))
        )

    def _narrowed(
        self, box: Box, name: str, lo: Expr, hi: Expr
    ) -> tuple[Expr, Expr, tuple[Expr, ...]] | None:
        """The range in which the conditions on an index hold, and those that are left."""
        left: list[Expr] = []
        for condition in box.conditions:
            if name not in condition.symbols():
                left.append(condition)
                continue
            slope = condition.coefficient(name)
            if slope == const(1):
                lo = maximum(lo, sym(name) - condition)
            elif slope == const(-1):
                hi = minimum(hi, condition + sym(name) + 1)
            else:
                return None
        return lo, hi, tuple(left)

    def _joined(self, boxes: Iterator[Box] | Sequence[Box], facts: Facts) -> list[Box]:
        """The boxes, those in one that lie side by side."""
        found: list[Box] = []
        for box in boxes:
            while found and (both := self._beside(found[-1], box, facts)) is not None:
                found.pop()
                box = both
            found.append(box)
        return found

    def _beside(self, a: Box, b: Box, facts: Facts) -> Box | None:
        apart = [i for i, (x, y) in enumerate(zip(a.sides, b.sides, strict=True)) if x != y]
        if a.conditions != b.conditions or len(apart) > 1:
            return None
        if not apart:
            return a
        (axis,) = apart
        (first, end), (start, last) = a.sides[axis], b.sides[axis]
        reach = end if end == start else maximum(first, end)  # nothing ends before it begins
        reaches = (reach, *_unlimited(end, lambda limit: limit == last))
        if not any(self._proves(reach - start, facts) for reach in reaches):
            return None
        if not self._proves(last - end, facts):
            return None
        return Box((*a.sides[:axis], (first, last), *a.sides[axis + 1 :]), a.conditions)


def _unlimited(end: Expr, is_limit: Callable[[Expr], bool]) -> Iterator[Expr]:
    """An end without a limit that all that follows has too: x of min(x, most). What is below the
    limit is then covered if intervals that end at x meet."""
    for monomial, coefficient in end.terms:
        if coefficient != 1 or len(monomial) != 1 or monomial[0][1] != 1:
            continue
        atom = monomial[0][0]
        rest = end - Expr(((monomial, 1),))
        for part, limit in (atom.args, atom.args[::-1]) if atom.kind == "min" else ():
            if is_limit(rest + limit):
                yield rest + part


def _conditions(value: Value) -> tuple[Expr, ...] | None:
    """Expressions that are at least 0 just where a bool value holds, or None."""
    if not isinstance(value, Op) or len(value.args) != 2:
        return None
    a, b = value.args
    if value.fn == "and":
        left, right = _conditions(a), _conditions(b)
        return None if left is None or right is None else (*left, *right)
    x, y = _integer(a), _integer(b)
    if x is None or y is None:
        return None
    gap = x - y
    kinds = {"ge": gap, "gt": gap - 1, "le": -gap, "lt": -gap - 1}
    return (kinds[value.fn],) if value.fn in kinds else None


def _integer(value: Value) -> Expr | None:
    if isinstance(value, Index):
        return value.expr
    return const(int(value.value)) if isinstance(value, Const) and value.dtype == I64 else None
