"""Quantised models on GPUs: a layer is a product of 8-bit operands and all that belongs to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

from stagefuse.compiler.driver import compile_file
from stagefuse.onnx import import_model

from ..compiler.gpu.gpu_run import Emulated, check_legal
from . import models
from .models import node

Array = Any


def constants(rng: np.random.Generator, weight: Array) -> dict[str, Array]:
    """A weight with its scales, and the scales of what goes in and comes out."""
    each = weight.shape[0] if weight.ndim == 4 else weight.shape[1]
    return {
        "xs": np.float32(0.02), "xz": np.uint8(120), "w": weight,
        "ws": (rng.random(each) * 0.01 + 0.005).astype(np.float32), "wz": np.zeros(each, np.int8),
        "ys": np.float32(0.1), "yz": np.uint8(3),
    }  # fmt: skip


def weights_of(rng: np.random.Generator, *shape: int) -> Array:
    return rng.integers(-127, 128, shape).astype(np.int8)


def qlinear(rng: np.random.Generator) -> ModelProto:
    held = constants(rng, weights_of(rng, 64, 40))
    held["ws"] = np.float32(0.01)
    held["wz"] = np.int8(0)
    names = ["x", "xs", "xz", "w", "ws", "wz", "ys", "yz"]
    return models.model([node("QLinearMatMul", names, ["y"])],
                        {"x": (TensorProto.UINT8, ["n", 64])}, ["y"], as_arrays(held))  # fmt: skip


def between(rng: np.random.Generator) -> ModelProto:
    """MatMul, Add and Relu between DequantizeLinear and QuantizeLinear."""
    held = constants(rng, weights_of(rng, 64, 40))
    held["b"] = rng.standard_normal(40).astype(np.float32)
    nodes = [
        node("DequantizeLinear", ["x", "xs", "xz"], ["f"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["v"], axis=1),
        node("MatMul", ["f", "v"], ["m"]),
        node("Add", ["m", "b"], ["a"]),
        node("Relu", ["a"], ["r"]),
        node("QuantizeLinear", ["r", "ys", "yz"], ["y"]),
    ]
    inputs = {"x": (TensorProto.UINT8, ["n", 64])}
    return models.model(nodes, inputs, ["y"], as_arrays(held), opset=21)


def integers(rng: np.random.Generator) -> ModelProto:
    """Zeros of both sides; what follows is f32."""
    held = {"w": weights_of(rng, 64, 40), "xz": np.uint8(120), "wz": np.int8(5),
            "s": np.float32(0.001)}  # fmt: skip
    nodes = [
        node("MatMulInteger", ["x", "w", "xz", "wz"], ["i"]),
        node("Cast", ["i"], ["f"], to=TensorProto.FLOAT),
        node("Mul", ["f", "s"], ["y"]),
    ]
    inputs = {"x": (TensorProto.UINT8, ["n", 64])}
    return models.model(nodes, inputs, ["y"], as_arrays(held), opset=21)


def convolution(rng: np.random.Generator) -> ModelProto:
    held = constants(rng, weights_of(rng, 24, 8, 3, 3))
    nodes = [
        node("DequantizeLinear", ["x", "xs", "xz"], ["f"]),
        node("DequantizeLinear", ["w", "ws", "wz"], ["v"], axis=0),
        node("Conv", ["f", "v"], ["c"], pads=[1, 1, 1, 1]),
        node("QuantizeLinear", ["c", "ys", "yz"], ["y"]),
    ]
    inputs = {"x": (TensorProto.UINT8, ["n", 8, 6, 6])}
    return models.model(nodes, inputs, ["y"], as_arrays(held), opset=21)


def as_arrays(held: dict[str, Array]) -> dict[str, Array]:
    return {name: np.asarray(array) for name, array in held.items()}


@pytest.mark.parametrize("make", [qlinear, between, integers, convolution])
def test_a_layer_is_a_product_of_codes(
    make: Any, tmp_path: Path, rng: np.random.Generator
) -> None:
    of = make(rng)
    found = import_model(of)
    source = tmp_path / "p.pipe"
    source.write_text(found.text)
    plan = compile_file(source, targets=["a100", "h100"], weights={"w": found.arrays})
    check_legal(plan)
    # a sum of codes if the weights have zeros, windows of a convolution, and the product
    before = {qlinear: 0, between: 0, integers: 1, convolution: 1}[make]
    shape = (5, 8, 6, 6) if make is convolution else (37, 64)
    x = rng.integers(0, 256, shape).astype(np.uint8)
    (wanted,) = models.reference(of, x=x)
    for arch in ("sm_80", "sm_90a"):
        (gpu,) = [g for g in plan.pipelines[0].gpu if g.arch == arch]
        assert all(n.report["spill bytes"] == 0 for n in gpu.launches if "spill bytes" in n.report)
        assert len([n for n in gpu.launches if "matmul" not in n.report["fused"]]) == before
        assert "k32.s32" in plan.ptx[arch] or "k32.row.col.s32" in plan.ptx[arch]
        (y,) = Emulated(plan, arch)({"x": x}, {gpu.launches[0].dims[0]: len(x)})
        assert y.dtype == wanted.dtype
        off = np.abs(y.astype(float) - wanted.astype(float))
        if make is integers:
            np.testing.assert_allclose(y, wanted, rtol=2**-22)
        else:  # where sums of another order lie on the other side of a half
            assert off.max(initial=0) <= 1 and (off > 0).mean() < 0.02
