"""Windows that are reduced to one number each, as convolutions with one result channel do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .gpu_run import Emulated, check_legal, compiled, launches

TEXT = """
pipeline image(x: DTYPE[B, 37, 122, 24], w: DTYPE[2, 5, 24]) -> DTYPE[B, 38, 122]
where B >= 1:
    z = pad(x, [(0, 0), (1, 1), (2, 2), (0, 0)])
    y[b, i, j] = sum[c, m, n] (z[b, i + m, j + n, c] * w[m, n, c])
    maximum(y, 0.0)

pipeline line(x: DTYPE[B, 32995], w: DTYPE[66]) -> DTYPE[B, 16465]
where B >= 1:
    y[b, i] = sum[k] (x[b, 2 * i + k] * w[k])
    y
"""


@pytest.mark.parametrize("arch, dtype", [("sm_80", "f32"), ("sm_90a", "f16")])
def test_windows(arch: str, dtype: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """Of windows of many channels a part of a warp has one, in vectors along the channels; of
    those along a line a lane."""
    plan = compiled(tmp_path / "p.pipe", TEXT.replace("DTYPE", dtype), (arch,))
    check_legal(plan)
    image, line = launches(plan)
    assert not image.report["spill bytes"] and not line.report["spill bytes"]
    assert image.grid[0] == "(4636*B + 63) // 64" and line.grid[0] == "(16465*B + 255) // 256"
    assert "ld.global.nc.v" in plan.ptx[arch]
    kind, eps = np.dtype(dtype.replace("f", "float")), np.finfo(dtype.replace("f", "float")).eps
    x = rng.standard_normal((1, 37, 122, 24)).astype(kind)
    w = rng.standard_normal((2, 5, 24)).astype(kind)
    (found,) = Emulated(plan, arch)({"x": x, "w": w}, {"B": 1})
    windows = np.lib.stride_tricks.sliding_window_view(
        np.pad(x[0], ((1, 1), (2, 2), (0, 0))).astype(np.float64), (2, 5), (0, 1)
    )
    _check(found[0], windows, w.transpose(2, 0, 1), "ijcmn,cmn->ij", eps, 0.0)
    x, w = (rng.standard_normal(n).astype(kind) for n in (32995, 66))
    (found,) = Emulated(plan, arch, 1)({"x": x[None], "w": w}, {"B": 1})
    windows = np.lib.stride_tricks.sliding_window_view(x.astype(np.float64), 66)[::2]
    _check(found[0], windows, w, "ik,k->i", eps, -np.inf)


def _check(
    found: np.ndarray, x: np.ndarray, w: np.ndarray, sums: str, eps: float, low: float
) -> None:
    """Within the rounding of sums in f32, and of results to their dtype."""
    wide = w.astype(np.float64)
    right, size = np.einsum(sums, x, wide), np.einsum(sums, np.abs(x), np.abs(wide))
    off = np.abs(found.astype(np.float64) - np.maximum(right, low))
    assert np.all(off <= size * (w.size * 2.0**-24) + np.abs(right) * eps)
