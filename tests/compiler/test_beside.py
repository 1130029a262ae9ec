"""Kernels of the same steps that read the same are one on the CPU too."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from stagefuse.compiler.driver import compile_file
from stagefuse.runtime.cpu_pipeline import CpuPipeline

from .cpu_run import LEVELS

Arrays = tuple[np.ndarray, ...]


def _softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(1, keepdims=True))
    return np.asarray(e / e.sum(1, keepdims=True))


CASES: dict[str, tuple[str, int, Callable[[np.ndarray], Arrays]]] = {
    "a": ("sum(a, axis=1), max(a, axis=1)", 1, lambda x: (x.sum(1), x.max(1))),
    "b": ("argmax(b, axis=1), max(b, axis=1)", 1, lambda x: (x.argmax(1), x.max(1))),
    "c": ("sum(c, axis=0), min(c, axis=0)", 1, lambda x: (x.sum(0), x.min(0))),
    "d": ("exp(d), d * 2.0 + 1.0", 1, lambda x: (np.exp(x), x * 2 + 1)),
    "e": ("nn.softmax(e), e + 1.0", 1, lambda x: (_softmax(x), x + 1)),
    "f": ("f + 1.0, sum(f, axis=1)", 2, lambda x: (x + 1, x.sum(1))),  # of rows and of elements
    "g": ("g * 2.0, transpose(g, [1, 0]) * 3.0", 2, lambda x: (x * 2, x.T * 3)),
}
"""By input: what is made of it, by how many kernels, and NumPy's result."""


@pytest.mark.parametrize("level", LEVELS)
def test_kernels_of_the_same_steps_read_once(
    rng: np.random.Generator, level: str, tmp_path: Path
) -> None:
    path = tmp_path / "p.pipe"
    inputs = ", ".join(f"{name}: f32[B, D]" for name in CASES)
    values = ", ".join(value for value, _, _ in CASES.values())
    path.write_text(f"import nn\n\npipeline p({inputs})\nwhere D >= 1:\n    {values}\n")
    plan = compile_file(path, levels=(level,))
    assert len(plan.pipelines[0].steps) == sum(count for _, count, _ in CASES.values())
    pipe = CpuPipeline(plan, threads=2)
    for rows, columns in ((1, 1), (7, 37), (53, 1009), (3, 64)):
        given = {name: rng.normal(size=(rows, columns)).astype(np.float32) for name in CASES}
        made, wanted = pipe(**given), list[np.ndarray]()
        for name, (_, _, meaning) in CASES.items():
            wanted += meaning(given[name].astype(np.float64))
        for found, expected in zip(made, wanted, strict=True):
            near = columns * 2.0**-23 * max(1.0, np.abs(expected).max())  # a rounding an element
            np.testing.assert_allclose(found, expected, rtol=0, atol=near)
        for found, again in zip(made, pipe(**given), strict=True):
            assert found.tobytes() == again.tobytes()
    for found in pipe(**{name: np.zeros((0, 5), np.float32) for name in CASES}):
        assert found.shape in ((0,), (5,), (0, 5), (5, 0))


def test_many_sums_are_few_kernels(rng: np.random.Generator, tmp_path: Path) -> None:
    """More than one kernel holds, of which those that are left share kernels."""
    path, count = tmp_path / "p.pipe", 21
    sums = " + ".join(f"sum(x * x * {n}.0 + x, axis=1)" for n in range(count))
    path.write_text(f"pipeline p(x: f32[B, D]) -> f32[B]:\n    {sums}\n")
    plan = compile_file(path, levels=LEVELS[-1:])
    assert len(plan.pipelines[0].steps) <= 4
    x = rng.normal(size=(11, 307)).astype(np.float32)
    wide = x.astype(np.float64)
    wanted = sum((wide * wide * n + wide).sum(1) for n in range(count))
    np.testing.assert_allclose(CpuPipeline(plan, threads=1)(x=x), wanted, rtol=307 * 2.0**-23)
