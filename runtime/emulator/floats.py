"""Floating-point arithmetic with PTX's roundings, on NumPy arrays.

Results of `rn` in f32 and f64 are the processor's own, which rounds as IEEE 754 says. What needs
another rounding, or one rounding where the processor would do two, is computed in f64 and rounded
to odd first: a result rounded to odd keeps what a second rounding needs to be exact (S. Boldo,
G. Melquiond, "Emulation of FMA and correctly rounded sums: proved algorithms using rounding to
odd", 2008), as long as the second one has at least two bits less.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

F16, F32, F64 = np.dtype(np.float16), np.dtype(np.float32), np.dtype(np.float64)
U8, U16, U32, U64 = (np.dtype(t) for t in (np.uint8, np.uint16, np.uint32, np.uint64))
BF16 = np.dtype(ml_dtypes.bfloat16)
_TINY = {F32: np.float32(2.0**-126), F64: np.float64(2.0**-1022), F16: np.float16(2.0**-14)}


def flush(x: Array) -> Array:
    """Subnormal numbers to zeros of their sign (`.ftz`)."""
    small = np.abs(x) < _TINY[x.dtype]
    if not small.any():
        return x
    return np.where(small, np.copysign(x.dtype.type(0), x), x)


def canonical(x: Array) -> Array:
    """NaN of f32 and f16 as the hardware's: all bits but the sign. `x` is changed in place."""
    nan = x != x
    if nan.any():
        if not isinstance(x, np.ndarray):
            x = np.array(x)
        if x.dtype == F32:
            x.view(U32)[nan] = 0x7FFFFFFF
        elif x.dtype == F16:
            x.view(U16)[nan] = 0x7FFF
    return x


def saturate(x: Array) -> Array:
    """Clamped to [0, 1]; NaN is 0."""
    clamped: Array = np.where(x > 0, np.minimum(x, x.dtype.type(1)), x.dtype.type(0))
    return clamped


def relu(x: Array) -> Array:
    """Negative numbers and -0 to +0; NaN stays."""
    zero = x.dtype.type(0)
    clamped: Array = np.where(x > 0, x, np.where(x == x, zero, x))
    return clamped


def two_sum(a: Array, b: Array) -> tuple[Array, Array]:
    """a + b as the rounded sum and its exact error (Knuth)."""
    s = a + b
    t = s - a
    return s, (a - (s - t)) + (b - t)


def odd_sum(a: Array, b: Array) -> Array:
    """a + b in f64, rounded to odd."""
    s, e = two_sum(a, b)
    s = np.atleast_1d(s)
    bits = s.view(np.int64)
    fix = (e != 0) & np.isfinite(e) & ((bits & 1) == 0)
    if fix.any():
        bits = bits + np.where(fix, np.where((e > 0) == (s > 0), 1, -1), 0)
    return bits.view(F64)


def narrow(x: Array, mode: str) -> Array:
    """f64 to f32 by a rounding: `rn`, `rz`, `rm` or `rp`."""
    y = x.astype(F32)
    return y if mode == "rn" else _directed(y, y.astype(F64) - x, y.astype(F64), mode)


def _directed(y: Array, above: Array, wide: Array, mode: str) -> Array:
    """The nearest `y` corrected by the sign of its error `above` (y minus the exact value)."""
    above = np.where(np.isnan(above), 0, above)
    zero, inf = y.dtype.type(0), y.dtype.type(np.inf)
    if mode == "rz":
        return np.where(above * np.sign(wide) > 0, np.nextafter(y, zero), y)
    if mode == "rm":
        return np.where(above > 0, np.nextafter(y, -inf), y)
    return np.where(above < 0, np.nextafter(y, inf), y)


def odd32(x: Array) -> Array:
    """f64 to f32, rounded to odd."""
    x = np.atleast_1d(x)
    y = x.astype(F32)
    wide = y.astype(F64)
    inexact = (wide != x) & (x == x)
    bits = y.view(np.int32)
    bits = np.where(inexact & (np.abs(wide) > np.abs(x)), bits - 1, bits)
    return np.where(inexact, bits | 1, bits).astype(np.int32).view(F32)


def to_bf16(x: Array, mode: str = "rn") -> Array:
    """f32 or f64 to the bits of bf16."""
    x = np.atleast_1d(x)
    bits = (odd32(x) if x.dtype == F64 else x).view(U32)
    low, up = bits & U32.type(0xFFFF), bits >> U32.type(16)
    if mode == "rn":
        up = (bits + U32.type(0x7FFF) + (up & U32.type(1))) >> U32.type(16)
    elif mode in ("rm", "rp"):
        away = (x < 0) if mode == "rm" else (x > 0)
        up = up + ((low != 0) & away)
    return np.where(x == x, up, 0x7FFF).astype(U16)


def from_bf16(bits: Array) -> Array:
    """The bits of bf16 to f32."""
    return (np.atleast_1d(bits).astype(U32) << U32.type(16)).view(F32)


def to_f16(x: Array, mode: str = "rn") -> Array:
    """f32 or f64 to f16."""
    y = np.atleast_1d(x).astype(F16)
    if mode != "rn":
        wide = y.astype(F64)
        y = _directed(y, wide - x.astype(F64), wide, mode)
    return canonical(y)


def to_tf32(x: Array, mode: str) -> Array:
    """f32 to f32 with 10 bits of mantissa; `rna` is ties away from zero."""
    bits = np.atleast_1d(x).view(U32)
    if mode == "rna":
        rounded = bits + U32.type(0x1000)
    elif mode == "rn":
        rounded = bits + U32.type(0xFFF) + ((bits >> U32.type(13)) & U32.type(1))
    else:
        rounded = bits
    finite = (bits & U32.type(0x7F800000)) != 0x7F800000
    kept = np.where(finite, rounded & U32.type(0xFFFFE000), bits)
    return np.where(x == x, kept, 0x7FFFFFFF).astype(U32).view(F32)


# arithmetic


def add(a: Array, b: Array, mode: str) -> Array:
    """a + b of f32 or f64."""
    if mode == "rn":
        return a + b
    if a.dtype == F32:
        return _signed_zero(narrow(odd_sum(a.astype(F64), b.astype(F64)), mode), a, b, mode)
    s, e = two_sum(a, b)
    e = np.where(np.isinf(s) & np.isfinite(a) & np.isfinite(b), -s, e)
    return _signed_zero(_directed(s, -e, s, mode), a, b, mode)


def _signed_zero(y: Array, a: Array, b: Array, mode: str) -> Array:
    """An exact sum of 0 from numbers that are not both zeros of one sign is -0 with `rm`."""
    if mode != "rm":
        return y
    zero = (y == 0) & ~(np.signbit(a) == np.signbit(b))
    return np.where(zero, -y.dtype.type(0) * 1, y) if zero.any() else y


def mul(a: Array, b: Array, mode: str) -> Array:
    """a * b of f32 or f64."""
    if mode == "rn":
        return a * b
    if a.dtype == F32:
        return narrow(a.astype(F64) * b.astype(F64), mode)
    return exactly(lambda x, y: x * y, mode, a, b)


def fma(a: Array, b: Array, c: Array, mode: str) -> Array:
    """a * b + c of f32 or f64, rounded once."""
    if np.result_type(a) == F64:
        return _fma64(a, b, c, mode)
    product = np.multiply(a, b, dtype=F64)
    s = product + c
    if mode != "rn":
        c64 = c.astype(F64)
        exact = odd_sum(product, c64)
        y = narrow(exact, mode)
        if mode == "rm":  # an exact 0 of numbers of both signs
            y[(exact == 0) & (np.signbit(product) != np.signbit(c64))] = -0.0
        return y
    y = s.astype(F32)
    # only a sum that is halfway between two f32, or that is subnormal, can have been rounded wrong
    halfway = (np.atleast_1d(s).view(np.int64) & 0x1FFFFFFF) == 0x10000000
    if not halfway.any() and np.abs(y).min() > 2.0**-125:
        return y
    risky = np.flatnonzero(halfway | (np.abs(s) < 2.0**-125) & (s != 0))
    if not len(risky):
        return y
    p, q = (np.broadcast_to(v, y.shape)[risky] for v in (product, c.astype(F64)))
    y[risky] = odd_sum(p, q).astype(F32)
    return y


def fma_exact(a: Array, b: Array, c: Array) -> Array:
    """a * b + c of 16-bit floats given as f64, rounded to odd: the product is exact."""
    return odd_sum(a * b, c)


def _split(a: Array) -> tuple[Array, Array]:
    t = a * 134217729.0  # 2^27 + 1 (Veltkamp)
    high = t - (t - a)
    return high, a - high


def _fma64(a: Array, b: Array, c: Array, mode: str) -> Array:
    """By Boldo and Melquiond where exponents allow, else in rational arithmetic."""
    a, b, c = np.broadcast_arrays(*map(np.atleast_1d, (a, b, c)))
    uh = a * b
    (ah, al), (bh, bl) = _split(a), _split(b)
    ul = al * bl - (((uh - ah * bh) - al * bh) - ah * bl)
    th, tl = two_sum(c, ul)
    vh, vl = two_sum(uh, th)
    y = vh + odd_sum(tl, vl)
    sizes = [np.abs(x) for x in (a, b, c, uh)]
    plain = np.logical_and.reduce([(x > 2.0**-900) & (x < 2.0**900) for x in sizes])
    special = ~np.isfinite(a) | ~np.isfinite(b) | ~np.isfinite(c) | (a == 0) | (b == 0)
    y = np.where(special, uh + c, y)
    slow = ~special & (~plain | (mode != "rn"))
    if slow.any():
        y[slow] = exactly(lambda p, q, r: p * q + r, mode, a[slow], b[slow], c[slow])
    if mode == "rm":  # an exact 0 of numbers of both signs
        exact = (uh != 0) | (a == 0) | (b == 0)  # no product that is too small for f64
        y[exact & (uh == -c) & (ul == 0) & (np.signbit(uh) != np.signbit(c))] = -0.0
    return y


def div(a: Array, b: Array, mode: str) -> Array:
    """a / b of f32 or f64."""
    if mode == "rn":
        return a / b
    return exactly(lambda x, y: x / y, mode, a, b, plain=lambda x, y: x / y)


def sqrt(a: Array, mode: str) -> Array:
    """The square root of f32 or f64."""
    y = np.sqrt(a)
    if mode == "rn":
        return y
    wide = np.atleast_1d(y).astype(F64)
    pairs = zip(wide, np.atleast_1d(a).astype(F64), strict=True)
    above = np.array([_square_above(float(r), float(x)) for r, x in pairs])
    return _directed(np.atleast_1d(y), above, wide, mode)


def _square_above(root: float, x: float) -> float:
    """The sign of root squared minus x."""
    if not (math.isfinite(root) and math.isfinite(x)):
        return 0.0
    return _sign(Fraction(root) ** 2 - Fraction(x))


def exactly(
    f: Callable[..., Fraction], mode: str, *operands: Array,
    plain: Callable[..., Array] | None = None,
) -> Array:  # fmt: skip
    """f of each element in rational arithmetic, rounded to the operands' type."""
    arrays = np.broadcast_arrays(*map(np.atleast_1d, operands))
    out = plain(*arrays) if plain is not None else f(*arrays)
    result: Array = np.array(out, dtype=arrays[0].dtype)
    for at in range(result.size):
        values = [float(x[at]) for x in arrays]
        if not all(map(math.isfinite, values)):
            continue
        try:
            exact = f(*map(Fraction, values))
        except ZeroDivisionError:
            continue
        nearest = result.dtype.type(_nearest(exact))
        if nearest == 0 and exact == 0:
            continue
        if math.isfinite(nearest):
            above = _sign(Fraction(float(nearest)) - exact)
        else:
            above = float(np.sign(nearest))
        one = np.array([nearest])
        result[at] = one[0] if mode == "rn" else _directed(
            one, np.array([above]), one.astype(F64), mode)[0]  # fmt: skip
    return result


def _nearest(x: Fraction) -> float:
    try:
        return x.numerator / x.denominator
    except OverflowError:
        return math.inf if x > 0 else -math.inf


def _sign(x: Fraction) -> float:
    return float((x > 0) - (x < 0))
