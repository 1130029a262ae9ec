"""Quotients by numbers that stand in one another, as one."""

from __future__ import annotations

from math import gcd

from .dims import Atom, Expr, expr_of, floordiv


def unnested(expr: Expr) -> Expr:
    """The same for every size, its quotients by numbers above 0 with as few of them inside.

    (a // m + c) // n is (a + c*m) // (m*n), and (g*a + c) // (g*n) is (a + c // g) // n, for g and
    m above 0 and whatever c is.
    """
    found = {
        atom: whole
        for monomial, _ in expr.terms
        for atom, _ in monomial
        if atom.kind == "//" and (whole := _of(atom)) is not None
    }
    return expr.with_atoms(found) if found else expr


def unfolded(expr: Expr) -> Expr:
    """The same for every size with a - b * (a // b) for remainders a % b by numbers above 0, and
    quotients of what is taken away as those of what is not: -N // b is -((N + b - 1) // b)."""
    found = {}
    for atom in {atom for monomial, _ in expr.terms for atom, _ in monomial}:
        by = atom.args[1].as_int() if atom.kind in ("//", "%") else None
        if by is not None and by > 0:
            a = unfolded(atom.args[0])
            down = all(coefficient < 0 for monomial, coefficient in a.terms if monomial)
            quotient = -floordiv(by - 1 - a, by) if down else floordiv(a, by)
            found[atom] = quotient if atom.kind == "//" else a - quotient * by
    return expr.with_atoms(found) if found else expr


def quotients_of(expr: Expr) -> list[tuple[Expr, Expr]]:
    """What is divided by what, other than 0, in the quotients that a product is of."""
    product = [atom for atom, _ in expr.terms[0][0]] if len(expr.terms) == 1 else []
    return [(a.args[0], a.args[1]) for a in product if a.kind == "//" and a.args[1].as_int()]


def _of(atom: Atom) -> Expr | None:
    """A quotient without those inside it, or None where it is that."""
    inside, by = unnested(atom.args[0]), atom.args[1].as_int()
    if by is None or by < 1:
        return None
    for monomial, coefficient in inside.terms:
        (first, power), *more = monomial or ((None, 0),)
        if coefficient != 1 or first is None or first.kind != "//" or power != 1 or more:
            continue
        a, m = first.args[0], first.args[1].as_int()
        if m is not None and m > 0:
            return unnested(floordiv(a + (inside - expr_of(first)) * m, by * m))
    shared = gcd(by, *(c for monomial, c in inside.terms if monomial))
    if shared > 1:
        terms = [(m, c // shared) for m, c in inside.terms if c // shared]
        return unnested(floordiv(Expr(tuple(terms)), by // shared))
    return None if inside == atom.args[0] else floordiv(inside, by)
