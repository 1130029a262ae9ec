"""Positions from data in loops of vectors: looked through first, and told where one is wrong."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.driver import compile_file
from stagefuse.runtime.cpu_pipeline import CpuPipeline
from stagefuse.runtime.errors import IndexOutOfRange, InputError

from .cpu_run import LEVELS
from .test_packed_bytes import between_pages

SOURCE = """
pipeline p(x: {dtype}[K, L], i: {places}[M, N], j: {places}[N]) -> (y: f32[M, N], z: {dtype}[M, N]):
    y[m, n] = exp(f32(x[i[m, n], j[n]]) * 0.01) + f32(x[i[m, n], 0])
    z[m, n] = x[i[m, n], j[n]]
    y, z
"""


def compiled(level: str, dtype: str, places: str, folder: Path) -> CpuPipeline:
    (folder / "p.pipe").write_text(SOURCE.format(dtype=dtype, places=places))
    return CpuPipeline(compile_file(folder / "p.pipe", levels=(level,)), threads=2)


def positions(rng: np.random.Generator, extent: int, shape: Any, places: str) -> Any:
    return rng.integers(-extent, extent, shape).astype({"i64": np.int64, "i32": np.int32}[places])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("places", ["i64", "i32"])
@pytest.mark.parametrize("dtype", ["f32", "u8"])
def test_loops_of_positions(
    level: str, places: str, dtype: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    pipe = compiled(level, dtype, places, tmp_path)
    for m, n in ((0, 5), (3, 0), (1, 1), (2, 7), (5, 67), (1, 5003)):
        k, length = (int(v) for v in rng.integers(1, 40, 2))
        values = rng.integers(0, 256, (k, length)).astype(np.uint8 if dtype == "u8" else np.float32)
        area, x = between_pages(values)
        i = positions(rng, k, (m, n), places)
        j = positions(rng, length, n, places)
        found = pipe(x=x, i=i, j=j)
        y = np.exp(values[i, j].astype(np.float64) * 0.01) + values[i, 0]
        np.testing.assert_allclose(found.y, y, rtol=4 * 2.0**-23)
        np.testing.assert_array_equal(found.z, values[i, j])
        if m * n:
            at = tuple(rng.integers(0, (m, n)))
            i[at] = wrong = int(rng.choice([k, -k - 1, 2**31 - 1, -(2**31)]))
            with pytest.raises(IndexOutOfRange, match=str(wrong)):
                pipe(x=x, i=i, j=j)
        del found, x
        assert area


@pytest.mark.parametrize("level", LEVELS)
def test_positions_into_nothing(level: str, tmp_path: Path) -> None:
    pipe = compiled(level, "f32", "i64", tmp_path)
    none = np.zeros((0, 3), np.float32)
    empty = pipe(x=none, i=np.zeros((4, 0), np.int64), j=np.zeros(0, np.int64))
    assert empty.y.shape == (4, 0)
    with pytest.raises(InputError, match="no index is in range"):
        pipe(x=none, i=np.zeros((4, 20), np.int64), j=np.zeros(20, np.int64))


@pytest.mark.parametrize("level", LEVELS)
def test_positions_behind_conditions(level: str, rng: np.random.Generator, tmp_path: Path) -> None:
    """Positions end where memory does: none is looked at of an element that is padding."""
    (tmp_path / "p.pipe").write_text("""
pipeline p(x: f32[K], i: i64[N], keep: bool[N]) -> (y: f32[N + 9], z: f32[N]):
    taken[n] = x[i[n]]
    y = pad(taken, [(4, 5)])
    z[n] = select(keep[n], x[i[n]], 0.0)
    y, z
""")
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=1)
    x = rng.standard_normal(31).astype(np.float32)
    area, i = between_pages(rng.integers(0, 31, 200))
    keep = rng.random(200) < 0.5
    found = pipe(x=x, i=i, keep=keep)
    np.testing.assert_array_equal(found.y, np.pad(x[i], (4, 5)))
    np.testing.assert_array_equal(found.z, np.where(keep, x[i], 0))
    assert area


@pytest.mark.parametrize("level", LEVELS)
def test_rows_of_no_elements_are_not_asked_for(level: str, tmp_path: Path) -> None:
    (tmp_path / "p.pipe").write_text("""
pipeline p(x: u8[K, L], i: i64[M], j: i64[N]):
    y[m, n] = f32(x[i[m], clamp(j[n], 0, L - 1)])
    y
""")
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=1)
    x, far = np.ones((3, 4), np.uint8), np.array([9])
    assert pipe(x=x, i=far, j=np.zeros(0, np.int64)).shape == (1, 0)
    with pytest.raises(IndexOutOfRange, match="9"):
        pipe(x=x, i=far, j=np.zeros(20, np.int64))
