"""The larger workloads: whole networks, with random weights of their shapes."""

from __future__ import annotations

from typing import Any

import numpy as np

from .workload import Array, Arrays, Data, Parts

ATTENTION, FEED = "attention.self", "intermediate.dense"


def encoder(data: Data, b: int, t: int, d: int, f: int, h: int, layers: int, v: int) -> Parts:
    """A sentence encoder: MiniLM-L6 where d = 384, f = 1536, h = 12, layers = 6, v = 30522."""
    weights = {
        "words": data.normal(v, d, scale=0.1),
        "pos": data.normal(128, d, scale=0.1),
        "typ": data.normal(1, d, scale=0.1),
        **_layer_norm(data, "embeddings", d),
    }
    for number in range(layers):
        at = f"encoder.layer.{number}"
        for name in ("query", "key", "value"):
            weights |= _dense(data, f"{at}.{ATTENTION}.{name}", d, d)
        weights |= _dense(data, f"{at}.attention.output.dense", d, d)
        weights |= _dense(data, f"{at}.{FEED}", d, f)
        weights |= _dense(data, f"{at}.output.dense", f, d)
        weights |= _layer_norm(data, f"{at}.attention.output", d)
        weights |= _layer_norm(data, f"{at}.output", d)
    lengths = data.rng.integers(max(1, t // 2), t + 1, b) if b > 1 else np.array([t])
    mask = (np.arange(t)[None, :] < lengths[:, None]).astype(np.float32)

    def formula(ops: Any, x: Arrays, w: Arrays) -> list[Any]:
        def norm(y: Any, name: str) -> Any:
            scope = f"{name}.LayerNorm"
            return ops.layer_norm(y, w[f"{scope}.weight"], w[f"{scope}.bias"], 1e-12)

        def linear(y: Any, name: str) -> Any:
            return ops.linear(y, w[f"{name}.W"], w[f"{name}.bias"])

        bias = ops.reshape(x["mask"] * 1e4 + -1e4, (b, 1, 1, t))
        y = norm(ops.embed(w["words"], x["ids"]) + w["pos"][:t] + w["typ"], "embeddings")
        for number in range(layers):
            at = f"encoder.layer.{number}"
            q, k, v = (linear(y, f"{at}.{ATTENTION}.{n}") for n in ("query", "key", "value"))
            mixed = linear(ops.attention(q, k, v, h, bias), f"{at}.attention.output.dense")
            y = norm(y + mixed, f"{at}.attention.output")
            fed = linear(ops.gelu(linear(y, f"{at}.{FEED}")), f"{at}.output.dense")
            y = norm(y + fed, f"{at}.output")
        return [y]

    return {"ids": data.rng.integers(0, v, (b, t)), "mask": mask}, weights, formula


def _dense(data: Data, name: str, inner: int, outer: int) -> dict[str, Array]:
    matrix = data.normal(inner, outer, scale=inner**-0.5)
    return {f"{name}.W": matrix, f"{name}.bias": data.normal(outer, scale=0.1)}


def _layer_norm(data: Data, name: str, size: int) -> dict[str, Array]:
    made = data.norm(size)
    return {f"{name}.LayerNorm.weight": made["w"], f"{name}.LayerNorm.bias": made["b"]}


def residual_network(data: Data, b: int, s: int, c: int, n: int) -> Parts:
    """ResNet-18 where c = 64 and n = 1000, on images of s x s; norms folded into convolutions."""
    weights: dict[str, Array] = {}

    def conv(name: str, inner: int, outer: int, size: int, gain: float = 1.0) -> None:
        scale = gain * (2 / (inner * size * size)) ** 0.5
        weights[f"{name}.k"] = data.normal(outer, inner, size, size, scale=scale)
        weights[f"{name}.b"] = data.normal(outer, scale=0.1)

    conv("stem", 3, c, 7)
    blocks: list[tuple[str, int]] = []
    width = c
    for stage in range(4):
        outer = c << stage
        for number in range(2):
            name = f"s{stage}.{number}"
            conv(f"{name}.a", width, outer, 3)
            conv(f"{name}.c", outer, outer, 3, 0.5)
            if width != outer:
                conv(f"{name}.d", width, outer, 1, 0.7)
            blocks.append((name, 1 if width == outer else 2))
            width = outer
    weights |= data.linear("fc", width, n)

    def formula(ops: Any, x: Arrays, w: Arrays) -> list[Any]:
        def conv(y: Any, name: str, stride: int, padding: int) -> Any:
            return ops.conv(y, w[f"{name}.k"], w[f"{name}.b"], stride, padding)

        y = ops.max_pool(ops.relu(conv(x["x"], "stem", 2, 3)))
        for name, stride in blocks:
            skip = y if stride == 1 else conv(y, f"{name}.d", stride, 0)
            inner = ops.relu(conv(y, f"{name}.a", stride, 1))
            y = ops.relu(conv(inner, f"{name}.c", 1, 1) + skip)
        return [ops.linear(ops.mean_of_image(y), w["fc.W"], w["fc.b"])]

    return {"x": data.normal(b, 3, s, s)}, weights, formula


def decoder_step(data: Data, p: int, d: int, g: int, r: int, e: int, f: int) -> Parts:
    """One token through two layers like Llama's, after p others: g groups of r heads of size e."""
    angle = np.tile(p * 10000.0 ** (-np.arange(0, e, 2) / e), 2)
    inputs = {
        "x": data.normal(1, d),
        "cos_": np.cos(angle).astype(np.float32),
        "sin_": np.sin(angle).astype(np.float32),
    }
    weights: dict[str, Array] = {}
    shapes = {"q": (d, g * r * e), "k": (d, g * e), "v": (d, g * e), "o": (g * r * e, d)}
    shapes |= {"gate": (d, f), "up": (d, f), "down": (f, d)}
    for layer in range(2):
        for name, (inner, outer) in shapes.items():
            weights |= data.linear(f"{layer}.{name}", inner, outer, bias=False)
        weights[f"{layer}.n1"], weights[f"{layer}.n2"] = data.norm(d)["w"], data.norm(d)["w"]
        inputs[f"k{layer}"], inputs[f"v{layer}"] = data.normal(g, p, e), data.normal(g, p, e)

    def formula(ops: Any, x: Arrays, w: Arrays) -> list[Any]:
        def rotate(t: Any) -> Any:
            low, high = ops.split(t, 2)
            return t * x["cos_"] + ops.concat([high * -1.0, low], -1) * x["sin_"]

        y, fresh = x["x"], []
        for layer in range(2):

            def linear(t: Any, name: str, at: int = layer) -> Any:
                return ops.linear(t, w[f"{at}.{name}.W"])

            a = ops.rms_norm(y, w[f"{layer}.n1"])
            q = rotate(ops.reshape(linear(a, "q"), (g, r, e)))
            k = rotate(ops.reshape(linear(a, "k"), (g, 1, e)))
            v = ops.reshape(linear(a, "v"), (g, 1, e))
            fresh += [k, v]
            keys, values = ops.concat([x[f"k{layer}"], k], 1), ops.concat([x[f"v{layer}"], v], 1)
            mixed = ops.reshape(ops.attention(q, keys, values, 1), (1, g * r * e))
            y = y + linear(mixed, "o")
            a = ops.rms_norm(y, w[f"{layer}.n2"])
            y = y + linear(ops.silu(linear(a, "gate")) * linear(a, "up"), "down")
        return [y, *fresh]

    return inputs, weights, formula
