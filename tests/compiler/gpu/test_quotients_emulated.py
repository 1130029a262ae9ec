"""Functions made of the hardware's approximations keep their bounds if those err as documented."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

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
        for name, units in ERRORS.items():
            monkeypatch.setitem(meanings.PURE, name, _err(meanings.PURE[name], units, rng))
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
