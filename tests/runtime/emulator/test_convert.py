"""cvt against rational arithmetic."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from .apply import apply, check, dtype_of, numbers
from .exact import rounded
from .test_floating import MODES, check_bits, floats_of, flushed, stored
from .test_integer import clamped, wrapped

INTS = ("u8", "u16", "u32", "u64", "s8", "s16", "s32", "s64")
LIMITS = {"f16": 65504.0, "bf16": float(np.float32(3.3895314e38)), "e4m3": 448.0, "e5m2": 57344.0}


def wide(kind: str) -> str:
    """The type of a register that holds a type of 8 bits."""
    return f"{kind[0]}16" if kind[1:] == "8" else kind


def held(kind: str, a: Any) -> list[int]:
    """The values of a register cut to a type."""
    return [wrapped(int(x), kind) for x in a]


@pytest.mark.parametrize("to", INTS)
@pytest.mark.parametrize("source", INTS)
def test_integers(rng: np.random.Generator, to: str, source: str) -> None:
    a = numbers(rng, wide(source))
    values = held(source, a)
    want = np.array([wrapped(v, to) for v in values], dtype_of(to)).astype(dtype_of(wide(to)))
    check(apply(f"cvt.{to}.{source}", [(wide(source), a)], wide(to)), want, a)
    bits, own = int(to[1:]), int(source[1:])
    fits = to[0] == source[0] and own <= bits or source[0] == "u" and to[0] == "s" and own < bits
    if not fits:
        want = np.array([clamped(v, to) for v in values], dtype_of(to)).astype(dtype_of(wide(to)))
        check(apply(f"cvt.sat.{to}.{source}", [(wide(source), a)], wide(to)), want, a)


INTEGRAL = {"rzi": math.trunc, "rmi": math.floor, "rpi": math.ceil, "rni": round}


@pytest.mark.parametrize("source", ["f16", "bf16", "f32", "f64"])
@pytest.mark.parametrize("to", INTS)
def test_float_to_integer(rng: np.random.Generator, to: str, source: str) -> None:
    if source == "bf16" and to[1:] == "8":
        pytest.skip("there is none")
    a = numbers(rng, source)
    for mode, f in INTEGRAL.items():
        want = []
        for x in floats_of(source, a):
            if math.isnan(x):  # PTX ISA, "cvt"
                top = 1 << int(to[1:]) - 1
                sign = -1 if to[0] == "s" else 1
                want.append(sign * top if source == "f64" or to[1:] == "64" else 0)
            elif math.isinf(x):
                want.append(clamped((1 << 70) * (1 if x > 0 else -1), to))
            else:
                want.append(clamped(int(f(Fraction(x))), to))
        expected = np.array(want, dtype_of(to)).astype(dtype_of(wide(to)))
        check(apply(f"cvt.{mode}.{to}.{source}", [(source, a)], wide(to)), expected, a)


@pytest.mark.parametrize("source", INTS)
@pytest.mark.parametrize("to", ["f16", "bf16", "f32", "f64"])
def test_integer_to_float(rng: np.random.Generator, to: str, source: str) -> None:
    if to == "bf16" and source[1:] == "8":
        pytest.skip("there is none")
    a = numbers(rng, wide(source))
    for mode in MODES:
        want = [rounded(Fraction(v), to, mode) for v in held(source, a)]
        got = apply(f"cvt.{mode}.{to}.{source}", [(wide(source), a)], to)
        check_bits(to, got, stored(to, want), a)


def narrowed(x: float, to: str, mode: str) -> float:
    if not math.isfinite(x):
        return x
    return math.copysign(rounded(Fraction(abs(x)), to, {"rm": "rp", "rp": "rm"}.get(mode, mode)
                                 if x < 0 else mode), x)  # fmt: skip


@pytest.mark.parametrize(
    ("to", "source", "modes"),
    [
        ("f16", "f32", MODES), ("f16", "f64", MODES), ("f32", "f64", MODES),
        ("bf16", "f32", MODES), ("bf16", "f16", MODES), ("f16", "bf16", MODES),
        ("bf16", "f64", MODES), ("f32", "f16", ("",)), ("f64", "f32", ("",)),
        ("f64", "f16", ("",)), ("f32", "bf16", ("",)), ("f64", "bf16", ("",)),
    ],
)  # fmt: skip
def test_float_to_float(
    rng: np.random.Generator, to: str, source: str, modes: tuple[str, ...]
) -> None:
    a = numbers(rng, source)
    for mode in modes:
        name = f"cvt.{mode}.{to}.{source}" if mode else f"cvt.{to}.{source}"
        values = floats_of(source, a)
        want = [narrowed(x, to, mode) if mode else x for x in values]
        check_bits(to, apply(name, [(source, a)], to), stored(to, want), a)


def test_options(rng: np.random.Generator) -> None:
    a = numbers(rng, "f32")
    x = floats_of("f32", a)
    relu = [y if math.isnan(y) else max(narrowed(y, "bf16", "rn"), 0.0) for y in x]
    got = apply("cvt.rn.relu.bf16.f32", [("f32", a)], "bf16")
    check_bits("bf16", got, stored("bf16", [y + 0.0 for y in relu]), a)
    sat = [0.0 if math.isnan(y) else min(max(y, 0.0), 1.0) for y in x]
    got = apply("cvt.sat.f32.f32", [("f32", a)], "f32")
    assert (got == np.array(sat, np.float32)).all()
    got = apply("cvt.ftz.f64.f32", [("f32", a)], "f64")
    check(got, np.array([flushed(y, "f32") for y in x]), a)
    for mode, f in INTEGRAL.items():
        want = [math.copysign(float(f(Fraction(y))), y) if math.isfinite(y) else y for y in x]
        check(apply(f"cvt.{mode}.f32.f32", [("f32", a)], "f32"), np.array(want, np.float32), a)


@pytest.mark.parametrize("mode", ["rna", "rn", "rz"])
def test_tf32(rng: np.random.Generator, mode: str) -> None:
    a = numbers(rng, "f32")
    a = a[np.abs(a) < 3.4e38]
    want = [narrowed(float(x), "tf32", mode) for x in a]
    got = apply(f"cvt.{mode}.tf32.f32", [("f32", a)], "b32").view(np.float32)
    check(got, np.array(want, np.float32), a)


@pytest.mark.parametrize("to", ["f16", "bf16"])
def test_two_to_one(rng: np.random.Generator, to: str) -> None:
    a, b = numbers(rng, "f32"), numbers(rng, "f32")
    for mode in ("rn", "rz"):
        got = apply(f"cvt.{mode}.{to}x2.f32", [("f32", a), ("f32", b)], f"{to}x2")
        for half, source in ((1, a), (0, b)):
            want = [narrowed(x, to, mode) for x in floats_of("f32", source)]
            check_bits(to, got.view(np.uint16)[half::2].copy(), stored(to, want), source)


@pytest.mark.parametrize("kind", ["e4m3", "e5m2"])
def test_eight_bit_floats(rng: np.random.Generator, kind: str) -> None:
    dtype = ml_dtypes.float8_e4m3fn if kind == "e4m3" else ml_dtypes.float8_e5m2
    a, b = numbers(rng, "f32"), numbers(rng, "f32")
    a[:256] = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float32)
    got = apply(f"cvt.rn.satfinite.{kind}x2.f32", [("f32", a), ("f32", b)], f"{kind}x2")
    table = np.arange(256, dtype=np.uint8).view(dtype).astype(np.float64)
    finite = np.sort(table[np.isfinite(table)])
    for half, source in ((1, a), (0, b)):
        found = got.view(np.uint8)[half::2].copy().view(dtype).astype(np.float64)
        for x, y in zip(source.astype(np.float64), found, strict=True):
            if np.isnan(x):
                assert np.isnan(y)
            else:
                x = np.clip(x, -LIMITS[kind], LIMITS[kind])
                assert abs(y - x) == np.abs(finite - x).min()
    everything = np.arange(65536, dtype=np.uint16)
    back = apply(f"cvt.rn.f16x2.{kind}x2", [(f"{kind}x2", everything)], "f16x2")
    want = everything.view(np.uint8).view(dtype).astype(np.float16)
    check_bits("f16", back.view(np.uint16), want.view(np.uint16))
    h = numbers(rng, "f16x2")
    got = apply(f"cvt.rn.satfinite.{kind}x2.f16x2", [("f16x2", h)], f"{kind}x2")
    halves = h.view(np.float16).astype(np.float32)
    operands = [("f32", halves[1::2].copy()), ("f32", halves[0::2].copy())]
    again = apply(f"cvt.rn.satfinite.{kind}x2.f32", operands, f"{kind}x2")
    check(got, again, h)


def test_pack(rng: np.random.Generator) -> None:
    a, b, c = numbers(rng, "s32"), numbers(rng, "s32"), numbers(rng, "b32")
    for kind in ("u16", "s16"):
        want = [(clamped(int(x), kind) & 0xFFFF) << 16 | clamped(int(y), kind) & 0xFFFF
                for x, y in zip(a, b, strict=True)]  # fmt: skip
        got = apply(f"cvt.pack.sat.{kind}.s32", [("s32", a), ("s32", b)], "b32")
        check(got, np.array(want, np.uint32), a, b)
    for kind in ("u8", "s8"):
        want = [(int(z) << 16 | (clamped(int(x), kind) & 0xFF) << 8 | clamped(int(y), kind) & 0xFF)
                & 0xFFFFFFFF for x, y, z in zip(a, b, c, strict=True)]  # fmt: skip
        operands = [("s32", a), ("s32", b), ("b32", c)]
        got = apply(f"cvt.pack.sat.{kind}.s32.b32", operands, "b32")
        check(got, np.array(want, np.uint32), a, b, c)
