"""Steps that move elements."""

from __future__ import annotations

import numpy as np

from . import measured as m
from .growing import Growing
from .measured import FLOATS, Measured
from .sizes import ONE, Dim, Sizes, sized


class Views(Growing):
    """Other shapes, parts, repetitions, and positions read from data."""

    def begin_views(self) -> None:
        """Views of views: what their bounds rest on is several steps away."""
        kinds = ["transpose", "reshape", "slice", "pad", "concat", "broadcast"]
        for kind in self.rng.choices(kinds, (2, 4, 4, 3, 1, 1), k=8):
            self.step("make_" + kind)

    def make_transpose(self) -> None:
        if x := self.pick(least=2):
            perm = list(range(x.rank))
            self.rng.shuffle(perm)
            self.add(
                f"transpose({x.name}, {perm})",
                [x.shape[p] for p in perm],
                x.dtype,
                [x],
                lambda s, a: a.seen(lambda z: z.transpose(perm)),
            )

    def make_reshape(self) -> None:
        x = self.pick(least=1)
        if not x:
            return
        shape = list(x.shape)
        if x.rank > 1 and self.rng.random() < 0.6:
            at = self.rng.randrange(x.rank - 1)
            shape[at : at + 2] = [shape[at] * shape[at + 1]]
        else:
            at = self.rng.randrange(x.rank)
            split = shape[at].factors()
            if split and self.rng.random() < 0.7:
                shape[at : at + 1] = self.rng.choice(split)
            else:
                shape.insert(at, ONE)
        if len(shape) > 5:
            return
        said = [str(d) for d in shape]
        self.add(
            f"reshape({x.name}, [{', '.join(said)}])",
            shape,
            x.dtype,
            [x],
            lambda s, a: a.seen(lambda z: z.reshape(sized(tuple(shape), s))),
        )

    def make_slice(self) -> None:
        x = self.pick(least=1)
        if not x:
            return
        items, texts, shape = [], [], []
        for d in x.shape:
            n = d.number
            kind = self.rng.randrange(6)
            if kind == 0 and n:
                at = self.rng.randrange(-n, n)
                items.append(at)
                texts.append(str(at))
            elif kind == 1:
                items.append(slice(None, None, -1))
                texts.append("::-1")
                shape.append(d)
            elif kind == 2 and n:
                a, b, c = (
                    self.rng.randint(-n, n),
                    self.rng.randint(-n, n + 2),
                    self.rng.choice([1, 2, -1, 3]),
                )
                items.append(slice(a, b, c))
                texts.append(f"{a}:{b}:{c}")
                shape.append(Dim.of(len(range(n)[a:b:c])))
            elif kind > 2 and (spare := self.spare(d)):
                a = self.rng.randint(0, spare)
                b = self.rng.randint(0, spare - a)
                items.append(slice(a, -b or None))
                texts.append(f"{a or ''}:{-b or ''}")
                shape.append(d + -(a + b))
            else:
                items.append(slice(None))
                texts.append(":")
                shape.append(d)
            if self.rng.random() < 0.1 and len(shape) < 4:
                items.append(None)
                texts.append("None")
                shape.append(ONE)
        if all(t == ":" for t in texts):
            return
        self.add(
            f"{x.name}[{', '.join(texts)}]",
            shape,
            x.dtype,
            [x],
            lambda s, a: a.seen(lambda z: z[tuple(items)]),
        )

    def make_broadcast(self) -> None:
        if (x := self.pick(most=3)) and x.rank < 4:
            shape = [
                self.rng.choice(self.dims),
                *(self.rng.choice(self.dims) if d == ONE else d for d in x.shape),
            ]
            self.add(
                f"broadcast_to({x.name}, [{', '.join(map(str, shape))}])",
                shape,
                x.dtype,
                [x],
                lambda s, a: a.seen(lambda z: np.broadcast_to(z, sized(tuple(shape), s))),
            )

    def make_pad(self) -> None:
        x = self.pick(least=1)
        if not x:
            return
        widths = [(self.rng.choice([0, 0, 1, 2]), self.rng.choice([0, 1, 3])) for _ in x.shape]
        value = self.rng.choice([0, 1]) if x.dtype not in FLOATS else self.rng.choice([0.0, -1.5])
        if x.dtype == "bool":
            value = self.rng.random() < 0.5
        self.add(
            f"pad({x.name}, {widths}, value={value})",
            [d + (a + b) for d, (a, b) in zip(x.shape, widths, strict=True)],
            x.dtype,
            [x],
            lambda s, a: Measured(
                np.pad(a.v, widths, constant_values=value), np.pad(a.e, widths), a.dtype
            ),
        )

    def make_concat(self) -> None:
        x = self.pick(least=1)
        if not x:
            return
        axis = self.rng.randrange(x.rank)
        rest = x.shape[:axis] + x.shape[axis + 1 :]
        fits = [
            n
            for n in self.nodes
            if n.dtype == x.dtype
            and n.rank == x.rank
            and n.shape[:axis] + n.shape[axis + 1 :] == rest
        ]
        parts = [x, *self.rng.choices(fits, k=self.rng.randint(1, 2))]
        size = Dim(())
        for p in parts:
            size = size + p.shape[axis]
        self.add(
            f"concat([{', '.join(p.name for p in parts)}], axis={axis})",
            [*x.shape[:axis], size, *x.shape[axis + 1 :]],
            x.dtype,
            parts,
            lambda s, *a: Measured(
                np.concatenate([p.v for p in a], axis),
                np.concatenate([p.e for p in a], axis),
                a[0].dtype,
            ),
        )

    def make_split(self) -> None:
        x = self.pick(least=1)
        if not x:
            return
        axis = self.rng.randrange(x.rank)
        if x.shape[axis].number not in (2, 4, 8, 6):
            return
        half = Dim.of(x.shape[axis].number // 2)  # type: ignore[operator]
        shape = [*x.shape[:axis], half, *x.shape[axis + 1 :]]
        self.add(
            f"{{name}}, other_{self.count} = split({x.name}, 2, axis={axis})",
            shape,
            x.dtype,
            [x],
            lambda s, a: a.seen(lambda z: np.split(z, 2, axis)[0]),
        )

    def make_gather(self) -> None:
        x, ids = self.pick(least=1), self.pick("i64", "i32", "u8", most=2)
        if not x or not ids or x.rank - 1 + ids.rank > 5:
            return
        axis = self.rng.randrange(x.rank)
        n = x.shape[axis].number
        if not n:
            return
        colons = ":, " * axis
        shift = self.rng.choice([0, n // 2]) if ids.dtype != "u8" else 0
        inner = f"{ids.name} % {n}" + (f" - {shift}" if shift else "")

        def meaning(s: Sizes, a: Measured, i: Measured) -> Measured:
            at = i.v % i.v.dtype.type(n) - (i.v.dtype.type(shift) if shift else 0)
            at = at.astype(np.int64)
            v, e = np.take(a.v, at, axis), np.take(a.e, at, axis)
            lost = np.where(i.e > 0, m.UNKNOWN, 0.0)
            lost = lost.reshape((1,) * axis + lost.shape + (1,) * (a.v.ndim - 1 - axis))
            return Measured(v, e + lost, a.dtype)

        self.add(
            f"{x.name}[{colons}{inner}]",
            [*x.shape[:axis], *ids.shape, *x.shape[axis + 1 :]],
            x.dtype,
            [x, ids],
            meaning,
        )

    def make_scatter(self) -> None:
        base, ids = self.pick(least=1, most=3), self.pick("i64", least=1, most=1)
        if not base or not ids or base.dtype == "bool" or not base.shape[0].number:
            return
        n = base.shape[0].number
        wanted = (ids.shape[0], *base.shape[1:])
        updates = [u for u in self.nodes if u.dtype == base.dtype and u.shape == wanted]
        if not updates:
            return
        u = self.rng.choice(updates)
        name = self.rng.choice(["scatter_add", "scatter_max", "scatter_set"])

        def meaning(s: Sizes, b: Measured, i: Measured, w: Measured) -> Measured:
            v, e = b.v.copy(), np.array(b.e, np.float64)
            size = np.abs(v.astype(np.float64)) + e
            if i.e.any():
                return Measured(v, np.full(v.shape, m.UNKNOWN), b.dtype)
            with np.errstate(all="ignore"):
                for row, at in enumerate(i.v % n):
                    if name == "scatter_set":
                        v[at], e[at] = w.v[row], w.e[row]
                    elif name == "scatter_max":
                        v[at], e[at] = np.maximum(v[at], w.v[row]), np.maximum(e[at], w.e[row])
                    else:
                        v[at], e[at] = v[at] + w.v[row], e[at] + w.e[row]
                        size[at] += np.abs(w.v[row].astype(np.float64)) + w.e[row]
                if name != "scatter_add" or b.dtype not in FLOATS:
                    return Measured(v, e, b.dtype)
                return m.rounded(
                    v,
                    e + (len(i.v) + 2) * m.unit(b.dtype) * np.where(np.isfinite(size), size, 0),
                    b.dtype,
                )

        self.add(
            f"{name}({base.name}, {ids.name} % {n}, {u.name})",
            base.shape,
            base.dtype,
            [base, ids, u],
            meaning,
        )

    def make_update(self) -> None:
        x = self.pick(least=1, most=3)
        if not x or (x.shape[0].number or 0) < 2:
            return
        fits = [n for n in self.nodes if n.dtype == x.dtype and n.shape == x.shape[1:]]
        if not fits:
            return
        y, at = self.rng.choice(fits), self.rng.choice([0, 1, -1])

        def meaning(s: Sizes, a: Measured, b: Measured) -> Measured:
            v, e = a.v.copy(), np.array(a.e)
            v[at], e[at] = b.v, b.e
            return Measured(v, e, a.dtype)

        self.add(
            f"{{name}} = {x.name}\n{{name}}[{at}] = {y.name}", x.shape, x.dtype, [x, y], meaning
        )
