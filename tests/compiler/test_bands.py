"""Short rows that are read from far apart: by bands of what lies beside them, of any sizes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stagefuse.compiler import stages
from stagefuse.compiler.driver import compile_file
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.runtime.cpu_pipeline import CpuPipeline

from .cpu_run import LEVELS

SIZES = [(1, 1), (9, 4), (8, 64), (17, 65), (100, 130), (0, 7), (5, 0)]
"""Rows of what is read, and stretches that lie side by side in each."""


@pytest.mark.parametrize("wide, name", [(2, "f32"), (33, "f16"), (64, "u8")])
def test_heads_are_split(rng: np.random.Generator, tmp_path: Path, wide: int, name: str) -> None:
    """Of unknown sizes, with arithmetic, and another operand that lies as the result does."""
    path = tmp_path / "p.pipe"
    path.write_text(f"""
pipeline p(x: {name}[B, T, H, {wide}], y: {name}[B, H, T, {wide}]) -> {name}[B, H, T, {wide}]:
    maximum(transpose(x, [0, 2, 1, 3]), y)
""")
    ((_, kernels),) = stages.text_after(path, "kernels", {})
    assert "parallel d2s" in kernels
    pipes = [CpuPipeline(compile_file(path, levels=(x,)), threads=2) for x in LEVELS]
    for t, h in SIZES:
        dtype = DTYPES[name].numpy
        x, y = (rng.integers(0, 99, s).astype(dtype) for s in ((2, t, h, wide), (2, h, t, wide)))
        for pipe in pipes:
            np.testing.assert_array_equal(pipe(x=x, y=y), np.maximum(x.swapaxes(1, 2), y))


@pytest.mark.parametrize(
    "axes, banded",
    [("100, 9, 16", True), ("100, 3, 16", False), ("8, 100, 16", False), ("100, 9, 65", False)],
)
def test_where_bands_help(tmp_path: Path, axes: str, banded: bool) -> None:
    a, b, c = axes.split(", ")
    path = tmp_path / "p.pipe"
    path.write_text(
        f"pipeline p(x: f32[{axes}]) -> f32[{b}, {a}, {c}]:\n    transpose(x, [1, 0, 2])\n"
    )
    ((_, kernels),) = stages.text_after(path, "kernels", {})
    assert ("parallel d1s" in kernels) == banded


def test_panels_are_packed_by_bands(rng: np.random.Generator, tmp_path: Path) -> None:
    """Whatever columns the last panel has, and what is padded."""
    path = tmp_path / "p.pipe"
    path.write_text("""
pipeline p(x: f32[M, K], y: f32[K - 2, N]) -> f32[M, N]
where M in 1000..=2000, K in 2..=500, N in 1..=500:
    x @ pad(y, [(1, 1), (0, 0)], value=1.0)
""")
    ((_, kernels),) = stages.text_after(path, "kernels", {})
    assert "parallel d1s" in kernels
    pipes = [CpuPipeline(compile_file(path, levels=(x,)), threads=2) for x in LEVELS]
    for k, n in [(2, 1), (9, 49), (65, 15), (33, 130), (64, 384)]:
        x, y = (rng.integers(-9, 9, s).astype(np.float32) for s in ((1000, k), (k - 2, n)))
        wanted = x @ np.pad(y, [(1, 1), (0, 0)], constant_values=1)
        for pipe in pipes:
            np.testing.assert_array_equal(pipe(x=x, y=y), wanted)
