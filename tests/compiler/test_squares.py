"""Pointwise kernels that read across the rows they write: by squares, of any sizes."""

from __future__ import annotations

from itertools import permutations

import numpy as np
import pytest

import stagefuse
from stagefuse.dsl.dtypes import DTYPES

SIDES = [(1, 1), (1, 200), (16, 16), (15, 300), (63, 65), (64, 64), (129, 190), (0, 5), (300, 2)]
SOURCE = """
pipeline turned(x: {0}[M, N], y: {0}[N, M]) -> {0}[N, M]:
    maximum(transpose(x, [1, 0]), y)
"""


@pytest.mark.parametrize("name", ["f64", "f32", "f16", "i64", "u8", "bool"])
def test_matrices(rng: np.random.Generator, name: str) -> None:
    pipe = stagefuse.compile(SOURCE.format(name), threads=2)
    for m, n in SIDES:
        x, y = (rng.integers(0, 100, s).astype(DTYPES[name].numpy) for s in ((m, n), (n, m)))
        np.testing.assert_array_equal(pipe(x=x, y=y), np.maximum(x.T, y))


@pytest.mark.parametrize("order", list(permutations(range(3))))
def test_any_order_of_axes(rng: np.random.Generator, order: tuple[int, ...]) -> None:
    """With what is the same along an axis, or read another way too."""
    x, y = (rng.integers(-99, 99, (70, 33, 20)).astype(np.float32) for _ in range(2))
    b = rng.integers(-99, 99, (33, 1)).astype(np.float32)
    shape = ", ".join(str(x.shape[a]) for a in order)
    source = (
        f"pipeline p(x: f32[70, 33, 20], y: f32[70, 33, 20], b: f32[33, 1]) -> f32[{shape}]:\n"
        f"    transpose(x * b - y, {list(order)}) * 2.0 + transpose(x[:, ::-1], {list(order)})\n"
    )
    wanted = (x * b - y).transpose(order) * np.float32(2) + x[:, ::-1].transpose(order)
    found = stagefuse.compile(source)(x=x, y=y, b=b)
    np.testing.assert_array_equal(found, wanted)
