"""Conversions (PTX ISA, "cvt" and "cvt.pack")."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from stagefuse.compiler.ptx.table import Match
from stagefuse.compiler.ptx.types import TYPES
from stagefuse.runtime.emulator import floats as fl
from stagefuse.runtime.emulator.values import DTYPES

from . import pure

Function = Callable[..., Any]
_F8 = {"e4m3x2": np.dtype(ml_dtypes.float8_e4m3fn), "e5m2x2": np.dtype(ml_dtypes.float8_e5m2)}
_MOST = {"e4m3x2": 448.0, "e5m2x2": 57344.0, "f16": 65504.0, "f16x2": 65504.0,
         "bf16": float(np.array(0x7F7F0000, np.uint32).view(np.float32)),
         "bf16x2": float(np.array(0x7F7F0000, np.uint32).view(np.float32))}  # fmt: skip
_INTEGRAL: dict[str, Function] = {"rni": np.rint, "rzi": np.trunc, "rmi": np.floor,
                                  "rpi": np.ceil}  # fmt: skip


def _types(match: Match) -> tuple[str, str]:
    """What a conversion gives and takes: the last two types among its modifiers."""
    found = [match.slots[s.name] for s in match.form.slots if s.name in match.slots]
    kinds = [word for word in found if word in TYPES]
    return (kinds[-2], kinds[-1]) if len(kinds) > 1 else (kinds[0], kinds[0])


@pure("convert.cvt")
def cvt(match: Match) -> Function:
    to, source = _types(match)
    if len(match.form.specs) == 3:
        return _packed(match, to)
    if to in _F8 or source in _F8:
        return _f8(match, to, source)
    a_float, d_float = (TYPES[t].kind == "float" for t in (source, to))
    if to == "tf32":
        mode = match.get("R") or "rna"
        most = float(np.array(0x7F7FE000, np.uint32).view(np.float32))  # the largest tf32
        clamp: Function = (lambda a: np.clip(a, -most, most)) if "satfinite" in match else np.array
        return lambda a: fl.to_tf32(clamp(_relu(match, a)), mode)
    if not a_float and not d_float:
        return _int_to_int(match, to, source)
    if a_float and not d_float:
        return _float_to_int(match, to, source)
    return _to_float(match, to, source)


def _relu(match: Match, x: Any) -> Any:
    """Negative numbers to 0; NaN stays NaN."""
    return fl.relu(np.asarray(x)) if "relu" in match else x


def _int_to_int(match: Match, to: str, source: str) -> Function:
    dtype = DTYPES[to]
    if "sat" not in match:
        return lambda a: np.asarray(a).astype(dtype)
    limit, own = np.iinfo(dtype), np.iinfo(DTYPES[source])
    low, high = max(limit.min, own.min), min(limit.max, own.max)
    return lambda a: np.clip(a, low, high).astype(dtype)


def _widened(kind: str, a: Any, ftz: bool) -> Any:
    """A float of any type as f64, exactly."""
    if kind == "bf16":
        a = fl.from_bf16(a)
    return (fl.flush(a) if ftz else np.asarray(a)).astype(fl.F64)


def _float_to_int(match: Match, to: str, source: str) -> Function:
    """Clamped. NaN gives 0 where neither type has 64 bits, else the top bit (PTX ISA, "cvt")."""
    integral, ftz = _INTEGRAL[match.get("irnd")], "ftz" in match
    dtype, limit = DTYPES[to], np.iinfo(DTYPES[to])
    wide = source == "f64" or dtype.itemsize == 8
    nan = float(1 << 8 * dtype.itemsize - 1) * (-1 if limit.min else 1) if wide else 0.0

    def run(a: Any) -> Any:
        x = integral(_widened(source, a, ftz))
        x = np.where(x == x, x, nan)
        low, high = float(limit.min), float(limit.max)
        above = x >= high if high > 2.0**53 else x > high
        inside = np.where(above | (x < low), 0.0, x).astype(dtype)
        return np.where(above, dtype.type(limit.max), np.where(x < low, limit.min, inside)).astype(
            dtype
        )

    return run


def _to_float(match: Match, to: str, source: str) -> Function:
    mode, irnd = match.get("rnd") or match.get("R") or "rn", match.get("irnd")
    ftz, sat = "ftz" in match, "sat" in match
    clamps = "satfinite" in match

    def run(a: Any) -> Any:
        if TYPES[source].kind == "float":
            x = _widened(source, a, ftz)
        else:
            x = _from_int(np.atleast_1d(a), to, mode)
        if irnd:
            x = np.copysign(_INTEGRAL[irnd](x), x)
        x = _relu(match, x)
        if clamps:
            x = np.clip(x, -_MOST[to], _MOST[to])
        if sat:
            x = fl.saturate(x)
        return _rounded(x, to, mode, ftz)

    return run


def _from_int(a: Any, to: str, mode: str) -> Any:
    """An integer as f64 that a second rounding makes right: rounded to odd beyond 53 bits."""
    if a.dtype.itemsize < 8:
        return a.astype(fl.F64)
    upper = (a >> a.dtype.type(32)).astype(fl.F64) * 2.0**32
    lower = (a & a.dtype.type(0xFFFFFFFF)).astype(fl.F64)
    if to != "f64":
        return fl.odd_sum(upper, lower)
    return fl.add(upper, lower, mode)


def _rounded(x: Any, to: str, mode: str, ftz: bool) -> Any:
    x = np.atleast_1d(x)
    if to == "f64":
        return x
    if to == "f32":
        y = fl.narrow(x, mode)
        return fl.canonical(fl.flush(y) if ftz else y)
    return fl.to_bf16(x, mode) if to == "bf16" else fl.to_f16(x, mode)


def _packed(match: Match, to: str) -> Function:
    """Two f32 to two narrower floats, a in the upper half."""
    mode = match.get("R") or "rn"

    def run(a: Any, b: Any) -> Any:
        high, low = np.broadcast_arrays(np.atleast_1d(a), np.atleast_1d(b))
        both = np.stack([low, high], axis=1).reshape(-1)
        both = _relu(match, both)
        if "satfinite" in match and to not in _F8:
            both = np.clip(both, -_MOST[to], _MOST[to])
        if to in _F8:
            return _to_f8(both, to).view(fl.U16)
        rounded = fl.to_bf16(both, mode) if to == "bf16x2" else fl.to_f16(both.astype(fl.F64), mode)
        return np.ascontiguousarray(rounded).view(fl.U32)

    return run


def _to_f8(x: Any, to: str) -> Any:
    """f32 to 8-bit floats, clamped to the largest finite one; NaN becomes the positive 0x7f."""
    made = np.clip(x, -_MOST[to], _MOST[to]).astype(fl.F32).astype(_F8[to]).view(np.uint8)
    return np.where(x == x, made, np.uint8(0x7F))


def _f8(match: Match, to: str, source: str) -> Function:
    def narrow(a: Any) -> Any:
        x = np.atleast_1d(a).view(fl.F16).astype(fl.F32)
        return _to_f8(_relu(match, x), to).view(fl.U16)

    def widen(a: Any) -> Any:
        x = np.atleast_1d(a).view(_F8[source]).astype(fl.F16)
        return fl.canonical(_relu(match, x)).view(fl.U32)

    return narrow if to in _F8 else widen


@pure("convert.pack")
def pack(match: Match) -> Function:
    """PTX ISA, "cvt.pack": clamped values, a above b, and below the rest of c where it is given."""
    to = match.get("D")
    bits = TYPES[to].bits
    mask = (1 << bits) - 1
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if to[0] == "s" else (0, mask)

    def field(x: Any) -> Any:
        return np.clip(np.asarray(x).astype(np.int64), low, high) & mask

    def run(a: Any, b: Any, c: Any = 0) -> Any:
        packed = (field(a) << bits) | field(b)
        return (packed | (np.asarray(c).astype(np.int64) << 2 * bits)).astype(np.uint32)

    return run
