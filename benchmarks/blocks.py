"""The smaller workloads: data and formula of single operations and of blocks of networks."""

from __future__ import annotations

from typing import Any

import numpy as np

from .workload import Arrays, Data, Parts


def pointwise(data: Data, m: int, n: int) -> Parts:
    inputs = {"x": data.normal(m, n), "r": data.normal(m, n)}
    weights = {"s": data.normal(n), "b": data.normal(n)}
    return inputs, weights, lambda ops, x, w: [ops.gelu(x["x"] * w["s"] + w["b"]) + x["r"]]


def softmax(data: Data, m: int, n: int) -> Parts:
    return {"x": data.normal(m, n, scale=2)}, {}, lambda ops, x, w: [ops.softmax(x["x"])]


def masked_softmax(data: Data, b: int, h: int, t: int, s: int) -> Parts:
    keep = np.arange(s)[None, :] < data.rng.integers(max(1, s // 3), s + 1, b)[:, None]
    mask = np.where(keep, 0, -1e4).astype(np.float32).reshape(b, 1, 1, s)
    inputs = {"x": data.normal(b, h, t, s, scale=4), "m": mask}
    return inputs, {}, lambda ops, x, w: [ops.softmax(x["x"] * 0.125 + x["m"])]


def residual_norm(data: Data, m: int, n: int, *, rms: bool) -> Parts:
    def formula(ops: Any, x: Arrays, w: Arrays) -> list[Any]:
        h = x["x"] + x["r"]
        return [ops.rms_norm(h, w["w"]), h] if rms else [ops.layer_norm(h, w["w"], w["b"])]

    return {"x": data.normal(m, n), "r": data.normal(m, n)}, data.norm(n), formula


def preprocess(data: Data, b: int, h: int, w: int, s: int) -> Parts:
    mean = 255 * np.array([0.485, 0.456, 0.406], np.float32)
    deviation = 255 * np.array([0.229, 0.224, 0.225], np.float32)
    weights = {"scale": 1 / deviation, "shift": -mean / deviation}
    images = data.rng.integers(0, 256, (b, h, w, 3), dtype=np.uint8)

    def formula(ops: Any, x: Arrays, p: Arrays) -> list[Any]:
        return [ops.preprocess(x["img"], s, p["scale"], p["shift"])]

    return {"img": images}, weights, formula


def linear_gelu(data: Data, m: int, k: int, n: int) -> Parts:
    def formula(ops: Any, x: Arrays, w: Arrays) -> list[Any]:
        return [ops.gelu(ops.linear(x["x"], w["l.W"], w["l.b"]))]

    return {"x": data.normal(m, k)}, data.linear("l", k, n), formula


def product(data: Data, m: int, k: int, n: int) -> Parts:
    weights = data.linear("l", k, n, bias=False)
    return {"x": data.normal(m, k)}, weights, lambda ops, x, w: [ops.linear(x["x"], w["l.W"])]


def product_of_inputs(data: Data, m: int, k: int, n: int) -> Parts:
    inputs = {"x": data.normal(m, k), "y": data.normal(k, n, scale=k**-0.5)}
    return inputs, {}, lambda ops, x, w: [ops.matmul(x["x"], x["y"])]


def mlp(data: Data, m: int, d: int, f: int) -> Parts:
    def formula(ops: Any, x: Arrays, w: Arrays) -> list[Any]:
        h = ops.gelu(ops.linear(x["x"], w["a.W"], w["a.b"]))
        return [ops.layer_norm(x["x"] + ops.linear(h, w["c.W"], w["c.b"]), w["w"], w["b"])]

    weights = {**data.linear("a", d, f), **data.linear("c", f, d), **data.norm(d)}
    return {"x": data.normal(m, d)}, weights, formula


def attention(data: Data, b: int, t: int, c: int, h: int) -> Parts:
    def formula(ops: Any, x: Arrays, w: Arrays) -> list[Any]:
        q, k, v = ops.split(ops.linear(x["x"], w["qkv.W"], w["qkv.b"]), 3)
        mixed = ops.linear(ops.attention(q, k, v, h), w["o.W"], w["o.b"])
        return [ops.layer_norm(x["x"] + mixed, w["w"], w["b"])]

    weights = {**data.linear("qkv", c, 3 * c), **data.linear("o", c, c), **data.norm(c)}
    return {"x": data.normal(b, t, c)}, weights, formula
