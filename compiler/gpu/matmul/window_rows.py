"""Rows of a product in the order of windows that pool it: those of a window after each other.

Where an element of a gathered left operand lies is a part that depends on its row, which may be any
expression; so tiles have whole windows at no more cost than those of adjacent places.
"""

from __future__ import annotations

from dataclasses import replace

from stagefuse.compiler.fusion.join_pooled import Pooled
from stagefuse.compiler.graph import flatten_index, split_index
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.lower.product import Product
from stagefuse.dsl.dims import Expr, const, floordiv, mod
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen


@frozen
class Windows:
    """Windows of the places that are a product's rows: by axis of the rows how many windows there
    are, how many places each has, and how many places there are in all."""

    counts: tuple[Expr, ...]
    places: tuple[int, ...]
    extents: tuple[Expr, ...]

    @staticmethod
    def of(pooled: Pooled, p: Product) -> Windows:
        rows = p.primitive.rows
        counts = tuple(pooled.counts[a] for a in rows)
        return Windows(counts, tuple(pooled.places[a] for a in rows),
                       tuple(p.domain[a] for a in rows))  # fmt: skip

    @property
    def size(self) -> int:
        """Rows of a window."""
        return size_of([const(n) for n in self.places]).as_int() or 1

    def rows_of(self, p: Product) -> Product:
        """The product with the rows of all windows, which may be fewer than its own."""
        return replace(p, rows=size_of(self.counts) * self.size)

    def place(self, window: Expr, facts: Facts) -> list[Expr]:
        """Which window it is along each axis."""
        return split_index(window, self.counts, facts)

    def row_at(self, number: Expr, facts: Facts) -> Expr:
        """The product's row that is the `number`-th in the order of windows."""
        windows = self.place(floordiv(number, self.size), facts)
        inside = split_index(mod(number, self.size), [const(n) for n in self.places], facts)
        at = [w * n + x for w, n, x in zip(windows, self.places, inside, strict=True)]
        return flatten_index(at, self.extents)
