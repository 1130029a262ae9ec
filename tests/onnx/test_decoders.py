"""Decoders with caches, cross-attention and masks as exporters write them, folded into layers."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from onnx import ModelProto, TensorProto

from stagefuse.onnx import import_model

from . import models
from .models import F32, drawn
from .test_lift import Net, computed, require_same

WIDTH, HEADS = 8, 2


@pytest.fixture
def rng(request: pytest.FixtureRequest) -> np.random.Generator:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    request.node.add_report_section("setup", "seed", f"seed {seed}")
    return np.random.default_rng(seed)


class Layers(Net):
    """Attention of several heads and what stands around it."""

    def __init__(self, rng: np.random.Generator) -> None:
        super().__init__()
        self.rng = rng
        self.weights["shape"] = np.array([0, -1, HEADS, WIDTH // HEADS])
        self.weights["flat"] = np.array([0, -1, WIDTH])

    def product(self, x: str, scope: str) -> str:
        return self.linear(x, scope, drawn(self.rng, WIDTH, WIDTH))

    def heads(self, x: str) -> str:
        return self.add("Transpose", [self.add("Reshape", [x, "shape"])], perm=[0, 2, 1, 3])

    def attend(self, q: str, k: str, v: str, bias: str | None, zero: str | None = None) -> str:
        """The softmax of q @ k^T + bias; where that is not a number, `zero` instead."""
        scores = self.add("MatMul", [q, self.add("Transpose", [k], perm=[0, 1, 3, 2])])
        scores = self.add("Add", [scores, bias]) if bias else scores
        probs = self.add("Softmax", [scores], axis=-1)
        if zero:
            probs = self.add("Where", [self.add("IsNaN", [probs]), zero, probs])
        mixed = self.add("Transpose", [self.add("MatMul", [probs, v])], perm=[0, 2, 1, 3])
        return self.add("Reshape", [mixed, "flat"])

    def norm(self, x: str, scope: str) -> str:
        self.weights[f"{scope}.weight"] = 1 + drawn(self.rng, WIDTH)
        self.weights[f"{scope}.bias"] = drawn(self.rng, WIDTH)
        return self.add("LayerNormalization", [x, f"{scope}.weight", f"{scope}.bias"], axis=-1)

    def scaled(self, x: str) -> str:
        """Queries are scaled before they are heads."""
        return self.add("Mul", [x, self.number((WIDTH // HEADS) ** -0.5)])


def test_self_attention_and_cross_attention_are_one_function(rng: np.random.Generator) -> None:
    """What a layer attends to is itself in one call, something else in another."""
    net = Layers(rng)

    def block(x: str, y: str, scope: str) -> str:
        q = net.heads(net.scaled(net.product(x, f"{scope}.q")))
        k, v = (net.heads(net.product(y, f"{scope}.{n}")) for n in "kv")
        out = net.product(net.attend(q, k, v, None), f"{scope}.out")
        return net.norm(net.add("Add", [x, out]), f"{scope}.norm")

    memory, x = "z", "x"
    for k in range(2):
        memory = block(memory, memory, f"encoder.{k}")
    for k in range(2):
        x = block(x, x, f"decoder.{k}.own")
        x = block(x, memory, f"decoder.{k}.cross")
    model = net.model({"x": (F32, ["b", "t", WIDTH]), "z": (F32, ["b", "s", WIDTH])}, x)
    text = require_same(model, x=drawn(rng, 2, 3, WIDTH), z=drawn(rng, 2, 5, WIDTH)).text
    assert text.count("nn.attend(") == 1 and "scale=" not in text
    assert text.count("\nfn ") == 1 and "block(x, x, w.decoder[0].own)" in text


def decoder_with_past(rng: np.random.Generator, layers: int) -> ModelProto:
    """Each layer with keys and values of its own, which it gives back with those that are new."""
    net, x = Layers(rng), "x"
    net.weights["zero"] = np.zeros(1, np.float32)
    net.weights["least"] = np.full(1, -np.inf, np.float32)
    bias = net.add("Where", ["mask", "zero", "least"])
    caches = []
    for n in range(layers):
        scope = f"net.layers.{n}"
        h = net.norm(x, f"{scope}.norm")
        q = net.heads(net.scaled(net.product(h, f"{scope}.attention.q")))
        lost = f"onnx::MatMul_{n}"
        net.weights[lost] = drawn(rng, WIDTH, WIDTH)
        keys = f"/layers.{n}/attention/k/MatMul_output_0"
        net.nodes.append(models.node("MatMul", [h, lost], [keys]))
        new = net.heads(keys), net.heads(net.product(h, f"{scope}.attention.v"))
        both = [net.add("Concat", [f"past.{n}.{kind}", made], axis=-2)
                for kind, made in zip(("key", "value"), new, strict=True)]  # fmt: skip
        mixed = net.attend(q, *both, bias, "zero")
        x = net.add("Add", [x, net.product(mixed, f"{scope}.attention.out")])
        caches += [net.add("Concat", [b], axis=0) for b in both]
    named = [f"present.{n}.{kind}" for n in range(layers) for kind in ("key", "value")]
    net.nodes += [models.node("Identity", [c], [n]) for c, n in zip(caches, named, strict=True)]
    past = (F32, ["b", HEADS, "past", WIDTH // HEADS])
    inputs: dict[str, Any] = {"x": (F32, ["b", "t", WIDTH])}
    inputs |= {n.replace("present", "past"): past for n in named}
    inputs["mask"] = (TensorProto.BOOL, ["b", 1, "t", "total"])
    net.nodes.append(models.node("Identity", [x], ["y"]))
    return models.model(net.nodes, inputs, ["y", *named], net.weights)


def test_layers_with_a_cache_are_calls_of_one_function(rng: np.random.Generator) -> None:
    """A query that may look at nothing gives zeros, as where NaN is replaced."""
    model = decoder_with_past(rng, 4)
    found = import_model(model)
    body = found.text.partition("\nwhere")[2]
    assert found.text.count("\nfn ") == 1 and body.count("= layer(") == 4, found.text
    assert "mask=mask" in found.text and "isnan" not in found.text
    assert "w.net.layers[3]" in found.text and "past_key: f32" in found.text
    assert "7 more inputs are spelled with `_` like `past_0_key`" in found.text.replace("\n", " ")
    assert "net.layers.3.attention.k.weight" in found.arrays
    assert [*found.results.values()][1] == "present_0_key"
    past = {f"past.{n}.{kind}": drawn(rng, 2, HEADS, 5, WIDTH // HEADS)
            for n in range(4) for kind in ("key", "value")}  # fmt: skip
    mask = rng.random((2, 1, 3, 8)) < 0.6
    mask[0, 0, 1] = False
    given = {"x": drawn(rng, 2, 3, WIDTH), "mask": mask, **past}
    with np.errstate(invalid="ignore"):
        wanted = models.reference(model, **given)
    got = computed(found, **{found.inputs[n]: v for n, v in given.items()})
    for a, b in zip(got, wanted, strict=True):
        # f32; sums of at most 8 products of numbers near 1, four layers deep
        np.testing.assert_allclose(a, np.nan_to_num(b), rtol=2e-4, atol=5e-5)


@pytest.mark.parametrize("least", [-np.inf, -3.4e38])
@pytest.mark.parametrize("form", ["positions", "triangle"])
def test_masks_of_what_comes_later_are_causal(
    rng: np.random.Generator, form: str, least: float
) -> None:
    """Written as positions that are compared, or as a triangle of ones that is compared with 0."""
    net = Layers(rng)
    net.weights |= {"zero": np.zeros(1, np.float32), "least": np.full(1, least, np.float32)}
    net.weights |= {"none": np.array(0), "one": np.array(1), "first": np.array([0, 1, 2]),
                    "second": np.array([0, 1, 3]), "length": np.array([1]),
                    "ones": np.ones(1, np.float32)}  # fmt: skip
    size = net.add("Gather", [net.add("Shape", ["x"]), "one"])
    if form == "positions":
        at = net.add("Range", ["none", size, "one"])
        columns, rows = (net.add("Unsqueeze", [at, a]) for a in ("first", "second"))
        allowed = net.add("LessOrEqual", [columns, rows])
        bias = net.add("Where", [allowed, "zero", "least"])
    else:
        square = net.add("Concat", [net.add("Reshape", [size, "length"])] * 2, axis=0)
        low = net.add("Trilu", [net.add("Expand", ["ones", square])], upper=0)
        bias = net.add("Where", [net.add("Equal", [low, "zero"]), "least", "zero"])
    q, k, v = (net.heads(net.product("x", f"layer.{n}")) for n in "qkv")
    model = net.model({"x": (F32, ["b", "t", WIDTH])}, net.attend(q, k, v, bias))
    text = require_same(model, x=drawn(rng, 2, 5, WIDTH)).text
    assert "causal=True" in text and "bias=" not in text and "iota" not in text


def test_a_mask_whose_axes_were_joined_is_a_view(rng: np.random.Generator) -> None:
    """`mask[b, s]` is read at `s + b * S` of all of it."""
    net = Layers(rng)
    net.weights |= {"none": np.array(0), "one": np.array(1), "columns": np.array([0, 1, 2]),
                    "rows": np.array([1, 2, 3]), "flat": np.array([-1, 1])}  # fmt: skip
    shape = net.add("Shape", ["mask"])
    batch, size = (net.add("Gather", [shape, n]) for n in ("none", "one"))
    column = net.add("Unsqueeze", [net.add("Range", ["none", size, "one"]), "columns"])
    row = net.add("Unsqueeze", [net.add("Range", ["none", batch, "one"]), "rows"])
    at = net.add("Add", [column, net.add("Mul", [row, size])])
    read = net.add("Gather", [net.add("Reshape", ["mask", "flat"]), at])
    net.weights["last"] = np.array([-1])
    model = net.model({"mask": (F32, ["b", "s"])}, net.add("Squeeze", [read, "last"]))
    found = require_same(model, mask=drawn(rng, 3, 4))
    assert "    reshape(mask, [B, 1, 1, S])\n" in found.text


def test_sizes_that_must_be_equal_are_before_sizes_of_an_example() -> None:
    """[S, T, 8] as [B, -1, 2, 4] is for S = B, not for the T at which all B would fit."""
    nodes = [
        models.node("Shape", ["x"], ["shape"]),
        models.node("Gather", ["shape", "none"], ["b"]),
        models.node("Unsqueeze", ["b", "axis"], ["first"]),
        models.node("Concat", ["first", "rest"], ["wanted"], axis=0),
        models.node("Reshape", ["memory", "wanted"], ["y"]),
    ]
    weights = {"none": np.array(0), "axis": np.array([0]), "rest": np.array([-1, 2, 4])}
    inputs = {"x": (F32, ["B", 4]), "memory": (F32, ["S", "T", 8])}
    text = import_model(models.model(nodes, inputs, ["y"], weights)).text
    assert "T, 8]" in text and "T >= 1" in text
