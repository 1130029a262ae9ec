"""Steps that are sums of products."""

from __future__ import annotations

from typing import Any

import numpy as np

from . import measured as m
from .growing import Growing, Node
from .meanings import explicit
from .measured import FLOATS, Measured
from .sizes import MOST, Dim, Sizes, points

LETTERS = "abcdefghijklmnop"


class Products(Growing):
    """Matrix products, index notation and windows."""

    def make_matmul(self) -> None:
        x = self.pick(*FLOATS, "i8", "u8", "i32", least=1, most=4)
        if not x:
            return
        k = x.shape[-1]
        fits = [
            (n, i)
            for n in self.nodes
            if n.dtype == x.dtype and 1 <= n.rank <= 3
            for i in range(n.rank)
            if n.shape[i] == k
        ]
        if not fits:
            return
        y, axis = self.rng.choice(fits[-8:])
        if y.rank == 1:
            text, wanted, perm = y.name, (k,), [0]
        else:
            perm = [i for i in range(y.rank) if i != axis]
            perm.insert(len(perm) - 1, axis)
            wanted = tuple(y.shape[p] for p in perm)
            text = y.name if perm == sorted(perm) else f"transpose({y.name}, {perm})"
        lead = self.fits(x.shape[:-2], wanted[:-2])
        if lead is None or len(lead) > 2:
            return
        shape = [*lead, *x.shape[-2:-1], *(wanted[-1:] if y.rank > 1 else ())]
        if points([*shape, k]) > MOST:
            return
        dtype = {"i8": "i32", "u8": "i32"}.get(x.dtype, x.dtype)

        def meaning(s: Sizes, a: Measured, b: Measured) -> Measured:
            b = b.seen(lambda z: z.transpose(perm))
            if a.dtype not in FLOATS:
                f = lambda p, q: np.matmul(p.astype(m.INTS[dtype]), q.astype(m.INTS[dtype]))  # noqa: E731
                v = f(a.v, b.v)
                lost = np.matmul(np.where(a.e > 0, 1.0, 0.0), np.ones(b.v.shape))
                lost = lost + np.matmul(np.ones(a.v.shape), np.where(b.e > 0, 1.0, 0.0))
                return Measured(v, np.where(lost > 0, m.UNKNOWN, 0.0), dtype)
            return m.product(np.matmul, a, b, a.v.shape[-1], dtype)

        self.add(f"{x.name} @ {text}", shape, dtype, [x, y], meaning)

    def make_index(self) -> None:
        """Index notation: a sum of products of two tensors that share indices."""
        x, y = self.pick(*FLOATS, least=1, most=3), self.pick(*FLOATS, least=1, most=3)
        if not x or not y or x.dtype != y.dtype:
            return
        letters: list[tuple[str, Dim]] = []

        def indices(node: Node) -> list[str]:
            found: list[str] = []
            for d in node.shape:
                same = [c for c, e in letters if e == d and c not in found]
                if same and self.rng.random() < 0.75:
                    found.append(self.rng.choice(same))
                else:
                    letters.append((LETTERS[len(letters)], d))
                    found.append(letters[-1][0])
            return found

        ix, iy = indices(x), indices(y)
        used = [c for c, _ in letters]
        free = [c for c in used if self.rng.random() < 0.55][:4]
        bound = [c for c in used if c not in free]
        self.rng.shuffle(free)
        sizes = dict(letters)
        spec = f"{''.join(ix)},{''.join(iy)}->{''.join(free)}"
        if not free or points([d for _, d in letters]) > MOST:
            return
        inner = f"{x.name}[{', '.join(ix)}] * {y.name}[{', '.join(iy)}]"
        how = f"sum[{', '.join(bound)}] " if bound else ""
        text = f"{{name}}[{', '.join(free)}] = {how}{inner}"

        def meaning(s: Sizes, a: Measured, b: Measured) -> Measured:
            count = int(np.prod([sizes[c].at(s) for c in bound], dtype=int))
            return m.product(lambda p, q: explicit(spec, p, q), a, b, count, a.dtype)

        self.add(text, [sizes[c] for c in free], x.dtype, [x, y], meaning)

    def make_window(self) -> None:
        """Sums of products of windows: a convolution over the last axis."""
        x = self.pick(*FLOATS, least=1, most=3)
        if not x or x.shape[-1].number not in (5, 8):
            return
        ws = [
            n
            for n in self.nodes
            if n.dtype == x.dtype and n.rank == 1 and n.shape[0].number in (2, 3)
        ]
        if not ws:
            return
        w = self.rng.choice(ws)
        n, k = x.shape[-1].number, w.shape[0].number
        stride = self.rng.choice([1, 2])
        out = (n - k) // stride + 1  # type: ignore[operator]
        lead = LETTERS[5 : 5 + x.rank - 1]
        ii = "".join(f"{c}, " for c in lead)
        text = f"{{name}}[{ii}a in 0..{out}] = sum[b] {x.name}[{ii}a * {stride} + b] * {w.name}[b]"

        def f(p: Any, q: Any) -> Any:
            parts = np.stack([p[..., i * stride : i * stride + k] for i in range(out)], -2)
            return parts @ q

        self.add(
            text,
            [*x.shape[:-1], Dim.of(out)],
            x.dtype,
            [x, w],
            lambda s, a, b: m.product(f, a, b, k or 1, a.dtype),
        )
