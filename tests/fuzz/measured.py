"""Arrays with a bound on the error that a right implementation may have, in float64.

Independent of the compiler: NumPy alone. A `Measured` has what an operation means of exact numbers
and how far a program may be from it when every operation rounds to its dtype, or keeps more digits.
An infinite bound is an element that may be anything: a comparison of what is equal within errors.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np

Array = Any
FLOATS = {  # the dtype, bits of the significand, the least exponent, the greatest value
    "f64": (np.float64, 53, -1074, 1.7976931348623157e308),
    "f32": (np.float32, 24, -149, 3.4028234663852886e38),
    "f16": (np.float16, 11, -24, 65504.0),
    "bf16": (ml_dtypes.bfloat16, 8, -133, 3.3895313892515355e38),
    "f8e4m3": (ml_dtypes.float8_e4m3fn, 4, -9, 448.0),
    "f8e5m2": (ml_dtypes.float8_e5m2, 3, -16, 57344.0),
}
INTS = {
    "i64": np.int64,
    "i32": np.int32,
    "i16": np.int16,
    "i8": np.int8,
    "u64": np.uint64,
    "u32": np.uint32,
    "u16": np.uint16,
    "u8": np.uint8,
}
UNKNOWN = np.inf
TF32_PARTS = 2.0**-136
"""What a factor of an f32 product may lose where it is two tf32 numbers: a tf32 has 10 bits behind
the point and the exponents of f32, so that the second one's least bit is that."""


def numpy_dtype(name: str) -> Any:
    return FLOATS[name][0] if name in FLOATS else INTS.get(name, np.bool_)


def unit(dtype: str) -> float:
    """Half a unit in the last place of 1: the greatest relative error of a rounding."""
    return 2.0 ** -FLOATS[dtype][1]


def accumulator(dtype: str) -> str:
    return "f64" if dtype == "f64" else "f32"


@dataclass
class Measured:
    """Values `v` of a dtype (floats as float64) and the bounds `e` of their errors."""

    v: Array
    e: Array
    dtype: str

    @property
    def exact(self) -> bool:
        return not np.any(self.e)

    def seen(self, view: Callable[[Array], Array]) -> Measured:
        """What moves elements without computing."""
        return Measured(np.array(view(self.v)), np.array(view(self.e)), self.dtype)


def given(array: Array, dtype: str) -> Measured:
    values = np.asarray(array)
    values = values.astype(np.float64) if dtype in FLOATS else values
    return Measured(values, np.zeros(values.shape), dtype)


def rounded(v: Array, e: Array, dtype: str, roundings: float = 1.0) -> Measured:
    """A float result: `e` is what came with the operands; so many roundings to `dtype` more.

    Near overflow and beyond nothing is known: more digits may be kept. An infinity is one, but
    in f8e4m3, which has none: it is the greatest value, or still infinite in what is computed.
    """
    _, bits, least, greatest = FLOATS[dtype]
    with np.errstate(all="ignore"):
        v = np.asarray(v, np.float64)
        e = np.where(np.isnan(e), UNKNOWN, e)
        size = np.abs(v) + e
        more = np.where(np.isfinite(v), roundings * (size * 2.0**-bits + 2.0**least), 0.0)
        known = np.isnan(v) if dtype == "f8e4m3" else ~np.isfinite(v)
        e = np.where(~known & (size > greatest / 4), UNKNOWN, e + more)
    return Measured(v, np.broadcast_to(e, v.shape), dtype)


def corners(f: Callable[..., Array], *args: Measured, steps: bool = False) -> tuple[Array, Array]:
    """f of the values, and how far it is from them at the ends of the bounds.

    f is monotone in each argument. With `steps`, f jumps: what differs at all is unknown.
    """
    with np.errstate(all="ignore"):
        v = np.asarray(f(*[a.v for a in args]))
        if all(a.exact for a in args):
            return v, np.zeros(v.shape)
        e = np.zeros(v.shape)
        for signs in itertools.product((-1.0, 1.0), repeat=len(args)):
            ends = [
                a.v + s * a.e if a.dtype in FLOATS else a.v
                for a, s in zip(args, signs, strict=True)
            ]
            at = np.asarray(f(*ends))
            same = (at == v) | ((at != at) & (v != v))
            if steps or v.dtype.kind != "f":
                away = np.where(same, 0.0, UNKNOWN)
            else:
                away = np.where(same, 0.0, np.abs(at - v))
            e = np.maximum(e, np.where(np.isnan(away), UNKNOWN, away))
        untouched = True
        for a in args:
            untouched = untouched & (a.e == 0)
            e = np.where(np.isinf(a.e), UNKNOWN, e)
    return v, np.where(np.broadcast_to(untouched, v.shape), 0.0, e)


def lipschitz(f: Callable[[Array], Array], a: Measured) -> tuple[Array, Array]:
    """f whose slope is at most 1."""
    with np.errstate(all="ignore"):
        v = f(a.v)
        return v, np.where(np.isnan(v) & (a.e > 0), UNKNOWN, a.e)


def integers(f: Callable[..., Array], *args: Measured, dtype: str) -> Measured:
    """An operation on integers or bools: known where all operands are."""
    with np.errstate(all="ignore"):
        v = np.asarray(f(*[a.v for a in args]))
    e = sum(np.broadcast_to(np.where(a.e > 0, UNKNOWN, 0.0), v.shape) for a in args)
    return Measured(v.astype(numpy_dtype(dtype)), np.asarray(e, np.float64), dtype)


def cast(a: Measured, dtype: str) -> Measured:
    """Conversion: to integers saturating from floats and wrapping from integers."""
    with np.errstate(all="ignore"):
        if dtype == "bool":
            v, e = corners(lambda x: x != 0, a, steps=True)
            if a.dtype in FLOATS:  # the ends may both be other than 0, and what is between 0
                e = np.where((np.abs(a.v) <= a.e) & (a.e > 0), UNKNOWN, e)
            return Measured(v, e, dtype)
        if dtype in INTS:
            if a.dtype in FLOATS:
                v, e = corners(lambda x: _saturated(x, dtype), a, steps=True)
                return Measured(v, e, dtype)
            return integers(lambda x: x.astype(INTS[dtype]), a, dtype=dtype)
        wide = a.v.astype(np.float64)
        if dtype.startswith("f8"):
            greatest = FLOATS[dtype][3]
            keep = np.clip(wide, -greatest, greatest)
            e = np.where(np.isinf(a.e), UNKNOWN, a.e)
            size = np.minimum(np.abs(keep) + e, greatest)
            e = e + size * unit(dtype) * 1.01 + 2.0 ** FLOATS[dtype][2]
            return Measured(keep, np.where(np.isnan(keep), np.where(a.e > 0, UNKNOWN, 0), e), dtype)
        more = np.abs(wide) * 2.0**-53 if a.dtype in INTS else 0.0
        return rounded(wide, np.where(a.e > 0, a.e, 0.0) + more, dtype)


def _saturated(x: Array, dtype: str) -> Array:
    info = np.iinfo(INTS[dtype])
    x = np.trunc(np.where(np.isnan(x), 0.0, x))
    low, high = x <= float(info.min), x >= float(info.max)
    inside = np.where(low | high, 0.0, x).astype(INTS[dtype])
    return np.where(low, info.min, np.where(high, info.max, inside)).astype(INTS[dtype])


def total(a: Measured, axes: Sequence[int], keep: bool, mean: bool = False) -> Measured:
    """The sum, or mean, over axes; floats accumulate in f32 or wider."""
    axes = tuple(axes)
    count = int(np.prod([a.v.shape[x] for x in axes], dtype=int))
    with np.errstate(all="ignore"):
        if a.dtype not in FLOATS:
            if mean:
                v = a.v.astype(np.float64).sum(axes, keepdims=keep) / count
                if count == 0:
                    v = np.full(v.shape, np.nan)
                e = np.where(a.e > 0, UNKNOWN, 0.0).sum(axes, keepdims=keep)
                big = np.abs(a.v.astype(np.float64)).sum(axes, keepdims=keep) / max(count, 1)
                return rounded(v, e + big * count * 2.0**-23, "f32", 3)
            v = a.v.astype(np.int64).sum(axes, keepdims=keep)
            return Measured(v, np.where(a.e > 0, UNKNOWN, 0.0).sum(axes, keepdims=keep), "i64")
        v = a.v.sum(axes, keepdims=keep)
        size = (np.where(np.isfinite(a.v), np.abs(a.v), 0) + a.e).sum(axes, keepdims=keep)
        e = a.e.sum(axes, keepdims=keep) + (count + 2) * unit(accumulator(a.dtype)) * size
        lost = np.isinf(a.e).any(axes, keepdims=keep)
        e = np.where(np.isfinite(v), e, np.where(lost, UNKNOWN, 0))
        e = np.where(size > FLOATS[accumulator(a.dtype)][3] / 4, UNKNOWN, e)
        if mean:
            v, e = v / count if count else np.full(v.shape, np.nan), e / max(count, 1)
        return rounded(v, e, a.dtype, 2)


def extreme(a: Measured, axes: Sequence[int], keep: bool, name: str) -> Measured:
    """The greatest or least element; of nothing the lowest or highest value."""
    f = np.max if name == "max" else np.min
    sign = -1.0 if name == "max" else 1.0
    axes = tuple(axes)
    if a.dtype in FLOATS:
        start: Any = sign * (FLOATS[a.dtype][3] if a.dtype == "f8e4m3" else np.inf)
        v, e = (
            corners(
                lambda x: f(x, axis=axes, keepdims=keep, initial=start), Measured(a.v, a.e, a.dtype)
            )
            if a.exact
            else _ends(a, axes, keep, f, start)
        )
        if a.v.size == 0:
            e = np.zeros(v.shape)
        return Measured(v, e, a.dtype)
    if a.dtype == "bool":
        start = name == "min"
    else:
        info = np.iinfo(INTS[a.dtype])
        start = info.min if name == "max" else info.max
    v = f(a.v, axis=axes, keepdims=keep, initial=start)
    return Measured(v, np.where(a.e > 0, UNKNOWN, 0.0).sum(axes, keepdims=keep), a.dtype)


def _ends(a: Measured, axes: Any, keep: bool, f: Any, start: float) -> tuple[Array, Array]:
    with np.errstate(all="ignore"):
        v, low, high = (
            f(a.v + s * np.where(np.isinf(a.e), 0, a.e), axis=axes, keepdims=keep, initial=start)
            for s in (0.0, -1.0, 1.0)
        )
        e = np.maximum(np.abs(high - v), np.abs(v - low))
        e = np.where((v == low) & (v == high), 0.0, e)
        e = np.where(np.isnan(v), 0.0, np.where(np.isnan(e), UNKNOWN, e))
    return v, np.where(np.isinf(a.e).any(axes, keepdims=keep), UNKNOWN, e)


factor_error = 0.0
"""Of f32 products, on the device that is looked at."""


def product(
    f: Callable[[Array, Array], Array],
    a: Measured,
    b: Measured,
    terms: int,
    dtype: str,
    roundings: float = 2.0,
) -> Measured:
    """A sum of products, f bilinear; each sum has so many terms. Factors of f32 may be off by
    `factor_error`."""
    with np.errstate(all="ignore"):
        av, bv = a.v.astype(np.float64), b.v.astype(np.float64)
        v = f(av, bv)
        fa, fb = (np.where(np.isfinite(x), np.abs(x), 0.0) for x in (av, bv))
        own = factor_error if dtype == "f32" else 0.0
        ea, eb = (np.where(np.isinf(x.e), 0.0, x.e) + own for x in (a, b))
        size = f(fa + ea, fb + eb)
        e = size - f(fa, fb) + size * (4 * (terms + 8) * unit(accumulator(dtype)))
        e = e + terms * 2.0 ** (FLOATS[accumulator(dtype)][2] - 1)  # of products that underflow
        lost = f(np.isinf(a.e).astype(float), np.ones(b.v.shape))
        lost = lost + f(np.ones(a.v.shape), np.isinf(b.e).astype(float))
        touched = f((a.e > 0).astype(float), np.ones(b.v.shape))
        touched = touched + f(np.ones(a.v.shape), (b.e > 0).astype(float))
        e = np.where(np.isfinite(v), e, np.where(touched > 0, UNKNOWN, 0.0))
        e = np.where(lost > 0, UNKNOWN, e)
        # finite products near overflow: a factor may be taken out of the sum
        over = ~(size <= FLOATS[accumulator(dtype)][3] / 4)
        return rounded(v, np.where(over, UNKNOWN, e), dtype, roundings)


def check(found: Array, wanted: Measured) -> str:
    """What is wrong with an array, or nothing."""
    found = np.asarray(found)
    if found.shape != wanted.v.shape:
        return f"shape {found.shape}, not {wanted.v.shape}"
    if found.dtype != np.dtype(numpy_dtype(wanted.dtype)):
        return f"dtype {found.dtype}, not {wanted.dtype}"
    known = np.isfinite(wanted.e)
    with np.errstate(all="ignore"):
        if wanted.dtype in FLOATS:
            ours, theirs = found.astype(np.float64), wanted.v
            fine = (ours == theirs) | (np.isnan(ours) & np.isnan(theirs))
            fine |= np.abs(ours - theirs) <= wanted.e
        else:
            fine = found == wanted.v
    wrong = known & ~fine
    if not wrong.any():
        return ""
    at = tuple(int(x) for x in np.argwhere(wrong)[0])
    return (
        f"{int(wrong.sum())} of {wrong.size} wrong, first at {at}: {found[at]!r}, "
        f"not {wanted.v[at]!r} within {wanted.e[at]:.3g}"
    )
