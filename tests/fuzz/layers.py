"""Whole layers to begin a program with, and what is almost one of them."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import measured as m
from .growing import Growing, Node
from .meanings import masked_softmax, pointwise, softmax
from .measured import Measured
from .sizes import ONE, Dim


class Layers(Growing):
    """Attention and convolutions, each value of which can be a result too."""

    @property
    def layer_dtype(self) -> str:
        return self.float if self.float in ("f32", "f16", "bf16") else "f32"

    def begin_attention(self) -> None:
        """softmax(q k^T * scale + mask) v, or what is almost that."""
        r, dtype = self.rng, self.layer_dtype
        depth, width = Dim.of(r.choice([8, 16, 32, 40, 64])), Dim.of(r.choice([16, 24, 32, 64]))
        queries = r.choice([self.dims[0], Dim.of(5), Dim.of(33)])
        keys = r.choice([self.dims[1], Dim.of(17), Dim.of(64)])
        lead = r.choice([(), (self.dims[2],), (Dim.of(2), Dim.of(3))])
        q = self.input((*lead, queries, depth), dtype)
        k = self.input((*lead, keys, depth), dtype)
        v = self.input((*lead, keys, width), dtype)
        n = len(lead)
        scores = self.add(
            f"{q.name} @ transpose({k.name}, {[*range(n), n + 1, n]})",
            (*lead, queries, keys),
            dtype,
            [q, k],
            lambda s, a, b: m.product(
                np.matmul, a, b.seen(lambda z: np.swapaxes(z, -1, -2)), a.v.shape[-1], dtype
            ),
        )
        weights = self._weights(self._scaled(scores))
        if r.random() < 0.25:
            weights = self.add(
                f"{weights.name} * {weights.name}",
                weights.shape,
                dtype,
                [weights],
                lambda s, a: m.rounded(*m.corners(np.square, _at_most(a, 2.0)), dtype),
            )
        out = self.add(
            f"{weights.name} @ {v.name}",
            (*lead, queries, width),
            dtype,
            [weights, v],
            lambda s, a, b: m.product(np.matmul, a, b, b.v.shape[-2], dtype),
        )
        if r.random() < 0.5:
            self._relu(out)

    def _scaled(self, x: Node) -> Node:
        """Scores times a power of two, and at times a cap or a bias."""
        dtype = x.dtype
        if self.rng.random() < 0.7:
            x = self.add(
                f"{x.name} * 0.125",
                x.shape,
                dtype,
                [x],
                lambda s, a: m.rounded(a.v * 0.125, a.e * 0.125, dtype),
            )
        kind = self.rng.choice(["plain", "plain", "cap", "bias"])
        if kind == "cap":
            return self.add(
                f"tanh({x.name} * 0.25) * 4.0",
                x.shape,
                dtype,
                [x],
                lambda s, a: m.rounded(*m.corners(lambda z: np.tanh(z * 0.25) * 4, a), dtype, 6),
            )
        if kind == "bias":
            b = self.input(x.shape[-2:], dtype)
            return self.add(
                f"{x.name} + {b.name}",
                x.shape,
                dtype,
                [x, b],
                lambda s, a, c: m.rounded(*m.corners(np.add, a, c), dtype),
            )
        return x

    def _weights(self, x: Node) -> Node:
        """A softmax of scores under a mask of some kind."""
        kind = self.rng.choice(["plain", "mask", "infinite", "causal", "masked"])
        dtype, queries, keys = x.dtype, x.shape[-2], x.shape[-1]
        if kind in ("mask", "infinite", "masked"):
            shape = self.rng.choice([(queries, keys), (keys,), x.shape])
            c = self.input(shape, "bool")
        if kind == "masked" and dtype != "f16":
            return self.add(
                f"nn.masked_softmax({x.name}, {c.name})",
                x.shape,
                dtype,
                [x, c],
                lambda s, a, b: masked_softmax(a, b),
            )
        if kind in ("mask", "infinite"):
            low = -1e4 if kind == "mask" else -np.inf
            zero = f"zero_{self.count}"
            said = "-1e4" if kind == "mask" else f"-(1.0 / {zero})"
            text = f"{{name}} = select({c.name}, {x.name}, {said})"
            if kind == "infinite":
                text = f"{zero} = {dtype}(0.0)\n{text}"
            x = self.add(text, x.shape, dtype, [c, x], lambda s, p, a: _where(p.v, a, low))
        if kind == "causal":
            x = self.add(
                f"select(iota({keys})[None, :] <= iota({queries})[:, None], {x.name}, -1e4)",
                x.shape,
                dtype,
                [x],
                lambda s, a: _where(np.tri(*a.v.shape[-2:], dtype=bool), a, -1e4),
            )
        axis = len(x.shape) - (2 if queries == keys and self.rng.random() < 0.3 else 1)
        return self.add(
            f"nn.softmax({x.name}, axis={axis})",
            x.shape,
            dtype,
            [x],
            lambda s, a: softmax(a, axis, False),
        )

    def begin_convolution(self) -> None:
        """Sums of products of windows of an image, a bias and a relu."""
        r, dtype = self.rng, self.layer_dtype
        inside, outside = r.choice([1, 3, 4, 16]), r.choice([1, 5, 16, 32])
        k, stride = r.choice([1, 2, 3]), r.choice([1, 2])
        tall, wide = r.randint(k, 12), r.randint(k, 12)
        batch = r.choice([self.dims[0], ONE, Dim.of(3)])
        x = self.input((batch, Dim.of(inside), Dim.of(tall), Dim.of(wide)), dtype)
        w = self.input((Dim.of(outside), Dim.of(inside), Dim.of(k), Dim.of(k)), dtype)
        rows, columns = (tall - k) // stride + 1, (wide - k) // stride + 1

        def convolved(p: Any, q: Any) -> Any:
            total = np.zeros((p.shape[0], q.shape[0], rows, columns))
            for i, j in np.ndindex(k, k):
                part = p[:, :, i : i + stride * rows : stride, j : j + stride * columns : stride]
                part = part[:, :, :rows, :columns]
                total = total + (part[:, None] * q[None, :, :, i, j, None, None]).sum(2)
            return total

        y = self.add(
            f"nn.convolve2d({x.name}, {w.name}, {stride}, 1, 1)",
            (batch, Dim.of(outside), Dim.of(rows), Dim.of(columns)),
            dtype,
            [x, w],
            lambda s, a, b: m.product(convolved, a, b, inside * k * k, dtype),
        )
        if r.random() < 0.6:
            b = self.input((Dim.of(outside), ONE, ONE), dtype)
            y = self.add(
                f"{y.name} + {b.name}",
                y.shape,
                dtype,
                [y, b],
                lambda s, a, c: m.rounded(*m.corners(np.add, a, c), dtype),
            )
        if r.random() < 0.5:
            y = self._relu(y)
        high, wide = r.choice([1, 2]), r.choice([2, 2, 4])
        if rows >= high and columns >= wide and r.random() < 0.5:
            self._pooled(y, (high, wide), (rows // high, columns // wide))

    def _pooled(self, x: Node, size: tuple[int, int], count: tuple[int, int]) -> None:
        """The greatest of windows that share nothing and may leave some places out."""
        (high, wide), (rows, columns) = size, count

        def pool(z: Any) -> Any:
            part = z[:, :, : rows * high, : columns * wide]
            return part.reshape(*z.shape[:2], rows, high, columns, wide).max((3, 5))

        self.add(
            f"{{name}}[b, c, i in 0..{rows}, j in 0..{columns}] = max[m in 0..{high}, "
            f"n in 0..{wide}] {x.name}[b, c, i * {high} + m, j * {wide} + n]",
            (*x.shape[:2], Dim.of(rows), Dim.of(columns)),
            x.dtype,
            [x],
            lambda s, a: Measured(pool(a.v), pool(a.e), a.dtype),
        )

    def _relu(self, x: Node) -> Node:
        text = f"maximum({x.name}, 0.0)"
        return self.add(text, x.shape, x.dtype, [x], lambda s, a: pointwise("relu", a))


def _where(keep: Any, a: Measured, low: float) -> Measured:
    return m.rounded(np.where(keep, a.v, low), np.where(keep, a.e, 0), a.dtype)


def _at_most(a: Measured, bound: float) -> Measured:
    """The same where more is known of errors than they say: weights are in 0..=1."""
    known = np.isfinite(a.e) & np.isfinite(a.v)
    return Measured(a.v, np.where(known, np.minimum(a.e, bound), a.e), a.dtype)
