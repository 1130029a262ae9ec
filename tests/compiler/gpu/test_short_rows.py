"""Rows of up to 128 elements are done by parts of warps: several rows of a warp are under way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .gpu_run import Emulated, check_legal, compiled, launches

TEXT = """
import math
import nn

pipeline masked(x: f32[B, H, T, S], m: f32[B, 1, 1, S]) -> f32[B, H, T, S]
where S in 1..=4096:
    nn.softmax(x * 0.125 + m)

pipeline norms(x: f32[M, 64], r: bf16[M, 64]) -> (y: f32[M, 64], s: f32[M], a: i64[M]):
    h = x + f32(r)
    math.standardize(h), sum(h, axis=-1), argmax(h, axis=-1)

pipeline reduced(x: f16[M, 33]) -> (f32[M], f16[M]):
    sum(f32(x), axis=1), max(x, axis=1)

pipeline picked(ids: i64[M], t: f32[V, 96]) -> f32[M, 96]:
    x = t[ids]
    x * rsqrt(mean(x * x, axis=-1, keepdims=True) + 1e-5)
"""


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_short_rows(arch: str, tmp_path: Path, rng: np.random.Generator) -> None:
    import ml_dtypes

    plan = compiled(tmp_path / "p.pipe", TEXT, (arch,))
    check_legal(plan)
    assert all(x.report.get("spill bytes", 0) == 0 for x in launches(plan))
    masked, norms, reduced, picked = (Emulated(plan, arch, n) for n in range(4))
    for b, h, t, s in ((2, 3, 5, 7), (1, 2, 3, 128), (2, 1, 9, 64), (1, 1, 1, 1), (1, 3, 3, 129)):
        x = rng.standard_normal((b, h, t, s)).astype(np.float32)
        m = rng.standard_normal((b, 1, 1, s)).astype(np.float32)
        (found,) = masked({"x": x, "m": m}, {"B": b, "H": h, "T": t, "S": s})
        wanted = _softmax(x.astype(np.float64) * 0.125 + m)
        np.testing.assert_allclose(found, wanted, rtol=3e-6, atol=1e-7)
    for m_rows in (1, 17, 65):
        x = rng.standard_normal((m_rows, 64)).astype(np.float32)
        r = rng.standard_normal((m_rows, 64)).astype(ml_dtypes.bfloat16)
        y, total, place = norms({"x": x, "r": r}, {"M": m_rows})
        own = x.astype(np.float64) + r.astype(np.float64)
        deviation = np.sqrt(own.var(-1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(y, (own - own.mean(-1, keepdims=True)) / deviation, atol=4e-6)
        np.testing.assert_allclose(total, own.sum(-1), atol=2e-5)
        np.testing.assert_array_equal(place, (x + r.astype(np.float32)).argmax(-1))
        w = rng.standard_normal((m_rows, 33)).astype(np.float16)
        total, most = reduced({"x": w}, {"M": m_rows})
        np.testing.assert_allclose(total, w.astype(np.float64).sum(1), atol=2e-5)
        np.testing.assert_array_equal(most, w.max(1))
        table = rng.standard_normal((11, 96)).astype(np.float32)
        ids = rng.integers(-11, 11, m_rows)
        (found,) = picked({"ids": ids, "t": table}, {"M": m_rows, "V": 11})
        row = table[ids].astype(np.float64)
        root = np.sqrt((row * row).mean(-1, keepdims=True) + 1e-5)
        np.testing.assert_allclose(found, row / root, rtol=3e-6, atol=1e-6)


def test_two_rows_of_a_warp_are_under_way(tmp_path: Path) -> None:
    """A row of 128 f32 has half a warp, whose lanes load two vectors of it, and what a mask's row
    is found by is one division."""
    plan = compiled(tmp_path / "p.pipe", TEXT, ("sm_90a",))
    text = plan.ptx["sm_90a"]
    entry = text[text.index(".entry masked_softmax_div_to_128") :].split("\n}", 1)[0]
    assert "bfly.b32" in entry and ", 16, 31" not in entry
    version = entry[entry.index("$long2:") :].split("$done", 1)[0]
    assert version.count("ld.global.nc.v4.f32") == 4
    assert version.count("div.u64") == 1


PLANES = """
pipeline centred(x: f32[B, 5, H, W], m: f32[B, H, W], s: f32[B, 5]) -> f32[B, 5, H, W]
where B >= 1, H >= 0, W >= 0:
    (x - m[:, None]) * s[:, :, None, None]

pipeline heads(x: f16[B, T, N, 24]) -> f16[B, N, T, 24]
where B >= 1:
    transpose(x, [0, 2, 1, 3])
"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_rows_of_planes_together(arch: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """A step has several short rows, whose elements are those of one where they lie so."""
    plan = compiled(tmp_path / "p.pipe", PLANES, (arch,))
    check_legal(plan)
    assert not any(x.report["spill bytes"] for x in launches(plan))
    centred, heads = (Emulated(plan, arch, n) for n in range(2))
    sizes = ((2, 7, 7), (1, 70, 12), (1, 3, 700), (2, 1, 1), (1, 0, 4), (1, 4, 0), (1, 9, 31))
    for b, h, w in sizes:
        x = rng.standard_normal((b, 5, h, w)).astype(np.float32)
        m = rng.standard_normal((b, h, w)).astype(np.float32)
        s = rng.standard_normal((b, 5)).astype(np.float32)
        (found,) = centred({"x": x, "m": m, "s": s}, {"B": b, "H": h, "W": w})
        np.testing.assert_array_equal(found, (x - m[:, None]) * s[:, :, None, None])
    for b, t, n in ((1, 100, 3), (2, 5, 7), (1, 0, 2)):
        x = rng.standard_normal((b, t, n, 24)).astype(np.float16)
        (found,) = heads({"x": x}, {"B": b, "T": t, "N": n})
        np.testing.assert_array_equal(found, x.transpose(0, 2, 1, 3))
