"""Transposed convolutions of every stride, padding and group."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import TensorProto, helper, numpy_helper

import stagefuse as sf
from stagefuse.onnx import import_onnx

Array = np.ndarray[Any, Any]
# kernel, strides, dilations, pads, output padding, groups
CASES = [
    ((2, 2), (2, 2), (1, 1), (0, 0, 0, 0), (0, 0), 1),
    ((3, 3), (2, 2), (1, 1), (1, 1, 1, 1), (1, 1), 1),
    ((4, 5), (2, 3), (1, 1), (1, 0, 2, 3), (0, 2), 2),
    ((3, 3), (1, 2), (1, 1), (0, 2, 1, 0), (0, 0), 1),
    ((1, 2), (2, 3), (1, 1), (0, 0, 0, 0), (1, 0), 1),
    ((2, 3), (2, 2), (2, 1), (1, 0, 0, 1), (0, 0), 2),
    ((2, 2), (2, 1), (1, 1), (3, 0, 0, 0), (0, 0), 1),
    ((16,), (8,), (1,), (4, 4), (0,), 1),
    ((7,), (3,), (1,), (6, 9), (2,), 3),
]


def meaning(
    x: Array, w: Array, strides: tuple[int, ...], dilations: tuple[int, ...],
    pads: tuple[int, ...], more: tuple[int, ...], groups: int,
) -> Array:  # fmt: skip
    """Each element of the input adds its multiples of the kernel to the result."""
    rank, size = len(strides), w.shape[2:]
    full = [
        (x.shape[2 + k] - 1) * strides[k] + (size[k] - 1) * dilations[k] + 1 + more[k]
        for k in range(rank)
    ]
    y = np.zeros((len(x), w.shape[1] * groups, *full))
    xs, ws = x.reshape(len(x), groups, -1, *x.shape[2:]), w.reshape(groups, -1, *w.shape[1:])
    for tap in itertools.product(*map(range, size)):
        part = np.einsum("bgc...,gco->bgo...", xs, ws[(..., *tap)])
        at = [
            slice(t * d, t * d + (n - 1) * s + 1, s)
            for t, d, n, s in zip(tap, dilations, x.shape[2:], strides, strict=True)
        ]
        y[(slice(None), slice(None), *at)] += part.reshape(len(x), -1, *x.shape[2:])
    inside = [slice(pads[k], full[k] - pads[rank + k]) for k in range(rank)]
    return y[(slice(None), slice(None), *inside)]


def imported(case: tuple[Any, ...], x: Array, w: Array, bias: Array, folder: Path) -> Any:
    size, strides, dilations, pads, more, groups = case
    node = helper.make_node(
        "ConvTranspose", ["x", "w", "b"], ["y"], strides=strides, dilations=dilations, pads=pads,
        output_padding=more, group=groups,
    )  # fmt: skip
    value = helper.make_tensor_value_info
    graph = helper.make_graph(
        [node], "g", [value("x", TensorProto.FLOAT, ["B", *x.shape[1:]])],
        [value("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(w, "w"), numpy_helper.from_array(bias, "b")],
    )  # fmt: skip
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    return sf.compile(import_onnx(folder / "m.onnx", folder))


@pytest.mark.parametrize("case", CASES, ids=str)
def test_transposed_convolutions(
    case: tuple[Any, ...], rng: np.random.Generator, tmp_path: Path
) -> None:
    size, *window = case
    groups = case[-1]
    channels = groups * int(rng.integers(1, 4))
    outputs = int(rng.integers(1, 5))
    space = [int(n) for n in rng.integers(4, 12, len(size))]
    x = rng.standard_normal((2, channels, *space)).astype(np.float32)
    w = rng.standard_normal((channels, outputs, *size)).astype(np.float32)
    bias = rng.standard_normal(outputs * groups).astype(np.float32)
    pipe = imported(case, x, w, bias, tmp_path)
    around = (1, -1, *(1 for _ in size))
    want = meaning(x.astype(float), w.astype(float), *window) + bias.reshape(around)
    most = meaning(abs(x).astype(float), abs(w).astype(float), *window) + abs(bias).reshape(around)
    found = pipe(x=x)
    assert found.shape == want.shape
    # each product and each partial sum rounds once (Higham 2002, section 3.1)
    assert np.all(abs(found - want) <= (w[:, 0].size + 2) * 2.0**-24 * most)


def test_what_is_infinite_stays_where_the_kernel_takes_it(
    rng: np.random.Generator, tmp_path: Path
) -> None:
    """No phase of a stride multiplies by weights that it has not."""
    case = CASES[1]
    x = rng.standard_normal((1, 2, 6, 6)).astype(np.float32)
    w = rng.standard_normal((2, 3, 3, 3)).astype(np.float32)
    x[0, 0, 2, 3] = np.inf
    found = imported(case, x, w, np.zeros(3, np.float32), tmp_path)(x=x)
    touched = np.zeros(found.shape, bool)
    touched[:, :, 3:6, 5:8] = True
    np.testing.assert_array_equal(np.isfinite(found), ~touched)
