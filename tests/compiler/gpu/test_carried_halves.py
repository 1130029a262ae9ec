"""Products of 16 bits by what a recurrence carries, and of a matrix by itself."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

import stagefuse as sf

STEPS = """\
pipeline p(x: bf16[4, 64, 64], w: bf16[64, 64]) -> bf16[4, 64, 64]:
    scan t in 0..4 with s = full([64, 64], 0, bf16):
        s = maximum(x[t], s @ w)
        y[t] = s
    y
"""
SQUARE = """\
pipeline p(x: bf16[5, M, 5]) -> bf16[5, M, M]
where M in 1..=600:
    x @ transpose(x, [0, 2, 1])
"""


def whole(rng: np.random.Generator, shape: tuple[int, ...], most: int) -> np.ndarray:
    """Integers, whose products and sums here are exact in f32 and small enough for bf16."""
    return rng.integers(-most, most + 1, shape).astype(ml_dtypes.bfloat16)


@pytest.mark.parametrize("target", ["a100", "h200"])
def test_the_half_that_is_not_defined_yet_is_not_read(
    target: str, rng: np.random.Generator
) -> None:
    x, w = whole(rng, (4, 64, 64), 3), np.zeros((64, 64), ml_dtypes.bfloat16)
    w[rng.permutation(64), np.arange(64)] = rng.choice([-1, 1], 64)
    wanted, s = [], np.zeros((64, 64))
    for step in x.astype(np.float64):
        s = np.maximum(step, s @ w.astype(np.float64))
        wanted.append(s)
    with sf.compile(STEPS, target=target, device="emulator") as pipe:
        np.testing.assert_array_equal(np.asarray(pipe(x=x, w=w)).astype(np.float64), wanted)


@pytest.mark.parametrize("target", ["a100", "h200"])
@pytest.mark.parametrize("m", [1, 37])
def test_a_matrix_of_odd_depth_by_itself(target: str, m: int, rng: np.random.Generator) -> None:
    x = whole(rng, (5, m, 5), 3)
    exact = x.astype(np.float64) @ x.astype(np.float64).transpose(0, 2, 1)
    with sf.compile(SQUARE, target=target, device="emulator") as pipe:
        np.testing.assert_array_equal(np.asarray(pipe(x=x)).astype(np.float64), exact)
