"""Proofs that index expressions stay in bounds for every size, under conditions that hold.

A proof is exact; where none is found, sizes and positions are tried, and one that breaks the bound
is a counterexample. Neither is possible too: then the bound is left open, and said to be.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from math import gcd
from typing import ClassVar

from stagefuse.dsl.dims import Atom, Expr, as_expr, const, divide, expr_of, floordiv, sym
from stagefuse.dsl.facts import Facts

from .conditions import (
    combined,
    expanded,
    is_plain,
    multiplied,
    reached,
    sharpened,
    without,
)
from .opaque import opaque

SMALL = (0, 1, 2, 3, 4, 5, 8, 12, 17, 64, 1000)
TRIES = 300
GOALS = 40
"""Goals that one line of a proof may try."""
BARE_GOALS = 12
"""Goals of the proof that is tried first, from ranges alone: nearly all bounds have one, and what
conditions say need not be found out."""


@dataclass
class Bounds:
    """Conditions on sizes that hold, and what has been decided under them.

    `given` are expressions that are at least 0 at every call. `open` are bounds that were neither
    proved nor broken.
    """

    strict: ClassVar[bool] = False
    """Whether an open bound counts as broken, as it does in tests."""

    given: tuple[Expr, ...] = ()
    open: list[str] = field(default_factory=list)
    known: set[tuple[object, ...]] = field(default_factory=set)

    def broken(
        self, expr: Expr, facts: Facts, guards: Sequence[Expr], what: Callable[[], str]
    ) -> dict[str, int] | None:
        """Sizes and positions where `expr` is negative though all guards hold; None if unknown.

        `what` gives the text of what asks, for a bound that is left open.
        """
        if is_plain(expr, facts) or expr in guards or expr in self.given:
            return None
        if facts.is_chained(expr):
            return None
        key = (expr, tuple(guards), _ranges_of((expr, *guards), facts))
        if key in self.known:
            return None
        bare = _Search(facts, (), expr, BARE_GOALS).steps_to(expr)
        assumed = expanded((*guards, *self.given), facts)
        if bare or _follows(expr, facts, assumed) or facts.is_nonneg(expr):
            self.known.add(key)
            return None
        found = _counterexample(expr, facts, (*guards, *self.given))
        if found is None:
            self.open.append(f"{what()}: {expr} >= 0")
            return {} if self.strict else None
        return found

    def inside(
        self,
        index: Expr,
        extent: Expr,
        facts: Facts,
        guards: Sequence[Expr],
        what: Callable[[], str],
    ) -> str | None:
        """Why an index is outside 0..extent, or None."""
        for expr, side in ((index, "below 0"), (extent - 1 - index, f"not below {extent}")):
            sizes = self.broken(expr, facts, guards, what)
            if sizes is not None:
                at = ", ".join(f"{n} = {v}" for n, v in sizes.items())
                return f"{index} is {side} for {at}" if at else f"{index} may be {side}"
        return None


def _ranges_of(exprs: Iterable[Expr], facts: Facts) -> tuple[tuple[str, str], ...]:
    """The ranges of all symbols in expressions and in those ranges, as texts."""
    found = reached(exprs, facts).items()
    return tuple(sorted((n, " ".join(str(e) for e in ends if e is not None)) for n, ends in found))


def _bounds_of(end: Expr, top: bool) -> Iterator[Expr]:
    """An end of a range, and what it can't exceed: an argument of the least (greatest) in it."""
    kind = "min" if top else "max"
    for monomial, coefficient in end.terms:
        if coefficient == 1 and len(monomial) == 1 and monomial[0][0].kind == kind:
            rest = end - Expr(((monomial, coefficient),))
            yield from (rest + part for part in monomial[0][0].args)
    yield end


def _without_content(goal: Expr) -> Expr:
    """What is negative where an expression is, without the factor of all coefficients but that of
    the constant: 2 - s for 5 - 2*s."""
    constant = sum(c for monomial, c in goal.terms if not monomial)
    content = gcd(*(c for monomial, c in goal.terms if monomial))
    if content < 2:
        return goal
    return divide(goal - constant, const(content))[0] + constant // content


def _follows(goal: Expr, facts: Facts, conditions: Sequence[Expr]) -> bool:
    """Whether goal >= 0 is proved: from the conditions, or from what they say together."""
    if any((condition.as_int() or 0) < 0 for condition in conditions):
        return True  # nothing meets them
    sharp = sharpened(facts, conditions)
    shorter = sharp.simplify(goal)
    if shorter.length() < goal.length():  # ((W//4)*s + c) // (W//4) is s, where W is 4 at least
        goal = shorter
        if _Search(sharp, (), goal, BARE_GOALS).steps_to(goal):
            return True
    ways = [
        way for way in (
            opaque(goal, facts, conditions), (goal, facts, conditions),
            opaque(goal, facts, conditions, positions=True),
        ) if way is not None
    ]  # fmt: skip
    return any(_is_found(*way) for way in ways) or any(_is_found_together(*way) for way in ways)


def _is_found(goal: Expr, facts: Facts, conditions: Sequence[Expr]) -> bool:
    """Whether a proof from the conditions is found: at a tenth of the price of one from more."""
    return _Search(sharpened(facts, conditions), conditions, goal).proves(goal)


def _is_found_together(goal: Expr, facts: Facts, conditions: Sequence[Expr]) -> bool:
    """Whether a proof is found from the conditions and what they say together."""
    more = combined([goal], conditions, facts)
    if any(is_plain(-1 - condition, facts) for condition in more):
        return True
    conditions = (*conditions, *more)
    known = sharpened(facts, conditions)
    outright = multiplied(conditions, known)
    if not more and not outright:
        return False
    return _Search(known, (*conditions, *outright), goal).proves(goal)


class _Search:
    """Looks for a proof of goal >= 0: by intervals, else by way of goals that it follows from.

    Each step takes something away: a condition, a symbol, a function. `GOALS` bounds the work.
    """

    def __init__(
        self, facts: Facts, conditions: Sequence[Expr], goal: Expr, goals: int = GOALS
    ) -> None:
        self.facts, self.conditions = facts, conditions
        self.symbols = sorted(goal.symbols().union(*(c.symbols() for c in conditions)))
        self.failed: set[Expr] = set()
        self.left = goals
        self.plain = dict.fromkeys(conditions, True)
        self.slopes = [(condition, _slopes(condition)) for condition in conditions]
        self.depths: dict[str, int] = {}

    def proves(self, goal: Expr) -> bool:
        if self.steps_to(goal):
            return True
        for case in self._without_conditions(goal):
            self.left = GOALS // 3
            if self.steps_to(case):
                return True
        return self.facts.is_nonneg(goal)

    def _plain(self, goal: Expr) -> bool:
        if goal not in self.plain:
            self.plain[goal] = is_plain(goal, self.facts) or self.facts.is_lifted(goal)
        return self.plain[goal]

    def _positive(self, divisor: Expr) -> bool:
        goal = divisor - 1
        if self._plain(goal) or any(map(self._plain, self._without_conditions(goal))):
            return True
        return self._plain(divisor) and any(map(partial(self._is_among, divisor), self.symbols))

    def _is_among(self, count: Expr, name: str) -> bool:
        """Whether a symbol is one of a multiple of a count, which then isn't 0."""
        low, high = self.facts.ranges.get(name, (const(0), None))
        if high is None or not self._plain(as_expr(low)):
            return False
        ends = (divide(bound + 1, count) for bound in _bounds_of(as_expr(high), True))
        return any(times.terms and not left.terms for times, left in ends)

    def steps_to(self, goal: Expr) -> bool:
        """Whether steps lead to the goal from here, those that are left."""
        if self._plain(goal):
            return True
        if goal in self.failed or self.left <= 0:
            return False
        self.left -= 1
        self.failed.add(goal)
        if any(map(self._plain, self._without_conditions(goal))):
            return True
        moves = list(self._moves(goal))
        if any(all(map(self._plain, cases)) for cases in moves):
            return True
        if not self.conditions:
            moves.sort(key=_length)
        return any(all(map(self.steps_to, cases)) for cases in moves)

    def _moves(self, goal: Expr) -> Iterator[tuple[Expr, ...]]:
        """Lists of goals, each of which proves this one. What is exact has no alternative."""
        yield from self._bounded(goal)
        exact = next(self._divisions(goal), None) or next(self._eliminated(goal, True), None)
        if exact is not None:
            yield exact
            return
        yield from self._undivided(goal)
        yield from self._functions(goal, ("min", "max"))
        yield from islice(self._eliminated(goal, False), 1)
        yield from self._functions(goal, ("//", "%"))

    def _undivided(self, goal: Expr) -> Iterator[tuple[Expr, ...]]:
        """The goal without a factor of all its terms but the constant: one that is never negative
        if the constant isn't, and is left out; else one above 0, since f * x >= x for x >= 0."""
        terms = [(m, c) for m, c in goal.terms if m]
        constant = min(0, sum(c for m, c in goal.terms if not m))
        common = set.intersection(*({a for a, _ in m} for m, _ in terms)) if terms else set[Atom]()
        for atom in sorted(common):
            factor = expr_of(atom)
            if self._positive(factor) if constant else self._plain(factor):
                parts = (Expr(((without(m, atom), c),)) for m, c in terms)
                yield (sum(parts, const(constant)),)

    def _eliminated(self, goal: Expr, loops: bool) -> Iterator[tuple[Expr, ...]]:
        """A symbol at the end of its range that is worst for the goal.

        Those whose range rests on others (positions, inner loops first) or the others (sizes).
        """
        for name in sorted(goal.symbols(), key=self._depth, reverse=True):
            slope = goal.coefficient(name)
            if slope is None or not slope.terms or name not in self.facts.ranges:
                continue
            if (self._depth(name)[0] > 1) != loops:
                continue
            low, high = self.facts.ranges[name]
            if self._plain(slope):
                yield (goal.substitute({name: low}),)
            elif high is not None and self._plain(-slope):
                yield (goal.substitute({name: high}),)

    def _depth(self, name: str) -> tuple[int, str]:
        """How many symbols a range rests on, through other ranges."""
        if name not in self.depths:
            self.depths[name] = len(reached([sym(name)], self.facts))
        return self.depths[name], name

    def _bounded(self, goal: Expr) -> Iterator[tuple[Expr, ...]]:
        """The goal with the greatest value of a quotient whose numerator a condition bounds."""
        for monomial, coefficient in goal.terms:
            if coefficient > 0 or len(monomial) != 1 or monomial[0][1] != 1:
                continue
            atom = monomial[0][0]
            if atom.kind != "//":
                continue
            rest = goal - Expr(((monomial, coefficient),))
            for condition in self.conditions:
                most = self._most(condition, *atom.args)
                if most is not None:
                    yield (rest + coefficient * most,)

    def _most(self, condition: Expr, a: Expr, b: Expr) -> Expr | None:
        """The greatest a // b if a condition says that a is at most a number or below a multiple
        of b."""
        most, by = condition + a, b.as_int()
        if by is not None:
            number = most.as_int()
            return const(number // by) if number is not None and by > 0 else None
        times, left = divide(most + 1, b)
        return times - 1 if times.terms and not left.terms and self._positive(b) else None

    def _divisions(self, goal: Expr) -> Iterator[tuple[Expr, ...]]:
        """The goal times the divisor of a quotient that is a term of it: of a position, which is
        subtracted, before that of a size."""
        goal = _without_content(goal)
        for monomial, coefficient in sorted(goal.terms, key=lambda term: term[1] > 0):
            if abs(coefficient) != 1 or len(monomial) != 1:
                continue
            ((atom, power),) = monomial
            if atom.kind == "//" and power == 1 and self._positive(atom.args[1]):
                a, b = atom.args
                rest = goal - Expr(((monomial, coefficient),))
                # for b >= 1: a // b <= r is a < (r + 1) * b, and a // b >= -r is a >= -r * b
                yield ((rest + 1) * b - 1 - a if coefficient < 0 else rest * b + a,)

    def _functions(self, goal: Expr, kinds: tuple[str, ...]) -> Iterator[tuple[Expr, ...]]:
        for monomial, coefficient in goal.terms:
            for atom, power in monomial:
                if atom.kind not in kinds or power != 1:
                    continue
                slope = Expr(((tuple(p for p in monomial if p[0] != atom), coefficient),))
                rest = goal - Expr(((monomial, coefficient),))
                if self._plain(slope):
                    yield from self._replaced(atom, slope, rest, True)
                elif self._plain(-slope):
                    yield from self._replaced(atom, slope, rest, False)

    def _replaced(
        self, atom: Atom, slope: Expr, rest: Expr, rising: bool
    ) -> Iterator[tuple[Expr, ...]]:
        """The goal rest + slope * atom, with a bound of the atom in its place."""
        a, b = atom.args
        options = (rest + slope * a, rest + slope * b)
        if atom.kind in ("min", "max"):
            if (atom.kind == "min") == rising:
                yield options
            else:
                # where more cancels first, then the shorter: it is proved, or fails, at less cost
                order = sorted(options, key=lambda o: (len(o.terms), o.length()))
                yield from ((o,) for o in order)
            return
        if atom.kind == "//" and rising and self._plain(b):
            yield (rest, a)  # for a >= 0 the quotient is not negative, by 0 neither
        if not self._positive(b):
            return
        if atom.kind == "%":
            yield (rest,) if rising else (rest + slope * (b - 1),)
        else:
            for end in self._ends(a, not rising):
                yield (rest + slope * floordiv(end, b, self.facts),)
            times = floordiv(slope, b, self.facts)
            if times * b == slope:
                # a - b + 1 <= b * (a // b) <= a
                yield (rest + times * (a - b + 1) if rising else rest + times * a,)

    def _ends(self, expr: Expr, top: bool) -> Iterator[Expr]:
        """What is never below (`top`) or above an expression: itself with a position, of an inner
        loop first, at the end of its range."""
        for name in sorted(expr.symbols(), key=self._depth, reverse=True):
            slope = expr.coefficient(name)
            if slope is None or name not in self.facts.ranges or self._depth(name)[0] < 2:
                continue
            low, high = self.facts.ranges[name]
            if self._plain(slope) or self._plain(-slope):
                greatest = self._plain(slope) == top
                end = high if greatest else low
                if end is not None:
                    for bound in _bounds_of(as_expr(end), greatest):
                        yield expr.substitute({name: bound})
                return

    def _without_conditions(self, goal: Expr) -> Iterator[Expr]:
        """The goal less a condition that holds: it follows from what is left."""
        outside = _slopes(goal)
        for condition, inside in self.slopes:
            if not inside.keys().isdisjoint(outside):
                for times in _multiples(goal, inside, outside):
                    if self._plain(times):
                        yield goal - condition * times


def _length(cases: tuple[Expr, ...]) -> int:
    """How long goals are: where most cancels, a proof is found soonest, or fails."""
    return sum([case.length() for case in cases])


def _multiples(
    expr: Expr, inside: Mapping[str, int | None], outside: Mapping[str, int | None]
) -> tuple[Expr, ...]:
    """Factors by which a condition may be contained in an expression, with no term that falls,
    given the slopes of both."""
    found = {const(1): None}
    for name in sorted(inside.keys() & outside.keys()):
        own, wanted = inside[name], outside[name]
        if not own:
            continue
        if wanted is not None:
            if wanted % own == 0 and wanted // own > 0:
                found[const(wanted // own)] = None
            continue
        slope = expr.coefficient(name)
        if slope is not None:
            times, left = divide(slope, const(own))
            if times.terms and not left.terms and all(c > 0 for _, c in times.terms):
                found[times] = None
    return tuple(found)


def _slopes(expr: Expr) -> dict[str, int | None]:
    """The symbols of an expression, each with its coefficient if that is a number, else None."""
    found: dict[str, int | None] = {}
    for monomial, coefficient in expr.terms:
        if len(monomial) == 1 and monomial[0][1] == 1 and monomial[0][0].kind == "sym":
            name = monomial[0][0].name
            found[name] = None if name in found else coefficient
        else:
            found.update((name, None) for atom, _ in monomial for name in atom.symbols)
    return found


def _counterexample(expr: Expr, facts: Facts, conditions: Sequence[Expr]) -> dict[str, int] | None:
    """Values in all ranges under which all conditions hold and `expr` is negative."""
    rng = random.Random(0)
    wanted = sorted(frozenset[str]().union(*(e.symbols() for e in (expr, *conditions))))
    for _ in range(TRIES):
        values: dict[str, int] = {}
        if not all(_assign(name, facts, values, rng, 0) for name in wanted):
            continue
        if any(e.evaluate(values) < 0 for e in conditions):
            continue
        if expr.evaluate(values) < 0 and _divisible(facts, values):
            shown = sorted(expr.symbols())
            return {n: values[n] for n in shown}
    return None


def _divisible(facts: Facts, values: dict[str, int]) -> bool:
    for whole, by in facts.divisible:
        if (whole.symbols() | as_expr(by).symbols()) <= values.keys():
            number = as_expr(by).evaluate(values)
            if number and whole.evaluate(values) % number:
                return False
    return True


def _assign(
    name: str, facts: Facts, values: dict[str, int], rng: random.Random, depth: int
) -> bool:
    """Gives a symbol a value in its range; False if that is empty."""
    if name in values:
        return True
    if depth > 20:
        return False
    low, high = (None if e is None else as_expr(e) for e in facts.ranges.get(name, (0, None)))
    assert low is not None
    for end in (low, high):
        for other in sorted(end.symbols()) if end is not None else ():
            if not _assign(other, facts, values, rng, depth + 1):
                return False
    first = low.evaluate(values)
    last = None if high is None else high.evaluate(values)
    if last is not None and last < first:
        return False
    choices = [first + s for s in SMALL if last is None or first + s <= last]
    if last is not None:
        choices += [last, (first + last) // 2]
    values[name] = rng.choice(choices)
    return True


def size_of(shape: Sequence[Expr]) -> Expr:
    """The number of elements."""
    total = const(1)
    for size in shape:
        total = total * size
    return total


def nonempty(shape: Sequence[Expr]) -> tuple[Expr, ...]:
    """What holds wherever a position of this shape exists."""
    return tuple(d - 1 for d in shape if (d.as_int() or 0) < 1)


def positions(facts: Facts, symbols: Sequence[str], shape: Sequence[Expr]) -> Facts:
    """The facts with each symbol within its axis."""
    return facts.with_ranges({s: (0, d - 1) for s, d in zip(symbols, shape, strict=True)})
