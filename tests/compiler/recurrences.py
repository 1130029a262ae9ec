"""Recurrences of every kind, each with its meaning in NumPy, for tests."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from stagefuse.dsl.program import Pipeline

Array = Any
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Case:
    """A pipeline, and what it computes of float64 inputs."""

    source: str
    meaning: Callable[..., Sequence[Array]]
    least: int = 0
    """The least size that it takes."""

    @property
    def name(self) -> str:
        return self.source.partition("pipeline ")[2].partition("(")[0]

    def inputs(self, pipeline: Pipeline, sizes: Sizes, rng: np.random.Generator) -> dict[str, Any]:
        """Random inputs; integers are positions in the first axis."""
        found: dict[str, Any] = {}
        for name, type, _ in pipeline.inputs:
            shape = tuple(d.evaluate(sizes) for d in type.shape)
            if type.dtype.is_float:
                found[name] = (0.4 * rng.standard_normal(shape)).astype(type.dtype.numpy)
            else:
                found[name] = rng.integers(0, max(1, sizes["T"]), shape)
        return found


def _stacked(rows: Sequence[Array], *shape: int) -> Array:
    return np.stack(rows) if rows else np.zeros((0, *shape))


def _sigmoid(x: Array) -> Array:
    return 1 / (1 + np.exp(-x))


def _lstm(x: Array, w: Array, r: Array, h: Array, c: Array) -> Sequence[Array]:
    rows = []
    for t in range(len(x)):
        i, o, f, u = np.split(x[t] @ w + h @ r, 4, axis=1)
        c = _sigmoid(f) * c + _sigmoid(i) * np.tanh(u)
        h = _sigmoid(o) * np.tanh(c)
        rows.append(h)
    return _stacked(rows, *h.shape), h, c


def _fibonacci(x: Array) -> Sequence[Array]:
    a, b = 0, 1
    for _ in x:
        a, b = b, a + b
    return a, b


def _backwards(x: Array) -> Sequence[Array]:
    s, rows = np.zeros(x.shape[1]), []
    for row in x[::-1]:
        s = 0.5 * s + row
        rows.append(2 * s)
    return _stacked(rows[::-1], *s.shape), s


def _nested(x: Array) -> Sequence[Array]:
    total, y = 0.0, np.zeros(x.shape)
    for t in range(x.shape[0]):
        s = total
        for u in range(x.shape[1]):
            s = 0.25 * s + x[t, u]
            y[t, u] = s
        total = 0.5 * s + t
    return y, total


def _shifted(x: Array) -> Sequence[Array]:
    h = np.zeros(x.shape[1] + 1)
    for t in range(1, len(x)):
        h = np.concatenate([[t + 1], 0.5 * h[:-1] + x[t]])
    return (h,)


def _sides(x: Array, w: Array, v: Array) -> Sequence[Array]:
    h, y, z = np.zeros(x.shape[1]), [], []
    for row in x:
        z.append(h + row)
        h = np.tanh(row + w @ h)
        y.append(h @ v)
    return _stacked(y, v.shape[1]), _stacked(z, len(h)), h


def _kinds(x: Array, ids: Array) -> Sequence[Array]:
    m, n, seen = np.full(x.shape[1], -1e30), 0, x[0] < 0
    flags, top, w = [], [], []
    for t in range(len(x)):
        m = np.maximum(m, x[ids[t]])
        n += 2 * t
        seen = seen | (x[t] > 0.4)
        flags.append(seen)
        top.append(m.max())
        w.append(x[t] - m)
    return m, n, np.stack(flags), np.stack(top), np.stack(w)


def _from_one(x: Array) -> Sequence[Array]:
    s, d = x[0], []
    for t in range(1, len(x)):
        s = 0.5 * s + x[t] - x[t - 1]
        d.append(s)
    return _stacked(d), s


def _attention(x: Array, keys: Array) -> Sequence[Array]:
    h, rows = np.zeros(x.shape[1]), []
    for row in x:
        e = np.exp(keys @ (row + h))
        h = np.tanh((e / e.sum()) @ keys)
        rows.append(h)
    return (_stacked(rows, *h.shape),)


def _ordered(x: Array, n: Array) -> Sequence[Array]:
    s = np.zeros(x.shape[1])
    for row in x:
        s = 0.5 * np.cumsum(s + row)
        np.add.at(s, n % len(s), 1.0)
        s = np.sort(s)
    return (s,)


def _windows(x: Array) -> Sequence[Array]:
    s, rows = np.zeros(3), []
    for t in range(len(x) - 2):
        s = 0.5 * s + x[t : t + 3]
        rows.append(s)
    return _stacked(rows, 3), s


def _states(x: Array, q: Array, k: Array) -> Sequence[Array]:
    s, rows = np.zeros((k.shape[1], x.shape[1])), []
    for t in range(len(x)):
        s = 0.9 * s + np.outer(k[t], x[t])
        rows.append(q[t] @ s)
    return (_stacked(rows, x.shape[1]),)


def _pair(x: Array, w: Array) -> Sequence[Array]:
    """Two scans after each other, the second over what the first gathers."""
    h, rows = np.zeros(x.shape[1]), []
    for row in x:
        h = np.tanh(row + h)
        rows.append(h)
    y = _stacked(rows, x.shape[1]) @ w
    g = np.zeros(4)
    for row in y[::-1]:
        g = 0.5 * g + row
    return (g,)


def _twins(x: Array) -> Sequence[Array]:
    """Two scans that begin alike and go on differently."""
    h = g = np.zeros(x.shape[1])
    for row in x:
        h, g = 0.5 * h + row, 0.25 * g - row
    return h, g


def _updated(x: Array) -> Sequence[Array]:
    """Rows of what is carried are updated: the last three of x, and sums of pairs."""
    ring, sums, y = np.zeros((3, x.shape[1])), np.zeros(x.shape), np.zeros(x.shape)
    for t in range(len(x)):
        ring[t % 3] = x[t]
        sums[t] = x[t] + sums[len(x) - 1 - t]
        y[t] = ring.max(axis=0)
    return ring, sums, y


CASES = [
    Case(
        """
pipeline lstm(
    x: f32[T, B, D], w: f32[D, 4*H], r: f32[H, 4*H], h0: f32[B, H], c0: f32[B, H]
) -> (f32[T, B, H], f32[B, H], f32[B, H]):
    scan t in 0..T with h = h0, c = c0:
        i, o, f, u = split(x[t] @ w + h @ r, 4, axis=1)
        c = sigmoid(f) * c + sigmoid(i) * tanh(u)
        h = sigmoid(o) * tanh(c)
        y[t] = h
    y, h, c
""",
        _lstm,
    ),
    Case(
        """
pipeline fibonacci(x: f32[T]) -> (i64, i64):
    scan t in 0..T with a = 0, b = 1:
        a, b = b, a + b
    a, b
""",
        _fibonacci,
    ),
    Case(
        """
fn decayed(x: f32[N, D], rate: float) -> (f32[N, D], f32[D]):
    scan n in 0..N with s = zeros([D], f32):
        at = N - 1 - n
        s = rate * s + x[at]
        y[at] = s * 2.0
    y, s

pipeline backwards(x: f32[T, D]) -> (f32[T, D], f32[D]):
    decayed(x, 0.5)
""",
        _backwards,
    ),
    Case(
        """
pipeline nested(x: f32[T, D]) -> (f32[T, D], f32):
    scan t in 0..T with total = 0.0:
        scan u in 0..D with s = total:
            s = 0.25 * s + x[t, u]
            z[u] = s
        total = 0.5 * s + f32(t)
        y[t] = z
    y, total
""",
        _nested,
    ),
    Case(
        """
pipeline sides(x: f32[T, D], w: f32[D, D], v: f32[D, 3]) -> (f32[T, 3], f32[T, D], f32[D]):
    scan t in 0..T with h = zeros([D], f32), unused = 0:
        before = h
        h = tanh(x[t] + w @ h)
        unused = unused + 1
        y[t] = h @ v
        z[t] = before + x[t]
    y, z, h
""",
        _sides,
    ),
    Case(
        """
pipeline kinds(x: f32[T, D], ids: i64[T]) -> (f32[D], i64, bool[T, D], f32[T], f32[T, D])
where T >= 1, D >= 1:
    scan t in 0..T with m = full([D], -1e30, f32), n = 0, seen = x[0] < 0.0:
        m = maximum(m, x[ids[t]])
        n = n + t * 2
        seen = seen or x[t] > 0.4
        flags[t] = seen
        top[t] = max(m)
        w[t, d] = x[t, d] - m[d]
    m, n, flags, top, w
""",
        _kinds,
        1,
    ),
    Case(
        """
pipeline from_one(x: f32[T]) -> (f32[T - 1], f32)
where T >= 1:
    scan t in 1..T with s = x[0]:
        s = 0.5 * s + x[t] - x[t - 1]
        d[t - 1] = s
    d, s
""",
        _from_one,
        1,
    ),
    Case(
        """
pipeline attention(x: f32[T, D], keys: f32[B, D]) -> f32[T, D]:
    scan t in 0..T with h = zeros([D], f32):
        e = exp(keys @ (x[t] + h))
        h = tanh((e / sum(e)) @ keys)
        y[t] = h
    y
""",
        _attention,
        1,
    ),
    Case(
        """
pipeline ordered(x: f32[T, D], n: i64[2]) -> f32[D]
where D >= 1:
    scan t in 0..T with s = zeros([D], f32):
        s = 0.5 * cumsum(s + x[t], axis=0)
        s = scatter_add(s, n % D, ones([2], f32))
        s = sort(s)
    s
""",
        _ordered,
        1,
    ),
    Case(
        """
pipeline windows(x: f32[T]) -> (f32[T - 2, 3], f32[3])
where T >= 2:
    scan t in 0..T - 2 with s = zeros([3], f32):
        w[j in 0..3] = x[t + j]
        s = 0.5 * s + w
        y[t] = s
    y, s
""",
        _windows,
        2,
    ),
    Case(
        """
pipeline states(x: f32[T, D], q: f32[T, 4], k: f32[T, 4]) -> f32[T, D]:
    scan t in 0..T with s = zeros([4, D], f32):
        s = 0.9 * s + k[t][:, None] * x[t]
        y[t] = q[t] @ s
    y
""",
        _states,
    ),
    Case(
        """
pipeline pair(x: f32[T, D], w: f32[D, 4]) -> f32[4]:
    scan t in 0..T with h = zeros([D], f32):
        h = tanh(x[t] + h)
        y[t] = h @ w
    scan t in 0..T with g = zeros([4], f32):
        g = 0.5 * g + y[T - 1 - t]
    g
""",
        _pair,
    ),
    Case(
        """
pipeline twins(x: f32[T, D]) -> (f32[D], f32[D]):
    scan t in 0..T with h = zeros([D], f32):
        h = 0.5 * h + x[t]
    scan u in 0..T with g = zeros([D], f32):
        g = 0.25 * g - x[u]
    h, g
""",
        _twins,
    ),
    Case(
        """
pipeline shifted(x: f32[T, D]) -> f32[D + 1]:
    scan t in 1..T with h = zeros([D + 1]):
        h = concat([full([1], t + 1, f32), 0.5 * h[:-1] + x[t]])
    h
""",
        _shifted,
    ),
    Case(
        """
pipeline updated(x: f32[T, D]) -> (f32[3, D], f32[T, D], f32[T, D]):
    scan t in 0..T with ring = zeros([3, D], f32), sums = zeros([T, D], f32):
        ring[t % 3] = x[t]
        sums[t] = x[t] + sums[T - 1 - t]
        y[t] = max(ring, axis=0)
    ring, sums, y
""",
        _updated,
    ),
]
SIZES: Sequence[Sizes] = [
    {"T": 0, "D": 3, "B": 2, "H": 4},
    {"T": 1, "D": 1, "B": 1, "H": 1},
    {"T": 2, "D": 5, "B": 0, "H": 3},
    {"T": 7, "D": 3, "B": 3, "H": 17},
]
