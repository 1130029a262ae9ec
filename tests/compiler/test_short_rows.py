"""Reductions of short rows, which are turned in blocks: of any sizes, kinds and dtypes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.kernel_ir import Alloc
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.runtime.cpu_pipeline import CpuPipeline

from .cpu_run import LEVELS
from .ir_cases import kernels_of, of_text

SIDES = {
    "f32": [(16, 9), (63, 12), (130, 16), (100, 7, 7), (70, 3, 5)],
    "f64": [(17, 31), (64, 2, 6)],
    "i32": [(8, 8), (40, 10)],
    "f16": [(20, 15)],
}


@pytest.mark.parametrize("level", LEVELS)
def test_rows_of_any_length(rng: np.random.Generator, level: str, tmp_path: Path) -> None:
    """With weights along a row, what is of a row, and an extreme of the same elements."""
    given, inputs, values, results = dict[str, np.ndarray](), [], [], []
    sides = [(name, *side) for name, found in SIDES.items() for side in found]
    for i, (name, rows, *row) in enumerate(sides):
        for key, size in (("x", (rows, *row)), ("w", (*row,)), ("r", (rows,))):
            given[f"{key}{i}"] = rng.integers(-9, 9, size).astype(DTYPES[name].numpy)
            inputs.append(f"{key}{i}: {name}[{', '.join(map(str, size))}]")
        axis = "(1, 2)" if len(row) > 1 else "1"
        values.append(f"f64(sum(x{i} * w{i}, axis={axis})) - f64(max(x{i}, axis={axis}) * r{i})")
        results.append(f"y{i}: f64[{rows}]")
    path = tmp_path / "p.pipe"
    header = f"pipeline p({', '.join(inputs)}) -> ({', '.join(results)}):"
    path.write_text(f"{header}\n    {', '.join(values)}\n")
    pipe = CpuPipeline(compile_file(path, levels=(level,)), threads=2)
    for i, y in enumerate(pipe(**given)):
        x, w, r = (given[f"{key}{i}"].astype(np.float64) for key in "xwr")
        axes = tuple(range(1, x.ndim))
        np.testing.assert_array_equal(y, (x * w).sum(axes) - x.max(axes) * r)  # small integers


@pytest.mark.parametrize("level", LEVELS)
def test_rows_that_pairs_are_made_of(rng: np.random.Generator, level: str, tmp_path: Path) -> None:
    """Those of one side are turned once for several of the other, few or none of them too."""
    path = tmp_path / "p.pipe"
    path.write_text(
        "pipeline p(x: f32[B, N, 9], z: f32[B, K, 9], v: i32[N, 8], w: i32[K, 8]) "
        "-> (f32[B, N, K], i64[N, K]):\n"
        "    near[b, n, k] = max[i] abs(x[b, n, i] - z[b, k, i])\n"
        "    both[n, k] = sum[i] v[n, i] * minimum(v[n, i], w[k, i])\n"
        "    near * 2.0, both\n"
    )
    pipe = CpuPipeline(compile_file(path, levels=(level,)), threads=2)
    for n, k in [(0, 70), (70, 0), (1, 64), (17, 65), (33, 127), (16, 63)]:
        x, z = (rng.integers(-9, 9, (2, rows, 9)).astype(np.float32) for rows in (n, k))
        v, w = (rng.integers(-9, 9, (rows, 8)).astype(np.int32) for rows in (n, k))
        near, both = pipe(x=x, z=z, v=v, w=w)
        np.testing.assert_array_equal(near, np.abs(x[:, :, None] - z[:, None]).max(-1) * 2)
        np.testing.assert_array_equal(both, (v[:, None] * np.minimum(v[:, None], w)).sum(-1))


CASES = {
    "x: f32[B, 512, 7, 7]": ("mean(x, axis=(2, 3))", True),
    "x: f32[2, 16, 4, 4]": ("mean(x, axis=(2, 3), keepdims=True)", True),
    "x: f32[M, 9]": ("sum(x * x, axis=1)", True),
    "x: f32[M, 8], y: f32[N, 8]": ("sum(abs(x[:, None] - y), axis=2)", True),
    "x: f32[M, 7], y: f32[N, 7]": ("sum(abs(x[:, None] - y), axis=2)", False),  # few
    "x: f32[M, 8]": ("sum(x, axis=1)", False),  # few
    "x: f32[M, 100]": ("sum(x, axis=1)", False),  # many
    "x: f32[9, M]": ("sum(x, axis=0)", False),  # columns
    "x: f16[M, 16]": ("sum(x, axis=1)", False),
    "x: f32[8, 16]": ("sum(x, axis=1)", False),  # few rows
    "x: f32[M, 16], y: f32[M, 16]": ("sum(x * y[:, ::-1], axis=1)", False),
    "x: f32[M, 16], i: i64[16]": ("sum(x[:, i], axis=1)", False),
}


@pytest.mark.parametrize("inputs", CASES)
def test_what_is_turned(inputs: str) -> None:
    value, wanted = CASES[inputs]
    (kernel,) = kernels_of(of_text(f"pipeline p({inputs}):\n    {value}\n").passed())
    assert any(isinstance(s, Alloc) and s.name.startswith("rows") for s in kernel.body) == wanted
