"""What is printed of products and operands of expressions."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .dims import Expr, Monomial


def print_order(term: tuple[Monomial, int]) -> tuple[bool, bool, int, str]:
    """Where a term stands: of most factors first, negative ones behind, a number last."""
    monomial, coefficient = term
    powers = [power for _, power in monomial]
    return (monomial == (), coefficient < 0, -sum(powers), monomial_text(monomial, 1))


def monomial_text(monomial: Monomial, coefficient: int) -> str:
    """A product as `dims_text.py` reads it."""
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


def wrapped(expr: Expr) -> str:
    """An expression as an operand."""
    text = str(expr)
    return text if re.fullmatch(r"\w+", text) else f"({text})"
