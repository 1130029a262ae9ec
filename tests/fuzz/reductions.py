"""Steps that compute along axes."""

from __future__ import annotations

import numpy as np

from . import measured as m
from .growing import Growing
from .meanings import falling, masked_softmax, running, softmax, sorted_
from .measured import FLOATS, Measured
from .sizes import ONE, Dim, Sizes


class Reductions(Growing):
    """Sums, extremes, orders, and what is made of them."""

    def make_reduce(self) -> None:
        x = self.pick(least=1)
        if not x:
            return
        name = self.rng.choice(["sum", "mean", "max", "min", "sum", "max"])
        if x.dtype == "bool":
            name = self.rng.choice(["any", "all", "sum", "mean"])
        axes, keep = self.axes(x), self.rng.random() < 0.5
        shape = [ONE if i in axes else d for i, d in enumerate(x.shape) if keep or i not in axes]
        dtype = x.dtype
        if name == "sum" and dtype not in FLOATS:
            dtype = "i64"
        if name == "mean" and dtype not in FLOATS:
            dtype = "f32"
        said = [a if self.rng.random() < 0.6 else a - x.rank for a in axes]
        axis = f"axis={said[0]}" if len(axes) == 1 else f"axis=({', '.join(map(str, said))})"
        text = f"{name}({x.name}, {axis}{', keepdims=True' if keep else ''})"
        if len(axes) == x.rank and not keep and self.rng.random() < 0.5:
            text = f"{name}({x.name})"

        def meaning(s: Sizes, a: Measured) -> Measured:
            if name in ("sum", "mean"):
                return m.total(a, axes, keep, name == "mean")
            if name in ("any", "all"):
                f = np.any if name == "any" else np.all
                v = f(a.v, axis=tuple(axes), keepdims=keep)
                e = np.where(a.e > 0, m.UNKNOWN, 0.0).sum(tuple(axes), keepdims=keep)
                return Measured(v, e, "bool")
            return m.extreme(a, axes, keep, name)

        self.add(text, shape, dtype, [x], meaning)

    def make_argmax(self) -> None:
        x = self.pick(least=1)
        if not x:
            return
        axis = self.rng.randrange(x.rank)
        if x.shape[axis].number in (None, 0):
            return
        name = self.rng.choice(["argmax", "argmin"])

        def meaning(s: Sizes, a: Measured) -> Measured:
            f = np.argmax if name == "argmax" else np.argmin
            v = f(a.v, axis=axis)
            e = np.where(a.e.max(axis) > 0, m.UNKNOWN, 0.0)
            return Measured(v, e, "i64")

        self.add(
            f"{name}({x.name}, axis={axis})",
            x.shape[:axis] + x.shape[axis + 1 :],
            "i64",
            [x],
            meaning,
        )

    def make_cumsum(self) -> None:
        x = self.pick(least=1)
        if not x:
            return
        axis = self.rng.randrange(x.rank)
        dtype = x.dtype if x.dtype in FLOATS else "i64"
        text = f"cumsum({x.name}, axis={axis})"
        self.add(text, x.shape, dtype, [x], lambda s, a: running(a, axis))

    def make_sort(self) -> None:
        x = self.pick(least=1)
        if not x:
            return
        axis, down = self.rng.randrange(x.rank), self.rng.random() < 0.4
        text = f"sort({x.name}, axis={axis}{', descending=True' if down else ''})"

        def meaning(s: Sizes, a: Measured) -> Measured:
            return sorted_(a, axis, down)

        self.add(text, x.shape, x.dtype, [x], meaning)

    def make_topk(self) -> None:
        x = self.pick(least=1)
        if not x:
            return
        axis = self.rng.randrange(x.rank)
        size = x.shape[axis].number
        if not size:
            return
        k = self.rng.randint(1, size)
        shape = [*x.shape]
        shape[axis] = Dim.of(k)

        def values(s: Sizes, a: Measured) -> Measured:
            return sorted_(a, axis, True).seen(lambda z: np.take(z, range(k), axis))

        def places(s: Sizes, a: Measured) -> Measured:
            key = a.v
            order = np.argsort(falling(key), axis=axis, kind="stable")
            e = np.where(a.e.max(axis, keepdims=True) > 0, m.UNKNOWN, 0.0)
            v = np.take(order, range(k), axis).astype(np.int64)
            return Measured(v, np.broadcast_to(e, v.shape), "i64")

        first = self.rng.random() < 0.5
        text = f"{{name}}, unused_{self.count} = topk({x.name}, {k}, axis={axis})"
        if not first:
            text = f"unused_{self.count}, {{name}} = topk({x.name}, {k}, axis={axis})"
        self.add(text, shape, x.dtype if first else "i64", [x], values if first else places)

    def make_softmax(self) -> None:
        x = self.pick(*FLOATS, least=1)
        if not x:
            return
        axis = self.rng.randrange(x.rank)
        log = self.rng.random() < 0.3

        def meaning(s: Sizes, a: Measured) -> Measured:
            return softmax(a, axis, log)

        if log:
            text = f"nn.log_softmax({x.name}, axis={axis})"
        elif self.rng.random() < 0.5:
            text = f"nn.softmax({x.name}, axis={axis})"
        else:
            e, n = f"e_{self.count}", x.name
            text = (
                f"{e} = exp({n} - max({n}, axis={axis}, keepdims=True))\n"
                f"{{name}} = {e} / sum({e}, axis={axis}, keepdims=True)"
            )
        self.add(text, x.shape, x.dtype, [x], meaning)

    def make_masked(self) -> None:
        x = self.pick(*FLOATS, least=1)
        if (
            not x
            or not (found := self.partner(x, "bool"))
            or x.dtype in ("f16", "f8e4m3", "f8e5m2")
        ):
            return
        mask, shape = found
        if shape != x.shape:
            return

        self.add(
            f"nn.masked_softmax({x.name}, {mask.name})",
            x.shape,
            x.dtype,
            [x, mask],
            lambda s, a, c: masked_softmax(a, c),
        )

    def make_norm(self) -> None:
        x = self.pick(*FLOATS, least=1)
        if not x:
            return
        axis = self.rng.randrange(x.rank)
        t = f"t_{self.count}"
        text = (
            f"{t} = {x.name} - mean({x.name}, axis={axis}, keepdims=True)\n"
            f"{{name}} = {t} * rsqrt(mean({t} * {t}, axis={axis}, keepdims=True) + 0.5)"
        )

        def meaning(s: Sizes, a: Measured) -> Measured:
            mean = m.total(a, [axis], True, True)
            c = m.rounded(*m.corners(np.subtract, a, mean), a.dtype)
            square = m.rounded(*m.corners(np.multiply, c, c), a.dtype)
            var = m.total(square, [axis], True, True)
            root = m.rounded(
                *m.corners(lambda z: 1 / np.sqrt(np.maximum(z, 0) + 0.5), var), a.dtype, 4
            )
            return m.rounded(*m.corners(np.multiply, c, root), a.dtype)

        self.add(text, x.shape, x.dtype, [x], meaning)
