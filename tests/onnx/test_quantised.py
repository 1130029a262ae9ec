"""Quantised models: written with the library's functions, folded like others, exported as QDQ."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto

import stagefuse as sf
from stagefuse.onnx import Imported, import_model

from . import models
from .export_run import by_reference, checked, ops_of
from .models import F32, node

STEP = 0.05
"""The scale of activations."""


class Qdq:
    """Linear layers between quantizers, named as ONNX Runtime's quantizer names them."""

    def __init__(self, rng: np.random.Generator, code: Any) -> None:
        self.rng, self.code = rng, code
        self.nodes: list[Any] = []
        self.weights: dict[str, np.ndarray[Any, Any]] = {}

    def rounded(self, x: str, name: str) -> str:
        low = np.iinfo(self.code).min
        self.weights[f"{name}_scale"] = np.array(STEP * self.rng.uniform(0.9, 1.0), np.float32)
        self.weights[f"{name}_zero_point"] = np.array(low + self.rng.integers(1, 128), self.code)
        scaling = [f"{name}_scale", f"{name}_zero_point"]
        self.nodes += [node("QuantizeLinear", [x, *scaling], [f"{name}_QuantizeLinear_Output"]),
                       node("DequantizeLinear", [f"{name}_QuantizeLinear_Output", *scaling],
                            [f"{name}_DequantizeLinear_Output"])]  # fmt: skip
        return f"{name}_DequantizeLinear_Output"

    def stored(self, name: str, shape: tuple[int, ...], axis: int | None) -> str:
        """A tensor in i8: symmetric with a scale for each place along an axis, or with a zero."""
        count = () if axis is None else (shape[axis],)
        self.weights[f"{name}_quantized"] = self.rng.integers(-127, 128, shape).astype(np.int8)
        scale = self.rng.uniform(0.5, 1.0, count) / 127 / np.sqrt(shape[0])
        self.weights[f"{name}_scale"] = np.asarray(scale, np.float32)
        zero = np.zeros(count, np.int8) if count else np.array(5, np.int8)
        self.weights[f"{name}_zero_point"] = zero
        given = [f"{name}_{end}" for end in ("quantized", "scale", "zero_point")]
        options = {} if axis is None else {"axis": axis}
        made = f"{name}_DequantizeLinear_Output"
        self.nodes.append(node("DequantizeLinear", given, [made], **options))
        return made

    def linear(self, x: str, number: int, lost: str, axis: int | None) -> str:
        weight = self.stored(lost, (12, 12), axis)
        path = f"/net/layer.{number}/dense"
        self.nodes.append(node("MatMul", [x, weight], [f"{path}/MatMul_output_0"]))
        x = self.rounded(f"{path}/MatMul_output_0", f"{path}/MatMul_output_0")
        bias = self.stored(f"net.layer.{number}.dense.bias", (12,), None)
        self.nodes.append(node("Add", [bias, x], [f"{path}/Add_output_0"]))
        return self.rounded(f"{path}/Add_output_0", f"{path}/Add_output_0")


def encoder(rng: np.random.Generator, layers: int, code: Any, axis: int | None) -> ModelProto:
    net = Qdq(rng, code)
    x = net.rounded("x", "x")
    for n in range(layers):
        h = net.linear(x, n, f"onnx::MatMul_{n}", axis)
        name = f"/net/layer.{n}/Add_output_0"
        net.nodes.append(node("Add", [h, x], [name]))
        x = net.rounded(name, name)
    net.nodes.append(node("Identity", [x], ["y"]))
    return models.model(net.nodes, {"x": (F32, ["B", 12])}, ["y"], net.weights, opset=21)


def require_near(found: Any, wanted: Any) -> None:
    """Equal but for a rounding that falls the other way: a step or two of what is rounded last."""
    np.testing.assert_allclose(found, wanted, rtol=0, atol=4 * STEP)


def run_of(found: Imported, x: np.ndarray[Any, Any]) -> Any:
    return sf.compile(found.text, weights={"w": found.arrays})(x=x)


@pytest.mark.parametrize("code, axis", [(np.uint8, None), (np.int8, 1), (np.uint16, 1)])
def test_layers_are_folded_with_their_scales_in_scopes(
    code: Any, axis: int | None, rng: np.random.Generator
) -> None:
    x = rng.standard_normal((3, 12)).astype(np.float32)
    texts = []
    for layers in (3, 5):
        made = encoder(rng, layers, code, axis)
        found = import_model(made)
        require_near(run_of(found, x), models.reference(made, x=x)[0])
        texts.append(found.text)
        ends = [k.removeprefix("net.layer.0.") for k in found.arrays if ".layer.0." in k]
        assert "dense.weight.q" in ends and "dense.bias.zero" in ends and "Add.scale" in ends
        assert ("dense.weight.zero" in ends) == (axis is None)
    assert texts[0].count("dense.weight)") == 1 and "    for " in texts[0]
    assert texts[0].count("nn.") == texts[1].count("nn.")


@pytest.mark.parametrize("code, axis", [(np.uint8, None), (np.uint16, 1)])
def test_what_is_imported_as_qdq_is_exported_as_qdq(
    code: Any, axis: int | None, tmp_path: Path, rng: np.random.Generator
) -> None:
    made = encoder(rng, 3, code, axis)
    onnx.save(made, tmp_path / "net.onnx")
    path = sf.import_onnx(tmp_path / "net.onnx", tmp_path)
    back = checked(onnx.load(sf.export_onnx(path, tmp_path / "back.onnx", opset=21)))
    kinds = ("QuantizeLinear", "DequantizeLinear", "MatMul", "Add")
    assert sorted(ops_of(back)) == sorted(op for op in ops_of(made) if op in kinds)
    x = rng.standard_normal((4, 12)).astype(np.float32)
    require_near(by_reference(back, {"x": x})[0], models.reference(made, x=x)[0])


def test_scales_along_any_axis_are_rows_of_the_model(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """The weight of a convolution has a scale for each of its first axis: [O, 1, 1, 1] here."""
    text = """
import nn

weights w = "w.npz"

pipeline p(x: f32[B, 3, H, W]) -> f32[B, 4, H - 2, W - 2]
where B in 1..=4, H in 3..=32, W in 3..=32:
    nn.convolve2d(x, nn.dequantized(w.kernel), stride=1, dilation=1, groups=1)
"""
    kernel = rng.integers(-127, 128, (4, 3, 3, 3)).astype(np.int8)
    scale = rng.uniform(0.01, 0.02, (4, 1, 1, 1)).astype(np.float32)
    weights = {"kernel.q": kernel, "kernel.scale": scale}
    (tmp_path / "p.pipe").write_text(text)
    path = sf.export_onnx(tmp_path / "p.pipe", tmp_path / "p.onnx", weights={"w": weights})
    back = checked(onnx.load(path))
    assert ops_of(back) == ["DequantizeLinear", "Conv"]
    assert {tuple(t.dims) for t in back.graph.initializer} == {(4, 3, 3, 3), (4,)}
    x = rng.standard_normal((2, 3, 5, 7)).astype(np.float32)
    found = sf.compile(text, weights={"w": weights})(x=x)
    # f32; 27 products of numbers below 4
    np.testing.assert_allclose(by_reference(back, {"x": x})[0], found, rtol=1e-5, atol=1e-4)


def test_what_is_only_laid_out_anew_is_rounded_once(rng: np.random.Generator) -> None:
    net = Qdq(rng, np.uint8)
    first = net.rounded("x", "x")
    net.nodes.append(node("Transpose", [first], ["t"], perm=[1, 0]))
    scaling = ["x_scale", "x_zero_point"]
    net.nodes += [node("QuantizeLinear", ["t", *scaling], ["tq"]),
                  node("DequantizeLinear", ["tq", *scaling], ["y"])]  # fmt: skip
    made = models.model(net.nodes, {"x": (F32, ["B", 12])}, ["y"], net.weights, opset=21)
    found = import_model(made)
    assert len(re.findall("fake_quantize", found.text)) == 1
    x = rng.standard_normal((3, 12)).astype(np.float32)
    np.testing.assert_array_equal(run_of(found, x), models.reference(made, x=x)[0])


def test_a_number_that_is_stored_in_integers_is_a_number() -> None:
    weights = {"c": np.array(77, np.uint8), "scale": np.array(0.25, np.float32),
               "zero": np.array(5, np.uint8)}  # fmt: skip
    made = models.model(
        [node("DequantizeLinear", ["c", "scale", "zero"], ["d"]), node("Mul", ["x", "d"], ["y"])],
        {"x": (F32, ["B"])}, ["y"], weights,
    )  # fmt: skip
    found = import_model(made)
    assert "x * 18.0" in found.text and not found.arrays
