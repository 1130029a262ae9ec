"""Steps that read and write at positions that come from data."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import measured as m
from .growing import Growing, Node
from .measured import FLOATS, Measured
from .sizes import Dim, Sizes


class Positions(Growing):
    """Slices and updates that begin where data says, and elements at several positions at once."""

    def _start(self, size: int) -> tuple[Node, str, Any] | None:
        """A node, a line that binds `at` to one of `size` positions, and what that is."""
        ids = self.pick("i64", "i32", "i16", "u8", "bool")
        if not ids:
            return None
        axes = tuple(range(ids.rank))
        back = self.rng.choice([0, 0, size])
        total = f"sum({ids.name})" if ids.rank else f"i64({ids.name})"
        line = f"at_{self.count} = {total} % {size}" + (f" - {back}" if back else "")
        return ids, line, lambda a: int(np.sum(a.v, axis=axes, dtype=np.int64)) % size

    def _along(self, x: Node) -> tuple[int, int, Node, str, Any] | None:
        """An axis of x, its size, and a position of it as `_start` has it."""
        axis = self.rng.randrange(x.rank)
        n = x.shape[axis].number
        found = self._start(n) if n else None
        return (axis, n, *found) if n and found else None

    def make_run(self) -> None:
        """`x[at : at + length]`."""
        x = self.pick(least=1)
        if not x or not (found := self._along(x)):
            return
        axis, n, ids, line, position = found
        length = self.rng.randint(0, n)
        start = f"at_{self.count} % {n - length + 1}"
        line = f"{line}\nfrom_{self.count} = {start}"
        item = f"from_{self.count} : from_{self.count} + {length}"

        def meaning(s: Sizes, a: Measured, i: Measured) -> Measured:
            at = self._at(line, position(i), n) % (n - length + 1)
            return _known(a.seen(lambda z: np.take(z, range(at, at + length), axis)), i)

        shape = [*x.shape]
        shape[axis] = Dim.of(length)
        text = f"{line}\n{{name}} = {x.name}[{':, ' * axis}{item}]"
        self.add(text, shape, x.dtype, [x, ids], meaning)

    @staticmethod
    def _at(line: str, position: int, size: int) -> int:
        """The value of `at`, which may count from the end."""
        return position - size if f" - {size}" in line else position

    def make_put(self) -> None:
        """`x[at] = ...`, `x[:, at : at + length] = ...` and the like, in a copy of x."""
        x = self.pick(least=1, most=3)
        if not x or not (found := self._along(x)):
            return
        axis, n, ids, line, position = found
        value, said = self._number(x.dtype)
        length = self.rng.choice([0, 1, 1, n])
        item = f"at_{self.count}"
        if length > 1:
            line = f"{line}\nto_{self.count} = at_{self.count} - at_{self.count}"
            item = f"to_{self.count} : to_{self.count} + {length}"
        parents = [x, ids]
        fits = [y for y in self.nodes if y.dtype == x.dtype and y.shape == x.shape[1:]]
        if axis == 0 and length <= 1 and fits:
            parents.append(self.rng.choice(fits))
            said = parents[-1].name

        def meaning(s: Sizes, a: Measured, i: Measured, *given: Measured) -> Measured:
            v, e = a.v.copy(), np.array(a.e)
            at = position(i) if length <= 1 else slice(0, length)
            place = (slice(None),) * axis + (at,)
            v[place], e[place] = (given[0].v, given[0].e) if given else (value, 0.0)
            return _known(Measured(v, e, a.dtype), i)

        text = f"{line}\n{{name}} = {x.name}\n{{name}}[{':, ' * axis}{item}] = {said}"
        self.add(text, x.shape, x.dtype, parents, meaning)

    def make_puts(self) -> None:
        """`x[ids] = ...`: of repeated positions the last holds."""
        x, ids = self.pick(least=1, most=3), self.pick("i64", "i32", "u8", least=1, most=1)
        if not x or not ids or not (n := x.shape[0].number):
            return
        value, said = self._number(x.dtype)
        wanted = (ids.shape[0], *x.shape[1:])
        fits = [y for y in self.nodes if y.dtype == x.dtype and y.shape == wanted]
        parents = [x, ids]
        if fits:
            parents.append(self.rng.choice(fits))
            said = parents[-1].name

        def meaning(s: Sizes, a: Measured, i: Measured, *given: Measured) -> Measured:
            v, e = a.v.copy(), np.array(a.e)
            for row, at in enumerate(i.v % i.v.dtype.type(n)):
                v[at], e[at] = (given[0].v[row], given[0].e[row]) if given else (value, 0.0)
            return _known(Measured(v, e, a.dtype), i)

        text = f"{{name}} = {x.name}\n{{name}}[{ids.name} % {n}] = {said}"
        self.add(text, x.shape, x.dtype, parents, meaning)

    def make_pairs(self) -> None:
        """`x[i, j]` with two tensors of positions, or each with its own index."""
        x, i = self.pick(least=2), self.pick("i64", "i32", "u8", most=2)
        if not x or not i or not (found := self.partner(i)):
            return
        j, shape = found
        tall, wide = x.shape[0].number, x.shape[1].number
        if not tall or not wide or len(shape) + x.rank - 2 > 5:
            return
        outer = i.rank == j.rank == 1 and self.rng.random() < 0.5
        rest = x.shape[2:]

        def meaning(s: Sizes, a: Measured, p: Measured, q: Measured) -> Measured:
            rows, columns = p.v % p.v.dtype.type(tall), q.v % q.v.dtype.type(wide)
            lost = [np.where(z.e > 0, m.UNKNOWN, 0.0) for z in (p, q)]
            if outer:
                rows, lost[0] = rows[:, None], lost[0][:, None]
            total = lost[0] + lost[1]
            total = total.reshape(total.shape + (1,) * len(rest))
            return Measured(a.v[rows, columns], a.e[rows, columns] + total, a.dtype)

        if outer:
            names = [f"c{k}" for k in range(len(rest))]
            left = ", ".join(["a", "b", *names])
            at = ", ".join([f"{i.name}[a] % {tall}", f"{j.name}[b] % {wide}", *names])
            text, shape = f"{{name}}[{left}] = {x.name}[{at}]", (i.shape[0], j.shape[0])
        else:
            text = f"{x.name}[{i.name} % {tall}, {j.name} % {wide}]"
        self.add(text, [*shape, *rest], x.dtype, [x, i, j], meaning)

    def _number(self, dtype: str) -> tuple[Any, str]:
        if dtype == "bool":
            return True, "True"
        value: Any = self.rng.choice([0.5, -1.5] if dtype in FLOATS else [0, 7])
        return value, str(value)


def _known(found: Measured, position: Measured) -> Measured:
    """The same, or nothing that is known where the position is not."""
    if not np.any(position.e):
        return found
    return Measured(found.v, np.full(found.v.shape, m.UNKNOWN), found.dtype)
