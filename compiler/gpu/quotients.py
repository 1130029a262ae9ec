"""Reciprocals, quotients and what is made of them in f32, from the hardware's approximations.

`div.rn` and `sqrt.rn` test their operands and jump to a second way for those of unusual size. Here
one step of Newton's method follows the approximation, with a residual that a fused multiply-add
leaves exact, and the sizes that need more are known or are scaled.
"""

from __future__ import annotations

from .exponent import exp_f32
from .ir import Code, Value

LARGE = 2.0**64


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
