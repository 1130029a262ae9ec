"""Exact integer expressions: dimensions of tensors and positions of loops.

An `Expr` is a polynomial with integer coefficients over atoms; an atom is a symbol or one of
`//`, `%`, `min`, `max` of expressions. Equal polynomials are equal objects by value, so `==` on
expressions is exact up to what those four hide. `Facts` hold ranges and divisibility, and prove
bounds. Floor division and remainder are Python's; by zero they are 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TypeAlias, Union

IntLike: TypeAlias = Union["Expr", int]


@dataclass(frozen=True, order=True)
class Atom:
    """A symbol (`kind` is "sym", `name` set) or a function of expressions."""

    kind: str
    name: str = ""
    args: tuple[Expr, ...] = ()

    @cached_property
    def _hash(self) -> int:
        return hash((self.kind, self.name, self.args))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        if self.kind == "sym":
            return self.name
        a, b = self.args
        if self.kind in ("min", "max"):
            return f"{self.kind}({a}, {b})"
        return f"{_wrapped(a)} {self.kind} {_wrapped(b)}"


Monomial: TypeAlias = tuple[tuple[Atom, int], ...]


@dataclass(frozen=True, order=True)
class Expr:
    """A polynomial: monomials with their coefficients, sorted, none of them zero."""

    terms: tuple[tuple[Monomial, int], ...]

    def __add__(self, other: IntLike) -> Expr:
        total = dict(self.terms)
        for monomial, coefficient in as_expr(other).terms:
            total[monomial] = total.get(monomial, 0) + coefficient
        return _from_terms(total)

    def __mul__(self, other: IntLike) -> Expr:
        product: dict[Monomial, int] = {}
        for left, a in self.terms:
            for right, b in as_expr(other).terms:
                monomial = _times(left, right)
                product[monomial] = product.get(monomial, 0) + a * b
        return _from_terms(product)

    def __neg__(self) -> Expr:
        return Expr(tuple((m, -c) for m, c in self.terms))

    def __sub__(self, other: IntLike) -> Expr:
        return self + -as_expr(other)

    def __rsub__(self, other: IntLike) -> Expr:
        return as_expr(other) - self

    __radd__ = __add__
    __rmul__ = __mul__

    @cached_property
    def _hash(self) -> int:
        return hash(self.terms)

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        return self._text

    @cached_property
    def _text(self) -> str:
        if not self.terms:
            return "0"
        parts: list[str] = []
        for monomial, coefficient in sorted(self.terms, key=_print_order):
            text = _monomial_text(monomial, abs(coefficient))
            if not parts and coefficient < 0:  # a sign binds tighter than // and %
                quotient = coefficient == -1 and monomial and monomial[0][0].kind in ("//", "%")
                parts.append(f"-({text})" if quotient and len(monomial) == 1 else f"-{text}")
            elif not parts:
                parts.append(text)
            else:
                parts.append(f"{'-' if coefficient < 0 else '+'} {text}")
        return " ".join(parts)

    def __repr__(self) -> str:
        return f"Expr({self})"

    def as_int(self) -> int | None:
        """The value if this is a constant."""
        if not self.terms:
            return 0
        if len(self.terms) == 1 and self.terms[0][0] == ():
            return self.terms[0][1]
        return None

    def as_symbol(self) -> str | None:
        """The name if this is a single symbol."""
        if len(self.terms) == 1 and self.terms[0][1] == 1 and len(self.terms[0][0]) == 1:
            atom, power = self.terms[0][0][0]
            if power == 1 and atom.kind == "sym":
                return atom.name
        return None

    @cached_property
    def _symbols(self) -> frozenset[str]:
        found: set[str] = set()
        for monomial, _ in self.terms:
            for atom, _power in monomial:
                if atom.kind == "sym":
                    found.add(atom.name)
                for arg in atom.args:
                    found |= arg.symbols()
        return frozenset(found)

    def symbols(self) -> frozenset[str]:
        """The names that occur anywhere in it."""
        return self._symbols

    def substitute(self, values: Mapping[str, IntLike], facts: Facts | None = None) -> Expr:
        """This with symbols replaced at once; `facts` describe the symbols of the result."""
        if not self.symbols() & values.keys():
            return self
        total = const(0)
        for monomial, coefficient in self.terms:
            product = const(coefficient)
            for atom, power in monomial:
                if atom.kind == "sym":
                    factor = as_expr(values.get(atom.name, _expr_of(atom)))
                else:
                    a, b = (arg.substitute(values, facts) for arg in atom.args)
                    factor = _APPLY[atom.kind](a, b, facts)
                for _ in range(power):
                    product = product * factor
            total = total + product
        return total

    def evaluate(self, values: Mapping[str, int]) -> int:
        """The value for given symbols. Raises KeyError for a symbol without one."""
        total = 0
        for monomial, coefficient in self.terms:
            product = coefficient
            for atom, power in monomial:
                if atom.kind == "sym":
                    product *= values[atom.name] ** power
                else:
                    a, b = (arg.evaluate(values) for arg in atom.args)
                    product *= _EVALUATE[atom.kind](a, b) ** power
            total += product
        return total

    def coefficient(self, name: str) -> Expr | None:
        """The coefficient of a symbol that occurs only linearly, else None."""
        inside = const(0)
        for monomial, coefficient in self.terms:
            rest: list[tuple[Atom, int]] = []
            power_of = 0
            for atom, power in monomial:
                if atom.kind == "sym" and atom.name == name:
                    power_of = power
                elif any(name in arg.symbols() for arg in atom.args):
                    return None
                else:
                    rest.append((atom, power))
            if power_of > 1:
                return None
            if power_of == 1:
                inside = inside + Expr(((tuple(rest), coefficient),))
        return inside


def _print_order(term: tuple[Monomial, int]) -> tuple[bool, bool, int, str]:
    monomial, coefficient = term
    degree = sum(power for _, power in monomial)
    return (monomial == (), coefficient < 0, -degree, _monomial_text(monomial, 1))


def _monomial_text(monomial: Monomial, coefficient: int) -> str:
    factors = [] if coefficient == 1 and monomial else [str(coefficient)]
    for atom, power in monomial:
        text = str(atom) if atom.kind in ("sym", "min", "max") else f"({atom})"
        factors.extend([text] * power)
    if len(factors) == 1 and factors[0].startswith("("):
        return factors[0][1:-1] if _balanced(factors[0][1:-1]) else factors[0]
    return "*".join(factors)


def _balanced(text: str) -> bool:
    depth = 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if depth < 0:
            return False
    return depth == 0


def _wrapped(expr: Expr) -> str:
    text = str(expr)
    return text if re.fullmatch(r"\w+", text) else f"({text})"


def _times(left: Monomial, right: Monomial) -> Monomial:
    powers = dict(left)
    for atom, power in right:
        powers[atom] = powers.get(atom, 0) + power
    return tuple(sorted(powers.items()))


def _from_terms(terms: Mapping[Monomial, int]) -> Expr:
    found = [(m, c) for m, c in terms.items() if c]
    if len(found) < 2:
        return Expr(tuple(found))
    found.sort()
    return _join_divisions(Expr(tuple(found)))


def _join_divisions(expr: Expr) -> Expr:
    """c * (b * (a // b) + a % b) is c * a."""
    kinds = {atom.kind for monomial, _ in expr.terms for atom, _power in monomial}
    if "//" not in kinds or "%" not in kinds:
        return expr
    for monomial, coefficient in expr.terms:
        for atom, power in monomial:
            if atom.kind != "%" or power != 1:
                continue
            a, b = atom.args
            others = Expr(((tuple(p for p in monomial if p[0] != atom), coefficient),))
            whole = others * b * _expr_of(Atom("//", "", (a, b)))
            if whole.terms and set(whole.terms) <= set(expr.terms):
                left = tuple(t for t in expr.terms if t[0] != monomial and t not in whole.terms)
                return Expr(left) + others * a
    return expr


def _expr_of(atom: Atom) -> Expr:
    return Expr(((((atom, 1),), 1),))


def const(value: int) -> Expr:
    """The constant `value`."""
    return Expr((((), value),)) if value else Expr(())


def sym(name: str) -> Expr:
    """The symbol `name`."""
    return _expr_of(Atom("sym", name))


def as_expr(value: IntLike) -> Expr:
    return value if isinstance(value, Expr) else const(int(value))


def floordiv(a: IntLike, b: IntLike, facts: Facts | None = None) -> Expr:
    """The floor of a / b, simplified by what `facts` prove."""
    a, b = as_expr(a), as_expr(b)
    x, y = a.as_int(), b.as_int()
    if y == 1:
        return a
    if y == 0 or x == 0:
        return const(0)
    if x is not None and y is not None:
        return const(x // y)
    quotient, rest = _divide(a, b)
    if quotient.terms and (y is not None or (facts and facts.is_positive(b))):
        return quotient + floordiv(rest, b, facts)
    if facts and facts.is_nonneg(a) and facts.prove_lt(a, b):
        return const(0)
    return _expr_of(Atom("//", "", (a, b)))


def mod(a: IntLike, b: IntLike, facts: Facts | None = None) -> Expr:
    """The remainder of floor division, with the sign of b, simplified by what `facts` prove."""
    a, b = as_expr(a), as_expr(b)
    x, y = a.as_int(), b.as_int()
    if y in (0, 1) or x == 0:
        return const(0)
    if x is not None and y is not None:
        return const(x % y)
    if facts and facts.divides(a, b):
        return const(0)
    quotient, rest = _divide(a, b)
    if quotient.terms and (y is not None or (facts and facts.is_positive(b))):
        return mod(rest, b, facts)
    if facts and facts.is_nonneg(a) and facts.prove_lt(a, b):
        return a
    return _expr_of(Atom("%", "", (a, b)))


def minimum(a: IntLike, b: IntLike, facts: Facts | None = None) -> Expr:
    """The smaller of two."""
    a, b = as_expr(a), as_expr(b)
    gap = (a - b).as_int()
    if gap is not None:
        return a if gap <= 0 else b
    if facts and facts.prove_le(a, b):
        return a
    if facts and facts.prove_le(b, a):
        return b
    return _expr_of(Atom("min", "", tuple(sorted((a, b)))))


def maximum(a: IntLike, b: IntLike, facts: Facts | None = None) -> Expr:
    """The larger of two."""
    a, b = as_expr(a), as_expr(b)
    gap = (a - b).as_int()
    if gap is not None:
        return a if gap >= 0 else b
    if facts and facts.prove_le(a, b):
        return b
    if facts and facts.prove_le(b, a):
        return a
    for one, other in ((a, b), (b, a)):
        found = _within_maximum(one, other, facts)
        if found is not None:
            return found
    return _expr_of(Atom("max", "", tuple(sorted((a, b)))))


def _within_maximum(a: Expr, b: Expr, facts: Facts | None) -> Expr | None:
    """max(a, b) where a is max(p, q) + k and p + k differs from b by a number, or None.

    What chains of slices make: max(max(N - 1, 0) - 1, 0) is max(N - 2, 0).
    """
    nested = [m[0][0] for m, c in a.terms if c == 1 and len(m) == 1 and m[0][1] == 1]
    if len(nested) != 1 or nested[0].kind != "max":
        return None
    shift = a - _expr_of(nested[0])
    if shift.as_int() is None:
        return None
    p, q = nested[0].args
    for part, rest in ((p, q), (q, p)):
        gap = (part + shift - b).as_int()
        if gap is not None:
            return a if gap >= 0 else maximum(rest + shift, b, facts)
    return None


def _divide(a: Expr, b: Expr) -> tuple[Expr, Expr]:
    """Terms of `a` that the divisor divides exactly, as quotient, and the rest.

    For a constant divisor a constant is split into multiple and remainder.
    """
    quotient: dict[Monomial, int] = {}
    rest: dict[Monomial, int] = {}
    if len(b.terms) != 1:
        if a == b:
            return const(1), const(0)
        factor = _exact_factor(a, b)
        return (factor, const(0)) if factor is not None else (const(0), a)
    (divisor, by) = b.terms[0]
    for monomial, coefficient in a.terms:
        powers = dict(monomial)
        fits = all(powers.get(atom, 0) >= power for atom, power in divisor)
        if fits and not divisor and not monomial:
            q, r = divmod(coefficient, by)
            quotient[()], rest[()] = q, r
        elif fits and coefficient % by == 0:
            for atom, power in divisor:
                powers[atom] -= power
            left = tuple(sorted((atom, p) for atom, p in powers.items() if p))
            quotient[left] = quotient.get(left, 0) + coefficient // by
        else:
            rest[monomial] = coefficient
    return _from_terms(quotient), _from_terms(rest)


def _exact_factor(a: Expr, b: Expr) -> Expr | None:
    """q with a == q * b for a polynomial b of several terms, or None."""
    quotient, rest = const(0), a
    lead, by = b.terms[-1]
    for _ in range(len(a.terms)):
        if not rest.terms:
            return quotient
        step, _ = _divide(Expr((rest.terms[-1],)), Expr(((lead, by),)))
        if not step.terms:
            return None
        quotient, rest = quotient + step, rest - step * b
    return quotient if not rest.terms else None


_APPLY: dict[str, Callable[[Expr, Expr, Facts | None], Expr]] = {
    "//": floordiv, "%": mod, "min": minimum, "max": maximum
}  # fmt: skip
_EVALUATE: dict[str, Callable[[int, int], int]] = {
    "//": lambda a, b: a // b if b else 0,
    "%": lambda a, b: a % b if b else 0,
    "min": min,
    "max": max,
}


MOST_EXPRESSIONS = 200
"""How many expressions a proof may look at before the question is left open."""


@dataclass(frozen=True)
class Facts:
    """What is known of symbols: inclusive ranges, and expressions that a number divides.

    A symbol without a range is at least 0. A bound may itself be an expression.
    """

    ranges: Mapping[str, tuple[IntLike, IntLike | None]] = field(default_factory=dict)
    divisible: tuple[tuple[Expr, IntLike], ...] = ()

    def with_ranges(self, ranges: Mapping[str, tuple[IntLike, IntLike | None]]) -> Facts:
        """These facts with further symbols."""
        return Facts({**self.ranges, **ranges}, self.divisible)

    def at_element(self, names: Sequence[str], shape: Sequence[Expr]) -> Facts:
        """These facts at an element of a tensor: `names` are within its axes, and no axis is
        empty, since there is an element."""
        found = self
        for name, size in zip(names, shape, strict=True):
            axis = size.as_symbol()
            if axis is not None:
                low, high = found.ranges.get(axis, (0, None))
                least = found.bounds(low)[0]
                if least is None or least < 1:
                    found = found.with_ranges({axis: (1, high)})
            found = found.with_ranges({name: (0, size - 1)})
        return found

    def bounds(self, expr: IntLike) -> tuple[int | None, int | None]:
        """The least and greatest value that can be proved; None where there is no bound."""
        expr = as_expr(expr)
        low, high = self._interval(expr, 0)
        for name in sorted(expr.symbols(), reverse=True):
            for end in self.ranges.get(name, (0, None)):
                if end is None or as_expr(end).as_int() is not None:
                    continue
                slope = expr.coefficient(name)
                sign = self._sign(slope) if slope is not None and slope.terms else None
                if sign is None:
                    continue
                a, b = self.bounds(expr.substitute({name: end}))
                is_upper = end is self.ranges[name][1]
                if is_upper == (sign > 0):
                    high = b if high is None or (b is not None and b < high) else high
                else:
                    low = a if low is None or (a is not None and a > low) else low
        return low, high

    def interval(self, expr: Expr) -> tuple[int | None, int | None]:
        """Ends between which it lies, by interval arithmetic alone: quick, and often wide."""
        return self._interval(expr, 0)

    def _sign(self, expr: Expr) -> int | None:
        low, high = self._interval(expr, 0)
        if low is not None and low >= 0:
            return 1
        if high is not None and high <= 0:
            return -1
        return None

    def _interval(self, expr: Expr, depth: int) -> tuple[int | None, int | None]:
        low: int | None = 0
        high: int | None = 0
        for monomial, coefficient in expr.terms:
            span: tuple[int | None, int | None] = (coefficient, coefficient)
            for atom, power in monomial:
                around = self._symbol(atom.name, depth) if atom.kind == "sym" else (
                    self._atom(atom, depth)
                )
                for _ in range(power):
                    span = _interval_product(span, around)
            low = None if low is None or span[0] is None else low + span[0]
            high = None if high is None or span[1] is None else high + span[1]
        return low, high

    @cached_property
    def _ends(self) -> dict[str, tuple[int | None, int | None]]:
        """What `_symbol` found."""
        return {}

    def _symbol(self, name: str, depth: int) -> tuple[int | None, int | None]:
        if name in self._ends:
            return self._ends[name]
        if depth > 12:
            return None, None
        low, high = self.ranges.get(name, (0, None))
        top = None if high is None else self._interval(as_expr(high), depth + 1)[1]
        found = (self._interval(as_expr(low), depth + 1)[0], top)
        if depth == 0:
            self._ends[name] = found
        return found

    def _atom(self, atom: Atom, depth: int) -> tuple[int | None, int | None]:
        (a_lo, a_hi), (b_lo, b_hi) = (self._interval(arg, depth + 1) for arg in atom.args)
        if atom.kind == "min":
            known = [v for v in (a_hi, b_hi) if v is not None]
            return _both(min, a_lo, b_lo), min(known) if known else None
        if atom.kind == "max":
            known = [v for v in (a_lo, b_lo) if v is not None]
            return max(known) if known else None, _both(max, a_hi, b_hi)
        if b_lo is None or b_lo < 0:
            return None, None
        if atom.kind == "%":
            limit = None if b_hi is None else max(b_hi - 1, 0)
            if a_lo is not None and a_lo >= 0 and a_hi is not None:
                limit = a_hi if limit is None else min(limit, a_hi)
            return 0, limit
        if a_lo is None or a_lo < 0:
            bottom = None if a_lo is None else (a_lo if b_lo == 0 else a_lo // b_lo)
        else:
            bottom = 0 if b_hi is None or b_lo == 0 else a_lo // b_hi
        top = None if a_hi is None else max(a_hi // max(b_lo, 1), 0 if b_lo == 0 else a_hi)
        if a_hi is not None and b_lo > 0:
            top = a_hi // b_lo if a_hi >= 0 else (0 if b_hi is None else a_hi // b_hi)
        return bottom, top

    def is_nonneg(self, expr: IntLike) -> bool:
        """Whether it is proved to be at least 0."""
        return self._prove_nonneg(as_expr(expr), 5, [MOST_EXPRESSIONS])

    def _prove_nonneg(self, expr: Expr, fuel: int, left: list[int]) -> bool:
        """Intervals first; then any one atom is replaced by its worst case, and again.

        `left` counts down the expressions that are looked at.
        """
        low = self._interval(expr, 0)[0]
        if low is not None and low >= 0:
            return True
        if fuel <= self._unproved.get(expr, 0) or not left[0]:
            return False
        left[0] -= 1
        for cases in self._worst_cases(expr):
            if all(self._prove_nonneg(case, fuel - 1, left) for case in cases):
                return True
        if left[0]:
            self._unproved[expr] = fuel
        return False

    @cached_property
    def _unproved(self) -> dict[Expr, int]:
        """Expressions that no proof was found for, and with how much fuel.

        Atoms replaced in another order lead to the same expression again.
        """
        return {}

    def _worst_cases(self, expr: Expr) -> Iterator[list[Expr]]:
        """Lists of expressions: where all of one list are not negative, neither is `expr`."""
        for name in sorted(expr.symbols(), reverse=True):
            low, high = self.ranges.get(name, (0, None))
            slope = expr.coefficient(name)
            sign = self._sign(slope) if slope is not None and slope.terms else None
            if sign is not None:
                end = low if sign > 0 else high
                if end is not None and as_expr(end).as_int() is None:
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
            scaled, remainder = _divide(slope, b)
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
        return self.bounds(a - b) == (0, 0)

    def simplify(self, expr: Expr) -> Expr:
        """The expression rebuilt with these facts."""
        fixed = {
            name: low
            for name, (low, high) in self.ranges.items()
            if high is not None and low == high and name in expr.symbols()
        }
        total = const(0)
        for monomial, coefficient in expr.terms:
            product = const(coefficient)
            for atom, power in monomial:
                if atom.kind == "sym":
                    factor = as_expr(fixed.get(atom.name, _expr_of(atom)))
                else:
                    a, b = (self.simplify(arg) for arg in atom.args)
                    factor = _APPLY[atom.kind](a, b, self)
                for _ in range(power):
                    product = product * factor
            total = total + product
        return self._undo_division(total)

    def _undo_division(self, expr: Expr) -> Expr:
        """b*(a // b) is a where b divides a."""
        for monomial, coefficient in expr.terms:
            for atom, power in monomial:
                if atom.kind == "//" and power == 1 and self.divides(*atom.args):
                    a, b = atom.args
                    others = tuple(p for p in monomial if p[0] != atom)
                    slope, remainder = _divide(Expr(((others, coefficient),)), b)
                    if slope.terms and not remainder.terms:
                        rest = expr - Expr(((monomial, coefficient),))
                        return self._undo_division(rest + slope * a)
        return expr

    def divides(self, expr: IntLike, by: IntLike) -> bool:
        """Whether `by` is proved to divide `expr`."""
        expr, by = as_expr(expr), as_expr(by)
        if not expr.terms:
            return True
        rest = _divide(expr, by)[1]
        if not rest.terms:
            return True
        for known, number in self.divisible:
            quotient, left = _divide(rest, known)
            if quotient.terms and not left.terms:
                if not _divide(as_expr(number) * quotient, by)[1].terms:
                    return True
        return False


def _both(choose: Callable[[int, int], int], a: int | None, b: int | None) -> int | None:
    return None if a is None or b is None else choose(a, b)


def _interval_product(
    x: tuple[int | None, int | None], y: tuple[int | None, int | None]
) -> tuple[int | None, int | None]:
    """The interval of a product; None stands for minus infinity below and infinity above."""
    (a, b), (c, d) = x, y
    if a is not None and c is not None and b is not None and d is not None:
        if a >= 0 and c >= 0:
            return a * c, b * d
        ends = (a * c, a * d, b * c, b * d)
        return min(ends), max(ends)
    inf = float("inf")
    ends_x = (-inf if x[0] is None else x[0], inf if x[1] is None else x[1])
    ends_y = (-inf if y[0] is None else y[0], inf if y[1] is None else y[1])
    corners = [0 if a == 0 or b == 0 else a * b for a in ends_x for b in ends_y]
    low, high = min(corners), max(corners)
    return (None if low == -inf else int(low), None if high == inf else int(high))


_TOKEN = re.compile(r"\s*(?:(\d+)|([A-Za-z_][\w.$]*)|(//|[-+*%(),]))")


def parse(text: str) -> Expr:
    """The expression that `str` printed. Raises ValueError on any other text."""
    tokens: list[str] = []
    position = 0
    stripped = text.rstrip()
    while position < len(stripped):
        match = _TOKEN.match(stripped, position)
        if not match or len(tokens) > 10_000:
            raise ValueError(f"not a dimension expression: {text[:80]!r}")
        tokens.append(match.group(1) or match.group(2) or match.group(3))
        position = match.end()
    reader = _Reader([*tokens, ""], text)
    result = reader.sum(0)
    if reader.peek():
        raise ValueError(f"not a dimension expression: {text[:80]!r}")
    return result


def parse_tokens(tokens: Sequence[str]) -> tuple[Expr, int]:
    """The expression that tokens begin with, and how many it took. Raises ValueError."""
    reader = _Reader([*tokens, ""], " ".join(tokens[:40]))
    return reader.sum(0), reader.at


class _Reader:
    def __init__(self, tokens: list[str], text: str) -> None:
        self.tokens, self.text, self.at = tokens, text, 0

    def peek(self) -> str:
        return self.tokens[self.at]

    def take(self) -> str:
        self.at += 1
        return self.tokens[self.at - 1]

    def expect(self, token: str) -> None:
        if self.take() != token:
            raise ValueError(f"not a dimension expression: {self.text[:80]!r}")

    def sum(self, depth: int) -> Expr:
        if depth > 60:
            raise ValueError("a dimension expression is nested too deeply")
        total = self.product(depth)
        while self.peek() in ("+", "-"):
            sign = 1 if self.take() == "+" else -1
            total = total + self.product(depth) * sign
        return total

    def product(self, depth: int) -> Expr:
        total = self.unary(depth)
        while self.peek() in ("*", "//", "%"):
            operator = self.take()
            right = self.unary(depth)
            total = total * right if operator == "*" else _APPLY[operator](total, right, None)
        return total

    def unary(self, depth: int) -> Expr:
        token = self.take()
        if token == "-":
            return -self.unary(depth + 1) if depth < 60 else self.sum(99)
        if token == "(":
            inner = self.sum(depth + 1)
            self.expect(")")
            return inner
        if token in ("min", "max") and self.peek() == "(":
            self.expect("(")
            a = self.sum(depth + 1)
            self.expect(",")
            b = self.sum(depth + 1)
            self.expect(")")
            return _APPLY[token](a, b, None)
        if token.isdigit():
            return const(int(token))
        if re.fullmatch(r"[A-Za-z_][\w.$]*", token):
            return sym(token)
        raise ValueError(f"not a dimension expression: {self.text[:80]!r}")
