"""Products by transposed matrices, converted, computed, or of unknown sizes: their panels."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stagefuse.compiler import stages
from stagefuse.compiler.driver import compile_file
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.runtime.cpu_pipeline import CpuPipeline

from .cpu_run import LEVELS

UNKNOWN = """
pipeline p(x: {0}[M, K], y: {0}[N, K]) -> {0}[M, N]
where K in 0..=2000, N in 0..=2000:
    x @ transpose(y, [1, 0])
"""
BATCH = """
pipeline p(x: {0}[B, M, K], y: {0}[B, N, K]) -> {0}[B, M, N]
where B in 1..=9, K in 0..=2000, N in 0..=2000:
    x @ transpose(y, [0, 2, 1])
"""
COMPUTED = """
pipeline p(x: {0}[40, K], y: {0}[N, K]) -> {0}[40, N]
where K in 1..=300, N in 1..=300:
    x @ transpose(maximum(y, -y), [1, 0])
"""


def pipes_of(source: str, name: str, tmp_path: Path) -> tuple[str, list[CpuPipeline]]:
    """The kernels as text, and the pipeline for each level."""
    path = tmp_path / "p.pipe"
    path.write_text(source.format(name))
    ((_, kernels),) = stages.text_after(path, "kernels", {})
    return kernels, [CpuPipeline(compile_file(path, levels=(x,)), threads=2) for x in LEVELS]


@pytest.mark.parametrize("name, source", [("f32", UNKNOWN), ("bf16", UNKNOWN), ("f64", BATCH)])
def test_panels_of_unknown_columns(
    rng: np.random.Generator, tmp_path: Path, name: str, source: str
) -> None:
    """Packed before the product or in it, the last one with fewer columns; integers are exact."""
    kernels, pipes = pipes_of(source, name, tmp_path)
    assert ("alloc turned" in kernels) == (source == UNKNOWN)
    batch = (2,) if source == BATCH else ()
    for m, k, n in [(40, 1, 3), (37, 130, 49), (50, 600, 95), (64, 127, 48), (40, 0, 5)]:
        x, y = (rng.integers(-2, 3, (*batch, s, k)).astype(DTYPES[name].numpy) for s in (m, n))
        wanted = x.astype(float) @ y.astype(float).swapaxes(-1, -2)
        for pipe in pipes:
            got = pipe(x=x, y=y)
            np.testing.assert_array_equal(got, wanted.astype(got.dtype))


@pytest.mark.parametrize("name", ["f32", "f16"])
def test_panels_of_computed_rows(rng: np.random.Generator, tmp_path: Path, name: str) -> None:
    _, pipes = pipes_of(COMPUTED, name, tmp_path)
    for k, n in [(1, 1), (129, 47), (256, 100), (300, 16)]:
        x, y = (rng.integers(-2, 3, (s, k)).astype(DTYPES[name].numpy) for s in (40, n))
        wanted = x.astype(float) @ np.abs(y.astype(float)).T
        for pipe in pipes:
            got = pipe(x=x, y=y)
            np.testing.assert_array_equal(got, wanted.astype(got.dtype))


def test_rows_are_converted_along_them(rng: np.random.Generator, tmp_path: Path) -> None:
    """Where the kernel that multiplies packs its panels, of known sizes and not."""
    source = "pipeline p(x: bf16[36, {0}], y: bf16[100, {0}]) -> bf16[36, 100]:\n"
    for depth in (600,):
        kernels, pipes = pipes_of(source + "    x @ transpose(y, [1, 0])\n", str(depth), tmp_path)
        assert "alloc lines" in kernels
        dtype = DTYPES["bf16"].numpy
        x, y = (rng.integers(-2, 3, (s, depth)).astype(dtype) for s in (36, 100))
        wanted = (x.astype(float) @ y.astype(float).T).astype(dtype)
        for pipe in pipes:
            np.testing.assert_array_equal(pipe(x=x, y=y), wanted)
