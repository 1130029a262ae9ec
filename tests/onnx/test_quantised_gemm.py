"""Gemm on integers, as ONNX Runtime's quantizer writes it."""

from __future__ import annotations

import numpy as np
import pytest
from onnx import helper

import stagefuse as sf
from stagefuse.onnx import import_model

from . import models
from .models import node


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("each", [False, True])
def test_a_point_and_a_scale_for_each_column(
    transposed: bool, each: bool, rng: np.random.Generator
) -> None:
    """[B, K] u8 by [K, N] i8, with biases in i32, to f32."""
    depth, columns = 7, 5
    b = rng.integers(-128, 128, (depth, columns)).astype(np.int8)
    shape = (columns,) if each else ()
    weights = {
        "as": np.float32(0.25), "az": np.uint8(130), "b": b.T.copy() if transposed else b,
        "bs": rng.uniform(0.5, 2, shape).astype(np.float32),
        "bz": rng.integers(-128, 128, shape).astype(np.int8),
        "c": rng.integers(-99, 99, columns).astype(np.int32),
    }  # fmt: skip
    gemm = node("QGemm", ["a", "as", "az", "b", "bs", "bz", "c"], ["y"], domain="com.microsoft",
                transB=int(transposed))  # fmt: skip
    made = models.model([gemm], {"a": (models.TensorProto.UINT8, ["n", depth])}, ["y"],
                        {k: np.asarray(v) for k, v in weights.items()})  # fmt: skip
    made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    found = import_model(made)
    a = rng.integers(0, 256, (3, depth)).astype(np.uint8)
    y = sf.compile(found.text, weights={"w": found.arrays})(a=a)
    total = (a.astype(int) - 130) @ (b.astype(int) - weights["bz"].astype(int)) + weights["c"]
    np.testing.assert_allclose(y, total * (0.25 * weights["bs"].astype(float)), rtol=1e-6)
