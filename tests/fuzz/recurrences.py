"""Steps that compute one position after the other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from . import measured as m
from .growing import Growing, Node
from .meanings import pointwise
from .measured import FLOATS, INTS, Measured
from .sizes import Dim, Shape, Sizes, points, sized

STEPS_MOST = 80
"""Steps of a scan at the largest sizes: each is a launch of its kernels."""


@dataclass(frozen=True)
class Loop:
    """What a scan over the rows of x does: `body` has lines in which `{s}` is what is carried,
    `{x}` a row, `{at}` its position and `{y}` what they make of it; `step` is their meaning."""

    body: str
    step: Callable[..., tuple[Measured, Measured]]
    """Of what is carried, the row, its position, and the values of `others`."""
    carried: tuple[Shape, str]
    made: tuple[Shape, str]
    others: Sequence[Node] = ()


class Recurrences(Growing):
    """Scans that carry values of every dtype, read at them and update them."""

    def _scan(self, x: Node, loop: Loop) -> None:
        """A scan over the first axis of x, forwards or backwards: what it gathers, or its end."""
        n, s, y = x.shape[0], f"s_{self.count}", f"y_{self.count}"
        back, gathers = self.rng.random() < 0.4, self.rng.random() < 0.7
        at = f"{n} - 1 - t" if back else "t"
        carried = f"{s} = {_zeros(*loop.carried)}" + (f", {y} = {_zeros(*loop.made)}")
        head = f"scan t in 0..{n} with {carried.partition(', y_')[0] if gathers else carried}:"
        body = loop.body.format(s=s, x=f"{x.name}[{at}]", y=y, at=f"({at})")
        lines = [head, *(f"    {line}" for line in body.splitlines())]
        lines.append(f"    {{name}}[{at}] = {y}" if gathers else f"{{name}} = {y}")

        def meaning(sizes: Sizes, a: Measured, *others: Measured) -> Measured:
            now, last = _zero(*loop.carried, sizes), _zero(*loop.made, sizes)
            rows = []
            for i in range(len(a.v))[:: -1 if back else 1]:
                now, last = loop.step(now, a.seen(lambda z, i=i: z[i]), i, *others)  # type: ignore[misc]
                rows.append(last)
            if not gathers:
                return last
            rows = rows[::-1] if back else rows
            if not rows:
                return _zero((n, *loop.made[0]), loop.made[1], sizes)
            return Measured(
                np.stack([r.v for r in rows]), np.stack([r.e for r in rows]), last.dtype
            )

        shape = (n, *loop.made[0]) if gathers else loop.made[0]
        self.add("\n".join(lines), shape, loop.made[1], [x, *loop.others], meaning)

    def _rows(self, *dtypes: str, least: int = 1) -> Node | None:
        """What a scan may go over."""
        x = self.pick(*dtypes, least=least, most=3)
        return x if x and points(x.shape[:1]) <= STEPS_MOST else None

    def _elements(self, x: Node, body: str, step: Callable[..., tuple[Measured, Measured]]) -> None:
        """A scan of what is carried for each element of a row."""
        row = (x.shape[1:], x.dtype)
        self._scan(x, Loop(body, step, row, row))

    def make_decayed(self) -> None:
        """Floats: `s = s * 0.5 + tanh(x)`."""
        x = self._rows(*FLOATS)
        if not x or x.dtype.startswith("f8"):
            return

        def step(now: Measured, row: Measured, at: int) -> tuple[Measured, Measured]:
            th = pointwise("tanh", row)
            now = m.rounded(*m.corners(lambda p, q: p * 0.5 + q, now, th), row.dtype, 2)
            return now, m.rounded(now.v * 2, now.e * 2, row.dtype, 2)

        self._elements(x, "{s} = {s} * 0.5 + tanh({x})\n{y} = {s} * 2.0", step)

    def make_counted(self) -> None:
        """Integers, which wrap, and positions: `s = s * 3 + x`."""
        x = self._rows(*INTS)
        if not x:
            return
        kind = INTS[x.dtype]

        def step(now: Measured, row: Measured, at: int) -> tuple[Measured, Measured]:
            now = m.integers(lambda p, q: p * kind(3) + q, now, row, dtype=row.dtype)
            return now, m.integers(lambda p, q: p ^ q, now, row, dtype=row.dtype)

        self._elements(x, "{s} = {s} * 3 + {x}\n{y} = {s} ^ {x}", step)

    def make_seen(self) -> None:
        """Bools that change where x is true; integers that grow to the greatest."""
        x = self._rows("bool", *INTS)
        if not x:
            return
        if x.dtype == "bool":
            body, first, second = (
                "{s} = {s} ^ {x}\n{y} = {s} and {x}",
                np.logical_xor,
                np.logical_and,
            )
        else:
            body, first, second = (
                "{s} = maximum({s}, {x})\n{y} = {s} - {x}",
                np.maximum,
                np.subtract,
            )

        def step(now: Measured, row: Measured, at: int) -> tuple[Measured, Measured]:
            now = m.integers(first, now, row, dtype=row.dtype)
            return now, m.integers(second, now, row, dtype=row.dtype)

        self._elements(x, body, step)

    def make_recurrent(self) -> None:
        """`s = tanh(x + s @ w)`."""
        x = self._rows("f32", "f64", "f16", "bf16", least=2)
        if not x:
            return
        ws = [w for w in self.nodes if w.dtype == x.dtype and w.shape == (x.shape[-1],) * 2]
        ws = ws or [self.input((x.shape[-1],) * 2, x.dtype)]
        w, row = self.rng.choice(ws), (x.shape[1:], x.dtype)

        def step(now: Measured, row: Measured, at: int, by: Measured) -> tuple[Measured, Measured]:
            total = m.product(np.matmul, now, by, by.v.shape[0], row.dtype)
            total = m.rounded(*m.corners(lambda a, b: a + b * 0.25, row, total), row.dtype, 2)
            return (pointwise("tanh", total),) * 2

        body = f"{{s}} = tanh({{x}} + {{s}} @ {w.name} * 0.25)\n{{y}} = {{s}}"
        self._scan(x, Loop(body, step, row, row, [w]))

    def make_chased(self) -> None:
        """A position that follows from the one before, and what is there."""
        x, table = self._rows("i64"), self.pick(least=1, most=3)
        if not x or x.rank != 1 or not table or not (size := table.shape[0].number):
            return

        def step(
            now: Measured, row: Measured, at: int, seen: Measured
        ) -> tuple[Measured, Measured]:
            now = m.integers(lambda p, q: (p * 5 + q + at) % size, now, row, dtype="i64")
            found = seen.seen(lambda z: z[int(now.v)])
            return now, _unless(now, found)

        body = f"{{s}} = ({{s}} * 5 + {{x}} + {{at}}) % {size}\n{{y}} = {table.name}[{{s}}]"
        made = (table.shape[1:], table.dtype)
        self._scan(x, Loop(body, step, ((), "i64"), made, [table]))

    def make_ring(self) -> None:
        """The last rows, in what is carried and updated in place, and the greatest of them."""
        x = self._rows(*INTS, *FLOATS)
        if not x:
            return
        size, row = self.rng.choice([1, 2, 3, 8]), (x.shape[1:], x.dtype)

        def step(now: Measured, row: Measured, at: int) -> tuple[Measured, Measured]:
            v, e = now.v.copy(), np.array(now.e)
            v[at % size], e[at % size] = row.v, row.e
            now = Measured(v, e, now.dtype)
            return now, m.extreme(now, [0], False, "max")

        body = f"{{s}}[{{at}} % {size}] = {{x}}\n{{y}} = max({{s}}, axis=0)"
        self._scan(x, Loop(body, step, ((Dim.of(size), *x.shape[1:]), x.dtype), row))


def _zeros(shape: Shape, dtype: str) -> str:
    zero = "False" if dtype == "bool" else "0"
    return f"full([{', '.join(map(str, shape))}], {zero}, {dtype})"


def _zero(shape: Shape, dtype: str, sizes: Sizes) -> Measured:
    return m.given(np.zeros(sized(shape, sizes), m.numpy_dtype(dtype)), dtype)


def _unless(position: Measured, found: Measured) -> Measured:
    """What is found, of which nothing is known where the position is not."""
    lost = np.where(np.any(position.e), m.UNKNOWN, found.e)
    return Measured(found.v, np.broadcast_to(lost, found.v.shape), found.dtype)
