"""Rows of a product in the order of windows that pool it: those of a window after each other.

Where an element of a gathered left operand lies is a part that depends on its row, which may be any
expression; so tiles have whole windows at no more cost than those of adjacent places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from math import prod

from stagefuse.compiler.fusion.join_pooled import Pooled
from stagefuse.compiler.graph import flatten_index, split_index
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.lower.product import Product
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen


@frozen
class Windows:
    """Windows of the places that are a product's rows: by axis of the rows how many windows there
    are, how many places each has, and how many places there are in all.

    The rows of a window follow each other; or in tiles of so many rows the first places of as many
    windows as a tile has, then the second ones, and so on: what copies bring that each go from
    window to window.
    """

    counts: tuple[Expr, ...]
    places: tuple[int, ...]
    extents: tuple[Expr, ...]
    tile: int = 0

    @staticmethod
    def of(pooled: Pooled, p: Product, tile: int = 0) -> Windows:
        rows = p.primitive.rows
        return Windows(
            tuple(pooled.counts[a] for a in rows), tuple(pooled.places[a] for a in rows),
            tuple(p.domain[a] for a in rows), tile,
        )  # fmt: skip

    @property
    def size(self) -> int:
        """Rows of a window."""
        return prod(self.places)

    @property
    def count(self) -> Expr:
        """All windows."""
        return size_of(self.counts)

    def rows_of(self, p: Product) -> Product:
        """The product with the rows of all windows, which may be fewer than its own, or of tiles
        that have them all."""
        rows = self.count * self.size
        if self.tile:
            rows = floordiv(rows + (self.tile - 1), self.tile) * self.tile
        return replace(p, rows=rows)

    def place(self, window: Expr, facts: Facts) -> list[Expr]:
        """Which window it is along each axis."""
        return split_index(window, self.counts, facts)

    def at_place(
        self, exprs: Sequence[Expr], window: Expr, number: Expr, facts: Facts
    ) -> list[Expr]:
        """Expressions over the product's row `i` for that of a place of a window."""
        inside = split_index(number, [const(n) for n in self.places], facts)
        names = [f"w{n}" for n in range(len(self.counts))]
        ranges = zip(names, self.counts, strict=True)
        inner = facts.with_ranges({name: (0, count - 1) for name, count in ranges})
        each = zip(names, self.places, inside, strict=True)
        row = flatten_index([sym(name) * n + x for name, n, x in each], self.extents)
        place = dict(zip(names, self.place(window, facts), strict=True))
        return [e.substitute({"i": row}, inner).substitute(place, facts) for e in exprs]

    def find(self, row: Expr) -> tuple[Expr, Expr]:
        """The window that a row in this order belongs to, and which of its places it is."""
        if not self.tile:
            return floordiv(row, self.size), mod(row, self.size)
        each = self.tile // self.size
        window = floordiv(row, self.tile) * each + mod(row, each)
        return window, floordiv(mod(row, self.tile), each)

    def in_order(self, exprs: Sequence[Expr], facts: Facts) -> tuple[Expr, ...]:
        """Expressions over the product's row `i` for the `i`-th row in this order."""
        return tuple(self.at_place(exprs, *self.find(sym("i")), facts))

    def beyond(self, facts: Facts) -> list[Expr]:
        """What is at least 0 for the rows `i` in this order that belong to a window: other windows
        are not along the first axis."""
        window, _ = self.find(sym("i"))
        ends = zip(self.place(window, facts), self.counts, strict=True)
        found = [count - 1 - at for at, count in ends if count.as_int() != 1]
        return found[:1] if self.tile else []

    def row_in_tile(self, window: Expr, number: Expr) -> Expr:
        """Where a place of a tile's `window` is there."""
        if not self.tile:
            return window * self.size + number
        return number * (self.tile // self.size) + window
