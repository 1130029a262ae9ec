"""Floating-point instructions against rational arithmetic, rounded once."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from .apply import apply, check, dtype_of, numbers, same
from .exact import KINDS, rounded

MODES = ("rn", "rz", "rm", "rp")
Exact = Callable[..., Fraction]


def floats_of(kind: str, a: Any) -> list[float]:
    if kind == "bf16":
        return [float(x) for x in (a.astype(np.uint32) << 16).view(np.float32)]
    return [float(x) for x in a.view(np.float16 if kind == "f16" else a.dtype)]


def stored(kind: str, values: list[float]) -> Any:
    """Values of a type that are exact in it, as arrays hold it."""
    if kind == "bf16":
        return (np.array(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)
    if kind == "f16":
        return np.array(values, np.float16).view(np.uint16)
    return np.array(values, dtype_of(kind))


def flushed(x: float, kind: str) -> float:
    return math.copysign(0.0, x) if abs(x) < 2.0 ** KINDS[kind][1] else x


def trial(
    rng: np.random.Generator, name: str, kind: str, count: int, f: Exact, mode: str,
    ftz: bool = False, n: int = 200,
) -> None:  # fmt: skip
    """An instruction on finite operands whose result is not zero, rounded as it should be."""
    arrays = [numbers(rng, kind, n) for _ in range(count)]
    lists = [floats_of(kind, a) for a in arrays]
    use, want = [], []
    for i, xs in enumerate(zip(*lists, strict=True)):
        if not all(map(math.isfinite, xs)):
            continue
        given = [flushed(x, kind) for x in xs] if ftz else list(xs)
        try:
            exact = f(*map(Fraction, given))
        except ZeroDivisionError:
            continue
        if exact == 0:
            continue
        value = rounded(exact, kind, mode)
        use.append(i)
        want.append(flushed(value, kind) if ftz else value)
    picked = [a[use] for a in arrays]
    assert use
    check_bits(kind, apply(name, [(kind, a) for a in picked], kind), stored(kind, want), *picked)


def check_bits(kind: str, got: Any, want: Any, *operands: Any) -> None:
    """As `check`; small floats, which arrays hold as bits, may be any NaN."""
    if kind in ("f16", "bf16"):
        nan = [np.isnan(floats_of(kind, x)) for x in (got, want)]
        got = np.where(nan[0] & nan[1], want, got)
    check(got, want, *operands)


TWO: dict[str, Exact] = {"add": lambda a, b: a + b, "sub": lambda a, b: a - b,
                         "mul": lambda a, b: a * b}  # fmt: skip


@pytest.mark.parametrize("kind", ["f32", "f64"])
@pytest.mark.parametrize("mode", MODES)
def test_arithmetic(rng: np.random.Generator, kind: str, mode: str) -> None:
    for opcode, f in TWO.items():
        trial(rng, f"{opcode}.{mode}.{kind}", kind, 2, f, mode)
    trial(rng, f"fma.{mode}.{kind}", kind, 3, lambda a, b, c: a * b + c, mode)
    trial(rng, f"div.{mode}.{kind}", kind, 2, lambda a, b: a / b, mode)
    trial(rng, f"rcp.{mode}.{kind}", kind, 1, lambda a: 1 / a, mode)


@pytest.mark.parametrize("kind", ["f32", "f64"])
def test_sqrt(rng: np.random.Generator, kind: str) -> None:
    a = np.abs(numbers(rng, kind))
    a = a[np.isfinite(a) & (a > 0)]
    for mode in MODES:
        got = apply(f"sqrt.{mode}.{kind}", [(kind, a)], kind)
        for x, y in zip(a.tolist(), got, strict=True):
            low, high = sorted((float(y), float(np.nextafter(y, y.dtype.type(
                0 if Fraction(float(y)) ** 2 > Fraction(x) else np.inf)))))  # fmt: skip
            exact = Fraction(x)
            assert Fraction(low) ** 2 <= exact <= Fraction(high) ** 2
            if mode in ("rz", "rm"):
                assert float(y) == low or Fraction(high) ** 2 == exact
            elif mode == "rp":
                assert float(y) == high or Fraction(low) ** 2 == exact
            else:
                middle = (Fraction(low) + Fraction(high)) / 2
                nearest = low if exact < middle**2 else high
                assert float(y) == nearest


@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_small_floats(rng: np.random.Generator, kind: str) -> None:
    for opcode, f in TWO.items():
        trial(rng, f"{opcode}.rn.{kind}", kind, 2, f, "rn", n=600)
    trial(rng, f"fma.rn.{kind}", kind, 3, lambda a, b, c: a * b + c, "rn", n=600)
    if kind == "f16":
        trial(rng, "add.ftz.f16", kind, 2, TWO["add"], "rn", True, n=600)


def test_f32_flushes(rng: np.random.Generator) -> None:
    for opcode, f in TWO.items():
        trial(rng, f"{opcode}.ftz.f32", "f32", 2, f, "rn", True)
    trial(rng, "fma.rn.ftz.f32", "f32", 3, lambda a, b, c: a * b + c, "rn", True)
    trial(rng, "div.rn.ftz.f32", "f32", 2, lambda a, b: a / b, "rn", True)


def test_double_rounding_of_fma() -> None:
    """Sums that lie so near the middle of two f32 that a sum in f64 lands on it."""
    a = np.array([1 + 2.0**-12, 1 + 2.0**-12, -(1 + 2.0**-12)], np.float32)
    b = np.array([1 + 2.0**-12, 2.0**-60, 2.0**-60], np.float32)
    c = np.array([2.0**-60, 1 + 2.0**-23, 1 + 2.0**-23], np.float32)
    c[0] = 2.0**-70
    want = [rounded(Fraction(float(x)) * Fraction(float(y)) + Fraction(float(z)), "f32")
            for x, y, z in zip(a, b, c, strict=True)]  # fmt: skip
    check(apply("fma.rn.f32", [("f32", a), ("f32", b), ("f32", c)], "f32"),
          np.array(want, np.float32), a, b, c)  # fmt: skip


def test_special_operands() -> None:
    inf, nan = math.inf, math.nan
    a = np.array([inf, inf, 0.0, -0.0, 1.0, nan, 0.0, -0.0, 5.0], np.float32)
    b = np.array([-inf, 0.0, -0.0, -0.0, -1.0, 1.0, inf, 0.0, 0.0], np.float32)
    two = [("f32", a), ("f32", b)]
    with np.errstate(all="ignore"):
        check(apply("add.f32", two, "f32"), a + b)
        check(apply("mul.f32", two, "f32"), a * b)
        check(apply("div.rn.f32", two, "f32"), a / b)
    got = apply("add.f32", two, "f32")
    assert set(got.view(np.uint32)[np.isnan(got)]) == {
        0x7FFFFFFF
    }  # the NaN that f32 instructions make
    down = apply("add.rm.f32", two, "f32")
    assert np.signbit(down[4]) and np.signbit(down[2])  # an exact 0 is -0 when rounding down
    assert not np.signbit(apply("add.rz.f32", two, "f32")[4])


def test_saturation(rng: np.random.Generator) -> None:
    a, b = numbers(rng, "f32"), numbers(rng, "f32")
    with np.errstate(all="ignore"):
        total = a + b
    want = np.where(np.isnan(total), 0, np.clip(total, 0, 1)).astype(np.float32)
    got = apply("add.sat.f32", [("f32", a), ("f32", b)], "f32")
    assert (got == want).all() and not np.signbit(got).any()


def _order(a: float, b: float, smaller: bool) -> float:
    if math.isnan(a) or math.isnan(b):
        return b if math.isnan(a) else a
    if a == b:
        negative = math.copysign(1, a) < 0
        return a if negative == smaller else b
    return min(a, b) if smaller else max(a, b)


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
def test_min_and_max(rng: np.random.Generator, kind: str) -> None:
    a, b = numbers(rng, kind), numbers(rng, kind)
    pairs = list(zip(floats_of(kind, a), floats_of(kind, b), strict=True))
    two = [(kind, a), (kind, b)]
    for opcode in ("min", "max"):
        want = stored(kind, [_order(x, y, opcode == "min") for x, y in pairs])
        check_bits(kind, apply(f"{opcode}.{kind}", two, kind), want, a, b)
        if kind == "f64":
            continue
        strict = stored(kind, [math.nan if math.isnan(x) or math.isnan(y) else
                               _order(x, y, opcode == "min") for x, y in pairs])  # fmt: skip
        check_bits(kind, apply(f"{opcode}.NaN.{kind}", two, kind), strict, a, b)
        crossed = [
            math.copysign(
                _order(abs(x), abs(y), opcode == "min"), math.copysign(1, x) * math.copysign(1, y)
            )
            for x, y in pairs
        ]
        got = apply(f"{opcode}.xorsign.abs.{kind}", two, kind)
        check_bits(kind, got, stored(kind, crossed), a, b)


@pytest.mark.parametrize("kind", ["f32", "f64", "f16", "bf16"])
def test_signs(rng: np.random.Generator, kind: str) -> None:
    a = numbers(rng, kind)
    bit = 1 << 8 * a.dtype.itemsize - 1
    raw = a.view(f"u{a.dtype.itemsize}")
    got = apply(f"neg.{kind}", [(kind, a)], kind)
    check_bits(kind, got, (raw ^ raw.dtype.type(bit)).view(a.dtype))
    got = apply(f"abs.{kind}", [(kind, a)], kind)
    check_bits(kind, got, (raw & raw.dtype.type(bit - 1)).view(a.dtype))
    if kind in ("f32", "f64"):
        b = numbers(rng, kind)
        assert same(apply(f"copysign.{kind}", [(kind, a), (kind, b)], kind), np.copysign(b, a))


@pytest.mark.parametrize("opcode", ["add", "mul", "min"])
@pytest.mark.parametrize("kind", ["f16", "bf16"])
def test_two_halves(rng: np.random.Generator, opcode: str, kind: str) -> None:
    a, b = numbers(rng, f"{kind}x2"), numbers(rng, f"{kind}x2")
    got = apply(f"{opcode}.{kind}x2", [(f"{kind}x2", a), (f"{kind}x2", b)], f"{kind}x2")
    halves = [x.view(np.uint16) for x in (a, b)]
    want = apply(f"{opcode}.{kind}", [(kind, x) for x in halves], kind)
    assert (got.view(np.uint16) == want).all()


APPROXIMATE = {
    "ex2.approx": (np.exp2, (-20, 20), (2.0**-22, 0)),
    "lg2.approx": (np.log2, (1e-3, 1e3), (2.0**-22, 2.0**-22)),
    "sin.approx": (np.sin, (-3, 3), (0, 2.0**-20.5)),
    "cos.approx": (np.cos, (-3, 3), (0, 2.0**-20.5)),
    "rcp.approx": (np.reciprocal, (0.1, 10), (2.0**-23, 0)),
    "sqrt.approx": (np.sqrt, (0, 9), (2.0**-22, 0)),
    "rsqrt.approx": (lambda x: 1 / np.sqrt(x), (0.1, 9), (2.0**-22, 0)),
    "tanh.approx": (np.tanh, (-3, 3), (2.0**-11, 0)),
}
"""Function, range, and the relative and absolute error that the ISA allows."""


@pytest.mark.parametrize("name", APPROXIMATE)
def test_approximate_functions(rng: np.random.Generator, name: str, is_emulated: bool) -> None:
    """In the emulator they are as near as f32 can be: half a unit in the last place, and 2^-50
    of f64's own; hardware has the ISA's bounds."""
    f, (low, high), (relative, absolute) = APPROXIMATE[name]
    a = rng.uniform(low, high, 300).astype(np.float32)
    exact = f(a.astype(np.float64))
    got = apply(f"{name}.f32", [("f32", a)], "f32").astype(np.float64)
    unit = np.spacing(np.abs(exact).astype(np.float32)).astype(np.float64)
    most = unit * 0.5000001 if is_emulated else relative * np.abs(exact) + absolute
    assert (np.abs(got - exact) <= most).all()


def test_approximate_small_floats(rng: np.random.Generator, is_emulated: bool) -> None:
    for name, kind, relative in (
        ("tanh.approx", "f16", 2.0**-10.9), ("tanh.approx", "bf16", 2.0**-8),
        ("ex2.approx", "f16", 2.0**-9.9),
    ):  # fmt: skip
        a = stored(kind, list(rng.uniform(-4, 4, 100).astype(np.float32)))
        x = np.array(floats_of(kind, a))
        exact = np.tanh(x) if name[0] == "t" else np.exp2(x)
        got = apply(f"{name}.{kind}", [(kind, a)], kind)
        if is_emulated:
            check(got, stored(kind, [rounded(Fraction(float(v)), kind) for v in exact]), a)
        else:
            half = 2.0 ** -KINDS[kind][0]  # of rounding, which the bound leaves out
            assert (np.abs(floats_of(kind, got) - exact) <= (relative + half) * abs(exact)).all()


def test_flush_of_exponentials() -> None:
    a = np.array([-126.5, -130.0, -126.0], np.float32)
    assert (apply("ex2.approx.ftz.f32", [("f32", a)], "f32") == [0, 0, 2.0**-126]).all()
    assert (apply("ex2.approx.f32", [("f32", a)], "f32") > 0).all()


def test_classes(rng: np.random.Generator) -> None:
    a = numbers(rng, "f32")
    normal = np.isfinite(a) & ((np.abs(a) >= 2.0**-126) | (a == 0))
    for word, want in (
        ("finite", np.isfinite(a)), ("infinite", np.isinf(a)), ("number", ~np.isnan(a)),
        ("notanumber", np.isnan(a)), ("normal", normal),
        ("subnormal", np.isfinite(a) & ~normal),
    ):  # fmt: skip
        check(apply(f"testp.{word}.f32", [("f32", a)], "pred"), want, a)


def test_coarse_f64(rng: np.random.Generator) -> None:
    a = rng.uniform(0.1, 10, 100)
    got = apply("rcp.approx.ftz.f64", [("f64", a)], "f64")
    assert (np.abs(got * a - 1) < 2.0**-19).all() and not (got.view(np.uint64) & 0xFFFFFFFF).any()
    got = apply("rsqrt.approx.f64", [("f64", a)], "f64")
    assert (np.abs(got * np.sqrt(a) - 1) < 2.0**-20).all()
