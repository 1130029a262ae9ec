"""What functions of the standard library compute, in NumPy, and how a case of one is written."""

import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
STD = Path(__file__).resolve().parent.parent / "dsl" / "std"


def normal(*shape: int, seed: int = 0) -> Array:
    """Seeded normal numbers in f32."""
    return np.random.default_rng(seed + sum(shape)).standard_normal(shape, np.float32)


@dataclass(frozen=True)
class Case:
    """A pipeline of one call, its inputs and weights, and what it should give."""

    covers: str
    signature: str
    body: str
    want: Callable[..., Any]
    inputs: Mapping[str, Array]
    weights: Mapping[str, Array] = field(default_factory=dict)
    where: str = ""

    @property
    def source(self) -> str:
        names = sorted(set(re.findall(r"\b(nn|math|image|onnx)\.", self.body)))
        lines = [f"import {name}" for name in names]
        if self.weights:
            lines.append('weights w = "w.npz"')
        where = f"\nwhere {self.where}" if self.where else ""
        lines.append(f"pipeline p({self.signature}){where}:")
        lines += [f"    {line}" for line in self.body.splitlines()]
        return "\n".join(lines) + "\n"


def sampled(image: Array, row: float, column: float) -> float:
    """An image between its elements, with zeros around."""
    total = 0.0
    for i in (int(np.floor(row)), int(np.floor(row)) + 1):
        for j in (int(np.floor(column)), int(np.floor(column)) + 1):
            if 0 <= i < image.shape[0] and 0 <= j < image.shape[1]:
                total += (1 - abs(row - i)) * (1 - abs(column - j)) * image[i, j]
    return total


def boxes_averaged(x: Array, rois: Array, of: Array, each: int = 2) -> Array:
    """2 x 3 bins of boxes at half the scale, whose sides are at least 1, of `each` samples a side;
    for 0, of as many as a bin has elements."""
    y = np.zeros((len(rois), x.shape[1], 2, 3))
    for r, c, i, j in np.ndindex(*y.shape):
        left, top, right, bottom = rois[r] * 0.5
        high, wide = max(bottom - top, 1) / 2, max(right - left, 1) / 3
        m, n = (each or math.ceil(high)), (each or math.ceil(wide))
        for s, t in np.ndindex(m, n):
            row, column = top + (i + (s + 0.5) / m) * high, left + (j + (t + 0.5) / n) * wide
            row, column = min(max(row, 0), x.shape[2] - 1), min(max(column, 0), x.shape[3] - 1)
            y[r, c, i, j] += sampled(x[of[r], c], row, column) / (m * n)
    return y


def boxes_largest(x: Array, rois: Array) -> Array:
    """3 x 2 bins of whole elements, in boxes (image, x0, y0, x1, y1) at half the scale."""
    y = np.zeros((len(rois), x.shape[1], 3, 2))
    for r, c, i, j in np.ndindex(*y.shape):
        ends = [math.copysign(math.floor(abs(e) * 0.5 + 0.5), e) for e in rois[r, 1:]]
        spans = []
        for first, last, bin, bins, size in (
            (ends[1], ends[3], i, 3, x.shape[2]), (ends[0], ends[2], j, 2, x.shape[3])
        ):  # fmt: skip
            length = max(last - first + 1, 1)
            low, high = first + bin * length // bins, first - (-(bin + 1) * length // bins)
            spans.append(slice(int(max(low, 0)), int(max(min(high, size), 0))))
        part = x[int(rois[r, 0]), c][tuple(spans)]
        y[r, c, i, j] = part.max() if part.size else 0
    return y


def convolved_at(x: Array, w: Array, offset: Array, mask: Array) -> Array:
    """A convolution in two groups whose taps are moved, two sets of offsets."""
    y = np.zeros((x.shape[0], w.shape[0], *offset.shape[-2:]))
    for b, o, i, j, d, k, m in np.ndindex(*y.shape, *w.shape[1:]):
        c = o // 2 * 2 + d
        moved = offset[b, c // 2, k, m, :, i, j]
        value = sampled(x[b, c], 2 * i + k - 1 + moved[0], j + 2 * m + moved[1])
        y[b, o, i, j] += value * mask[b, c // 2, k, m, i, j] * w[o, d, k, m]
    return y


UNIT = np.linspace(-1, 1, 41, dtype=np.float32)[:, None]
FAR = np.linspace(-89.4, 89.4, 41, dtype=np.float32)[:, None]
"""As far as sinh is finite in f32."""
ANGLES = np.linspace(-6, 6, 41, dtype=np.float32)[:, None]


SMALL = np.concatenate([
    s * np.concatenate([
        np.linspace(0, 9, 145), 2.0 ** np.arange(-20, 17), 1.125 * 2.0 ** np.arange(-19, 17),
        [231, 232, 233, 247, 248, 463, 464, 465, 61439, 61440, np.inf],
    ])
    for s in (1, -1)
]).astype(np.float32)  # fmt: skip
"""Around the ties and the ends of the smallest floats."""


POWERS = np.concatenate([
    *(np.float32(m) * np.float32(2.0) ** np.arange(-130, 128, dtype=np.float32)
      for m in (1, 1.25, -1.5, 1.75)),
    np.array([0, np.inf, np.nan, 1 + 2.0**-23, 2 - 2.0**-23]),
]).astype(np.float32)  # fmt: skip
"""Around powers of two, from below the smallest of f8e8m0 to above the largest."""


def power_near(x: Array, half: float, ends: tuple[float, float]) -> Array:
    """The exponent of a power of two: the next one up where the fraction, of at least 0.5, is at
    least half; `ends` for what is below 2 ** -127 or rounds to above 2 ** 127."""
    fraction, exponent = np.frexp(np.abs(x))
    near = exponent - np.where(fraction >= half, 0.0, 1.0)
    near = np.where(np.abs(x) < 2.0**-127, ends[0], near)
    near = np.where((near > 127) | np.isinf(x), ends[1], near)
    return np.where(np.isnan(x), np.nan, near)


def wide(x: Array) -> Array:
    """A float array in f64."""
    return x.astype(np.float64) if x.dtype.kind == "f" else x


def softmax(x: Array, axis: int = -1) -> Array:
    e = np.exp(x - x.max(axis, keepdims=True))
    return e / e.sum(axis, keepdims=True)


def masked_softmax(x: Array, mask: Array) -> Array:
    x, mask = np.broadcast_arrays(x, mask)
    with np.errstate(invalid="ignore"):  # of rows that are -infinity throughout
        shifted = x - np.where(mask, x, -np.inf).max(-1, keepdims=True)
    e = np.where(mask, np.exp(shifted), 0)
    total = e.sum(-1, keepdims=True)
    return np.divide(e, total, out=np.zeros_like(e), where=total != 0)


def erf(x: Array) -> Array:
    from math import erf as scalar

    return np.vectorize(scalar)(x)


def attend(
    q: Array, k: Array, v: Array, mask: Any = None, causal: bool = False, bias: Any = 0.0
) -> Array:
    times = q.shape[1] // k.shape[1]
    k, v = np.repeat(k, times, 1), np.repeat(v, times, 1)
    scores = q @ k.transpose(0, 1, 3, 2) * q.shape[-1] ** -0.5 + bias
    keep = np.ones(scores.shape, bool) if mask is None else np.broadcast_to(mask, scores.shape)
    if causal:
        t, s = scores.shape[-2:]
        keep = keep & (np.arange(s)[None, :] <= np.arange(t)[:, None] + s - t)
    return masked_softmax(scores, keep) @ v


def convolve(x: Array, w: Array, stride: int, padding: int, dilation: int, groups: int) -> Array:
    """2-D, by definition."""
    x = np.pad(x, ((0, 0), (0, 0), (padding, padding), (padding, padding)))
    out, deep, kh, kw = w.shape
    h = (x.shape[2] - (kh - 1) * dilation - 1) // stride + 1
    wd = (x.shape[3] - (kw - 1) * dilation - 1) // stride + 1
    y = np.zeros((x.shape[0], out, h, wd))
    for o in range(out):
        first = o // (out // groups) * deep
        for m in range(kh):
            for n in range(kw):
                rows = slice(m * dilation, m * dilation + (h - 1) * stride + 1, stride)
                columns = slice(n * dilation, n * dilation + (wd - 1) * stride + 1, stride)
                part = x[:, first : first + deep, rows, columns]
                y[:, o] += np.einsum("bchw,c->bhw", part, w[o, :, m, n])
    return y


def pooled(x: Array, size: int, stride: int, padding: int, fill: float, kind: str) -> Array:
    edges = ((0, 0), (0, 0), (padding, padding), (padding, padding))
    x = np.pad(x, edges, constant_values=fill)
    windows = np.lib.stride_tricks.sliding_window_view(x, (size, size), (2, 3))
    return getattr(np, kind)(windows[:, :, ::stride, ::stride], axis=(4, 5))


def rope(x: Array, positions: Array) -> Array:
    half = x.shape[-1] // 2
    angle = positions[:, None] * 10000.0 ** (-np.arange(half) / half)
    a, b, c, s = x[..., :half], x[..., half:], np.cos(angle), np.sin(angle)
    return np.concatenate([a * c - b * s, b * c + a * s], -1)


def bilinear(x: Array, height: int, width: int) -> Array:
    def taps(have: int, want: int) -> tuple[Array, Array, Array]:
        at = np.clip((np.arange(want) + 0.5) * have / want - 0.5, 0, have - 1)
        low = np.floor(at).astype(int)
        return low, np.minimum(low + 1, have - 1), at - low

    (r0, r1, fr), (c0, c1, fc) = taps(x.shape[1], height), taps(x.shape[2], width)
    fr, fc, x = fr[:, None, None], fc[:, None], x.astype(float)
    top = x[:, r0][:, :, c0] * (1 - fc) + x[:, r0][:, :, c1] * fc
    low = x[:, r1][:, :, c0] * (1 - fc) + x[:, r1][:, :, c1] * fc
    return top * (1 - fr) + low * fr


def layer_normed(x: Array, axes: Any = -1, eps: float = 1e-5) -> Array:
    return (x - x.mean(axes, keepdims=True)) / np.sqrt(x.var(axes, keepdims=True) + eps)


X = normal(3, 7)
MASK = np.arange(7)[None, :] < np.array([7, 3, 0])[:, None]
Q, K, V = normal(2, 4, 5, 8), normal(2, 4, 6, 8, seed=1), normal(2, 4, 6, 3, seed=2)
KEEP = np.arange(6)[None, :] < np.array([4, 0])[:, None]
IMAGE = normal(2, 4, 9, 8)
LAYER = {"l.weight": normal(7) + 1, "l.bias": normal(7, seed=3)}
BATCH = {
    "l.running_mean": normal(4), "l.running_var": np.abs(normal(4)) + np.float32(0.5),
    "l.weight": normal(4, seed=1), "l.bias": normal(4, seed=2),
}  # fmt: skip
PIXELS = np.random.default_rng(3).integers(0, 256, (2, 11, 13, 3), np.uint8)


def pointwise(name: str, want: Callable[[Array], Any], args: str = "") -> Case:
    x = normal(4, 33) * np.float32(3)
    return Case(f"nn.{name}", "x: f32[B, N]", f"nn.{name}(x{args})", want, {"x": x})


def conv2d(weight: Array, stride: int, padding: int, dilation: int, groups: int) -> Case:
    bias = normal(len(weight))
    args = f"stride={stride}, padding={padding}, dilation={dilation}, groups={groups}"
    return Case(
        "nn.conv2d nn.convolve2d",
        "x: f32[B, 4, H, W]",
        f"nn.conv2d(x, w.l, {args})",
        lambda x: convolve(x, weight, stride, padding, dilation, groups) + bias[:, None, None],
        {"x": IMAGE},
        {"l.weight": weight, "l.bias": bias},
        "H >= 5, W >= 5",
    )


def conv1d(weight: Array, stride: int, padding: int, dilation: int, groups: int) -> Case:
    args = f"stride={stride}, padding={padding}, dilation={dilation}, groups={groups}"

    def want(x: Array) -> Array:
        edges = ((0, 0), (0, 0), (padding, padding))
        rows = np.pad(x, edges)[:, :, None]
        return convolve(rows, weight[:, :, None], stride, 0, dilation, groups)[:, :, 0]

    return Case(
        "nn.conv1d nn.convolve1d", "x: f32[B, 4, T]", f"nn.conv1d(x, w.l, {args})", want,
        {"x": normal(2, 4, 19)}, {"l.weight": weight}, "T >= 9",
    )  # fmt: skip


ATTEND = "q: f32[B, 4, T, 8], k: f32[B, {g}, S, 8], v: f32[B, {g}, S, 3]"
def sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def recurrence(
    step: Callable[[Array, tuple[Array, ...]], tuple[Array, ...]],
    gates: Array,
    states: tuple[Array, ...],
    lengths: Array | None = None,
    reverse: bool = False,
) -> Array:
    """The states of all steps, then the last ones, flat side by side."""
    steps = range(len(gates))
    rows = np.zeros((len(gates), *states[0].shape))
    for t in reversed(steps) if reverse else steps:
        found = step(gates[t], states)
        inside = np.ones(len(gates[t]), bool) if lengths is None else t < lengths
        rows[t] = np.where(inside[:, None], found[0], 0)
        states = tuple(np.where(inside[:, None], a, b) for a, b in zip(found, states, strict=True))
    return np.concatenate([rows.ravel(), *(x.ravel() for x in states)])


def lstm(r: Array, order: str, p: Array | None = None, coupled: bool = False) -> Callable[..., Any]:
    """A step of an LSTM whose gates are in this order. Source: the ONNX operator LSTM."""
    pi, po, pf = np.zeros((3, 1)) if p is None else np.split(p, 3)

    def step(x: Array, states: tuple[Array, ...]) -> tuple[Array, ...]:
        h, c = states
        gate = dict(zip(order, np.split(x + h @ r.T, 4, axis=1), strict=True))
        i = sigmoid(gate["i"] + pi * c)
        forget = 1 - i if coupled else sigmoid(gate["f"] + pf * c)
        cell = forget * c + i * np.tanh(gate["u"])
        return sigmoid(gate["o"] + po * cell) * np.tanh(cell), cell

    return step


def gru(r: Array, bias: Array, order: str, reset_after: bool = True) -> Callable[..., Any]:
    """A step of a GRU whose gates are in this order. Source: the ONNX operator GRU."""
    parts, biases = (dict(zip(order, np.split(a, 3), strict=True)) for a in (r, bias))

    def step(x: Array, states: tuple[Array, ...]) -> tuple[Array, ...]:
        (h,) = states
        gate = dict(zip(order, np.split(x, 3, axis=1), strict=True))
        z, keep = (sigmoid(gate[k] + h @ parts[k].T + biases[k]) for k in "zr")
        rn, bn = parts["n"], biases["n"]
        inner = keep * (h @ rn.T + bn) if reset_after else (keep * h) @ rn.T + bn
        return ((1 - z) * np.tanh(gate["n"] + inner) + z * h,)

    return step


def rnn(r: Array, activation: Callable[[Array], Array] = np.tanh) -> Callable[..., Any]:
    return lambda x, states: (activation(x + states[0] @ r.T),)


STEPS, STATE = normal(5, 3, 4) * 0.5, normal(3, 6) * 0.5
LENGTHS = np.array([5, 0, 2])
FLAT = "concat([reshape(y, [-1]), reshape(h, [-1])])"
FLAT_C = "concat([reshape(y, [-1]), reshape(h, [-1]), reshape(c, [-1])])"


def layer(gates: int, name: str = "l0") -> dict[str, Array]:
    """The weights of a recurrent layer of PyTorch, of 4 inputs and 6 states."""
    size = 6 * gates
    return {
        f"weight_ih_{name}": normal(size, 4) * 0.4, f"weight_hh_{name}": normal(size, 6) * 0.4,
        f"bias_ih_{name}": normal(size), f"bias_hh_{name}": normal(size, seed=1) * 0.4,
    }  # fmt: skip


def layered(
    step: Callable[..., Any], p: dict[str, Array], states: tuple[Array, ...], x: Array, **how: Any
) -> Array:
    """A recurrence over what a layer's input adds to its gates; GRUs add the other bias inside."""
    w, r, one, other = (wide(a) for a in p.values())
    if len(w) == 18:
        return recurrence(gru(r, other, "rzn"), x @ w.T + one, states, **how)
    return recurrence(step(r), x @ w.T + one + other, states, **how)


def multiplied_at(x: Array, at: Array, updates: Array) -> Array:
    found = wide(x).copy()
    for row, update in zip(at, updates, strict=True):
        found[row] *= update
    return found


def rotated(x: Array, c: Array, s: Array, beside: bool) -> Array:
    """The first 2 * R elements as R pairs, each turned."""
    found, count = wide(x).copy(), c.shape[-1]
    first = slice(0, 2 * count, 2) if beside else slice(0, count)
    second = slice(1, 2 * count, 2) if beside else slice(count, 2 * count)
    a, b = found[..., first].copy(), found[..., second].copy()
    found[..., first], found[..., second] = a * c - b * s, b * c + a * s
    return found


def requantized(x: Array) -> Array:
    """x by way of codes of 0 to 255."""
    low, high = min(x.min(), np.float32(0)), max(x.max(), np.float32(0))
    scale = (high - low) / np.float32(255)
    zero = np.round(-low / scale)
    return (np.clip(np.round(x / scale) + zero, 0, 255) - zero) * scale
