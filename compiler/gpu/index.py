"""Index expressions in registers: 32 bits where ranges allow, divisions by constants as products.

Loops that lanes share bind their index to an expression over the lane's number, so that what is
common to several elements is computed once, and their distance becomes part of the address.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

from stagefuse.compiler.cpu import scalars as shared
from stagefuse.dsl.dims import Atom, Expr, as_expr, const, floordiv, is_size, mod, sym
from stagefuse.dsl.facts import Facts

from .ir import Code, Value
from .memory import Group

INT32 = (1 << 31) - 1
MANY_TERMS = 8
"""Terms of a sum that have a factor in common, from which on it is multiplied by their sum."""


class IndexWriter:
    """Expressions of a kernel over its dimensions, loop indices and the lane."""

    def __init__(self, facts: Facts) -> None:
        self.code = Code()
        self.facts = facts
        self.symbols: dict[str, Value] = {}  # registers
        self.bound: dict[str, Expr] = {}  # indices that are expressions over symbols
        self.multiples: dict[str, int] = {}  # symbols that a number divides
        self.divisors: set[Expr] = set()  # products of sizes by which a step may be divided at once
        self._small: dict[Expr, bool] = {}
        self._values: dict[tuple[Expr, str | None], tuple[Value, object]] = {}  # and their scopes

    # Names

    @contextmanager
    def named(self, **values: tuple[Value, Expr, Expr]) -> Iterator[None]:
        """Symbols held in registers, each with its least and greatest value."""
        before = self.symbols, self.facts
        self.symbols = {**self.symbols, **{n: v for n, (v, _, _) in values.items()}}
        self.facts = self.facts.with_ranges({n: (lo, hi) for n, (_, lo, hi) in values.items()})
        self._forget_bounds()
        try:
            yield
        finally:
            self.symbols, self.facts = before
            self._forget_bounds()

    @contextmanager
    def binding(self, **exprs: Expr) -> Iterator[None]:
        """Indices that are expressions."""
        before = self.bound
        self.bound = {**before, **exprs}
        try:
            yield
        finally:
            self.bound = before

    def _forget_bounds(self) -> None:
        self._small, self._values = {}, {}

    def resolve(self, expr: Expr) -> Expr:
        """An expression over registers alone."""
        return self.facts.replaced(expr, self.bound)

    def note_turns(
        self, head: str, ends: tuple[Expr, Expr], step: int | None, turns: Expr | None
    ) -> None:
        """Keeps how often a loop runs, if the sizes of a call alone say it: `turns` times, or else
        once for each step from the first to the last of `ends`."""
        if turns is None and step:
            turns = floordiv(ends[1] - ends[0] + step, step)
        turns = None if turns is None else self.resolve(turns)
        if turns is not None and all(map(is_size, turns.symbols())):
            self.code.turns[head] = turns

    # Facts

    def is_small(self, expr: Expr) -> bool:
        """Whether a resolved expression fits 32 bits for all sizes."""
        if expr not in self._small:
            low, high = self.facts.interval(expr)
            if low is None or high is None or not -INT32 <= low <= high <= INT32:
                low, high = self.facts.bounds(expr)
            self._small[expr] = (
                low is not None and high is not None and -INT32 <= low and high <= INT32
            )
        return self._small[expr]

    def most(self, expr: Expr) -> int | None:
        """The greatest value that can be proved."""
        return self.facts.bounds(self.resolve(expr))[1]

    def divides(self, number: int, expr: Expr) -> bool:
        """Whether a number is proved to divide a resolved expression."""
        return self._factor(expr) % number == 0 or self.facts.divides(expr, number)

    def is_common(self, relation: str, difference: Expr, group: Group) -> bool:
        """Whether a comparison of a difference with 0 is the same for a whole group: below 0 are
        all of so many numbers or none, if the first is a multiple of how many they are."""
        if relation not in ("lt", "le", "gt", "ge"):
            return False
        if relation in ("le", "gt"):
            difference = difference - 1
        if difference.coefficient(group.name) == const(-1):
            difference = const(-1) - difference
        if difference.coefficient(group.name) != const(1):
            return False
        start = self.facts.replaced(difference, {**self.bound, group.name: group.first})
        return self.divides(group.width, start)

    def _factor(self, expr: Expr) -> int:
        """A number that divides an expression."""
        found = 0
        for monomial, coefficient in expr.terms:
            factor = coefficient
            for atom, power in monomial:
                factor *= self._factor_of(atom) ** power
            found = math.gcd(found, factor)
        return found

    def _factor_of(self, atom: Atom) -> int:
        if atom.kind == "sym":
            known = [n for e, n in self.facts.divisible if e.as_symbol() == atom.name]
            numbers = [n for n in map(as_expr, known) if n.as_int() is not None]
            return math.lcm(self.multiples.get(atom.name, 1), *(n.as_int() or 1 for n in numbers))
        if atom.kind == "//":
            return 1
        a, b = (self._factor(arg) for arg in atom.args)
        return math.gcd(a, b) or 1

    def without_carry(self, expr: Expr, width: int) -> Expr:
        """An expression in which (a + c) // b is a // b and (a + c) % b is a % b + c, where
        `width` divides a and b, and c is less than it."""
        total = const(0)
        for monomial, coefficient in expr.terms:
            product = const(coefficient)
            for atom, power in monomial:
                factor = self._without_carry(atom, width)
                for _ in range(power):
                    product = product * factor
            total = total + product
        return total

    def _without_carry(self, atom: Atom, width: int) -> Expr:
        whole = Expr(((((atom, 1),), 1),))
        if atom.kind not in ("//", "%"):
            return whole
        a, b = (self.without_carry(arg, width) for arg in atom.args)
        small = next((c for m, c in a.terms if m == ()), 0) % width
        if not small or not self.divides(width, a - small) or not self.divides(width, b):
            if a == atom.args[0]:
                return whole
            return (floordiv if atom.kind == "//" else mod)(a, b, self.facts)
        if atom.kind == "//":
            return floordiv(a - small, b, self.facts)
        return mod(a - small, b, self.facts) + small

    # Values

    def index(self, expr: Expr, kind: str | None = None) -> Value:
        """The value of an expression: i32 if it fits and nothing else is asked, else i64."""
        return self._value(self.resolve(expr), kind)

    def _value(self, expr: Expr, kind: str | None = None) -> Value:
        """The value of an expression over registers, as long as where it was computed is open."""
        scopes, key = self.code.scopes, (expr, kind)
        known = self._values.get(key)
        if known is not None:
            value, scope = known
            if value.depth < len(scopes) and scopes[value.depth] is scope:
                return value
        value = self._computed(expr, kind)
        self._values[key] = value, scopes[value.depth]
        return value

    def _computed(self, expr: Expr, kind: str | None) -> Value:
        small = self.is_small(expr)
        own = "i32" if small else "i64"
        found = self._sum(expr, own)
        if kind == "i64" and small:
            return found.to("sext", "i64")
        if kind == "i32" and not small:
            return found.to("trunc", "i32")
        return found

    def _sum(self, expr: Expr, kind: str) -> Value:
        """Terms are added from the outermost loop inwards, so that sums leave loops."""
        code = self.code
        expr, together = _taken_apart(expr)
        parts = [self._term(m, c, kind) for m, c in expr.terms if m != ()]
        parts += [(self.atom(atom, kind) * self._value(e, kind), False) for atom, e in together]
        total: Value | None = None
        for value, negative in sorted(parts, key=lambda p: p[0].depth):
            if total is None:
                total = -value if negative else value
            else:
                total = total - value if negative else total + value
        constant = next((c for m, c in expr.terms if m == ()), 0)
        if total is None:
            return code.const(constant, kind)
        return total + constant

    def _term(
        self, monomial: tuple[tuple[Atom, int], ...], coefficient: int, kind: str
    ) -> tuple[Value, bool]:
        """A term's size and whether it is subtracted."""
        if kind == "i64" and len(monomial) == 1 and 1 < abs(coefficient) <= INT32:
            ((atom, power),) = monomial
            if power == 1 and self.is_small(Expr(((((atom, 1),), 1),))):
                number = self.code.const(abs(coefficient), "i32")
                found = self.code.pure("mul.wide.s32", "i64", self.atom(atom, "i32"), number)
                return found, coefficient < 0
        factors = [self.atom(atom, kind) for atom, power in monomial for _ in range(power)]
        factors.sort(key=lambda v: v.depth)
        found = factors[0]
        for factor in factors[1:]:
            found = found * factor
        negative = coefficient < 0
        return found * abs(coefficient), negative

    def atom(self, atom: Atom, kind: str) -> Value:
        """A symbol or function of expressions, as `kind`."""
        value = self.symbols[atom.name] if atom.kind == "sym" else self._function(atom)
        if value.type == kind:
            return value
        return value.to("sext" if kind == "i64" else "trunc", kind)

    def _function(self, atom: Atom) -> Value:
        a, b = self._at_once(atom)
        small = self.is_small(a) and self.is_small(b)
        kind = "i32" if small else "i64"
        x = self._value(a, kind)
        if atom.kind in ("min", "max"):
            return self.code.intrinsic(f"s{atom.kind}", x, self._value(b, kind))
        number = b.as_int()
        positive = self.facts.is_nonneg(a)
        if number is not None and number > 0:
            return self._by_constant(atom.kind, a, x, number, positive)
        y = self._value(b, kind)
        if positive and self.facts.is_positive(b):
            quotient = self.code.unsigned_division(x, y)
            return quotient if atom.kind == "//" else x - quotient * y
        divide = cast(Any, shared.integer_division)  # a formula for either writer
        quotient, rest = divide(self.code, x, y, unsigned=False)
        return cast(Value, quotient if atom.kind == "//" else rest)

    def _at_once(self, atom: Atom) -> tuple[Expr, Expr]:
        """What an atom divides: of (x // a) // b, of which nobody has asked for x // a yet, x by
        a * b, if the product is known not to be too large."""
        a, b = atom.args
        inner = a.as_atom()
        if atom.kind != "//" or inner is None or inner.kind != "//" or (a, None) in self._values:
            return a, b
        first, product = inner.args[1], inner.args[1] * b
        fits = self.is_small(product) or not (self.is_small(first) and self.is_small(b))
        return (inner.args[0], product) if product in self.divisors and fits else (a, b)

    def _by_constant(self, kind: str, a: Expr, x: Value, number: int, positive: bool) -> Value:
        if number & (number - 1) == 0:
            shift = number.bit_length() - 1
            return x.ashr(shift) if kind == "//" else x & (number - 1)
        quotient = divided(self.code, x, number) if positive else _floor(self.code, x, number)
        return quotient if kind == "//" else x - quotient * number


def _taken_apart(expr: Expr) -> tuple[Expr, list[tuple[Atom, Expr]]]:
    """What is left of a long sum, and the sums that atoms of it are multiplied by: a row times the
    size of a row of many parts is one product, not one for each part."""
    found: list[tuple[Atom, Expr]] = []
    while len(expr.terms) >= MANY_TERMS:
        of = Counter(atom for monomial, _ in expr.terms for atom, _ in monomial)
        atom, count = max(of.items(), key=lambda item: item[1])
        if count < MANY_TERMS:
            break
        inside = const(0)
        for monomial, coefficient in expr.terms:
            powers = dict(monomial)
            if atom in powers:
                powers[atom] -= 1
                rest = tuple((a, powers[a]) for a, _ in monomial if powers[a])
                inside = inside + Expr(((rest, coefficient),))
        expr = Expr(tuple((m, c) for m, c in expr.terms if atom not in dict(m)))
        found.append((atom, inside))
    return expr, found


def divided(code: Code, x: Value, number: int) -> Value:
    """x // number for 0 <= x, by a product with a scaled reciprocal.

    With l = ceil(log2 d) and m = floor(2^(b - 1 + l) / d) + 1, the high half of m * x, shifted by
    l - 1, is exact for x < 2^(b - 1), where b is 32 or 64 (Granlund and Montgomery, 1994).
    """
    bits = 64 if x.type == "i64" else 32
    length = (number - 1).bit_length()
    magic = (1 << (bits - 1 + length)) // number + 1
    if magic >> bits:
        return code.unsigned_division(x, code.const(number, x.type))
    factor = code.const(magic, x.type)
    high = code.pure(f"mul.hi.u{bits}", x.type, x, Value(code, str(magic), x.type, factor.depth))
    return high.lshr(length - 1)


def _floor(code: Code, x: Value, number: int) -> Value:
    """x // number for any x: of -1 - x for a negative one."""
    negative = x.compare("lt", 0)
    size = negative.select(code.const(-1, x.type) - x, x)
    quotient = divided(code, size, number)
    return negative.select(code.const(-1, x.type) - quotient, quotient)


def size_of(shape: tuple[Expr, ...]) -> Expr:
    """The number of elements."""
    total = const(1)
    for extent in shape:
        total = total * extent
    return total


__all__ = ["INT32", "IndexWriter", "as_expr", "divided", "size_of", "sym"]
