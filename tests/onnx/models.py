"""Small models as exporters write them, with weights drawn anew for each run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from onnx import ModelProto, NodeProto, TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator

F32, I64 = TensorProto.FLOAT, TensorProto.INT64


def node(op: str, inputs: Sequence[str], outputs: Sequence[str], **attributes: Any) -> NodeProto:
    name = f"node_{outputs[0]}"
    return helper.make_node(op, list(inputs), list(outputs), name=name, **attributes)


def model(
    nodes: Sequence[NodeProto],
    inputs: dict[str, tuple[int, Sequence[Any]]],
    outputs: Sequence[str],
    weights: dict[str, np.ndarray[Any, Any]] | None = None,
    opset: int = 17,
) -> ModelProto:
    """A model; inputs by name with element type and shape, where a text is a size that varies."""
    graph = helper.make_graph(
        list(nodes), "graph",
        [helper.make_tensor_value_info(n, t, s) for n, (t, s) in inputs.items()],
        [helper.make_empty_tensor_value_info(n) for n in outputs],
        [numpy_helper.from_array(a, n) for n, a in (weights or {}).items()],
    )  # fmt: skip
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)])


def reference(of: ModelProto, **inputs: Any) -> list[Any]:
    """The results by the standard's own implementation."""
    return list(ReferenceEvaluator(of).run(None, inputs))


def drawn(rng: np.random.Generator, *shape: int) -> np.ndarray[Any, Any]:
    """Weights whose products stay near 1."""
    fan = int(np.prod(shape[1:])) or 1
    return (rng.standard_normal(shape) / np.sqrt(fan)).astype(np.float32)


def mlp(rng: np.random.Generator) -> ModelProto:
    """Two linear layers as PyTorch's exporter writes them."""
    weights = {
        "fc1.weight": drawn(rng, 16, 8), "fc1.bias": drawn(rng, 16),
        "fc2.weight": drawn(rng, 4, 16), "fc2.bias": drawn(rng, 4),
    }  # fmt: skip
    nodes = [
        node("Gemm", ["x", "fc1.weight", "fc1.bias"], ["/fc1/Gemm_output_0"], transB=1),
        node("Relu", ["/fc1/Gemm_output_0"], ["/act/Relu_output_0"]),
        node("Gemm", ["/act/Relu_output_0", "fc2.weight", "fc2.bias"], ["logits"], transB=1),
        node("Softmax", ["logits"], ["probs"], axis=-1),
    ]
    return model(nodes, {"x": (F32, ["batch", 8])}, ["probs"], weights)


def residual(rng: np.random.Generator) -> ModelProto:
    """The start of a ResNet and its end: stem, pool, a residual block, global pool, scores."""
    weights: dict[str, np.ndarray[Any, Any]] = {
        "stem.weight": drawn(rng, 8, 3, 7, 7), "fc.weight": drawn(rng, 5, 8),
        "fc.bias": drawn(rng, 5),
    }  # fmt: skip
    for block in ("conv1", "conv2"):
        weights[f"layer.{block}.weight"] = drawn(rng, 8, 8, 3, 3)
    for norm in ("bn0", "layer.bn1", "layer.bn2"):
        weights |= {
            f"{norm}.weight": 1 + 0.1 * drawn(rng, 8), f"{norm}.bias": drawn(rng, 8),
            f"{norm}.running_mean": 0.1 * drawn(rng, 8),
            f"{norm}.running_var": rng.uniform(0.5, 2, 8).astype(np.float32),
        }  # fmt: skip

    def normed(x: str, norm: str, y: str) -> NodeProto:
        ends = ("weight", "bias", "running_mean", "running_var")
        return node("BatchNormalization", [x, *(f"{norm}.{e}" for e in ends)], [y], epsilon=1e-5)

    nodes = [
        node("Conv", ["image", "stem.weight"], ["c0"], kernel_shape=[7, 7], strides=[2, 2],
             pads=[3, 3, 3, 3]),
        normed("c0", "bn0", "n0"), node("Relu", ["n0"], ["a0"]),
        node("MaxPool", ["a0"], ["p0"], kernel_shape=[3, 3], strides=[2, 2], pads=[1, 1, 1, 1]),
        node("Conv", ["p0", "layer.conv1.weight"], ["c1"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        normed("c1", "layer.bn1", "n1"), node("Relu", ["n1"], ["a1"]),
        node("Conv", ["a1", "layer.conv2.weight"], ["c2"], kernel_shape=[3, 3], pads=[1, 1, 1, 1]),
        normed("c2", "layer.bn2", "n2"), node("Add", ["n2", "p0"], ["sum0"]),
        node("Relu", ["sum0"], ["a2"]), node("GlobalAveragePool", ["a2"], ["g"]),
        node("Flatten", ["g"], ["flat"]),
        node("Gemm", ["flat", "fc.weight", "fc.bias"], ["scores"], transB=1),
    ]  # fmt: skip
    return model(nodes, {"image": (F32, ["N", 3, 32, 32])}, ["scores"], weights)


def _bert(rng: np.random.Generator, width: int, heads: int) -> dict[str, np.ndarray[Any, Any]]:
    """What `attention` stores: products are transposed and have lost their names."""
    weights: dict[str, np.ndarray[Any, Any]] = {
        "embeddings.weight": drawn(rng, 50, width) * 5, "eps": np.array(1e-12, np.float32),
        "half": np.array(0.5, np.float32), "one": np.array(1, np.float32),
        "root": np.array(np.sqrt(2), np.float32), "zero": np.array(0, np.int64),
        "first": np.array(1, np.int64), "axes": np.array([0], np.int64),
        "heads": np.array([heads, width // heads], np.int64), "flat": np.array([width], np.int64),
        "scale": np.array(np.sqrt(width // heads), np.float32),
        "low": np.array(-3.4e38, np.float32), "axes12": np.array([1, 2], np.int64),
        "two": np.array([2], np.int64),
    }  # fmt: skip
    for name, (rows, columns) in {
        "query": (width, width), "key": (width, width), "value": (width, width),
        "output": (width, width), "up": (width, 4 * width), "down": (4 * width, width),
    }.items():  # fmt: skip
        weights[f"onnx::MatMul_{name}"] = drawn(rng, columns, rows).T.copy()
        weights[f"layer.{name}.bias"] = drawn(rng, columns)
    for norm in ("norm1", "norm2"):
        weights |= {f"{norm}.weight": 1 + drawn(rng, width), f"{norm}.bias": drawn(rng, width)}
    return weights


def attention(rng: np.random.Generator, width: int = 32, heads: int = 4) -> ModelProto:
    """A BERT layer with its embedding; shapes are computed by Shape, Gather and Concat."""
    weights = _bert(rng, width, heads)
    nodes: list[NodeProto] = []

    def add(op: str, inputs: Sequence[str], output: str, **attributes: Any) -> str:
        nodes.append(node(op, inputs, [output], **attributes))
        return output

    def dense(x: str, name: str) -> str:
        y = add("MatMul", [x, f"onnx::MatMul_{name}"], f"/{name}/MatMul_output_0")
        return add("Add", [f"layer.{name}.bias", y], f"/{name}/Add_output_0")

    def split(x: str, name: str, perm: list[int]) -> str:
        shape = add("Shape", [x], f"/{name}/Shape_output_0")
        parts = []
        for index in ("zero", "first"):
            size = add("Gather", [shape, index], f"/{name}/Gather_{index}", axis=0)
            parts.append(add("Unsqueeze", [size, "axes"], f"/{name}/Unsqueeze_{index}"))
        whole = add("Concat", [*parts, "heads"], f"/{name}/Concat_output_0", axis=0)
        y = add("Reshape", [x, whole], f"/{name}/Reshape_output_0")
        return add("Transpose", [y], f"/{name}/Transpose_output_0", perm=perm)

    x = add("Gather", ["embeddings.weight", "ids"], "/embeddings/Gather_output_0", axis=0)
    q = split(dense(x, "query"), "q", [0, 2, 1, 3])
    k = split(dense(x, "key"), "k", [0, 2, 3, 1])
    v = split(dense(x, "value"), "v", [0, 2, 1, 3])
    scores = add("Div", [add("MatMul", [q, k], "/MatMul_output_0"), "scale"], "/Div_output_0")
    keep = add("Cast", ["mask"], "/Cast_output_0", to=F32)
    lost = add("Sub", ["one", keep], "/Sub_output_0")
    wide = add("Unsqueeze", [lost, "axes12"], "/Unsqueeze_output_0")
    bias = add("Mul", [wide, "low"], "/Mul_output_0")
    shifted = add("Add", [scores, bias], "/Add_output_0")
    probs = add("Softmax", [shifted], "/Softmax_output_0", axis=-1)
    mixed = add("Transpose", [add("MatMul", [probs, v], "/MatMul_1_output_0")], "/T_out",
                perm=[0, 2, 1, 3])  # fmt: skip
    shape = add("Shape", [x], "/Shape_output_0")
    batch = add("Slice", [shape, "axes", "two"], "/Slice_output_0")
    whole = add("Concat", [batch, "flat"], "/Concat_output_0", axis=0)
    mixed = add("Reshape", [mixed, whole], "/Reshape_output_0")
    x = add("Add", [dense(mixed, "output"), x], "/residual_output_0")
    x = add("LayerNormalization", [x, "norm1.weight", "norm1.bias"], "/norm1_output_0", axis=-1,
            epsilon=1e-12)  # fmt: skip
    h = dense(x, "up")
    e = add("Erf", [add("Div", [h, "root"], "/Div_1_output_0")], "/Erf_output_0")
    g = add("Mul", [h, add("Add", [e, "one"], "/Add_1_output_0")], "/Mul_1_output_0")
    h = dense(add("Mul", [g, "half"], "/Mul_2_output_0"), "down")
    x = add("Add", [h, x], "/residual2_output_0")
    add("LayerNormalization", [x, "norm2.weight", "norm2.bias"], "hidden", axis=-1, epsilon=1e-12)
    return model(nodes, {"ids": (I64, ["batch", "sequence"]), "mask": (I64, ["batch", "sequence"])},
                 ["hidden"], weights)  # fmt: skip


def quantised(rng: np.random.Generator) -> ModelProto:
    """A linear layer between quantizers, its weight per channel: the QDQ form."""
    weights: dict[str, np.ndarray[Any, Any]] = {
        "q": rng.integers(-127, 128, (6, 12)).astype(np.int8),
        "q_scale": rng.uniform(0.01, 0.03, 6).astype(np.float32),
        "q_zero": np.zeros(6, np.int8), "bias": drawn(rng, 6),
        "x_scale": np.array(0.02, np.float32), "x_zero": np.array(128, np.uint8),
    }
    nodes = [
        node("QuantizeLinear", ["x", "x_scale", "x_zero"], ["xq"]),
        node("DequantizeLinear", ["xq", "x_scale", "x_zero"], ["xd"]),
        node("DequantizeLinear", ["q", "q_scale", "q_zero"], ["wd"], axis=0),
        node("Transpose", ["wd"], ["wt"], perm=[1, 0]),
        node("MatMul", ["xd", "wt"], ["y0"]), node("Add", ["y0", "bias"], ["y"]),
    ]
    return model(nodes, {"x": (F32, ["B", 12])}, ["y"], weights, opset=21)
