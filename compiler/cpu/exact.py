"""Sums and products of floats without loss, as pairs of a rounded value and the rest."""

from __future__ import annotations

from typing import TypeAlias

from .ir import Code, Value

Pair: TypeAlias = tuple[Value, Value]

# Adding 1.5 * 2**mantissa_bits rounds to an integer and leaves it in the low bits of the pattern.
MAGIC = {"float": 12582912.0, "double": 6755399441055744.0}
MAGIC_BITS = {"float": 0x4B400000, "double": 0x4338000000000000}


def two_sum(a: Value, b: Value) -> Pair:
    """The rounded sum and what rounding lost."""
    total = a + b
    part = total - a
    return total, (a - (total - part)) + (b - part)


def fast_two_sum(a: Value, b: Value) -> Pair:
    """The same where |a| >= |b|."""
    total = a + b
    return total, b - (total - a)


def two_product(c: Code, a: Value, b: Value) -> Pair:
    product = a * b
    return product, c.fma(a, b, -product)
