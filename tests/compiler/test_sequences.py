"""Scans, scatters and sorts as CPU code: whichever axis they go along, however many columns."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stagefuse.compiler import interpret
from stagefuse.compiler.driver import compile_file
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.runtime.cpu_pipeline import CpuPipeline
from stagefuse.runtime.errors import IndexOutOfRange

LEVELS = ("v3", "v4")
SHAPES = [(2, 9, 300), (1, 40, 257), (3, 5, 1), (2, 1, 17), (0, 4, 5), (2, 0, 5), (2, 3, 0)]


def compiled(path: Path, text: str, level: str, threads: int = 2) -> CpuPipeline:
    path.write_text(text)
    return CpuPipeline(compile_file(path, levels=(level,)), threads=threads)


def assert_same(found: np.ndarray, wanted: np.ndarray) -> None:
    assert found.dtype == wanted.dtype
    if found.dtype.kind == "V":  # whose NaN NumPy takes for a number
        found, wanted = found.astype(np.float32), wanted.astype(np.float32)
    np.testing.assert_array_equal(found, wanted)


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


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["u8", "i8", "i16"])
def test_few_bytes_are_updated_where_they_lie(
    rng: np.random.Generator, tmp_path: Path, level: str, dtype: str
) -> None:
    """A kernel may read bytes out of words, but none that it writes."""
    text = f"""
pipeline p(x: {dtype}[M, N], i: i64[K], u: {dtype}[K, N]) -> {dtype}[M, N]:
    scatter_add(x, i, u)
"""
    pipe = compiled(tmp_path / "p.pipe", text, level)
    kind = {"u8": np.uint8, "i8": np.int8, "i16": np.int16}[dtype]
    for rows, columns in ((1, 1), (1, 3), (2, 1), (3, 1), (2, 2), (5, 40)):
        x, u = (rng.integers(0, 60, (n, columns)).astype(kind) for n in (rows, 7))
        i, wanted = rng.integers(0, rows, 7), x.copy()
        np.add.at(wanted, i, u)
        assert np.array_equal(pipe(x=x, i=i, u=u), wanted)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("dtype", ["f32", "f64", "f16", "bf16", "i8", "u16", "i64", "bool"])
def test_the_first_few_of_many(
    rng: np.random.Generator, tmp_path: Path, level: str, dtype: str
) -> None:
    """Equal keys in their order, NaN first; of few, of as many as are inserted, and of more."""
    text = f"""
pipeline p(x: {dtype}[B, N], y: {dtype}[N, 3]) -> (
    {dtype}[B, 1], i64[B, 1], {dtype}[B, 64], i64[B, 64], {dtype}[B, 65], i64[B, 65],
    {dtype}[2, 3], i64[2, 3], {dtype}[B, 5])
where N in 65..=4096:
    a, b = topk(x, 1)
    c, d = topk(x, 64)
    e, f = topk(x, 65)
    g, h = topk(y, 2, axis=0)
    a, b, c, d, e, f, g, h, sort(x)[:, :5]
"""
    pipe = compiled(tmp_path / "p.pipe", text, level)
    kind = DTYPES[dtype].numpy
    for n in (65, 66, 79, 127, 131, 1000):
        x, y = (rng.standard_normal(s) * 5 for s in ((3, n), (n, 3)))
        x[1], x[2] = np.round(x[1]), np.sort(x[2])  # many are equal; each is better than before
        if DTYPES[dtype].is_float:
            x[0, rng.integers(0, n, 3)] = np.nan
            x[1, rng.integers(0, n, 9)] = np.copysign(0.0, rng.standard_normal(9))
        x, y = (np.abs(a) if dtype[0] == "u" else a for a in (x, y))
        x, y = x.astype(kind), y.astype(kind)
        found = [*map(np.asarray, pipe(x=x, y=y))]
        firsts = [(x, 1, 1), (x, 64, 1), (x, 65, 1), (y, 2, 0)]
        for place, (given, count, axis) in enumerate(firsts):
            wide = given.astype(float if DTYPES[dtype].is_float else np.int64)
            (values, order), (_, of_wide) = (interpret.sort(a, axis, True) for a in (given, wide))
            assert np.array_equal(order, of_wide)
            head = np.arange(count)
            for got, want in zip(found[2 * place :], (values, order), strict=False):
                assert_same(got, np.take(want, head, axis))
        assert_same(found[-1], interpret.sort(x, 1, False)[0][:, :5])
