"""Scans, scatters and sorts as CPU code: whichever axis they go along, however many columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stagefuse.compiler.driver import compile_file
from stagefuse.runtime.errors import IndexOutOfRange
from stagefuse.runtime.cpu_pipeline import CpuPipeline

LEVELS = ("v3", "v4")
SHAPES = [(2, 9, 300), (1, 40, 257), (3, 5, 1), (2, 1, 17), (0, 4, 5), (2, 0, 5), (2, 3, 0)]


def compiled(path: Path, text: str, level: str, threads: int = 2) -> CpuPipeline:
    path.write_text(text)
    return CpuPipeline(compile_file(path, levels=(level,)), threads=threads)


@pytest.mark.parametrize("level", LEVELS)
def test_sums_down_columns_add_in_order(
    rng: np.random.Generator, tmp_path: Path, level: str
) -> None:
    text = """
pipeline p(x: f32[B, M, N], y: f64[M, 700]) -> (a: f32[B, M, N], b: f32[B, M, N], c: f64[M, 700]):
    cumsum(x * 2.0, axis=1), cumsum(x, axis=0), cumsum(y, axis=0)
"""
    pipe = compiled(tmp_path / "p.pipe", text, level)
    for shape in SHAPES:
        x, y = rng.standard_normal(shape, np.float32), rng.standard_normal((shape[1], 700))
        found = pipe(x=x, y=y)
        wanted = (np.cumsum(x * 2, 1), np.cumsum(x, 0), np.cumsum(y, 0))
        assert all(map(np.array_equal, found, wanted))


@pytest.mark.parametrize("level", LEVELS)
def test_rows_are_updated_in_order(rng: np.random.Generator, tmp_path: Path, level: str) -> None:
    text = """
pipeline p(x: f32[B, M, N], i: i64[K], u: f32[B, K, N]) -> (a: f32[B, M, N], b: f32[B, M, N]):
    scatter_add(x, i, u, axis=1), scatter_set(x + 1.0, i, u, axis=1)
"""
    pipe = compiled(tmp_path / "p.pipe", text, level)
    for shape in [*SHAPES, (2, 3, 5000)]:
        batch, rows, columns = shape
        count = 6 if rows else 0
        i = rng.integers(-rows, rows, count) if rows else np.zeros(0, np.int64)
        x, u = (rng.standard_normal(s, np.float32) for s in (shape, (batch, count, columns)))
        added, chosen = x.copy(), x + 1
        for n, at in enumerate(i):
            added[:, at] += u[:, n]
            chosen[:, at] = u[:, n]
        found = pipe(x=x, i=i, u=u)
        assert np.array_equal(found[0], added) and np.array_equal(found[1], chosen)
    wide = np.zeros((1, 2, 9), np.float32)
    with pytest.raises(IndexOutOfRange):
        pipe(x=wide, i=np.array([2]), u=np.zeros((1, 1, 9), np.float32))
