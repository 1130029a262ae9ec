"""Rounding to a floating-point type in rational arithmetic, as IEEE 754 says."""

from __future__ import annotations

import math
from fractions import Fraction

KINDS = {"f16": (11, -14, 15), "bf16": (8, -126, 127), "f32": (24, -126, 127),
         "f64": (53, -1022, 1023), "tf32": (11, -126, 127)}  # fmt: skip
"""Bits of precision, and the exponents of the smallest normal and of the largest number."""


def rounded(x: Fraction, kind: str, mode: str = "rn") -> float:
    """The number of a type that x rounds to; zeros are positive."""
    precision, least, most = KINDS[kind]
    if x == 0:
        return 0.0
    size = abs(x)
    exponent = max(_exponent(size), least)
    unit = Fraction(2) ** (exponent - precision + 1)
    whole, rest = divmod(size, unit)
    down = whole
    negative = x < 0
    if mode in ("rn", "rna"):
        half = unit / 2
        up = rest > half or rest == half and (down % 2 == 1 or mode == "rna")
    else:
        up = rest > 0 and (mode == "rp" and not negative or mode == "rm" and negative)
    value = (down + up) * unit
    largest = (2 - Fraction(2) ** (1 - precision)) * Fraction(2) ** most
    if value > largest:
        value_float = math.inf if up or rest == 0 and mode in ("rn", "rna") or (
            mode == "rn") else float(largest)  # fmt: skip
        if mode in ("rz",) or mode == "rm" and not negative or mode == "rp" and negative:
            value_float = float(largest)
        elif mode in ("rm", "rp"):
            value_float = math.inf
    else:
        value_float = float(value)
    return -value_float if negative else value_float


def _exponent(x: Fraction) -> int:
    e = x.numerator.bit_length() - x.denominator.bit_length()
    return e if Fraction(2) ** e <= x else e - 1
