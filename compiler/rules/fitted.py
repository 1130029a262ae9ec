"""Rules that find functions which are computed better whole than from their parts.

They change bits, and only towards the exact value: `0.5 * x * (1 + erf(x / sqrt(2)))` loses what
`1 + erf` cancels for negative x, and `x * Phi(x)` fitted as one does not.
"""

from __future__ import annotations

import math

from stagefuse.compiler import scalar
from stagefuse.compiler.graph import Map, Ref
from stagefuse.dsl.numpy_later import np

from .record import Made, Match, Rule

MOST_FACTORS = 8


def _factors(m: Match) -> list[Ref]:
    """The factors of a product of products, as they are nested; none of one with too many."""
    found: list[Ref] = []
    pending = list(m.operands[::-1])
    while pending:
        if len(found) + len(pending) > MOST_FACTORS:
            return []
        ref = pending.pop()
        inner = m.args(ref, "mul")
        if inner is None:
            found.append(ref)
        else:
            pending.extend(inner[::-1])
    return found


def _one_plus(m: Match, ref: Ref, fn: str) -> Ref | None:
    """u, if a value is 1 + fn(u)."""
    terms = m.args(ref, "add")
    if terms is None or m.number(terms[1]) != 1:
        return None
    found = m.args(terms[0], fn)
    return None if found is None else found[0]


def _half_of_one_plus(m: Match, fn: str) -> tuple[Ref, list[Ref]] | None:
    """u and the other factors, if the node is 0.5 * (1 + fn(u)) times something."""
    if not m.type.dtype.is_float:
        return None
    factors = _factors(m)
    half = [f for f in factors if m.number(f) == 0.5]
    inner = [(f, u) for f in factors if (u := _one_plus(m, f, fn)) is not None]
    if len(half) != 1 or len(inner) != 1:
        return None
    ((sum_of, u),) = inner
    return u, [f for f in factors if f not in (half[0], sum_of)]


def _is_near(m: Match, ref: Ref, wanted: float) -> bool:
    """Whether all elements are a constant, as the dtype or a decimal literal of it rounds it."""
    value = m.number(ref)
    rounded = float(scalar.convert(np.asarray(wanted), m.type.dtype))
    return value is not None and abs(float(value) / rounded - 1) < 2.0**-22


def _gelu(m: Match) -> Made:
    found = _half_of_one_plus(m, "erf")
    if found is None:
        return None
    u, others = found
    scaled, divided = m.args(u, "mul"), m.args(u, "div")
    if scaled is not None and _is_near(m, scaled[1], math.sqrt(0.5)):
        x = scaled[0]
    elif divided is not None and _is_near(m, divided[1], math.sqrt(2)):
        x = divided[0]
    else:
        return None
    if others.count(x) != 1:
        return None
    others.remove(x)
    product = m.map("gelu", x)
    for factor in others:
        product = m.map("mul", product, factor)
    return product


def _sigmoid(m: Match) -> Made:
    found = _half_of_one_plus(m, "tanh")
    if found is None:
        return None
    u, others = found
    product = m.map("sigmoid", m.map("mul", u, m.full(2)))
    for factor in others:
        product = m.map("mul", factor, product)
    return product


RULES = (
    Rule("gelu", Map, ("mul",), _gelu,
         "0.5 * x * (1 + erf(x / sqrt(2))) = x * Phi(x): nearer, at half the cost"),
    Rule("sigmoid", Map, ("mul",), _sigmoid,
         "0.5 * (1 + tanh(u)) = sigmoid(2 * u): nearer below 0, and cheaper"),
)  # fmt: skip
