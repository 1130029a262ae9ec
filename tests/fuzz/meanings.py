"""What operations of the language mean of `Measured` arrays, by NumPy alone."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from . import measured as m
from .measured import FLOATS, Measured

UNARY: dict[str, tuple[str, Callable[..., Any], str]] = {
    # the text of x, its meaning, and how errors pass
    "neg": ("-{x}", np.negative, "steady"),
    "abs": ("abs({x})", np.abs, "slope"),
    "tanh": ("tanh({x})", np.tanh, "monotone"),
    "sigmoid": ("sigmoid({x})", lambda x: 1 / (1 + np.exp(-x)), "monotone"),
    "exp": ("exp(clamp({x}, -20.0, 4.0))", lambda x: np.exp(np.clip(x, -20, 4)), "monotone"),
    "exp_raw": ("exp({x})", np.exp, "monotone"),
    "exp2": ("exp2(minimum({x}, 3.0))", lambda x: np.exp2(np.minimum(x, 3)), "monotone"),
    "expm1": ("expm1(minimum({x}, 3.0))", lambda x: np.expm1(np.minimum(x, 3)), "monotone"),
    "log1p": ("log1p(maximum({x}, 0.0))", lambda x: np.log1p(np.maximum(x, 0)), "monotone"),
    "log": ("log(maximum({x}, 0.125))", lambda x: np.log(np.maximum(x, 0.125)), "monotone"),
    "log_raw": ("log({x})", np.log, "monotone"),
    "sqrt": ("sqrt(maximum({x}, 0.0))", lambda x: np.sqrt(np.maximum(x, 0)), "monotone"),
    "sqrt_raw": ("sqrt({x})", np.sqrt, "monotone"),
    "rsqrt": ("rsqrt(maximum({x}, 0.25))", lambda x: 1 / np.sqrt(np.maximum(x, 0.25)), "monotone"),
    "sin": ("sin({x})", np.sin, "slope"),
    "cos": ("cos({x})", np.cos, "slope"),
    "erf": ("erf({x})", lambda x: _erf(x), "monotone"),
    "relu": ("maximum({x}, 0.0)", lambda x: np.maximum(x, 0), "steady"),
    "clamp": ("clamp({x}, -0.5, 2.0)", lambda x: np.clip(x, -0.5, 2), "steady"),
    "floor": ("floor({x})", np.floor, "steps"),
    "round": ("round({x})", np.round, "steps"),
    "trunc": ("trunc({x})", np.trunc, "steps"),
    "ceil": ("ceil({x})", np.ceil, "steps"),
    "sign": ("sign({x})", np.sign, "steps"),
    "half": ("{x} * 0.5", lambda x: x * 0.5, "monotone"),
    "shift": ("1.5 - {x}", lambda x: 1.5 - x, "monotone"),
    "inverse": ("1.0 / {x}", lambda x: 1 / x, "pole"),
}


def _erf(x: Any) -> Any:
    return np.vectorize(math.erf, otypes=[np.float64])(x)


def pointwise(name: str, a: Measured) -> Measured:
    _, f, kind = UNARY[name]
    if kind == "slope":
        v, e = m.lipschitz(f, a)
    else:
        v, e = m.corners(f, a, steps=kind == "steps")
        if kind == "pole":
            e = np.where((np.abs(a.v) <= a.e) & (a.e > 0), m.UNKNOWN, e)
        if name in ("round", "ceil", "floor", "trunc", "sign"):
            e = np.where(a.e > 0.5, m.UNKNOWN, e)
    return m.rounded(v, e, a.dtype, 0.0 if kind in ("steady", "steps") else 8.0)


def _pow(x: Any, y: Any) -> Any:
    """Of integers: wraps; a negative power is 0 unless x is 1 or -1."""
    found = np.ones_like(x)
    base, left = x.copy(), np.where(y < 0, 0, y)
    for _ in range(64):
        found = np.where(left & 1 == 1, found * base, found)
        base, left = base * base, left >> 1
        if not left.any():
            break
    negative = np.where(x == 1, 1, np.where(x == -1, np.where(y & 1 == 1, -1, 1), 0))
    return np.where(y < 0, negative.astype(x.dtype), found).astype(x.dtype)


def _shift(x: Any, y: Any, left: bool) -> Any:
    bits = x.dtype.itemsize * 8
    out = (y < 0) | (y >= bits)
    by = np.where(out, 0, y).astype(x.dtype)
    if left:
        return np.where(out, 0, x << by).astype(x.dtype)
    return np.where(out, np.where(x < 0, -1, 0).astype(x.dtype), x >> by).astype(x.dtype)


def _floordiv(x: Any, y: Any) -> Any:
    safe = np.where(y == 0, 1, y).astype(x.dtype)
    if x.dtype.kind == "i":
        low = np.iinfo(x.dtype).min
        wraps = (x == low) & (safe == -1)
        safe = np.where(wraps, 1, safe).astype(x.dtype)
        return np.where(y == 0, 0, np.where(wraps, low, x // safe)).astype(x.dtype)
    return np.where(y == 0, 0, x // safe).astype(x.dtype)


def _mod(x: Any, y: Any) -> Any:
    safe = np.where((y == 0) | (y == -1) if x.dtype.kind == "i" else y == 0, 1, y).astype(x.dtype)
    return np.where(y == 0, 0, x % safe).astype(x.dtype)


INT_BINARY: dict[str, Callable[..., Any]] = {
    "{x} + {y}": lambda x, y: x + y, "{x} - {y}": lambda x, y: x - y,
    "{x} * {y}": lambda x, y: x * y, "maximum({x}, {y})": np.maximum,
    "minimum({x}, {y})": np.minimum, "{x} // {y}": _floordiv, "{x} % {y}": _mod,
    "{x} & {y}": lambda x, y: x & y, "{x} | {y}": lambda x, y: x | y,
    "{x} ^ {y}": lambda x, y: x ^ y,
    "{x} << {y}": lambda x, y: _shift(x, y, True), "{x} >> {y}": lambda x, y: _shift(x, y, False),
    "{x} ** {y}": _pow,
}  # fmt: skip
INT_UNARY: dict[str, Callable[..., Any]] = {
    "-{x}": lambda x: -x, "~{x}": lambda x: ~x, "abs({x})": np.abs, "sign({x})": np.sign,
    "{x} // 3": lambda x: x // 3, "{x} % 5": lambda x: x % 5,
    "{x} * 3": lambda x: x * x.dtype.type(3),
    "{x} << 1": lambda x: x << 1, "{x} >> 2": lambda x: x >> 2, "floor({x})": lambda x: x,
    "clamp({x}, 1, 9)": lambda x: np.clip(x, 1, 9), "{x} ** 3": lambda x: x * x * x,
    "100 // {x}": lambda x: _floordiv(np.full_like(x, 100), x),
    "7 % {x}": lambda x: _mod(np.full_like(x, 7), x),
}  # fmt: skip
COMPARE: dict[str, Callable[..., Any]] = {
    "==": np.equal, "!=": np.not_equal, "<": np.less, "<=": np.less_equal, ">": np.greater,
    ">=": np.greater_equal,
}  # fmt: skip
LOGIC: dict[str, Callable[..., Any]] = {
    "and": np.logical_and, "or": np.logical_or, "^": np.logical_xor, "&": np.logical_and,
    "|": np.logical_or,
}  # fmt: skip


def explicit(spec: str, p: Any, q: Any) -> Any:
    """What einsum says, product by product: NumPy's own takes factors out of sums."""
    (ix, iy), out = spec.split("->")[0].split(","), spec.split("->")[1]
    every = "".join(dict.fromkeys(ix + iy))
    sizes = {**dict(zip(ix, p.shape, strict=True)), **dict(zip(iy, q.shape, strict=True))}

    def spread(z: Any, names: str) -> Any:
        while len(set(names)) < len(names):
            i = next(i for i, c in enumerate(names) if c in names[:i])
            j = names.index(names[i])
            z = np.moveaxis(np.diagonal(z, axis1=j, axis2=i), -1, 0)
            names = names[i] + names[:j] + names[j + 1 : i] + names[i + 1 :]
        order = [c for c in every if c in names]
        z = z.transpose([names.index(c) for c in order])
        return z.reshape([sizes[c] if c in names else 1 for c in every])

    whole = np.broadcast_to(spread(p, ix) * spread(q, iy), [sizes[c] for c in every])
    total = whole.sum(tuple(i for i, c in enumerate(every) if c not in out))
    left = [c for c in every if c in out]
    return total.transpose([left.index(c) for c in out])


def falling(key: Any) -> Any:
    """Keys whose rising order is the falling order of `key`, NaN first, equal ones as they are."""
    flat = np.unique(key[key == key])
    rank = np.searchsorted(flat, np.where(key == key, key, flat[0] if flat.size else 0))
    return np.where(key == key, -rank.astype(np.int64), -(1 << 40))


def sorted_(a: Measured, axis: int, down: bool) -> Measured:
    def order(z: Any) -> Any:  # equal ones as they are: zeros have signs
        keys = falling(z) if down else z
        return np.take_along_axis(z, np.argsort(keys, axis=axis, kind="stable"), axis)

    v = order(a.v)
    if a.exact:
        return Measured(v, np.zeros(v.shape), a.dtype)
    if a.dtype not in FLOATS or np.isinf(a.e).any() or np.isnan(a.v).any():
        lost = np.where(a.e > 0, m.UNKNOWN, 0.0).max(axis, keepdims=True, initial=0)
        return Measured(v, np.broadcast_to(lost, v.shape), a.dtype)
    with np.errstate(all="ignore"):
        e = np.maximum(np.abs(order(a.v + a.e) - v), np.abs(order(a.v - a.e) - v))
    return Measured(v, np.where(np.isnan(e), 0.0, e), a.dtype)


def softmax(a: Measured, axis: int, log: bool) -> Measured:
    with np.errstate(all="ignore"):
        top = m.extreme(a, [axis], True, "max")
        v, e = m.corners(np.subtract, a, top)
        # x - max is the same whatever error max has as an element: count it all the same
        d = m.rounded(v, e, a.dtype, 2)
        x = m.rounded(*m.corners(np.exp, d), a.dtype, 8)
        s = m.total(x, [axis], True)
        if log:
            near = Measured(s.v, np.minimum(s.e, np.abs(s.v) * 0.9), s.dtype)
            log_s = m.rounded(*m.corners(np.log, near), a.dtype, 8)
            vague = np.isinf(s.e) | (s.e > 0.5 * np.abs(s.v))
            log_s.e = np.where(vague, m.UNKNOWN, log_s.e)
            return m.rounded(*m.corners(np.subtract, d, log_s), a.dtype, 2)
        v, e = m.corners(np.divide, x, s)
        e = np.where((s.e > 0) & (s.v - s.e <= 0), m.UNKNOWN, e)
        return m.rounded(v, e, a.dtype, 2)


def masked_softmax(a: Measured, mask: Measured) -> Measured:
    """softmax along the last axis of what the mask keeps; a row without any gives zeros.

    Of rows that keep what is not finite, or may not be, nothing is known.
    """
    keep = np.broadcast_to(mask.v, a.v.shape)
    found = softmax(
        Measured(np.where(keep, a.v, -np.inf), np.where(keep, a.e, 0), a.dtype), -1, False
    )
    strange = keep & ~(np.abs(a.v) + a.e < 1e29) | np.broadcast_to(mask.e > 0, a.v.shape)
    v = np.where(keep & np.isfinite(found.v), found.v, 0.0)
    e = np.where(keep, found.e, 0.0)
    return Measured(v, np.where(strange.any(-1, keepdims=True), m.UNKNOWN, e), a.dtype)


def running(a: Measured, axis: int) -> Measured:
    """Sums along an axis up to each element."""
    if a.dtype not in FLOATS:
        lost = np.cumsum(np.where(a.e > 0, m.UNKNOWN, 0.0), axis)
        return Measured(np.cumsum(a.v.astype(np.int64), axis), lost, "i64")
    wide = m.accumulator(a.dtype)
    with np.errstate(all="ignore"):
        v, e = np.cumsum(a.v, axis), np.cumsum(a.e, axis)
        size = np.cumsum(np.where(np.isfinite(a.v), np.abs(a.v), 0) + a.e, axis)
        more = (a.v.shape[axis] + 2) * m.unit(wide) * size
        e = np.where(np.isfinite(v), e + more, np.where(np.isinf(e), m.UNKNOWN, 0.0))
        e = np.where(size > FLOATS[wide][3] / 4, m.UNKNOWN, e)
    return m.rounded(v, e, a.dtype, 2.0)
