"""Long reductions of few rows, whose parts blocks share: the emulator against NumPy."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .gpu_run import Emulated, check_legal, compiled

SOURCE = """pipeline p(x: DTYPE[R, N]) -> (f32[R], f32[R], DTYPE[R], i64[R], i64[R])
where R in 0..=500, N in 1..=100000:
    y = f32(x)
    sum(y, axis=1), sqrt(mean(y * y, axis=1)), max(x, axis=1), argmax(x, axis=1), argmin(x, axis=1)
"""


@pytest.mark.parametrize("arch, dtype", [("sm_80", "f16"), ("sm_89", "f32"), ("sm_90a", "f64")])
def test_few_long_rows(arch: str, dtype: str, tmp_path: Path, rng: np.random.Generator) -> None:
    plan = compiled(tmp_path / "p.pipe", SOURCE.replace("DTYPE", dtype), (arch,))
    check_legal(plan)
    run = Emulated(plan, arch)
    for shape in ((3, 16384), (1, 33333), (2, 16383), (130, 5), (0, 20000), (1, 1)):
        x = rng.standard_normal(shape).astype(dtype.replace("f", "float"))
        if x.size > 9000:  # ties between parts, of which the first counts
            x[-1, [8000, shape[1] - 1]] = 9
            x[-1, [8001, shape[1] - 2]] = -9
        _check(run, x)
    x = np.zeros((2, 40000), x.dtype)
    x[0, 30001] = x[0, 7] = np.nan
    x[1, [5, 39999]] = -0.0
    _check(run, x)


def _check(run: Emulated, x: np.ndarray) -> None:
    total, root, most, at, least = run({"x": x}, dict(zip("RN", x.shape, strict=True)))
    y = x.astype(np.float64)
    eps = np.finfo(np.float32).eps
    close = np.abs(y).sum(1) * eps * 40 + 1e-30  # no element passes 40 additions
    np.testing.assert_allclose(total, y.sum(1), rtol=0, atol=np.nanmax(close, initial=1e-30))
    np.testing.assert_allclose(root, np.sqrt((y * y).mean(1)), rtol=40 * eps)
    np.testing.assert_array_equal(most, x.max(1))
    np.testing.assert_array_equal(at, x.argmax(1))
    np.testing.assert_array_equal(least, x.argmin(1))
