"""Reciprocals, quotients and what is made of them in f32, from the hardware's approximations.

`div.rn` and `sqrt.rn` test their operands and jump to a second way for those of unusual size. Here
one step of Newton's method follows the approximation, with a residual that a fused multiply-add
leaves exact, and the sizes that need more are known or are scaled.
"""

from __future__ import annotations

import struct
from fractions import Fraction

import numpy as np

from stagefuse.compiler.cpu.ir import round_to_single

from .exponent import exp_f32, short_exp
from .ir import Code, Value

LARGE = 2.0**64
SATURATED = 80.0
"""From here on a sigmoid is 1, and e^x finite."""


def reciprocal(code: Code, x: Value) -> Value:
    """1 / x for every x, rounded correctly, but for subnormal results, which are rounded twice."""
    large = code.pure("abs.f32", "float", x).compare("ge", LARGE)
    factor = large.select(code.const(2.0**-64, "float"), 2.0**32)
    scaled = x * factor
    near = code.pure("rcp.approx.ftz.f32", "float", scaled)
    return _refined(code, code.fma(-scaled, near, 1.0), near, near) * factor


def usual_reciprocal(code: Code, x: Value) -> Value:
    """1 / x for x from 2^-60 to 2^60, rounded correctly."""
    near = code.pure("rcp.approx.ftz.f32", "float", x)
    return code.fma(code.fma(-x, near, 1.0), near, near)


def rsqrt(code: Code, x: Value) -> Value:
    """1 / sqrt(x) within 1 ulp."""
    near = code.pure("rsqrt.approx.f32", "float", x)
    return _refined(code, code.fma(-(x * near), near, 1.0), near * 0.5, near)


def _refined(code: Code, rest: Value, slope: Value, near: Value) -> Value:
    """One step; a residual that is NaN, of 0 and infinity, leaves what is right already."""
    return code.fma(code.pure("min.f32", "float", rest, code.const(1.0, "float")), slope, near)


def quotient(code: Code, a: Value, b: Value) -> Value:
    """a / b, where b is in 1 .. 2^100 or NaN, rounded correctly but for what a is subnormal by."""
    near = code.pure("rcp.approx.ftz.f32", "float", b)
    found = a * near
    return code.fma(code.fma(-b, found, a), near, found)


def sigmoid(code: Code, x: Value) -> Value:
    """1 / (1 + e^-x) within 3 ulp: 1 or e^x over 1 + e^-|x|, which the residual takes as two
    numbers, not as their rounded sum."""
    e = exp_f32(code, -code.pure("abs.f32", "float", x))
    above = x.compare("ge", 0.0).select(code.const(1.0, "float"), e)
    near = code.pure("rcp.approx.ftz.f32", "float", e + 1.0)
    found = above * near
    return code.fma(code.fma(-found, e, above - found), near, found)


def short_sigmoid(code: Code, x: Value) -> Value:
    """1 / (1 + e^-x) within 2^-16 of itself: e^x over 1 + e^x, of an x that keeps both finite."""
    most = code.const(SATURATED, "float")
    e = short_exp(code, code.pure("min.NaN.f32", "float", x, most))
    return e * code.pure("rcp.approx.ftz.f32", "float", e + 1.0)


def ratio(code: Code, a: Value, b: Value) -> Value:
    """a / b, where b is from 2^-100 to 2^125, infinite or NaN, within 1/2 and 2^-22 ulp, from 2^100
    on 2^-4; the quotient itself where that is a number of f32, and 1 ulp where it is subnormal.

    1 / b is two numbers, the second above 0, so that an infinite a stays so.
    """
    if b.text.startswith("0f"):
        first, rest = (code.const(part, "float") for part in _reciprocal_of(b.text))
    else:
        near = reciprocal(code, b)
        below = (near.bits() - 1).as_float("float")
        left = code.fma(-b, near, 1.0)
        above = left.compare("le", 0.0)
        first = above.select(below, near)
        left = above.select(code.fma(-b, below, 1.0), left)
        rest = code.pure("min.f32", "float", left, code.const(1.0, "float")) * near
    return code.fma(a, first, a * rest)


def _reciprocal_of(text: str) -> tuple[float, float]:
    """The reciprocal of a constant as PTX writes it: the next number of f32 below, and the rest."""
    (b,) = struct.unpack(">f", bytes.fromhex(text[2:]))
    first = round_to_single(1 / b)
    while Fraction(first) * Fraction(b) >= 1:
        first = float(np.nextafter(np.float32(first), np.float32(0)))
    return first, float(1 / Fraction(b) - Fraction(first))
