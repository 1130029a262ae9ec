"""Ops of ONNX Runtime's own domain, by their meaning in NumPy and, where it is, by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from onnx import helper

import stagefuse as sf
from stagefuse.onnx import OnnxError, import_model

from . import models
from .export_run import onnxruntime

Array = np.ndarray[Any, Any]
B, T, H, D, P = 2, 3, 2, 8, 4
"""Sequences, steps, heads, elements of a head, steps before."""
W = H * D


@dataclass
class Case:
    """A node: inputs in order (None is left out), results, attributes, what the results are.

    `known` are places of inputs that are stored in the model.
    """

    op: str
    inputs: list[Array | None]
    meaning: Callable[..., list[Array]]
    results: tuple[int, ...] = (0,)
    known: tuple[int, ...] = ()
    attributes: dict[str, Any] = field(default_factory=dict)
    domain: str = "com.microsoft"

    def model(self) -> Any:
        names = ["" if a is None else f"a{k}" for k, a in enumerate(self.inputs)]
        outputs = [f"y{k}" if k in self.results else "" for k in range(max(self.results) + 1)]
        node = models.node(self.op, names, outputs, domain=self.domain, **self.attributes)
        given = {n: a for n, a in zip(names, self.inputs, strict=True) if a is not None}
        stored = {f"a{k}": given.pop(f"a{k}") for k in self.known}
        types = {n: (helper.np_dtype_to_tensor_dtype(a.dtype), a.shape) for n, a in given.items()}
        made = models.model([node], types, [o for o in outputs if o], stored)
        made.opset_import.append(helper.make_opsetid("com.microsoft", 1))
        made.ir_version = 10
        return made


def softmax(x: Array) -> Array:
    e = np.exp(x - x.max(-1, keepdims=True))
    return np.asarray(e / e.sum(-1, keepdims=True))


def attention(q: Array, k: Array, v: Array, bias: Any = 0.0, causal: bool = False) -> Array:
    """[B, H, T, D] by [B, H, S, D], merged."""
    scores = q @ k.swapaxes(-1, -2) / np.sqrt(q.shape[-1]) + bias
    if causal:
        late = np.arange(k.shape[2])[None] > np.arange(q.shape[2])[:, None] + (
            k.shape[2] - q.shape[2])
        scores = np.where(late, -np.inf, scores)
    y = softmax(scores) @ v
    return np.asarray(y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], -1))


def heads(x: Array, count: int = H) -> Array:
    return np.asarray(x.reshape(*x.shape[:2], count, -1).swapaxes(1, 2))


def masked(mask: Array) -> Array:
    return np.where(mask > 0, 0.0, -10000.0)


def normed(x: Array, scale: Array, shift: Any = 0.0, eps: float = 1e-12) -> Array:
    centred = x - x.mean(-1, keepdims=True)
    return np.asarray(
        centred / np.sqrt((centred**2).mean(-1, keepdims=True) + eps) * scale + shift)


def rms(x: Array, scale: Array, eps: float = 1e-12) -> Array:
    return np.asarray(x / np.sqrt((x * x).mean(-1, keepdims=True) + eps) * scale)


def gelu(x: Array) -> Array:
    from math import erf

    return np.asarray(x * 0.5 * (1 + np.vectorize(erf)(x / np.sqrt(2))))


def turned(x: Array, cosine: Array, sine: Array, beside: bool = False) -> Array:
    """[B, H, T, D] with [.., T, R]."""
    r = cosine.shape[-1]
    a, b = (x[..., 0 : 2 * r : 2], x[..., 1 : 2 * r : 2]) if beside else (
        x[..., :r], x[..., r : 2 * r])
    first, second = a * cosine - b * sine, b * cosine + a * sine
    y = x.copy()
    if beside:
        y[..., 0 : 2 * r : 2], y[..., 1 : 2 * r : 2] = first, second
    else:
        y[..., :r], y[..., r : 2 * r] = first, second
    return y


def merged(y: Array) -> Array:
    return np.asarray(y.swapaxes(1, 2).reshape(y.shape[0], y.shape[2], -1))


def _attentions(f: Callable[..., Array], rng: np.random.Generator) -> dict[str, Case]:
    mask = np.array([[1, 1, 0], [1, 1, 1]], np.int32)

    def projected(x: Array, w: Array, b: Array, *rest: Any, **options: Any) -> list[Array]:
        q, k, v = map(heads, np.split(x @ w + b, 3, -1))
        bias: Any = 0.0
        given = rest[0] if rest else None
        if given is not None and given.ndim == 1:
            bias = masked(np.arange(k.shape[2])[None] < given[:, None])[:, None, None]
        elif given is not None:
            bias = masked(given)[:, None, None] if given.ndim == 2 else masked(given)[:, None]
        if len(rest) > 1 and rest[1] is not None:
            k, v = (np.concatenate([p, n], 2) for p, n in zip(rest[1], (k, v), strict=True))
        bias = bias + (rest[2] if len(rest) > 2 else 0.0)
        return [attention(q, k, v, bias, **options), np.stack([k, v])]

    x, w, b = f(B, T, 5), f(5, 3 * W), f(3 * W)
    q, k, v = f(B, T, W), f(B, P, W), f(B, P, W)
    three = [q, k, v]
    past = [f(B, H, P, D), f(B, H, P, D)]
    some = {"num_heads": H}
    return {
        "attention": Case("Attention", [x, w, b], projected, attributes=some),
        "mask of keys": Case("Attention", [x, w, b, mask], projected, attributes=some),
        "lengths": Case("Attention", [x, w, b, np.array([2, 3], np.int32)], projected,
                        attributes=some),
        "mask of queries by keys": Case(
            "Attention", [x, w, b, np.tril(rng.integers(0, 2, (B, T, T)) | np.eye(T, dtype=int)
                                           ).astype(np.int32)], projected, attributes=some),
        "past": Case("Attention", [x, w, b, None, f(2, B, H, P, D)],
                     lambda *a: projected(*a, causal=True), (0, 1),
                     attributes={**some, "unidirectional": 1}),
        "bias of scores": Case("Attention", [x, w, b, None, None, f(1, H, T, T)], projected,
                               attributes=some),
        "multi-head": Case(
            "MultiHeadAttention", [*three, f(3 * W)],
            lambda q, k, v, b: [attention(*(heads(t + c) for t, c in zip(
                (q, k, v), np.split(b, 3), strict=True)))], attributes=some),
        "multi-head with past": Case(
            "MultiHeadAttention", [q, *(f(B, T, W) for _ in "kv"), None, None, None, *past],
            lambda q, k, v, _, m, c, pk, pv: [
                attention(heads(q), np.concatenate([pk, heads(k)], 2),
                          np.concatenate([pv, heads(v)], 2)),
                np.concatenate([pk, heads(k)], 2), np.concatenate([pv, heads(v)], 2)],
            (0, 1, 2), attributes=some),
        "packed keys": Case(
            "MultiHeadAttention", [q, f(B, P, H, 2, D)],
            lambda q, kv: [attention(heads(q), kv[:, :, :, 0].swapaxes(1, 2),
                                     kv[:, :, :, 1].swapaxes(1, 2))], attributes=some),
        "keys by heads": Case(
            "MultiHeadAttention", [q, *past, None, np.array([[1, 1, 0, 1]] * B, np.int32)],
            lambda q, k, v, _, m: [attention(heads(q), k, v, masked(m)[:, None, None])],
            attributes=some),
    }  # fmt: skip


def grouped(
    q: Array, k: Array, v: Array, pk: Array, pv: Array, lengths: Array, total: Array,
    cosine: Any = None, sine: Any = None, window: int = 0, groups: int = 1,
) -> list[Array]:  # fmt: skip
    """Each sequence by itself, as its length says."""
    size, steps = int(total), q.shape[1]
    q, k, v = heads(q), heads(k, groups), heads(v, groups)
    keys, values = (np.zeros((len(q), groups, size, q.shape[3])) for _ in "kv")
    y = np.zeros((len(q), steps, q.shape[1] * q.shape[3]))
    for i, last in enumerate(lengths):
        before = 0 if size == steps else int(last) + 1 - steps
        at = before + np.arange(steps)
        kk, qq = k[i : i + 1], q[i : i + 1]
        if cosine is not None:
            qq, kk = (turned(t, cosine[at], sine[at]) for t in (qq, kk))
        keys[i, :, :before], values[i, :, :before] = pk[i, :, :before], pv[i, :, :before]
        keys[i, :, before : before + steps] = kk[0]
        values[i, :, before : before + steps] = v[i]
        j = np.arange(size)[None]
        seen = (j <= at[:, None]) & ((j > at[:, None] - window) if window else True)
        wide = [np.repeat(t[i : i + 1], q.shape[1] // groups, 1) for t in (keys, values)]
        y[i] = attention(qq, *wide, np.where(seen, 0.0, -np.inf))[0]
    return [y, keys, values]


def _rotations(f: Callable[..., Array]) -> dict[str, Case]:
    angle = np.arange(9)[:, None] * 0.3 ** np.arange(D // 2)
    cosine, sine = np.cos(angle).astype(np.float32), np.sin(angle).astype(np.float32)
    at = np.array([[0, 1, 2], [4, 5, 6]], np.int64)
    past = [f(B, 1, P, D) for _ in "kv"]
    new = [f(B, T, 2 * D), f(B, T, D), f(B, T, D)]
    total, same = np.int32(P + T), np.full(B, P + T - 1, np.int32)
    some = {"num_heads": 2, "kv_num_heads": 1}
    return {
        "rotary": Case(
            "RotaryEmbedding", [f(B, H, T, D), at, cosine, sine],
            lambda x, at, c, s: [turned(x, c[at][:, None], s[at][:, None])]),
        "rotary of flat heads, beside": Case(
            "RotaryEmbedding", [f(B, T, W), np.array([5], np.int64), cosine, sine],
            lambda x, at, c, s: [merged(turned(heads(x), c[5 : 5 + T], s[5 : 5 + T], True))],
            attributes={"interleaved": 1}),
        "rotary of a part": Case(
            "RotaryEmbedding", [f(B, H, T, D), at, cosine[:, :2], sine[:, :2]],
            lambda x, at, c, s: [turned(x, c[at][:, None], s[at][:, None])],
            attributes={"rotary_embedding_dim": 4, "num_heads": H}),
        "grouped": Case("GroupQueryAttention", [*new, *past, same, total], grouped, (0, 1, 2),
                        (6,), some),
        "grouped with positions": Case(
            "GroupQueryAttention", [*new, *past, same, total, cosine, sine], grouped, (0, 1, 2),
            (6,), {**some, "do_rotary": 1}),
        "grouped of one step in a window": Case(
            "GroupQueryAttention",
            [*(t[:, :1] for t in new), *past, np.full(B, P, np.int32), np.int32(P + 1)],
            lambda *a: grouped(*a, window=2), (0, 1, 2), (6,), {**some, "local_window_size": 2}),
        "grouped of one sequence": Case(
            "GroupQueryAttention",
            [*(f(1, T, 16 * c) for c in (2, 1, 1)), *(f(1, 1, P, 16) for _ in "kv"), same[:1],
             total, *(np.concatenate([t, t], 1) for t in (cosine, sine))], grouped, (0, 1, 2),
            (6,), {**some, "do_rotary": 1}),
        "grouped from the start": Case(
            "GroupQueryAttention",
            [*new, *(t[:, :, :0] for t in past), np.full(B, T - 1, np.int32), np.int32(T)], grouped,
            (0, 1, 2), (6,), some),
    }  # fmt: skip


def _norms(f: Callable[..., Array], rng: np.random.Generator) -> dict[str, Case]:
    x, g, b = f(B, T, 6), f(6), f(6)
    ids = rng.integers(0, 7, (B, T)).astype(np.int32)
    tables = [f(7, 6), f(7, 6), f(7, 6)]
    mask = np.array([[1, 1, 0], [1, 1, 1]], np.int32)
    return {
        "skip norm": Case(
            "SkipLayerNormalization", [x, f(B, T, 6), g, b, f(6)],
            lambda x, s, g, b, c: [normed(x + s + c, g, b), x + s + c], (0, 3)),
        "skip norm without a mean": Case(
            "SkipSimplifiedLayerNormalization", [x, f(B, T, 6), g],
            lambda x, s, g: [rms(x + s, g), x + s], (0, 3)),
        "norm without a mean": Case(
            "SimplifiedLayerNormalization", [x, g], lambda x, g: [rms(x, g, 1e-5)],
            attributes={"axis": -1, "epsilon": 1e-5, "stash_type": 1}, domain=""),
        "embeddings": Case(
            "EmbedLayerNormalization", [ids, ids // 2, *tables, g, b, mask],
            lambda i, s, w, p, t, g, b, m: [normed(w[i] + p[: i.shape[1]] + t[s], g, b),
                                            m.sum(1)], (0, 1)),
        "group norm": Case(
            "GroupNorm", [f(2, 3, 3, 8), f(8), f(8)], lambda x, g, b: [_grouped_norm(x, g, b)],
            attributes={"groups": 4, "activation": 1, "epsilon": 1e-5}),
        "bias": Case("BiasGelu", [x, g], lambda x, b: [gelu(x + b)]),
        "split": Case("BiasSplitGelu", [f(2, 3, 8), f(8)],
                      lambda x, b: [(x + b)[..., :4] * gelu((x + b)[..., 4:])]),
        "bias softmax": Case("BiasSoftmax", [f(2, 3, 5), f(2, 1, 5)],
                             lambda x, b: [softmax(x + b)],
                             attributes={"axis": 2, "is_inner_broadcast": 1}),
        "dims": Case("ExpandDims", [x, np.int32(1)], lambda x, _: [x[:, None]], known=(1,)),
    }  # fmt: skip


def _grouped_norm(x: Array, g: Array, b: Array) -> Array:
    """[N, H, W, C] in 4 groups, and SiLU."""
    y = x.reshape(*x.shape[:3], 4, -1)
    y = y - y.mean((1, 2, 4), keepdims=True)
    y = (y / np.sqrt((y * y).mean((1, 2, 4), keepdims=True) + 1e-5)).reshape(x.shape) * g + b
    return np.asarray(y / (1 + np.exp(-y)))


def _products(f: Callable[..., Array], rng: np.random.Generator) -> dict[str, Case]:
    codes = rng.integers(0, 256, (5, 6)).astype(np.uint8)
    scale, zero = rng.uniform(0.01, 0.1, 6).astype(np.float32), codes[0]
    a, whole = rng.integers(0, 256, (3, 5)).astype(np.uint8), (codes - zero.astype(float)) * scale
    s, z = np.float32(0.05), np.uint8(120)
    image, kernel = f(2, 3, 5, 5), f(4, 3, 3, 3)

    def requantised(y: Array) -> list[Array]:
        return [np.clip(np.round(y / 0.05) + 120, 0, 255)]

    def real(x: Array) -> Array:
        return np.asarray((x - 120.0) * 0.05)

    def dynamic(x: Array, *_: Any) -> list[Array]:
        low, high = min(x.min(), 0), max(x.max(), 0)
        step = (high - low) / 255
        point = np.round(-low / step)
        return [(np.clip(np.round(x / step) + point, 0, 255) - point) * step @ whole]

    return {
        "transposed": Case("FusedMatMul", [f(2, 5, 3), f(2, 4, 5)],
                           lambda a, b: [0.5 * a.swapaxes(1, 2) @ b.swapaxes(1, 2)],
                           attributes={"transA": 1, "transB": 1, "alpha": 0.5}),
        "batches behind": Case("FusedMatMul", [f(3, 2, 5), f(2, 5, 4)],
                               lambda a, b: [a.transpose(1, 0, 2) @ b],
                               attributes={"transBatchA": 1}),
        "gemm": Case("FusedGemm", [f(3, 5), f(5, 4), f(4)],
                     lambda a, b, c: [np.where(a @ b + c > 0, a @ b + c, 0.1 * (a @ b + c))],
                     attributes={"activation": "LeakyRelu", "activation_alpha": 0.1}),
        "conv": Case("FusedConv", [image, kernel, f(4), f(2, 4, 3, 3)],
                     lambda x, w, b, z: [np.maximum(_conv(x, w) + b[:, None, None] + z, 0)],
                     attributes={"activation": "Relu", "kernel_shape": [3, 3]}),
        "integers": Case("MatMulIntegerToFloat",
                         [a, codes, s, scale, z, zero, f(6)],
                         lambda a, *r: [(a - 120.0) * 0.05 @ whole + r[-1]]),
        "dynamic": Case("DynamicQuantizeMatMul", [f(3, 5), codes, scale, zero], dynamic,
                        known=(1, 2, 3)),
        "where": Case("QLinearWhere", [a > 99, a, s, z, a[::-1], s, z, s, z],
                      lambda c, x, _, __, y, *r: requantised(np.where(c, real(x), real(y)))),
        "mean": Case("QLinearReduceMean", [a, s, z, s, z],
                     lambda x, *_: requantised(real(x).mean(1, keepdims=True)),
                     attributes={"axes": [1], "keepdims": 1}),
        "pool": Case("QLinearAveragePool", [rng.integers(0, 256, (1, 2, 4, 4)).astype(np.uint8),
                                            s, z, s, z],
                     lambda x, *_: requantised(real(x).reshape(1, 2, 2, 2, 2, 2).mean((3, 5))),
                     attributes={"kernel_shape": [2, 2], "strides": [2, 2]}),
    }  # fmt: skip


def _conv(x: Array, w: Array) -> Array:
    seen = np.lib.stride_tricks.sliding_window_view(x, w.shape[2:], (2, 3))
    return np.einsum("bchwij,ocij->bohw", seen, w)


def cases(rng: np.random.Generator) -> dict[str, Case]:
    def f(*shape: int) -> Array:
        return rng.standard_normal(shape).astype(np.float32)

    return _attentions(f, rng) | _rotations(f) | _norms(f, rng) | _products(f, rng)


@pytest.mark.parametrize("name", list(cases(np.random.default_rng(0))))
def test_it_is_what_it_means(name: str, rng: np.random.Generator) -> None:
    case = cases(rng)[name]
    made = case.model()
    found = import_model(made)
    given = {i.name: case.inputs[int(i.name[1:])] for i in made.graph.input}
    weights = {"w": found.arrays} if found.arrays else None
    got = sf.compile(found.text, weights=weights)(**given)
    wide = [a.astype(float) if a is not None and a.dtype.kind == "f" else a for a in case.inputs]
    want = case.meaning(*wide)
    results = [w for k, w in zip(range(len(want)), want, strict=True)][: len(case.results)]
    for y, w in zip(got if isinstance(got, tuple) else (got,), results, strict=True):
        _close(y, w)
    for y, w in zip(_by_runtime(made, given), results, strict=False):
        _close(y, w)


def _by_runtime(made: Any, given: dict[str, Any]) -> list[Array]:
    """What ONNX Runtime gives on its CPU; nothing if it is not there, or lacks that case."""
    if onnxruntime is None:
        return []
    state = onnxruntime.capi.onnxruntime_pybind11_state
    try:
        session = onnxruntime.InferenceSession(made.SerializeToString())
        return list(session.run(None, {n: np.asarray(a) for n, a in given.items()}))
    except (state.NotImplemented, state.InvalidArgument, state.RuntimeException):
        return []


def _close(y: Array, want: Array) -> None:
    """Codes may be rounded another way where they are halves; floats differ in the last bits."""
    assert y.shape == want.shape
    ends = {"atol": 1.0, "rtol": 0} if y.dtype.kind in "iu" else {"atol": 2e-5, "rtol": 2e-5}
    np.testing.assert_allclose(y.astype(float), want, **ends)


def test_what_is_not_translated_is_named() -> None:
    zero = np.zeros
    case = Case("GroupQueryAttention", [
        zero((1, 2, 8), np.float32), zero((1, 2, 8), np.float32), zero((1, 2, 8), np.float32),
        zero((1, 1, 3, 8), np.float32), zero((1, 1, 3, 8), np.float32), zero(1, np.int32),
        np.int32(5)], lambda *_: [], known=(6,),
        attributes={"num_heads": 1, "kv_num_heads": 1, "softcap": 30.0})  # fmt: skip
    with pytest.raises(OnnxError, match="`softcap` is 30.0"):
        import_model(case.model())
