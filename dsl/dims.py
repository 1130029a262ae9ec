"""Exact integer expressions: dimensions of tensors and positions of loops.

An `Expr` is a polynomial with integer coefficients over atoms; an atom is a symbol or one of
`//`, `%`, `min`, `max` of expressions. Equal polynomials are equal objects by value, so `==` on
expressions is exact up to what those four hide. `facts.py` proves bounds of them, `dims_text.py`
reads what `str` prints. Floor division and remainder are Python's; by zero they are 0.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import lru_cache
from typing import TYPE_CHECKING, Any, TypeAlias, Union

from .atoms import NONE
from .atoms import Atom as Atom
from .atoms import Monomial as Monomial
from .dims_print import monomial_text, print_order

if TYPE_CHECKING:
    from .facts import Facts

IntLike: TypeAlias = Union["Expr", int]
VARIABLE_PREFIX = "?"
"""Stands before the name of a size that a call is solved for."""


class Expr:
    """A polynomial: monomials with their coefficients, sorted, none of them zero. Immutable."""

    __slots__ = ("_hash", "_symbols", "_text", "terms")
    terms: tuple[tuple[Monomial, int], ...]

    def __init__(self, terms: tuple[tuple[Monomial, int], ...]) -> None:
        self.terms = terms
        self._hash: int | None = None
        self._text: str | None = None
        self._symbols: frozenset[str] | None = None

    def __add__(self, other: IntLike) -> Expr:
        return self._plus(as_expr(other), 1)

    def _plus(self, other: Expr, times: int) -> Expr:
        if not other.terms:
            return self
        if len(other.terms) == 1 and not other.terms[0][0]:  # a number
            return self._moved(times * other.terms[0][1])
        total = dict(self.terms)
        for monomial, coefficient in other.terms:
            total[monomial] = total.get(monomial, 0) + times * coefficient
        return _from_terms(total)

    def _moved(self, by: int) -> Expr:
        """The sum with a number other than 0, whose monomial comes first."""
        rest = self.terms
        if rest and not rest[0][0]:
            by, rest = by + rest[0][1], rest[1:]
        return Expr((((), by), *rest)) if by else Expr(rest)

    def __mul__(self, other: IntLike) -> Expr:
        if not isinstance(other, Expr):
            return self._scaled(int(other))
        factor = other.as_int()
        if factor is not None:
            return self._scaled(factor)
        factor = self.as_int()
        if factor is not None:
            return other._scaled(factor)
        product: dict[Monomial, int] = {}
        for left, a in self.terms:
            for right, b in other.terms:
                monomial = _times(left, right)
                product[monomial] = product.get(monomial, 0) + a * b
        return _from_terms(product)

    def _scaled(self, factor: int) -> Expr:
        if factor == 1:
            return self
        return Expr(tuple([(m, c * factor) for m, c in self.terms])) if factor else const(0)

    def __neg__(self) -> Expr:
        return self._scaled(-1)

    def __sub__(self, other: IntLike) -> Expr:
        return self._plus(as_expr(other), -1)

    def __rsub__(self, other: IntLike) -> Expr:
        return as_expr(other) - self

    __radd__ = __add__
    __rmul__ = __mul__

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Expr) and self.terms == other.terms)

    def __lt__(self, other: Expr) -> bool:
        return self.terms < other.terms

    def __hash__(self) -> int:
        if self._hash is None:
            self._hash = hash(self.terms)
        return self._hash

    def __reduce__(self) -> tuple[Any, ...]:
        return Expr, (self.terms,)

    def __str__(self) -> str:
        if self._text is None:
            self._text = self._written()
        return self._text

    def _written(self) -> str:
        parts: list[str] = []
        for monomial, coefficient in sorted(self.terms, key=print_order):
            text = monomial_text(monomial, abs(coefficient))
            if not parts and coefficient < 0:  # a sign binds tighter than // and %
                quotient = coefficient == -1 and monomial and monomial[0][0].kind in ("//", "%")
                parts.append(f"-({text})" if quotient and len(monomial) == 1 else f"-{text}")
            elif not parts:
                parts.append(text)
            else:
                parts.append(f"{'-' if coefficient < 0 else '+'} {text}")
        return " ".join(parts) or "0"

    def __repr__(self) -> str:
        return f"Expr({self})"

    def as_int(self) -> int | None:
        """The value if this is a constant."""
        terms = self.terms
        if not terms:
            return 0
        return terms[0][1] if len(terms) == 1 and not terms[0][0] else None

    def constant(self) -> int:
        """What is left where every other term is 0."""
        return self.terms[0][1] if self.terms and not self.terms[0][0] else 0

    def as_symbol(self) -> str | None:
        """The name if this is a single symbol."""
        atom = self.as_atom()
        return atom.name if atom is not None and atom.kind == "sym" else None

    def as_atom(self) -> Atom | None:
        """The atom if this is a single one."""
        if len(self.terms) == 1 and self.terms[0][1] == 1 and len(self.terms[0][0]) == 1:
            atom, power = self.terms[0][0][0]
            return atom if power == 1 else None
        return None

    def symbols(self) -> frozenset[str]:
        """The names that occur anywhere in it."""
        if self._symbols is None:
            self._symbols = NONE.union(*[a.symbols for m, _ in self.terms for a, _ in m])
        return self._symbols

    def length(self) -> int:
        """How many terms it is written with."""
        return len(self.terms) + sum([atom.length for m, _ in self.terms for atom, _ in m])

    def substitute(self, values: Mapping[str, IntLike], facts: Facts | None = None) -> Expr:
        """This with symbols replaced at once; `facts` describe the symbols of the result."""
        return self if self.symbols().isdisjoint(values) else self._with(values, facts, {})

    def with_atoms(self, atoms: Mapping[Atom, Expr], facts: Facts | None = None) -> Expr:
        """This with atoms replaced wherever they occur, outermost first; `facts` as above."""
        names = {name: sym(name) for atom in atoms for name in atom.symbols}
        return self if self.symbols().isdisjoint(names) else self._with(names, facts, dict(atoms))

    def _with(
        self, values: Mapping[str, IntLike], facts: Facts | None, made: dict[Atom, Expr]
    ) -> Expr:
        """The same; `made` are the atoms that were met before."""
        if self.symbols().isdisjoint(values):
            return self
        total: dict[Monomial, int] = {}
        for monomial, coefficient in self.terms:
            if all([a.kind == "sym" and a.name not in values for a, _ in monomial]):
                total[monomial] = total.get(monomial, 0) + coefficient
                continue
            product = const(coefficient)
            for atom, power in monomial:
                factor = made.get(atom)
                if factor is None:
                    if atom.name:
                        factor = as_expr(values.get(atom.name, expr_of(atom)))
                    else:
                        a, b = (arg._with(values, facts, made) for arg in atom.args)
                        factor = APPLY[atom.kind](a, b, facts)
                    made[atom] = factor
                for _ in range(power):
                    product = product * factor
            for part, count in product.terms:
                total[part] = total.get(part, 0) + count
        return _from_terms(total)

    def evaluate(self, values: Mapping[str, int]) -> int:
        """The value for given symbols. Raises KeyError for a symbol without one."""
        return self._at(values, {})

    def _at(self, values: Mapping[str, int], known: dict[Atom, int]) -> int:
        total = 0
        for monomial, coefficient in self.terms:
            product = coefficient
            for atom, power in monomial:
                if atom.kind == "sym":
                    product *= values[atom.name] ** power
                    continue
                if atom not in known:
                    a, b = (arg._at(values, known) for arg in atom.args)
                    known[atom] = _EVALUATE[atom.kind](a, b)
                product *= known[atom] ** power
            total += product
        return total

    def coefficient(self, name: str) -> Expr | None:
        """The coefficient of a symbol that occurs only linearly, else None."""
        if name not in self.symbols():
            return const(0)
        inside = const(0)
        for monomial, coefficient in self.terms:
            rest: list[tuple[Atom, int]] = []
            power_of = 0
            for atom, power in monomial:
                if atom.kind != "sym":
                    if name in atom.symbols:
                        return None
                elif atom.name == name:
                    power_of = power
                    continue
                rest.append((atom, power))
            if power_of > 1:
                return None
            if power_of == 1:
                inside = inside + Expr(((tuple(rest), coefficient),))
        return inside


def _times(left: Monomial, right: Monomial) -> Monomial:
    if not left or not right:
        return left or right
    powers = dict(left)
    for atom, power in right:
        powers[atom] = powers.get(atom, 0) + power
    return tuple(sorted(powers.items()))


def _from_terms(terms: Mapping[Monomial, int]) -> Expr:
    found = [(m, c) for m, c in terms.items() if c]
    if len(found) < 2:
        return Expr(tuple(found))
    found.sort()
    return join_divisions(Expr(tuple(found)))


def join_divisions(expr: Expr, facts: Facts | None = None) -> Expr:
    """c * (b * (a // b) + a % b) is c * a, for b that is not 0: by 0 both are 0.

    Where there is a position, no axis that it is of is empty; sizes alone may all be 0.
    """
    quotients = {
        a.args
        for monomial, _ in expr.terms
        for a, _ in monomial
        if a.kind == "//" and (_has_position(a) or (facts and facts.is_positive(a.args[1])))
    }
    if not quotients:
        return expr
    for monomial, coefficient in expr.terms:
        for atom, power in monomial:
            if atom.kind != "%" or power != 1 or atom.args not in quotients:
                continue
            a, b = atom.args
            rest = tuple([p for p in monomial if p[0] is not atom])
            quotient, by = Atom("//", "", (a, b)), b.as_int()
            wanted = (_times(rest, ((quotient, 1),)), coefficient * (by or 0))
            if by is not None and wanted not in expr.terms:
                continue
            others = Expr(((rest, coefficient),))
            whole = others * b * expr_of(quotient)
            if whole.terms and set(whole.terms) <= set(expr.terms):
                left = tuple(t for t in expr.terms if t[0] != monomial and t not in whole.terms)
                return Expr(left) + others * a
    return expr


def _has_position(quotient: Atom) -> bool:
    """Whether it is by a number, or has symbols that are no sizes, whose names are capitalised."""
    if quotient.args[1].as_int() is not None:
        return True
    return not all(is_size(name) for name in quotient.symbols)


def is_size(name: str) -> bool:
    """Whether a symbol is a size: those alone are capitalised, also as variables of a call."""
    return name.removeprefix(VARIABLE_PREFIX)[:1].isupper()


def expr_of(atom: Atom) -> Expr:
    return Expr(((((atom, 1),), 1),))


@lru_cache(maxsize=1 << 14)
def const(value: int) -> Expr:
    """The constant `value`."""
    return Expr((((), int(value)),)) if value else Expr(())


@lru_cache(maxsize=1 << 14)
def sym(name: str) -> Expr:
    """The symbol `name`."""
    return expr_of(Atom("sym", name))


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
    quotient, rest = divide(a, b)
    if quotient.terms and (y is not None or (facts and facts.is_positive(b))):
        return quotient + floordiv(rest, b, facts)
    if facts and facts.is_nonneg(a) and facts.prove_lt(a, b):
        return const(0)
    if facts and y is not None and (shift := a.constant()):
        over = facts.remainder(a - shift, b)
        if over is not None:
            return floordiv(a - shift, b, facts) + (over + shift) // y
    return _whole(a, b) or expr_of(Atom("//", "", (a, b)))


def _whole(a: Expr, b: Expr) -> Expr | None:
    """(p - p % b + c) // b for a number b and 0 <= c < b, which is p // b; None for other a."""
    for monomial, coefficient in a.terms if b.as_int() is not None else ():
        if coefficient != -1 or len(monomial) != 1 or monomial[0][1] != 1:
            continue
        atom = monomial[0][0]
        if atom.kind == "%" and atom.args[1] == b:
            quotient, rest = divide(a + expr_of(atom) - atom.args[0], b)
            if rest.as_int() is not None:
                return quotient + floordiv(atom.args[0], b)
    return None


def mod(a: IntLike, b: IntLike, facts: Facts | None = None) -> Expr:
    """The remainder of floor division, with the sign of b, simplified by what `facts` prove."""
    a, b = as_expr(a), as_expr(b)
    x, y = a.as_int(), b.as_int()
    if y in (0, 1) or x == 0:
        return const(0)
    if x is not None and y is not None:
        return const(x % y)
    over = facts.remainder(a, b) if facts else None
    if over is not None:
        return const(over)
    quotient, rest = divide(a, b)
    if quotient.terms and (y is not None or (facts and facts.is_positive(b))):
        return mod(rest, b, facts)
    if facts and facts.is_nonneg(a) and facts.prove_lt(a, b):
        return a
    return expr_of(Atom("%", "", (a, b)))


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
    return expr_of(Atom("min", "", tuple(sorted((a, b)))))


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
    return expr_of(Atom("max", "", tuple(sorted((a, b)))))


def _within_maximum(a: Expr, b: Expr, facts: Facts | None) -> Expr | None:
    """max(a, b) where a is c*max(p, q) + k, c > 0, and c*p + k differs from b by a number, or None.

    What chains of slices make: max(2*max(N - 1, 0) - 1, 0) is max(2*N - 3, 0).
    """
    nested = [(m[0][0], c) for m, c in a.terms if c > 0 and len(m) == 1 and m[0][1] == 1]
    if len(nested) != 1 or nested[0][0].kind != "max":
        return None
    atom, times = nested[0]
    shift = a - expr_of(atom) * times
    if shift.as_int() is None:
        return None
    p, q = atom.args
    for part, rest in ((p, q), (q, p)):
        gap = (part * times + shift - b).as_int()
        if gap is not None:
            return a if gap >= 0 else maximum(rest * times + shift, b, facts)
    return None


def divide(a: Expr, b: Expr) -> tuple[Expr, Expr]:
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
        step, _ = divide(Expr((rest.terms[-1],)), Expr(((lead, by),)))
        if not step.terms:
            return None
        quotient, rest = quotient + step, rest - step * b
    return quotient if not rest.terms else None


APPLY: dict[str, Callable[[Expr, Expr, Facts | None], Expr]] = {
    "//": floordiv, "%": mod, "min": minimum, "max": maximum
}  # fmt: skip
_EVALUATE: dict[str, Callable[[int, int], int]] = {
    "//": lambda a, b: a // b if b else 0,
    "%": lambda a, b: a % b if b else 0,
    "min": min,
    "max": max,
}
