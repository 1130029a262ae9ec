"""Sums of products that are infinite stay so in f8e5m2, where finite ones saturate."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from stagefuse.compiler.plan import LEVELS
from stagefuse.runtime.devices import open_plan

from ...fuzz.programs import compiled

TEXT = """
pipeline p(x: f8e5m2[M, K], y: f8e5m2[K, N]) -> (f8e5m2[M, N], f8e5m2[M])
where M in 1..=64, K in 2..=64, N in 1..=64:
    x @ y, x @ y[:, 0]
"""


@pytest.mark.parametrize("target", ["cpu", "sm_80", "sm_89", "sm_90a"])
def test_infinite_products(target: str, rng: np.random.Generator) -> None:
    kind = np.dtype(ml_dtypes.float8_e5m2)
    device = "cpu" if target == "cpu" else f"emulator:{target}"
    with open_plan(compiled(TEXT, [target], LEVELS), None, device) as pipe:
        for m, k, n in ((1, 64, 64), (64, 33, 40), (5, 7, 3)):
            x = rng.integers(-2, 3, (m, k)).astype(kind)
            y = rng.integers(-2, 3, (k, n)).astype(kind)
            x[0, 0], x[-1, 1] = np.inf, 57344
            with np.errstate(invalid="ignore"):
                wanted = x.astype(np.float64) @ y.astype(np.float64)
            finite = np.clip(wanted, -57344, 57344)
            wanted = np.where(np.isinf(wanted), wanted, finite).astype(kind).astype(np.float64)
            whole, column = pipe(x=x, y=y)
            assert np.array_equal(whole.astype(np.float64), wanted, equal_nan=True)
            assert np.array_equal(column.astype(np.float64), wanted[:, 0], equal_nan=True)
