"""e^x of an f32 by the hardware's powers of two."""

from __future__ import annotations

import math

from stagefuse.compiler.cpu.ir import round_to_single

from .ir import Code, Value

LOG2_E = math.log2(math.e)
SHIFT = 1.5 * 2**23
"""An f32 from here to a third more has its whole part in its lowest bits."""
MOST = 126.0
"""The greatest exponent of a factor, and behind the sign the least."""


def exp_f32(code: Code, x: Value) -> Value:
    """e^x within 2 ulp: 2^j of a whole j, whose bits a sum with a large number leaves, times
    `ex2.approx` of the rest of x log2(e), which is taken in two parts. j is within -126 .. 126:
    overflow, underflow and NaN come out of the last product."""

    def fused(op: str, a: Value, b: float, c: Value | float) -> Value:
        return code.pure(op, "float", a, code.const(b, "float"), code.operand(c, "float"))

    scaled = fused("fma.rn.sat.f32", x, LOG2_E / (2 * MOST), 0.5)
    whole = fused("fma.rm.f32", scaled, 2 * MOST, SHIFT + 127.0 - MOST)
    power = code.pure("add.rn.f32", "float", whole, code.const(-SHIFT - 127.0, "float"))
    rest = fused("fma.rn.f32", x, LOG2_E, -power)
    rest = fused("fma.rn.f32", x, LOG2_E - round_to_single(LOG2_E), rest)
    found = code.pure("ex2.approx.ftz.f32", "float", rest)
    return code.pure("mul.rn.f32", "float", found, whole.bits().shl(23).as_float("float"))


def short_exp(code: Code, x: Value) -> Value:
    """e^x within 2^-16 of itself: the square of its root, which is never subnormal where the square
    is a number."""
    root = code.pure("ex2.approx.ftz.f32", "float", x * (LOG2_E / 2))
    return root * root
