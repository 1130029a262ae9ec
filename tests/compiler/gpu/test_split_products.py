"""f32 products on warpgroups: every tile, tail and cluster equals the product in f64."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from stagefuse.compiler.gpu.matmul import tf32_shapes
from stagefuse.compiler.gpu.matmul.tf32_shapes import Shape
from stagefuse.dsl.dims_text import parse

from .gpu_run import Emulated, check_legal, compiled, launches

Floats = NDArray[np.float32]
TEXT = """pipeline p(x: f32[M, K], w: f32[K, N], v: f32[N, K], b: f32[N]) -> (f32[M, N], f32[M, N]):
    x @ w, x @ transpose(v, [1, 0]) + b
"""
SHAPES = [
    Shape(64, 32, 1), Shape(64, 64, 8), Shape(64, 96, 2), Shape(64, 128, 4), Shape(128, 32, 2),
    Shape(128, 64, 1), Shape(128, 96, 8), Shape(128, 128, 1),
]  # fmt: skip
SIZES = ((1, 4, 4), (3, 0, 8), (70, 36, 52), (130, 100, 132), (5, 7, 9), (0, 8, 4))


def near(found: Floats, x: Floats, w: Floats, more: float = 0.0) -> None:
    """Within what sums of f32 products in any order may differ from the sum: a rounding of 2^-24 of
    all that is summed for each element, and 2^-22 for what the parts of operands leave out."""
    wide = x.astype(np.float64), w.astype(np.float64)
    bound = (len(w) * 2.0**-24 + 2.0**-22) * (np.abs(wide[0]) @ np.abs(wide[1]))
    assert (np.abs(found - (wide[0] @ wide[1] + more)) <= bound + 2.0**-22).all()


@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tiles_of_any_sizes(
    shape: Shape, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tf32_shapes, "_shapes", lambda *_: [shape])
    plan = compiled(tmp_path / "p.pipe", TEXT, ("sm_90a",))
    check_legal(plan)
    assert "wgmma" in plan.ptx["sm_90a"] and "cp.async.bulk.tensor" in plan.ptx["sm_90a"]
    assert all(not x.report["spill bytes"] for x in launches(plan))
    assert max(x.cluster[0] for x in launches(plan)) == shape.split
    emulated = Emulated(plan)
    for m, k, n in SIZES:
        x, w, v, b = (
            rng.standard_normal(size).astype(np.float32) for size in ((m, k), (k, n), (n, k), (n,))
        )
        found = emulated({"x": x, "w": w, "v": v, "b": b}, {"M": m, "K": k, "N": n})
        near(found[0], x, w)
        near(found[1], x, v.T, b)


@pytest.mark.parametrize("split", [1, 4])
def test_infinities_and_nan(
    split: int, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither survives being split: the blocks that meet one multiply the numbers as they are."""
    monkeypatch.setattr(tf32_shapes, "_shapes", lambda *_: [Shape(64, 64, split)])
    text = "pipeline p(x: f32[130, 136], w: f32[136, 68]) -> f32[130, 68]:\n    x @ w\n"
    emulated = Emulated(compiled(tmp_path / "p.pipe", text, ("sm_90a",)))
    x, w = (rng.standard_normal(s).astype(np.float32) for s in ((130, 136), (136, 68)))
    x[3, 1], x[70, 130], w[1, 1], w[5, 66] = np.inf, np.nan, -np.inf, 3e38
    x[9, 5] = 2.0**100
    (found,) = emulated({"x": x, "w": w}, {})
    with np.errstate(over="ignore", invalid="ignore"):
        wide = x.astype(np.float64) @ w.astype(np.float64)
        expected = wide.astype(np.float32)
    assert np.isinf(expected).sum() > 100 and np.isnan(expected).sum() > 60
    finite = np.isfinite(expected)
    np.testing.assert_array_equal(found[~finite], expected[~finite])
    with np.errstate(invalid="ignore"):
        bound = 140 * 2.0**-24 * (np.abs(x.astype(np.float64)) @ np.abs(w.astype(np.float64)))
        assert (np.abs(found - wide)[finite] <= bound[finite]).all()


def test_batches_and_packed_panels(tmp_path: Path, rng: np.random.Generator) -> None:
    """Tensor copies bring the operands of a batch, other copies panels that lie in no steps."""
    text = (
        "pipeline p(x: f32[M, 64], w: f32[64, 4, 40], u: f32[B, M, 36], v: f32[B, 36, 40])"
        " -> (f32[M, 40, 4], f32[B, M, 40])\nwhere M in 40..=4096:\n"
        "    y[m, j, i] = sum[k] x[m, k] * w[k, i, j]\n"
        "    y, u @ v\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    wide = [x for x in launches(plan) if int(x.shared_bytes) > 48 << 10]
    assert sorted(len(x.maps) for x in wide) == [0, 2]
    assert not any(x.report["spill bytes"] for x in wide)
    emulated = Emulated(plan)
    for b, m in ((2, 70), (3, 41)):
        x, w, u, v = (
            rng.standard_normal(s).astype(np.float32)
            for s in ((m, 64), (64, 4, 40), (b, m, 36), (b, 36, 40))
        )
        y, z = emulated({"x": x, "w": w, "u": u, "v": v}, {"M": m, "B": b})
        near(y.reshape(m, 160), x, w.transpose(0, 2, 1).reshape(64, 160))
        for n in range(b):
            near(z[n], u[n], v[n])


@pytest.mark.parametrize("rows", [33, 64, 65, 100, 1000, 5000])
def test_one_kernel_runs_for_any_number_of_rows(rows: int, tmp_path: Path) -> None:
    text = (
        "pipeline p(x: f32[M, 384], w: f32[384, 1536], v: f32[1536, 384]) -> f32[M, 384]:\n"
        "    tanh(x @ w) @ v\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    grids = [parse(x.grid[0]).evaluate({"M": rows}) for x in launches(plan)]
    assert sum(g > 0 for g in grids) == 2
    assert all(g % x.cluster[0] == 0 for g, x in zip(grids, launches(plan), strict=True))


def test_shapes_fill_the_device() -> None:
    """A small product has many blocks by its clusters, a large one wide tiles."""
    shapes = [Shape(r, c, s) for r in (64, 128) for c in (64, 128) for s in (1, 2, 4, 8)]
    small, large = (
        min(shapes, key=lambda s, z=z: s.clocks(z))
        for z in ((1, 128, 384, 1536, 0), (1, 4096, 4096, 4096, 0))
    )
    assert small.split > 1 and (large.rows, large.columns, large.split) == (128, 128, 1)
