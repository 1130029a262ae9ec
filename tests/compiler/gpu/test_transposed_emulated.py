"""Kernels that read across the rows they write take squares through shared memory."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from .gpu_run import Emulated, check_legal, compiled

TEXT = """
pipeline plain(x: f32[M, N]) -> f32[N, M]:
    transpose(x, [1, 0])

pipeline sums(x: f32[M, N], y: bf16[M, N], z: f32[N, M]) -> f32[N, M]:
    transpose(x, [1, 0]) * 2.0 + transpose(f32(y), [1, 0]) + z

pipeline planes(x: u8[B, 23, N, 9]) -> f32[B, 9, 23, N]:
    f32(transpose(x, [0, 3, 1, 2])) / 3.0

pipeline turned(x: i64[M, N, 33]) -> i64[33, M, N]:
    transpose(x, [2, 0, 1])

pipeline several(x: f32[M, N], y: f32[M, N], z: i64[M, N]) -> f32[N, M]:
    t = transpose(x, [1, 0]) * transpose(y, [1, 0])
    t + transpose(f32(z), [1, 0]) - transpose(x, [1, 0])

pipeline padded(x: f32[M, N]) -> f32[N + 3, M + 5]:
    pad(transpose(x, [1, 0]), [(1, 2), (3, 2)], value=7)

pipeline half(x: f16[64, 96]) -> f16[96, 64]:
    -transpose(x, [1, 0])
"""


def test_no_load_of_a_whole_square_waits(tmp_path: Path) -> None:
    """What lies behind an edge is tested once for a square: a load that only some lanes do is a
    branch to ptxas, behind which the next one would wait."""
    plan = compiled(tmp_path / "p.pipe", TEXT, ("sm_90a",))
    text = plan.ptx["sm_90a"]
    entry = text[text.index(".entry plain_transpose") :].split("\n}", 1)[0]
    plain = [x for x in entry.splitlines() if x.startswith("\tld.global.nc.f32")]
    assert len(plain) == 32
    assert len(re.findall(r"@%p\d+ ld\.global\.nc\.f32", entry)) == 32
    entry = text[text.index(".entry padded_") :].split("\n}", 1)[0]
    assert len(re.findall(r"^\tld\.global\.nc\.f32", entry, re.MULTILINE)) == 32
    entry = text[text.index(".entry half_") :].split("\n}", 1)[0]
    assert entry.count("ld.global.nc.v4.b32") == 4 and "@%p" not in entry.split("bra", 1)[1]


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a"])
def test_squares(arch: str, tmp_path: Path, rng: np.random.Generator) -> None:
    import ml_dtypes

    plan = compiled(tmp_path / "p.pipe", TEXT, (arch,))
    check_legal(plan)
    plain, sums, planes, turned, several, padded, half = (Emulated(plan, arch, n) for n in range(7))
    for gpu in (p.gpu[0] for p in plan.pipelines):
        used = [x.report["shared bytes"] for x in gpu.launches if x.report.get("registers")]
        assert all(0 < n <= 72 << 10 for n in used)
    for m, n in ((1, 1), (31, 65), (32, 32), (33, 1), (0, 7), (100, 37)):
        dims = {"M": m, "N": n}
        x = rng.standard_normal((m, n)).astype(np.float32)
        y = rng.standard_normal((m, n)).astype(ml_dtypes.bfloat16)
        z = rng.standard_normal((n, m)).astype(np.float32)
        np.testing.assert_array_equal(plain({"x": x}, dims)[0], x.T)
        (found,) = sums({"x": x, "y": y, "z": z}, dims)
        np.testing.assert_allclose(
            found, x.T * 2 + y.T.astype(np.float32) + z, rtol=1e-6, atol=1e-6
        )
        wanted = np.pad(x.T, [(1, 2), (3, 2)], constant_values=7)
        np.testing.assert_array_equal(padded({"x": x}, dims)[0], wanted)
        i = rng.integers(-9, 9, (m, n, 33))
        np.testing.assert_array_equal(turned({"x": i}, dims)[0], i.transpose(2, 0, 1))
        w, k = z.T.copy(), rng.integers(-9, 9, (m, n))
        (found,) = several({"x": x, "y": w, "z": k}, dims)
        np.testing.assert_allclose(found, (x * w + k - x).T, rtol=1e-5, atol=1e-5)
        b = rng.integers(0, 255, (2, 23, n, 9)).astype(np.uint8)
        (found,) = planes({"x": b}, {"B": 2, "N": n})
        np.testing.assert_allclose(found, b.transpose(0, 3, 1, 2) / 3, rtol=1e-6)
    h = rng.standard_normal((64, 96)).astype(np.float16)
    np.testing.assert_array_equal(half({"x": h}, {})[0], -h.T)
