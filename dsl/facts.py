"""What is known of the symbols of expressions, and what follows: bounds, equality, divisibility."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import field
from functools import cached_property

from .chains import Edges, difference, edges_of, is_ordered
from .dims import (
    APPLY,
    Atom,
    Expr,
    IntLike,
    Monomial,
    as_expr,
    const,
    divide,
    expr_of,
    floordiv,
    is_size,
    join_divisions,
    sym,
)
from .frozen import frozen
from .intervals import BY_KIND, Interval, is_open, product, within_both
from .points import Point, is_negative_at, points
from .quotients import quotients_of, unfolded, unnested

MOST_EXPRESSIONS = 200
"""How many expressions a proof may look at before the question is left open."""
MOST_FUEL = 5
"""How many atoms a proof may replace, one after the other."""
MOST_BOUNDS, MOST_DEEP = 400, 120
"""How many bounds a bound may be found by, and how many of them within each other."""
MOST_RANGES = 12
"""How many ranges the interval of a symbol is looked for through."""


@frozen
class Facts:
    """What is known of symbols: inclusive ranges, and expressions that a number divides.

    A symbol without a range is at least 0. A bound may itself be an expression.
    """

    ranges: Mapping[str, tuple[IntLike, IntLike | None]] = field(default_factory=dict)
    divisible: tuple[tuple[Expr, IntLike], ...] = ()

    def with_ranges(self, ranges: Mapping[str, tuple[IntLike, IntLike | None]]) -> Facts:
        """These facts with further symbols."""
        return Facts({**self.ranges, **ranges}, self.divisible)

    def with_divisor(self, expr: Expr, number: int) -> Facts:
        """These facts where a number divides an expression too."""
        return Facts(self.ranges, (*self.divisible, (expr, number)))

    def at_element(self, names: Sequence[str], shape: Sequence[Expr]) -> Facts:
        """These facts at an element of a tensor: `names` are within its axes, and no axis is
        empty, since there is an element."""
        key = (tuple(names), tuple(shape))
        if key not in self._at:
            self._at[key] = self._at_element(*key)
        return self._at[key]

    @cached_property
    def _at(self) -> dict[tuple[tuple[str, ...], tuple[Expr, ...]], Facts]:
        """Facts at elements, which remember what could not be proved there."""
        return {}

    def _at_element(self, names: Sequence[str], shape: Sequence[Expr]) -> Facts:
        found = self
        for name, size in zip(names, shape, strict=True):
            axis = size.as_symbol()
            if axis is None and len(size.symbols()) == 1:  # blocks of an axis
                (only,) = size.symbols()
                axis = only if size.substitute({only: const(0)}).as_int() == 0 else None
            if axis is not None:
                low, high = found.ranges.get(axis, (0, None))
                least = found.bounds(low)[0]
                if least is None or least < 1:
                    found = found.with_ranges({axis: (1, high)})
            found = found.with_ranges({name: (0, size - 1)})
        return found

    def replaced(self, expr: Expr, values: Mapping[str, Expr]) -> Expr:
        """An expression with symbols replaced at once, once for the same of those it has."""
        key = expr, tuple([(n, values[n]) for n in expr.symbols() if n in values])
        if not key[1]:
            return expr
        found = self._replaced.get(key)
        if found is None:
            found = self._replaced[key] = expr.substitute(values, self)
        return found

    @cached_property
    def _replaced(self) -> dict[tuple[Expr, tuple[tuple[str, Expr], ...]], Expr]:
        """What `replaced` made."""
        return {}

    def bounds(self, expr: IntLike) -> Interval:
        """The least and greatest value that can be proved; None where there is no bound."""
        return self._bounds_of(as_expr(expr), [MOST_BOUNDS], MOST_DEEP)

    @cached_property
    def _bounds(self) -> dict[Expr, Interval]:
        """What `bounds` found: ends replaced in another order lead to the same expression."""
        return {}

    def _bounds_of(self, expr: Expr, left: list[int], depth: int) -> Interval:
        """`left` counts down the expressions that are looked at, `depth` those within another."""
        if expr in self._bounds:
            return self._bounds[expr]
        low, high = self._interval(expr, 0)
        left[0] = max(left[0] - 1, 0) if depth else 0
        if not left[0]:
            return low, high
        known = self._with_fixed(expr)
        if known != expr:
            return within_both((low, high), self._bounds_of(known, left, depth - 1))
        for name in sorted(expr.symbols(), reverse=True):
            for end in self.ranges.get(name, (0, None)):
                if end is None or not is_open(end):
                    continue
                slope = expr.coefficient(name)
                sign = self._sign(slope) if slope is not None and slope.terms else None
                if sign is None:
                    continue
                a, b = self._bounds_of(expr.substitute({name: end}), left, depth - 1)
                ends = (None, b) if (end is self.ranges[name][1]) == (sign > 0) else (a, None)
                low, high = within_both((low, high), ends)
                if not left[0]:
                    return low, high
        self._bounds[expr] = low, high
        return low, high

    def interval(self, expr: Expr) -> Interval:
        """Ends between which it lies, by interval arithmetic alone: quick, and often wide."""
        return self._interval(expr, 0)

    def _sign(self, expr: Expr) -> int | None:
        low, high = self._interval(expr, 0)
        if low is not None and low >= 0:
            return 1
        if high is not None and high <= 0:
            return -1
        return None

    def _interval(self, expr: Expr, depth: int) -> Interval:
        low: int | None = 0
        high: int | None = 0
        for monomial, coefficient in expr.terms:
            least, most = self._span(monomial, depth) if monomial else (1, 1)
            if coefficient < 0:
                least, most = most, least
            low = None if low is None or least is None else low + coefficient * least
            high = None if high is None or most is None else high + coefficient * most
        return low, high

    def _span(self, monomial: Monomial, depth: int) -> Interval:
        """The interval of a product of atoms."""
        (atom, power), *others = monomial
        span = first = self._ends_of(atom, depth)
        if power == 1 and not others:
            return span
        for _ in range(power - 1):
            span = product(span, first)
        for atom, power in others:
            around = self._ends_of(atom, depth)
            for _ in range(power):
                span = product(span, around)
        return span

    @cached_property
    def _ends(self) -> dict[tuple[Atom, int], Interval]:
        """What `_ends_of` found: sizes that nest, each read twice, take no power of two."""
        return {}

    def _ends_of(self, atom: Atom, depth: int) -> Interval:
        """The interval of an atom; `depth` counts the ranges that it was reached through."""
        if (atom, depth) not in self._ends:
            made = self._symbol(atom.name, depth) if atom.kind == "sym" else self._of(atom, depth)
            self._ends[atom, depth] = made
        return self._ends[atom, depth]

    def _symbol(self, name: str, depth: int) -> Interval:
        if depth > MOST_RANGES:
            return 0 if is_size(name) else None, None
        low, high = self.ranges.get(name, (0, None))
        top = None if high is None else self._interval(as_expr(high), depth + 1)[1]
        return self._interval(as_expr(low), depth + 1)[0], top

    def _of(self, atom: Atom, depth: int) -> Interval:
        a, b = (self._interval(arg, depth) for arg in atom.args)
        return BY_KIND[atom.kind](a, b)

    def is_nonneg(self, expr: IntLike) -> bool:
        """Whether it is proved to be at least 0."""
        expr = as_expr(expr)
        found = self._nonneg.get(expr)
        if found is None:
            found = self.is_chained(expr) or self._prove_nonneg(expr, MOST_FUEL, [MOST_EXPRESSIONS])
            found = found or self.is_lifted(expr)
            if not found and (less := self._undivided(expr)) != expr:
                found = self._prove_nonneg(less, MOST_FUEL, [MOST_EXPRESSIONS])
            if not found and (flat := unnested(expr)) != expr:
                found = self._prove_nonneg(flat, MOST_FUEL, [MOST_EXPRESSIONS])
            if not found and (whole := self._without_remainders(expr)) != expr:
                found = self._prove_nonneg(whole, MOST_FUEL, [MOST_EXPRESSIONS])
            self._nonneg[expr] = found
        return found

    def is_chained(self, goal: Expr) -> bool:
        """Whether a chain of ranges, each of which ends at the next symbol, says that it is at
        least 0."""
        ends = difference(goal)
        return ends is not None and is_ordered(self._chains, *ends)

    @cached_property
    def _chains(self) -> Edges:
        """Which symbols the ranges bound by each other."""
        return edges_of(self.ranges)

    def is_lifted(self, goal: Expr) -> bool:
        """Whether intervals say that it is at least 0 once every factor is its least value, which
        is above 0, and what it is more: n*m - n is n*x for m = 1 + x."""
        falling = {atom for monomial, c in goal.terms if c < 0 for atom, _ in monomial}
        products = [m for m, c in goal.terms if c > 0 and sum(power for _, power in m) > 1]
        if not any(atom in falling for monomial in products for atom, _ in monomial):
            return False
        lifted: dict[Atom, Expr] = {}
        ranges: dict[str, tuple[IntLike, IntLike | None]] = {}
        for atom in sorted({atom for monomial, _ in goal.terms for atom, _ in monomial}):
            low, high = self.interval(expr_of(atom))
            if low is None or low < 0:
                return False
            name = f"{atom} - {low}"
            ranges[name] = (0, None if high is None else high - low)
            lifted[atom] = sym(name) + low
        total = const(0)
        for monomial, c in goal.terms:
            product = const(c)
            for atom, power in monomial:
                for _ in range(power):
                    product = product * lifted[atom]
            total = total + product
        least = Facts(ranges).interval(total)[0]
        return least is not None and least >= 0

    def _undivided(self, expr: Expr) -> Expr:
        """What is negative wherever `expr` is, without the quotients by numbers that do not divide
        what they are times, and those by sizes: 2*K + 1 - K for K - K // 2.

        For b > 0, `expr` is at least 0 where b * expr + b - 1 is, and b * (a // b) is from
        a - b + 1 to a.
        """
        for _ in range(MOST_FUEL):
            for monomial, coefficient in expr.terms:
                inner = [p for p in monomial if p[0].kind == "//"]
                if len(inner) != 1 or inner[0][1] != 1:
                    continue
                a, by = inner[0][0].args
                slope = Expr(((tuple(p for p in monomial if p not in inner), coefficient),))
                number, sign = by.as_int(), self._sign(slope)
                left = slope.as_int() in (1, -1) if number is None else coefficient % number
                if sign is not None and left and self._sign(by - 1) == 1:
                    rest = expr - Expr(((monomial, coefficient),))
                    expr = rest * by + slope * (a if sign < 0 else a - by + 1) + (by - 1)
                    break
            else:
                break
        return expr

    @cached_property
    def _nonneg(self) -> dict[Expr, bool]:
        """What `is_nonneg` found."""
        return {}

    def _without_remainders(self, expr: Expr) -> Expr:
        """The same with a - b * (a // b) for a % b where that is taken away: j - j % 2 is
        2 * (j // 2)."""
        for monomial, c in expr.terms:
            (atom, power), *others = monomial or ((None, 0),)
            if c > 0 or atom is None or atom.kind != "%" or power != 1 or others:
                continue
            a, by = atom.args
            if self._sign(by - 1) == 1:
                expr = expr - c * expr_of(atom) + c * a - c * by * floordiv(a, by, self)
        return expr

    def _prove_nonneg(self, expr: Expr, fuel: int, left: list[int]) -> bool:
        """Intervals first; then any one atom is replaced by its worst case, and again.

        `left` counts down the expressions that are looked at.
        """
        low = self._interval(expr, 0)[0]
        if low is not None and low >= 0:
            return True
        if fuel <= self._unproved.get(expr, 0) or not left[0]:
            return False
        if any(is_negative_at(expr, point) for point in self._points):
            self._unproved[expr] = MOST_FUEL
            return False
        left[0] -= 1
        for cases in self._worst_cases(expr):
            if all(self._prove_nonneg(case, fuel - 1, left) for case in cases):
                return True
        if left[0]:
            self._unproved[expr] = fuel
        return False

    @cached_property
    def _points(self) -> list[Point]:
        """Some sizes that these facts allow: what is negative at one of them has no proof."""
        return [point for point in points(self.ranges) if self._divides_at(point)]

    def _divides_at(self, point: Point) -> bool:
        """Whether numbers divide there what they are known to divide."""
        try:
            values = [(e.evaluate(point), as_expr(by).evaluate(point)) for e, by in self.divisible]
        except KeyError:
            return False
        return all(value % by == 0 if by else value == 0 for value, by in values)

    @cached_property
    def _unproved(self) -> dict[Expr, int]:
        """Expressions that no proof was found for, and with how much fuel.

        Atoms replaced in another order lead to the same expression again.
        """
        return {}

    def _worst_cases(self, expr: Expr) -> Iterator[list[Expr]]:
        """Lists of expressions: where all of one list are not negative, neither is `expr`."""
        for name in sorted(expr.symbols(), reverse=True):
            ends = self.ranges.get(name, (0, None))
            if not any(map(is_open, ends)):
                continue
            slope = expr.coefficient(name)
            sign = self._sign(slope) if slope is not None and slope.terms else None
            if sign is not None:
                end = ends[0] if sign > 0 else ends[1]
                if end is not None and is_open(end):
                    yield [expr.substitute({name: end})]
        for monomial, coefficient in expr.terms:
            for atom, power in monomial:
                if power != 1 or atom.kind == "sym":
                    continue
                slope = Expr(((tuple(p for p in monomial if p[0] != atom), coefficient),))
                sign = self._sign(slope)
                if sign is not None:
                    rest = expr - Expr(((monomial, coefficient),))
                    yield from self._worst_of_function(atom, slope, rest, sign)

    def _worst_of_function(
        self, atom: Atom, slope: Expr, rest: Expr, sign: int
    ) -> Iterator[list[Expr]]:
        a, b = atom.args
        if atom.kind in ("min", "max"):
            options = [rest + slope * arg for arg in atom.args]
            if (atom.kind == "min") == (sign > 0):
                yield options
            else:
                yield from ([option] for option in options)
        elif atom.kind == "//" and self._sign(b - 1) == 1:
            # a - b + 1 <= b * (a // b) <= a for b >= 1
            scaled, remainder = divide(slope, b)
            if scaled.terms and not remainder.terms:
                yield [rest + scaled * (a if sign < 0 else a - b + 1)]
            if sign > 0:
                yield [rest, a]
        elif atom.kind == "%" and self._sign(b - 1) == 1:
            yield [rest + slope * (b - 1)] if sign < 0 else [rest]

    def is_positive(self, expr: IntLike) -> bool:
        """Whether it is proved to be at least 1."""
        return self.is_nonneg(as_expr(expr) - 1)

    def prove_le(self, a: IntLike, b: IntLike) -> bool:
        return self.is_nonneg(as_expr(b) - as_expr(a))

    def prove_lt(self, a: IntLike, b: IntLike) -> bool:
        return self.is_nonneg(as_expr(b) - as_expr(a) - 1)

    def prove_eq(self, a: IntLike, b: IntLike) -> bool:
        """Whether two expressions are equal for every size."""
        a, b = as_expr(a), as_expr(b)
        if a == b or self.simplify(a) == self.simplify(b):
            return True
        same = self.bounds(a - b) == (0, 0) or unnested(a) == unnested(b)
        return same or unfolded(a) == unfolded(b)

    def simplify(self, expr: Expr) -> Expr:
        """The expression rebuilt with these facts."""
        expr = self._with_fixed(expr)
        if not any(atom.args for monomial, _ in expr.terms for atom, _ in monomial):
            return expr  # a sum of products of symbols
        total = const(0)
        for monomial, coefficient in expr.terms:
            product = const(coefficient)
            for atom, power in monomial:
                factor = expr_of(atom)
                if atom.kind != "sym":
                    a, b = (self.simplify(arg) for arg in atom.args)
                    factor = APPLY[atom.kind](a, b, self)
                for _ in range(power):
                    product = product * factor
            total = total + product
        return self._undo_division(join_divisions(total, self))

    def _with_fixed(self, expr: Expr) -> Expr:
        """The expression without the symbols that have one value."""
        found = {n: value for n in expr.symbols() if (value := self._fixed(n)) is not None}
        return expr.substitute(found, self) if found else expr

    def _fixed(self, name: str) -> Expr | None:
        """What a symbol is that has one value, in symbols that have not; None for these."""
        pending = [name]
        while pending:
            low, high = self.ranges.get(pending[-1], (0, None))
            value = as_expr(low) if high is not None and low == high else None
            parts = [] if value is None else sorted(value.symbols())
            left = [n for n in parts if n not in self._known and n not in pending]
            if left:
                pending += left
                continue
            if value is not None:
                known = {n: v for n in parts if (v := self._known.get(n)) is not None}
                value = value.substitute(known, self)
            self._known[pending.pop()] = value
        return self._known[name]

    @cached_property
    def _known(self) -> dict[str, Expr | None]:
        """What `_fixed` found."""
        return {}

    def _undo_division(self, expr: Expr) -> Expr:
        """b*(a // b) is a - a % b, where that is a number."""
        for monomial, coefficient in expr.terms:
            for atom, power in monomial:
                over = self.remainder(*atom.args) if atom.kind == "//" and power == 1 else None
                if over is not None:
                    a, b = atom.args
                    others = tuple(p for p in monomial if p[0] != atom)
                    slope, remainder = divide(Expr(((others, coefficient),)), b)
                    if slope.terms and not remainder.terms:
                        rest = expr - Expr(((monomial, coefficient),))
                        return self._undo_division(rest + slope * (a - over))
        return expr

    def remainder(self, expr: Expr, by: Expr) -> int | None:
        """What is proved to be left of `expr` by `by`: 1 of D + 1 by 2, where 2 divides D."""
        if self.divides(expr, by):
            return 0
        number = by.as_int()
        if number is None or number < 1:
            return None
        tried = (expr.constant() - known.constant() for known, _ in self.divisible)
        return next((r % number for r in tried if self.divides(expr - r, by)), None)

    def divides(self, expr: IntLike, by: IntLike) -> bool:
        """Whether `by` is proved to divide `expr`."""
        expr, by = as_expr(expr), as_expr(by)
        if not expr.terms:
            return True
        rest = divide(expr, by)[1]
        if not rest.terms:
            return True
        for known, number in self.divisible:
            for part in (rest, expr):
                quotient, left = divide(part, known)
                if quotient.terms and not left.terms:
                    if not divide(as_expr(number) * quotient, by)[1].terms:
                        return True
        if self.divisible and any(self.divides(a, b * by) for a, b in quotients_of(rest)):
            return True  # as 2 divides N // 2 where 4 divides N
        return not divide(unfolded(expr), by)[1].terms
