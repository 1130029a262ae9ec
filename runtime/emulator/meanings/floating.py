"""Floating-point arithmetic of f32, f64, f16 and bf16.

Functions that PTX calls approximate are computed in f64 and rounded, so that they are within the
error that the ISA allows, for each of them.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stagefuse.compiler.ptx.table import Match
from stagefuse.runtime.emulator import floats as fl
from stagefuse.runtime.emulator.tensor_map import OUT_OF_BOUNDS_NAN

from . import pure

Function = Callable[..., Any]
_HALF = ("f16", "f16x2", "bf16", "bf16x2")


def type_name(match: Match) -> str:
    """The floating-point type of a form: its slot T, or a word of its modifiers."""
    if "T" in match:
        return match.get("T")
    return next(word for word in ("f32", "f64") if word in match.slots)


def finished(match: Match, f: Function) -> Function:
    """A function of f32 or f64 with the flushing and clamping that an instruction asks for."""
    ftz, sat = "ftz" in match, "sat" in match
    is_f32 = type_name(match) == "f32"

    def run(*operands: Any) -> Any:
        if ftz:
            operands = tuple(map(fl.flush, operands))
        result = f(*operands)
        if ftz:
            result = fl.flush(result)
        if sat:
            return fl.saturate(result)
        return fl.canonical(result) if is_f32 else result

    return run


def halves(match: Match, f: Function, *, raw: bool = False) -> Function:
    """A function on 16-bit floats, single or two in a register, given their values as f64.

    `f` gives f64 that is exact or rounded to odd, which is rounded here. `raw` passes and takes
    f16 values or bf16 bits instead.
    """
    name = type_name(match)
    is_bf16, ftz, sat = name.startswith("bf16"), "ftz" in match, "sat" in match
    relu = "relu" in match

    def widen(x: Any) -> Any:
        flat = np.atleast_1d(x).view(fl.U16)
        if raw:
            return flat if is_bf16 else flat.view(fl.F16)
        if is_bf16:
            return fl.from_bf16(flat).astype(fl.F64)
        half = flat.view(fl.F16)
        return (fl.flush(half) if ftz else half).astype(fl.F64)

    def run(*operands: Any) -> Any:
        operands = np.broadcast_arrays(*map(np.atleast_1d, operands))
        result = f(*[widen(np.ascontiguousarray(x)) for x in operands])
        if not raw:
            if sat:
                result = fl.saturate(result)
            if relu:
                result = fl.relu(result)
            result = fl.to_bf16(result) if is_bf16 else fl.to_f16(result)
            if ftz and not is_bf16:
                result = fl.flush(result)
        bits = np.ascontiguousarray(result).view(fl.U16)
        if name.endswith("x2"):
            return bits.view(fl.U32)
        return bits if is_bf16 else bits.view(fl.F16)

    return run


def _is_half(match: Match) -> bool:
    return type_name(match) in _HALF


@pure("float.add", "float.sub", "float.mul")
def add_sub_mul(match: Match) -> Function:
    mode, opcode = match.get("rnd", "rn"), match.form.opcode
    if _is_half(match):
        functions: dict[str, Function] = {
            "add": fl.odd_sum,
            "sub": lambda a, b: fl.odd_sum(a, -b),
            "mul": np.multiply,
        }
        return halves(match, functions[opcode])
    if mode == "rn":
        return finished(match, {"add": np.add, "sub": np.subtract, "mul": np.multiply}[opcode])
    if opcode == "mul":
        return finished(match, lambda a, b: fl.mul(a, b, mode))
    sign = -1 if opcode == "sub" else 1
    return finished(match, lambda a, b: fl.add(a, b if sign > 0 else -b, mode))


@pure("float.fma", "float.mad")
def fma(match: Match) -> Function:
    if "oob" in match:
        return _bounded_fma(match)
    if _is_half(match):
        return halves(match, fl.fma_exact)
    mode = match.get("rnd", "rn")
    return finished(match, lambda a, b, c: fl.fma(a, b, c, mode))


def _bounded_fma(match: Match) -> Function:
    """0 where a or b is the NaN that tensor copies fill with beyond an array."""
    plain = halves(match, fl.fma_exact)

    def run(*operands: Any) -> Any:
        a, b, c = np.broadcast_arrays(*map(np.atleast_1d, operands))
        result = np.atleast_1d(plain(a, b, c))
        beyond = [np.ascontiguousarray(x).view(fl.U16) == OUT_OF_BOUNDS_NAN for x in (a, b)]
        raw = np.where(beyond[0] | beyond[1], np.uint16(0), result.view(fl.U16))
        return raw.view(result.dtype)

    return run


@pure("float.div")
def div(match: Match) -> Function:
    mode = match.get("rnd", "rn")
    return finished(match, lambda a, b: fl.div(a, b, mode))


@pure("float.rcp")
def rcp(match: Match) -> Function:
    mode = match.get("rnd", "rn")
    if "approx" in match.slots and type_name(match) == "f64":
        return _upper(lambda a: 1.0 / a)
    return finished(match, lambda a: fl.div(np.ones_like(a), a, mode))


def _upper(f: Function) -> Function:
    """A coarse function of f64: the lower 32 bits are 0 (PTX ISA, "rcp.approx.ftz.f64")."""

    def run(a: Any) -> Any:
        y = np.atleast_1d(fl.flush(f(fl.flush(a))))
        return (y.view(fl.U64) & np.uint64(0xFFFFFFFF00000000)).view(fl.F64)

    return run


@pure("float.sqrt")
def sqrt(match: Match) -> Function:
    mode = match.get("rnd", "rn")
    return finished(match, lambda a: fl.sqrt(a, mode))


def _through_f64(match: Match, f: Function) -> Function:
    """An approximate function of f32 by way of f64."""
    return finished(match, lambda a: f(a.astype(fl.F64)).astype(fl.F32))


@pure("float.rsqrt")
def rsqrt(match: Match) -> Function:
    if type_name(match) == "f64":
        return lambda a: 1.0 / np.sqrt(a)
    return _through_f64(match, lambda a: 1.0 / np.sqrt(a))


@pure("float.sin", "float.cos", "float.lg2", "float.ex2", "float.tanh")
def transcendental(match: Match) -> Function:
    f: Function = {
        "sin": np.sin, "cos": np.cos, "lg2": np.log2, "ex2": np.exp2, "tanh": np.tanh,
    }[match.form.opcode]  # fmt: skip
    return halves(match, f) if _is_half(match) else _through_f64(match, f)


@pure("float.abs", "float.neg")
def abs_neg(match: Match) -> Function:
    """Only the sign bit changes; f32 may flush first. NaN of 16 bits is the hardware's own."""
    negates = match.form.opcode == "neg"
    if _is_half(match):
        bit = np.uint16(0x8000)
        flip: Function = (lambda b: b ^ bit) if negates else (lambda b: b & ~bit)
        infinity = np.uint16(0x7F80 if "bf16" in match.get("T") else 0x7C00)

        def bits(x: Any) -> Any:
            half = x.view(fl.F16) if "ftz" in match else x
            flat = fl.flush(half) if "ftz" in match else half
            raw = np.ascontiguousarray(flat).view(fl.U16)
            return np.where(raw & ~bit > infinity, np.uint16(0x7FFF), flip(raw))

        return halves(match, bits, raw=True)
    plain: Function = np.negative if negates else np.abs
    if "ftz" in match:
        return lambda a: plain(fl.flush(a))
    return plain


def _order(match: Match) -> Function:
    """min or max of f64, f32 or f16 values: a number rather than NaN, unless NaN is asked for.

    -0 is less than +0 (PTX ISA, "min").
    """
    smaller = match.form.opcode == "min"
    passes_nan = "NaN" in match.slots

    def pick(a: Any, b: Any) -> Any:
        a, b = np.broadcast_arrays(np.atleast_1d(a), np.atleast_1d(b))
        first = (a < b) if smaller else (a > b)
        sign = np.signbit(a) if smaller else ~np.signbit(a)
        result = np.where(first | ((a == b) & sign), a, b)
        nan_a, nan_b = a != a, b != b
        if not (nan_a.any() or nan_b.any()):
            return result
        if passes_nan:
            return np.where(nan_a | nan_b, a.dtype.type(np.nan), result)
        return np.where(nan_a, b, np.where(nan_b, a, result))

    if "xorsign" not in match.slots:
        return pick

    def xorsign(a: Any, b: Any) -> Any:
        result = pick(np.abs(a), np.abs(b))
        return np.copysign(result, np.where(np.signbit(a) ^ np.signbit(b), -1, 1)).astype(a.dtype)

    return xorsign


@pure("float.min", "float.max")
def min_max(match: Match) -> Function:
    return halves(match, _order(match)) if _is_half(match) else finished(match, _order(match))


@pure("float.testp")
def testp(match: Match) -> Function:
    name = match.get("test")

    def normal(a: Any) -> Any:  # zeros are, says the ISA
        return np.isfinite(a) & ((np.abs(a) >= np.finfo(a.dtype).smallest_normal) | (a == 0))

    tests: dict[str, Function] = {
        "finite": np.isfinite,
        "infinite": np.isinf,
        "number": lambda a: ~np.isnan(a),
        "notanumber": np.isnan,
        "normal": normal,
        "subnormal": lambda a: np.isfinite(a) & ~normal(a),
    }
    return tests[name]


@pure("float.copysign")
def copysign(match: Match) -> Function:
    return lambda a, b: np.copysign(b, a)
