"""Functions made of the hardware's approximations keep their bounds if those err as documented."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stagefuse.dsl.dtypes import DTYPES
from stagefuse.runtime.emulator import meanings

from ..test_ops_native import ulps
from .gpu_run import Emulated, compiled

TEXT = """
pipeline p(x: f32[N]) -> (f32[N], f32[N], f32[N], f32[N], f32[N]):
    1.0 / x, rsqrt(x), sigmoid(x), tanh(x), exp(x)
"""
ERRORS = {"float.rcp": 1, "float.rsqrt": 2, "float.ex2": 1}
"""Units in the last place by which approximations may err: as the PTX ISA says, but 2^x near 0 is
closer on every GPU than the 2 that it allows."""


def _err(factory: Callable[..., Any], units: int, rng: np.random.Generator) -> Callable[..., Any]:
    """A meaning whose results are off by up to some units either way, where they are normal."""

    def wrapped(match: Any) -> Any:
        exact = factory(match)

        def run(a: Any) -> Any:
            found = np.atleast_1d(np.asarray(exact(a), np.float32)).copy()
            off = rng.integers(-units, units + 1, found.shape).astype(np.int32)
            normal = np.isfinite(found) & (np.abs(found) > 1e-37) & (np.abs(found) < 1e38)
            moved = (found.view(np.int32) + off).view(np.float32)
            return np.where(normal, moved, found)

        return run

    return wrapped


def err(monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator) -> None:
    """Makes the approximations err."""
    for name, units in ERRORS.items():
        monkeypatch.setitem(meanings.PURE, name, _err(meanings.PURE[name], units, rng))


def _bits(rng: np.random.Generator) -> Any:
    """Numbers of all sizes, and those whose reciprocals lie closest between two others."""
    anything = rng.integers(0, 1 << 32, 20000, np.uint32).view(np.float32)
    usual = rng.normal(0, 4, 20000).astype(np.float32)
    exponents = rng.integers(0, 255, 400, np.uint32) << 23
    hard = exponents | rng.choice(np.array([0, 1, 2, 0x7FFFFF, 0x7FFFFE], np.uint32), 400)
    return np.concatenate([anything, usual, hard.view(np.float32), -hard.view(np.float32)])


@pytest.mark.parametrize("approximate", [False, True])
def test_bounds_hold(
    approximate: bool, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    if approximate:
        err(monkeypatch, rng)
    x = _bits(rng)
    emulated = Emulated(compiled(tmp_path / "p.pipe", TEXT, ("sm_90a",)))
    found = emulated({"x": x}, {"N": x.size})
    with np.errstate(all="ignore"):
        wide = x.astype(float)
        exact = [1 / wide, 1 / np.sqrt(wide), 1 / (1 + np.exp(-wide)), np.tanh(wide), np.exp(wide)]
    bounds = (1.0, 1.0, 4.0, 3.0, 2.0)
    for got, wanted, bound in zip(found, exact, bounds, strict=True):
        error = ulps(wanted, np.asarray(got).astype(float), DTYPES["f32"])
        worst = int(np.argmax(error))
        assert error[worst] <= bound, (bound, error[worst], x[worst], wanted[worst], got[worst])


SHORT = """
pipeline p(x: bf16[N], y: f16[N]) -> (bf16[N], bf16[N], f16[N], f16[N]):
    sigmoid(x), exp(x), sigmoid(y), exp(y)
"""


@pytest.mark.parametrize("approximate", [False, True])
def test_functions_of_16_bits_are_right_for_each_of_them(
    approximate: bool, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They may be 2^-16 of themselves off before they are rounded: one of two numbers beside."""
    if approximate:
        err(monkeypatch, rng)
    bits = np.arange(1 << 16, dtype=np.uint16)
    x, y = bits.view(ml_dtypes.bfloat16), bits.view(np.float16)
    plan = compiled(tmp_path / "p.pipe", SHORT, ("sm_90a",))
    assert "fma.rn.sat" not in plan.ptx["sm_90a"]
    emulated = Emulated(plan)
    found = emulated({"x": x, "y": y}, {"N": x.size})
    with np.errstate(all="ignore"):
        both = [(f(a.astype(float)), name) for a, name in ((x, "bf16"), (y, "f16"))
                for f in (lambda a: 1 / (1 + np.exp(-a)), np.exp)]  # fmt: skip
    for got, (wanted, name) in zip(found, both, strict=True):
        error = ulps(wanted, np.asarray(got).astype(float), DTYPES[name])
        worst = int(np.argmax(error))
        assert error[worst] <= 1.0, (name, error[worst], bits[worst], wanted[worst])
        assert np.mean(error == 0) > 0.99


RATIOS = """
pipeline p(x: f32[B, N]) -> (f32[B, N], f32[B, N], i8[B, N]):
    s = max(abs(x), axis=-1, keepdims=True) / 127.0 + 1e-6
    x / s, x / 3.0, i8(round(x / s))
"""


@pytest.mark.parametrize("approximate", [False, True])
def test_quotients_by_what_a_row_shares(
    approximate: bool, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of all sizes, with infinities and NaN; whole quotients are right to the bit."""
    if approximate:
        err(monkeypatch, rng)
    x = rng.normal(size=(64, 67)).astype(np.float32)
    x = x * 2.0 ** rng.integers(-140, 100, (64, 1))
    whole = rng.integers(-127, 128, x.shape).astype(np.float32)
    x = np.concatenate([x, 3 * whole * 2.0 ** rng.integers(-100, 90, (64, 1))])
    x = x.astype(np.float32)
    x[3, 5], x[7, :2], x[9, 1] = np.inf, (-np.inf, np.inf), np.nan
    plan = compiled(tmp_path / "p.pipe", RATIOS, ("sm_90a",))
    assert "div.rn" not in plan.ptx["sm_90a"]
    emulated = Emulated(plan)
    found, third, codes = map(np.asarray, emulated({"x": x}, dict(zip("BN", x.shape, strict=True))))
    with np.errstate(all="ignore"):
        exact = np.float32(1) * np.max(np.abs(x), axis=1, keepdims=True).astype(float) / 127 + 1e-6
        wanted = x.astype(float) / exact
        assert np.array_equal(third[64:], x[64:] / np.float32(3.0), equal_nan=True)
        error = ulps(x.astype(float) / 3.0, third.astype(float), DTYPES["f32"])
        small = np.abs(x) < 2.0**-122
        assert np.all(error <= np.where(small, 1.0, 0.5 + 2.0**-20))
        # the divisor, of which two roundings are known, is within 1 ulp
        error = ulps(wanted, found.astype(float), DTYPES["f32"])
        assert np.all(error <= 2.6)
        limited = np.clip(np.where(np.isnan(wanted), 0.0, wanted), -128, 127)
    near = np.abs(limited - codes.astype(float))
    assert np.all(near <= 0.5 + 2.0**-15)


def test_only_divisors_of_a_fair_size_are_inverted(tmp_path: Path) -> None:
    row = ("sqrt(sum(x * x, axis=1, keepdims=True))", "max(abs(x), axis=1, keepdims=True)")
    fair = [f"maximum({row[0]}, 1e-12)", f"({row[1]} / 127.0 + 1e-6)", "0.3"]
    others = [*row, "(x + 1.0)", f"({row[1]} + 1e-6)"]
    head = "pipeline {}{}(x: f32[B, 96]) -> f32[B, 96]:\n    x / {}\n"
    listed = (("fair", fair), ("other", others))
    text = "".join(head.format(k, n, d) for k, found in listed for n, d in enumerate(found))
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    entries = plan.ptx["sm_90a"].split(".visible .entry ")[1:]
    divided = {e.split("_")[0] for e in entries if "div.rn" in e}
    assert divided == {f"other{n}" for n in range(len(others))}
