"""Means over windows that reach beyond their input, beside the definition in float64."""

from __future__ import annotations

import random

import numpy as np
import pytest
from numpy.typing import NDArray

from stagefuse.onnx import Backend

from .models import node


def means(
    x: NDArray[np.float32], kernel: list[int], strides: list[int], dilations: list[int],
    pads: list[int], counted: bool,
) -> NDArray[np.float64]:  # fmt: skip
    """AveragePool of [B, C, H, W], element by element."""
    edges = [(0, 0), (0, 0), (pads[0], pads[2]), (pads[1], pads[3])]
    padded = np.pad(x.astype(float), edges)
    inside = np.pad(np.full(x.shape, 1.0), edges, constant_values=float(counted))
    sizes = [(padded.shape[2 + a] - (kernel[a] - 1) * dilations[a] - 1) // strides[a] + 1
             for a in range(2)]  # fmt: skip
    found = np.empty((*x.shape[:2], *sizes))
    for i in range(sizes[0]):
        for j in range(sizes[1]):
            rows = slice(i * strides[0], i * strides[0] + kernel[0] * dilations[0], dilations[0])
            columns = slice(j * strides[1], j * strides[1] + kernel[1] * dilations[1], dilations[1])
            part = (slice(None), slice(None), rows, columns)
            found[:, :, i, j] = padded[part].sum((2, 3)) / inside[part].sum((2, 3))
    return found


@pytest.mark.parametrize("counted", [False, True])
@pytest.mark.parametrize("dilated", [False, True])
def test_means_of_windows_beyond_an_edge(
    counted: bool, dilated: bool, chance: random.Random, rng: np.random.Generator
) -> None:
    kernel = [chance.randrange(2, 5) for _ in range(2)]
    strides = [chance.randrange(1, 4) for _ in range(2)]
    dilations = [chance.randrange(1, 4) if dilated else 1 for _ in range(2)]
    pads = [chance.randrange(0, k) for k in (*kernel, *kernel)]
    x = rng.standard_normal((2, 3, 13, 17), np.float32)
    made = node(
        "AveragePool", ["x"], ["y"], kernel_shape=kernel, strides=strides, dilations=dilations,
        pads=pads, count_include_pad=int(counted),
    )  # fmt: skip
    (found,) = Backend.run_node(made, [x])
    want = means(x, kernel, strides, dilations, pads, counted)
    # of a sum of k elements and a quotient, each element's part at most 4 standard deviations
    bound = (kernel[0] * kernel[1] + 1) * 2.0**-24 * means(abs(x), kernel, strides, dilations,
                                                            pads, counted)  # fmt: skip
    assert found.shape == want.shape
    assert np.all(abs(found - want) <= bound)
