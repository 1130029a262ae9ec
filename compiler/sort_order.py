"""The number that a key has in the order of its dtype, as sorts by digits take it apart.

The formula is written over the operators that writers of code share.
"""

from __future__ import annotations

from typing import Any, TypeVar

from stagefuse.dsl.dtypes import DType

from .operators import Operators

V = TypeVar("V", bound=Operators)

DIGITS = 256
"""A digit is of eight bits."""
INFINITY = {"f64": 0x7FF << 52, "f32": 0xFF << 23, "f16": 0x7C00, "bf16": 0x7F80,
            "f8e4m3": 0x7E, "f8e5m2": 0x7C}  # fmt: skip
"""The greatest bits of a magnitude that is no NaN."""


def number_of(code: Any, bits: V, dtype: DType, descending: bool) -> V:
    """The number of a key, given as its bits, in the lowest bits of the result: unsigned, rising
    with the order of a sort. -0.0 has that of 0.0, and NaN the greatest, or the least if
    descending."""
    top, number = 1 << (dtype.bits - 1), bits
    if dtype.is_float:
        size = bits & (top - 1)
        negative = (bits & top).compare("ne", 0)
        number = negative.select(0 - size, size) + top
        ones = code.const(-1, bits.type)
        number = size.compare("gt", INFINITY[dtype.name]).select(ones, number)
    elif dtype.kind == "int":
        number = bits ^ top
    return number ^ -1 if descending else number
