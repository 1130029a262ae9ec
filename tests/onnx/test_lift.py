"""Imported sources are written with layers, functions and loops, and mean what the model does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, NodeProto

import stagefuse as sf
from stagefuse.onnx import Imported, import_model

from . import models
from .models import F32, I64, drawn, node

Weights = dict[str, np.ndarray[Any, Any]]


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    request.node.add_report_section("setup", "seed", f"seed {seed}")
    return np.random.default_rng(seed)


class Net:
    """Nodes and weights, added one after another; values are named as exporters name them."""

    def __init__(self) -> None:
        self.nodes: list[NodeProto] = []
        self.weights: Weights = {}

    def add(self, op: str, inputs: Sequence[str], **attributes: Any) -> str:
        name = f"/{op}_{len(self.nodes)}_output_0"
        self.nodes.append(node(op, inputs, [name], **attributes))
        return name

    def number(self, value: float) -> str:
        name = f"c{len(self.weights)}"
        self.weights[name] = np.array(value, np.float32)
        return name

    def linear(self, x: str, scope: str, weight: np.ndarray[Any, Any]) -> str:
        """As PyTorch's exporter writes it: the weight is transposed and has lost its name."""
        lost = f"onnx::MatMul_{len(self.weights)}"
        self.weights[lost] = weight.T.copy()
        self.weights[f"{scope}.bias"] = drawn(np.random.default_rng(0), len(weight))
        return self.add("Add", [f"{scope}.bias", self.add("MatMul", [x, lost])])

    def model(self, inputs: dict[str, Any], output: str) -> ModelProto:
        self.nodes.append(node("Identity", [output], ["y"]))
        return models.model(self.nodes, inputs, ["y"], self.weights)


_HEADS = (("query", [0, 2, 1, 3]), ("key", [0, 2, 3, 1]), ("value", [0, 2, 1, 3]))
_SCOPES = (*(f"attention.{name}" for name, _ in _HEADS), "out", "norm", "up", "down")


def encoder(rng: np.random.Generator, layers: int) -> ModelProto:
    """Layers of attention and GELU with residuals, after one that all layers share a mask with."""
    net, width, heads = Net(), 16, 2
    net.weights["shape"] = np.array([0, 0, heads, width // heads])
    net.weights["flat"] = np.array([0, 0, width])
    mask = net.add("Mul", [net.add("Sub", [net.number(1), "keep"]), net.number(-3.4e38)])
    x = "x"
    for k in range(layers):
        scope = f"encoder.layer.{k}"
        split = []
        for name, perm in _HEADS:
            part = net.linear(x, f"{scope}.attention.{name}", drawn(rng, width, width))
            split.append(net.add("Transpose", [net.add("Reshape", [part, "shape"])], perm=perm))
        scores = net.add("Div", [net.add("MatMul", split[:2]), net.number(np.sqrt(width / heads))])
        probs = net.add("Softmax", [net.add("Add", [scores, mask])], axis=-1)
        mixed = net.add("Transpose", [net.add("MatMul", [probs, split[2]])], perm=[0, 2, 1, 3])
        mixed = net.linear(net.add("Reshape", [mixed, "flat"]), f"{scope}.out", drawn(rng, 16, 16))
        net.weights[f"{scope}.norm.weight"] = 1 + drawn(rng, width)
        net.weights[f"{scope}.norm.bias"] = drawn(rng, width)
        x = net.add("LayerNormalization", [net.add("Add", [mixed, x]), f"{scope}.norm.weight",
                    f"{scope}.norm.bias"], axis=-1)  # fmt: skip
        h = net.linear(x, f"{scope}.up", drawn(rng, 24, width))
        h = net.linear(gelu_of(net, h), f"{scope}.down", drawn(rng, width, 24))
        x = net.add("Add", [x, h])
    return net.model({"x": (F32, ["b", "t", width]), "keep": (F32, ["b", 1, 1, "t"])}, x)


def gelu_of(net: Net, x: str) -> str:
    erf = net.add("Erf", [net.add("Div", [x, net.number(2**0.5)])])
    product = net.add("Mul", [x, net.add("Add", [erf, net.number(1)])])
    return net.add("Mul", [product, net.number(0.5)])


def stages(rng: np.random.Generator, blocks: Sequence[int]) -> ModelProto:
    """A residual network: each stage begins with a block that halves the image."""
    net, wide = Net(), 4

    def conv(x: str, scope: str, out: int, size: int, stride: int = 1) -> str:
        net.weights[f"{scope}.weight"] = drawn(rng, out, wide, size, size)
        net.weights[f"{scope}.bias"] = drawn(rng, out)
        return net.add("Conv", [x, f"{scope}.weight", f"{scope}.bias"], kernel_shape=[size] * 2,
                       strides=[stride] * 2, pads=[size // 2] * 4)  # fmt: skip

    x = "x"
    for number, count in enumerate(blocks):
        for k in range(count):
            scope, stride = f"stage{number}.{k}", 1 if k else 2
            out = wide if k else 2 * wide
            short = x if k else conv(x, f"{scope}.short", out, 1, stride)
            h = net.add("Relu", [conv(x, f"{scope}.conv1", out, 3, stride)])
            wide = out
            h = conv(h, f"{scope}.conv2", out, 3)
            x = net.add("Relu", [net.add("Add", [h, short])])
    return net.model({"x": (F32, ["b", 4, 16, 16])}, x)


def computed(found: Imported, **inputs: Any) -> Any:
    weights = {"w": found.arrays} if found.arrays else {}
    return sf.compile(found.text, weights=weights)(**inputs)


def require_same(made: ModelProto, **inputs: Any) -> Imported:
    """The import; folded, plain and by the standard's reference it gives the same numbers."""
    folded, plain = import_model(made), import_model(made, plain=True)
    assert len(folded.text) < len(plain.text)
    (wanted,) = models.reference(made, **inputs)
    for found in (folded, plain):
        # f32; sums of at most 72 products of numbers near 1, a few layers deep
        np.testing.assert_allclose(computed(found, **inputs), wanted, rtol=2e-4, atol=5e-5)
    return folded


@pytest.mark.parametrize("batch, length", [(1, 1), (3, 7)])
def test_equal_layers_are_a_loop(rng: np.random.Generator, batch: int, length: int) -> None:
    x = rng.standard_normal((batch, length, 16)).astype(np.float32)
    keep = (rng.random((batch, 1, 1, length)) < 0.7).astype(np.float32)
    keep[..., 0] = 1
    found = require_same(encoder(rng, 4), x=x, keep=keep)
    assert "    for layer in w.encoder.layer:\n" in found.text
    assert "nn.attend(key, value, bias=" in found.text and "|> nn.gelu |>" in found.text
    assert found.text.count("nn.linear") == 6
    assert set(found.arrays) == {
        f"encoder.layer.{k}.{scope}.{end}"
        for k in range(4)
        for scope in _SCOPES
        for end in ("weight", "bias")
    }


def test_turns_with_one_set_of_weights_are_a_loop(rng: np.random.Generator) -> None:
    """Layers that share their weights, or whose equal weights an exporter has merged."""
    net, x = Net(), "x"
    for name in ("up", "down"):
        net.weights[f"{name}.weight"], net.weights[f"{name}.bias"] = drawn(rng, 8, 8), drawn(rng, 8)
    for _ in range(6):
        h = net.add("Gemm", [x, "up.weight", "up.bias"], transB=1)
        h = net.add("Gemm", [gelu_of(net, h), "down.weight", "down.bias"], transB=1)
        x = net.add("Tanh", [net.add("Add", [h, x])])
    found = require_same(net.model({"x": (F32, ["b", 8])}, x), x=drawn(rng, 3, 8))
    assert "for turn in 0..6:" in found.text


def test_blocks_in_several_places_are_a_function(rng: np.random.Generator) -> None:
    x = rng.standard_normal((2, 4, 16, 16)).astype(np.float32)
    found = require_same(stages(rng, (3, 4)), x=x)
    functions = [line for line in found.text.splitlines() if line.startswith("fn ")]
    assert len(functions) == 1 and functions[0].endswith("p: weights):")
    assert found.text.count("nn.conv2d") == 5 and "in (w.stage0, w.stage1):" in found.text


def test_folding_makes_sources_of_any_depth_equally_long(rng: np.random.Generator) -> None:
    lengths = [import_model(encoder(rng, n)).text.count("\n") for n in (3, 9)]
    assert lengths[0] == lengths[1]


def test_layers_that_keep_their_states_are_calls(rng: np.random.Generator) -> None:
    """A result of every turn can't leave a loop."""
    net, x, results = Net(), "x", []
    for k in range(4):
        h = net.linear(x, f"layers.{k}.in", drawn(rng, 8, 8))
        h = net.add("Tanh", [net.add("Mul", [h, net.add("Sigmoid", [h])])])
        x = net.add("Add", [net.linear(h, f"layers.{k}.out", drawn(rng, 8, 8)), x])
        results.append(h)
    made = net.model({"x": (F32, ["b", 8])}, net.add("Concat", [x, *results], axis=1))
    found = require_same(made, x=rng.standard_normal((3, 8)).astype(np.float32))
    assert "for " not in found.text and found.text.count("fn ") == 1


Written = Callable[[Net, str], str]


def _tanh_gelu(net: Net, x: str) -> str:
    cube = net.add("Pow", [x, net.number(3)])
    inner = net.add("Add", [x, net.add("Mul", [cube, net.number(0.044715)])])
    tanh = net.add("Tanh", [net.add("Mul", [inner, net.number(np.sqrt(2 / np.pi))])])
    half = net.add("Mul", [net.number(0.5), net.add("Add", [net.number(1), tanh])])
    return net.add("Mul", [half, x])


def _hard_swish(net: Net, x: str) -> str:
    up = net.add("Add", [x, net.number(3)])
    net.weights |= {"low": np.array(0, np.float32), "high": np.array(6, np.float32)}
    product = net.add("Mul", [x, net.add("Clip", [up, "low", "high"])])
    return net.add("Div", [product, net.number(6)])


def _silu(net: Net, x: str) -> str:
    return net.add("Mul", [net.add("Sigmoid", [x]), x])


def _layer_norm(net: Net, x: str) -> str:
    net.weights |= {"n.weight": np.linspace(1, 2, 8, dtype=np.float32), "axes": np.array([-1]),
                    "n.bias": np.linspace(-1, 1, 8, dtype=np.float32)}  # fmt: skip
    mean = net.add("ReduceMean", [x], axes=[-1])
    centred = net.add("Sub", [x, mean])
    square = net.add("Pow", [centred, net.number(2)])
    root = net.add("Sqrt", [net.add("Add", [net.add("ReduceMean", [square], axes=[-1]),
                                            net.number(1e-5)])])  # fmt: skip
    scaled = net.add("Mul", [net.add("Div", [centred, root]), "n.weight"])
    return net.add("Add", [scaled, "n.bias"])


def _softmax(net: Net, x: str) -> str:
    e = net.add("Exp", [net.add("Sub", [x, net.add("ReduceMax", [x], axes=[1])])])
    return net.add("Div", [e, net.add("ReduceSum", [e, "one"])])


@pytest.mark.parametrize(
    "name, write",
    [("nn.gelu", gelu_of), ("nn.gelu_tanh", _tanh_gelu), ("nn.hard_swish", _hard_swish),
     ("nn.silu", _silu), ("nn.layer_norm", _layer_norm), ("nn.softmax", _softmax)],
)  # fmt: skip
def test_what_is_written_out_is_found_again(
    name: str, write: Written, rng: np.random.Generator
) -> None:
    """Also where its argument is a sum or product itself."""
    x = 3 * rng.standard_normal((5, 8)).astype(np.float32)
    for before, argument in (("Neg", "-x"), ("Add", "x + 1.5"), ("Mul", "x * 1.5")):
        net = Net()
        net.weights["one"] = np.array([1])
        first = net.add(before, ["x"] if before == "Neg" else ["x", net.number(1.5)])
        made = net.model({"x": (F32, ["b", 8])}, write(net, first))
        found = import_model(made)
        assert f"    {name}({argument}" in found.text
        (wanted,) = models.reference(made, x=x)
        np.testing.assert_allclose(computed(found, x=x), wanted, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("half, root", [(0.5001, 2**0.5), (0.5, 1.4143), (-0.5, 2**0.5)])
def test_what_is_nearly_a_function_is_none(
    half: float, root: float, rng: np.random.Generator
) -> None:
    net = Net()
    erf = net.add("Erf", [net.add("Div", ["x", net.number(root)])])
    product = net.add("Mul", ["x", net.add("Add", [erf, net.number(1)])])
    made = net.model({"x": (F32, [9])}, net.add("Mul", [product, net.number(half)]))
    found = require_same(made, x=rng.standard_normal(9).astype(np.float32))
    assert "gelu" not in found.text


def test_tensors_whose_names_collide_stay_apart(rng: np.random.Generator) -> None:
    """A tensor `fc`, a layer `fc`, and a layer without bias beside a tensor of that name."""
    net = Net()
    x = net.linear("x", "fc", drawn(rng, 8, 8))
    net.weights |= {"fc": drawn(rng, 8), "fc.weight": drawn(rng, 8), "g.bias": drawn(rng, 8),
                    "g.weight": drawn(rng, 8, 8)}  # fmt: skip
    x = net.add("Mul", [net.add("Add", [x, "fc"]), "fc.weight"])
    x = net.add("Mul", [net.add("MatMul", [x, "g.weight"]), "g.bias"])
    require_same(net.model({"x": (F32, [3, 8])}, x), x=rng.standard_normal((3, 8)).astype("f4"))


def test_one_tensor_in_two_layers(rng: np.random.Generator) -> None:
    """A table that is also the last layer, and a bias that two layers share."""
    net = Net()
    net.weights["table.weight"] = drawn(rng, 11, 8)
    x = net.add("Gather", ["table.weight", "ids"])
    x = net.linear(x, "a", drawn(rng, 8, 8))
    net.weights["lost"] = drawn(rng, 8, 8)
    x = net.add("Add", [net.add("MatMul", [x, "lost"]), "a.bias"])
    x = net.add("MatMul", [x, net.add("Transpose", ["table.weight"], perm=[1, 0])])
    made = net.model({"ids": (I64, ["b", "t"])}, x)
    found = require_same(made, ids=rng.integers(0, 11, (2, 5)))
    assert "nn.linear(w.table)" in found.text
