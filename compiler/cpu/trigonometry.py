"""sin, cos and tan of arguments of any size, in f64.

An argument is multiplied by 2/pi in pieces whose multiples of four turns of a quarter are dropped
exactly (Payne and Hanek, "Radian reduction for trigonometric functions", 1983). Polynomials are
Chebyshev fits, computed with 300-bit arithmetic and rounded.
"""

from __future__ import annotations

import math

from .exact import MAGIC, fast_two_sum, two_product, two_sum
from .ir import Code, Value, constant_text

# (sin(r) - r) / r^3 and (cos(r) - 1 + r^2 / 2) / r^4 in r^2 on |r| <= pi / 4
SIN_F64 = (
    -0.16666666666666666, 0.008333333333333331, -0.0001984126984126506, 2.7557319219335453e-06,
    -2.5052106231157904e-08, 1.605853141458901e-10, -7.586685070091267e-13,
)  # fmt: skip
COS_F64 = (
    0.041666666666666664, -0.0013888888888888887, 2.4801587301584645e-05, -2.755731922140076e-07,
    2.0876755790363397e-09, -1.1470460773969325e-11, 4.7458652037874553e-14,
)  # fmt: skip
# the same for what is rounded to f32: to 2e-11 and 1e-9 of the sine and the cosine
SIN_F32 = (
    -0.1666666666385529, 0.008333331874709773, -0.00019840086735149065, 2.7249925772487327e-06,
)  # fmt: skip
COS_F32 = (0.041666664659501605, -0.0013888303035778091, 2.4547942059840178e-05)
# 2/pi in pieces of 29 bits: their products with an f32 value are exact.
TWO_OVER_PI_F32 = (
    0.636619770899415, 1.4681663246252086e-09, 2.2760100671971816e-18, 5.8812147387730434e-27,
    1.0346868700836215e-35, 3.7832563824127804e-45, 5.883287377678318e-54,
)  # fmt: skip
# floor(2/pi * 2^1216)
TWO_OVER_PI = int(
    "a2f9836e4e441529fc2757d1f534ddc0db6295993c439041fe5163abdebbc561b7246e3a424dd2e006492eea09d1"
    "921cfe1deb1cb129a73ee88235f52ebb4484e99c7026b45f7e413991d639835339f49c845f8bbdf9283b1ff897ff"
    "de05980fef2f118b5a0a6d1f6d367ecf27cb09b74f463f669e5fea2d7527bac7ebe5f17b3d0739f78a5292ea6bfb"
    "5fb11f8d5d0856033046fc7b6bab",
    16,
)
TABLE_STEP = 16  # bits between the rows of the table below
TABLE_ROWS = 61
PI_HALF = (1.5707963267948966, 6.123233995736766e-17)


def two_over_pi_table() -> tuple[tuple[float, ...], ...]:
    """Row j: 2/pi * 2^(16 j) modulo 4, as a sum of four doubles."""
    rows = []
    for row in range(TABLE_ROWS):
        fraction = 1216 - TABLE_STEP * row
        rest = TWO_OVER_PI & ((1 << (fraction + 2)) - 1)
        pieces = []
        for _ in range(4):
            drop = max(rest.bit_length() - 53, 0)
            top = rest >> drop
            pieces.append(math.ldexp(top, drop - fraction))
            rest -= top << drop
        rows.append(tuple(pieces))
    return tuple(rows)


def table_text() -> str:
    """The table as a global constant of LLVM."""
    entries = [constant_text(v, "double") for row in two_over_pi_table() for v in row]
    listed = ", ".join(f"double {e}" for e in entries)
    return (
        f"@sf.two_over_pi = private unnamed_addr constant [{len(entries)} x double] "
        f"[{listed}], align 64"
    )


def modulo_four(c: Code, x: Value) -> Value:
    return c.fma(c.intrinsic("rint", x * 0.25), -4.0, x)


def quarter_turns(c: Code, x: Value) -> tuple[Value, Value, Value]:
    """x times 2/pi modulo 4: the quadrant (integer) and the rest in two doubles."""
    exponent = (x.bits().lshr(52) & 0x7FF) - (1023 + 52)
    row = exponent.compare("gt", 0).select(exponent, 0).lshr(4)
    scaled = x * (1023 - row.shl(4)).shl(52).as_float("double")
    pieces = []
    for column in range(4):
        at = row.shl(2) + column
        entry = c.two_over_pi(at)
        pieces += [modulo_four(c, part) for part in two_product(c, scaled, entry)]
    total, low = pieces[0], c.const(0.0, "double")
    for piece in pieces[1:5]:
        total, lost = two_sum(total, piece)
        low = low + lost
    shifted = total + MAGIC["double"]
    rest, low = two_sum(total - (shifted - MAGIC["double"]), low)
    for piece in pieces[5:7]:
        rest, lost = two_sum(rest, piece)
        low = low + lost
    rest, low = fast_two_sum(rest, low)
    return shifted.bits(), rest, low


def quarter_turns_of_f32(c: Code, x: Value) -> tuple[Value, Value]:
    """The same for a double that holds an f32: in whole turns, of which the last two pieces are far
    less than one for any argument. Where the sum is small, it is so from the first pieces on, and
    these are added without loss."""
    total = c.const(0.0, "double")
    for piece in TWO_OVER_PI_F32[:-2]:
        turns = x * (piece / 4)
        total = total + (turns - c.intrinsic("rint", turns))
    for piece in TWO_OVER_PI_F32[-2:]:
        total = c.fma(x, piece / 4, total)
    shifted = c.fma(total, 4.0, MAGIC["double"])
    return shifted.bits(), c.fma(total, 4.0, MAGIC["double"] - shifted)


def sine_and_cosine(c: Code, x: Value) -> tuple[Value, Value, Value]:
    """Quadrant, sine and cosine of the rest, in f64, for f32 and f64."""
    if x.type == "float":
        quadrant, rest = quarter_turns_of_f32(c, x.to("fpext", "double"))
        return quadrant, *of_rest(c, rest * PI_HALF[0])
    quadrant, rest, rest_low = quarter_turns(c, x)
    r, low = two_product(c, rest, c.const(PI_HALF[0], "double"))
    low = c.fma(rest_low, PI_HALF[0], c.fma(rest, PI_HALF[1], low))
    z = r * r
    sine = r + c.fma(r * z, c.polynomial(z, SIN_F64), low)
    half = z * 0.5
    near = 1.0 - half
    tail = c.fma(z * z, c.polynomial(z, COS_F64), -(r * low))
    return quadrant, sine, near + (((1.0 - near) - half) + tail)


def of_rest(c: Code, r: Value) -> tuple[Value, Value]:
    """Sine and cosine, in f64 for what is rounded to f32, of |r| <= pi / 4."""
    z = r * r
    sine = c.fma(r * z, c.polynomial(z, SIN_F32), r)
    return sine, c.fma(z * z, c.polynomial(z, COS_F32), c.fma(z, -0.5, 1.0))


def flip_sign(x: Value, bit: Value) -> Value:
    """x with its sign flipped where bit 1 of an integer is set."""
    return (x.bits() ^ (bit & 2).shl(62)).as_float("double")


def sin(c: Code, x: Value) -> Value:
    quadrant, sine, cosine = sine_and_cosine(c, x)
    result = flip_sign((quadrant & 1).compare("eq", 0).select(sine, cosine), quadrant)
    return keep_tiny(c, x, result)


def cos(c: Code, x: Value) -> Value:
    quadrant, sine, cosine = sine_and_cosine(c, x)
    result = flip_sign((quadrant & 1).compare("eq", 0).select(cosine, sine), quadrant + 1)
    return result.to("fptrunc", x.type)


def tan(c: Code, x: Value) -> Value:
    quadrant, sine, cosine = sine_and_cosine(c, x)
    even = (quadrant & 1).compare("eq", 0)
    return keep_tiny(c, x, even.select(sine, -cosine) / even.select(cosine, sine))


def keep_tiny(c: Code, x: Value, result: Value) -> Value:
    """The result rounded to x's type, or x itself where the function is the identity."""
    limit = 1e-5 if x.type == "float" else 1e-9
    return c.intrinsic("fabs", x).compare("lt", limit).select(x, result.to("fptrunc", x.type))
