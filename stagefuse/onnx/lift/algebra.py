"""Products and sums as their factors and addends, in whatever order they were written.

A model writes x * 0.5 * (1 + erf(x / 1.414)) in a dozen ways. Rules compare flat forms, where
numbers are one coefficient. Recognised forms are equal as functions of real numbers, with constants
equal to a few roundings of the dtype.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence

from .terms import Term

_ROUNDING = {"f64": 2.0**-52, "f32": 2.0**-23, "bf16": 2.0**-8, "f16": 2.0**-10}
_ROUNDINGS = 4
"""A constant may be the product of as many rounded ones."""


def near(found: float, wanted: float, like: Term) -> bool:
    """Whether a constant that met the dtype of `like` is the wanted one."""
    dtype = like.type.dtype.name if like.type is not None else "f32"
    return math.isclose(found, wanted, rel_tol=_ROUNDINGS * _ROUNDING.get(dtype, 2.0**-23))


def factors(term: Term, whole: Sequence[Term] = ()) -> tuple[float, list[Term]]:
    """The coefficient and the factors of a product; only numbers are divided by.

    Those in `whole` are not taken apart.
    """
    number = term.number
    if number is not None:
        return number, []
    if term in whole or term.kind not in ("unary", "binary"):
        return 1.0, [term]
    if term.kind == "unary":
        if term.value != "-":
            return 1.0, [term]
        coefficient, found = factors(term.args[0], whole)
        return -coefficient, found
    right = term.args[1].number
    if term.value == "*":
        (a, first), (b, second) = (factors(t, whole) for t in term.args)
        return a * b, first + second
    if term.value == "/" and right:
        a, first = factors(term.args[0], whole)
        return a / right, first
    if term.value == "**" and right in (2.0, 3.0):
        a, first = factors(term.args[0], whole)
        return a**right, first * int(right)
    return 1.0, [term]


def scalings(term: Term) -> Iterator[tuple[float, Term]]:
    """The term as a coefficient times something, more and more numbers in the coefficient."""
    coefficient = 1.0
    while True:
        yield coefficient, term
        if not is_product(term):
            return
        left, right = term.args
        if right.number:
            coefficient *= right.number if term.value == "*" else 1 / right.number
            term = left
        elif term.value == "*" and left.number is not None:
            coefficient, term = coefficient * left.number, right
        else:
            return


def scaled(term: Term) -> tuple[float, Term]:
    """The coefficient with all numbers, and what they multiply."""
    return [*scalings(term)][-1]


def shifted(term: Term) -> tuple[float, Term]:
    """The number that is added last, and what it is added to."""
    if term.kind == "binary" and term.value in ("+", "-"):
        left, right = term.args
        if right.number is not None:
            return (right.number if term.value == "+" else -right.number), left
        if left.number is not None and term.value == "+":
            return left.number, right
    return 0.0, term


def is_product(term: Term) -> bool:
    return term.kind == "binary" and term.value in ("*", "/")


def pair(terms: Sequence[Term], is_first: Callable[[Term], bool]) -> tuple[Term, Term] | None:
    """Two terms, the first of which is as asked, whichever way round they stand."""
    if len(terms) != 2:
        return None
    if is_first(terms[0]):
        return terms[0], terms[1]
    return (terms[1], terms[0]) if is_first(terms[1]) else None
