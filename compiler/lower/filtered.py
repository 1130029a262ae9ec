"""Convolutions by minimal filtering: see `filtering`.

A step copies the part of the source that its windows see into a stripe, phases of two apart. Each
panel of windows is transformed once; tiles of the matrix multiply it at all positions, and their
products become tiles of the result. A stripe that has an infinity, a NaN or numbers whose sums may
leave f32's range is convolved without: no result depends on what its own window does not see.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import product as every
from typing import TypeAlias

from stagefuse.compiler.graph import flatten_index, split_index
from stagefuse.compiler.kernel_ir import (
    Alloc,
    Const,
    Fold,
    Index,
    Load,
    Local,
    Op,
    Store,
    TileProduct,
    Value,
)
from stagefuse.compiler.patterns.filtering import (
    AFTER,
    BEFORE,
    LARGEST,
    OF_ELEMENTS,
    OF_PRODUCTS,
    PLACES,
    RESULTS,
    Filtering,
)
from stagefuse.compiler.patterns.panel_width import LANES, panels_time
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.dtypes import BOOL

from .blocks import Parallel
from .expressions import at_least_one
from .product import Product
from .stretches import STEPS, STRIPE, Stretches
from .stripe import Stripe
from .values import Lowering

LEAST_STEPS = STEPS // 2
"""Steps that a product should have: each transforms its panels anew."""
AGAIN = 0.1
"""Cycles to read an element of the matrix again, for the next panel."""
Grid: TypeAlias = Mapping[tuple[int, ...], Value]
"""Values by their place along each axis of windows."""


class Filtered(Stretches):
    """A convolution by minimal filtering."""

    def __init__(self, low: Lowering, p: Product, found: Filtering) -> None:
        super().__init__(low, p, found.windows)
        self.found = found
        self.stripe = stripe = Stripe(low, found.windows, p.dtype)
        plane = (stripe.channels.as_int() or 1) * stripe.phases * (1 + stripe.above)
        most = max(STRIPE // plane // 48 * 48, 48)
        self.wide, self.pitch = stripe.columns(most, most)
        self.rows, self.width, self.tiles = self._choice()
        self.p = replace(p, row_tile=low.schedule.row_tile[self.width])
        stripe.shape(self.rows, self.wide, self.pitch, self.width)

    def _choice(self) -> tuple[int, int, int]:
        """What costs least; transforms are made in each part of the matrix again."""
        stripe, found = self.stripe, self.found
        height = 1 if stripe.across is None else stripe.across.size.as_int() or 1
        pitch, wide = self.pitch.as_int() or 1, self.wide.as_int() or 1
        matrix, channels = self.p.rows.as_int() or 1, stripe.channels.as_int() or 1
        pieces = -(-(stripe.along.size.as_int() or 1) // wide)

        def time(columns: int, width: int, parts: int) -> float:
            panels = -(-columns // width)
            one = (panels_time(columns, width) / 2 + AGAIN * panels) * matrix * found.depth
            changed = panels * width // LANES * (AFTER * matrix + BEFORE * found.depth * parts)
            return found.positions * (one + changed)

        sizes = pitch, wide, channels, matrix
        return self.cheapest(stripe, height, pieces, sizes, LEAST_STEPS, time)[1:]

    def lower(self) -> Parallel:
        low, p, stripe = self.low, self.p, self.stripe
        parallel = [*self.outer, *stripe.steps(), self.blocks()]
        low.bind(parallel)
        _, _, rows, wide = stripe.part()
        stripe.alloc()
        with low.part(low.group.packs[p.operands[1]], {}):
            stripe.fill(low.graph.nodes[p.operands[1].node].operands[0], self.windows.fill)
        is_small = self._is_small()
        columns = (rows - 1) * self.pitch + wide
        size = self.found.positions * self.width
        panel, products = low.name("panel"), low.name("products")
        low.emit(Alloc(panel, p.dtype, (const(size * self.found.depth),)))
        low.emit(Alloc(products, p.dtype, (const(size * p.row_tile),)))
        axes = self.found.filtered
        down = RESULTS if len(axes) == 2 and axes[0] else 1
        across = RESULTS if axes[-1] else 1
        tile = low.name("tile")
        low.emit(Alloc(tile, p.dtype, (const(down), const(p.row_tile), const(self.width * across))))
        first = sym("mb") * (p.row_tile * self.tiles)
        end = minimum(first + p.row_tile * self.tiles, p.rows, low.facts)

        def one_tile(column: Expr, count: Expr) -> None:
            start = first + sym("t") * p.row_tile
            rows = minimum(end - start, const(p.row_tile), low.facts)

            def multiplied() -> None:
                self._multiply(panel, products, start, rows, count)
                self._results(products, tile, rows)

            low.branch(is_small, multiplied)
            low.branch(
                Op("not", (is_small,), BOOL),
                lambda: self._plain(products, tile, start, rows, column),
            )
            self._finish(tile, start, rows, column, count, down, across)

        def one_panel() -> None:
            column = sym("p") * self.width
            count = minimum(columns - column, const(self.width), low.facts)
            self._transform(panel, column)
            tiles = floordiv(end - first + (p.row_tile - 1), p.row_tile, low.facts)
            low.loop("t", const(0), tiles, lambda: one_tile(column, count))

        panels = floordiv(columns + (self.width - 1), self.width, low.facts)
        low.loop("p", const(0), panels, one_panel)
        return parallel, at_least_one(p.depth) * (self.rows * RESULTS * self.wide * RESULTS)

    def _is_small(self) -> Value:
        """Whether sums of the stripe's elements stay finite."""
        low, stripe = self.low, self.stripe
        size = stripe.channels * stripe.phases * stripe.plane
        element = Load(stripe.name, (Index(sym("z")),), self.p.dtype)
        name = low.name("total")
        low.emit(
            Fold(name, "sum", (("z", size),), Op("abs", (element,), self.p.dtype), self.p.dtype)
        )
        total = Local(name, self.p.dtype)
        return Op("le", (total, Const(LARGEST, self.p.dtype)), BOOL)

    def _transform(self, panel: str, column: Expr) -> None:
        """What is multiplied at each position, of the windows from a column on, all channels."""
        low, found = self.low, self.found
        names, sizes = [n for n, _, _ in found.digits], [size for _, size, _ in found.digits]
        depth = flatten_index([sym(n) for n in names], sizes)

        def one_vector() -> None:
            grid: dict[tuple[int, ...], Value] = {}
            for at in self._grid(PLACES):
                digits = {n: sym(n) for n in names}
                for axis, yes, x in zip(found.windows.axes, found.filtered, at, strict=True):
                    if yes:
                        digits[axis.shifts[0][0]] = const(x)
                place = self.stripe.place(digits)
                index = Index(place + column + sym("x"))
                grid[at] = Load(self.stripe.name, (index,), self.p.dtype)
            for position, value in enumerate(self._applied(OF_ELEMENTS, grid).values()):
                row = depth + position * found.depth
                low.emit(Store(panel, (Index(row * self.width + sym("x")),), value))

        def one_step(left: Sequence[tuple[str, Expr]]) -> None:
            if not left:
                return self._columns(one_vector)
            (name, size), *rest = left
            low.loop(name, const(0), size, lambda: one_step(rest))

        one_step(list(zip(names, sizes, strict=True)))

    def _grid(self, most: int) -> Iterator[tuple[int, ...]]:
        """The places of a window along its axes, `most` along those that are filtered."""
        return every(*(range(most if yes else 1) for yes in self.found.filtered))

    def _applied(self, matrix: Sequence[Sequence[int]], grid: Grid) -> Grid:
        """A matrix applied to values along each axis that is filtered."""
        for axis, yes in enumerate(self.found.filtered):
            if yes:
                others = dict.fromkeys((at[:axis], at[axis + 1 :]) for at in grid)
                grid = {
                    (*before, n, *after): self._combined(
                        row, [grid[(*before, x, *after)] for x in range(PLACES)]
                    )
                    for before, after in others
                    for n, row in enumerate(matrix)
                }
        return dict(sorted(grid.items()))

    def _combined(self, signs: Sequence[int], values: Sequence[Value]) -> Value:
        """A sum of values with signs, not all of which are negative."""
        plus = [v for sign, v in zip(signs, values, strict=True) if sign > 0]
        minus = [v for sign, v in zip(signs, values, strict=True) if sign < 0]
        total, *rest = plus
        for value in rest:
            total = Op("add", (total, value), self.p.dtype)
        for value in minus:
            total = Op("sub", (total, value), self.p.dtype)
        return total

    def _multiply(
        self, panel: str, products: str, start: Expr, rows: Expr, count: Expr
    ) -> None:  # fmt: skip
        """The products of a tile's rows by a panel, at all positions."""
        low, p, found = self.low, self.p, self.found
        taps, depth = low.buffer(p.operands[2], "in"), const(found.depth)

        def one() -> None:
            matrix = p.lead * found.positions + sym("q")
            low.emit(
                TileProduct(
                    products, sym("q") * (p.row_tile * self.width), const(self.width),
                    taps.name, (matrix * p.rows + start) * depth, depth, const(1),
                    panel, sym("q") * (depth * self.width), rows, depth,
                    p.row_tile, self.width, width=count,
                )
            )  # fmt: skip

        low.loop("q", const(0), const(found.positions), one)

    def _results(self, products: str, tile: str, rows: Expr) -> None:
        """A tile of results of the products at all positions."""
        grid = {at: self._product(products, n) for n, at in enumerate(self._grid(PLACES))}
        self._interleave(tile, rows, self._applied(OF_PRODUCTS, grid))

    def _product(self, products: str, position: int) -> Load:
        """An element of the products at a position."""
        row = position * self.p.row_tile + sym("r")
        return Load(products, (Index(row * self.width + sym("x")),), self.p.dtype)

    def _interleave(self, tile: str, rows: Expr, results: Grid) -> None:
        """Stores the results of windows beside each other, those of different rows apart."""
        low, step = self.low, RESULTS if self.found.filtered[-1] else 1

        def one_vector() -> None:
            for at, value in results.items():
                line = at[0] if len(at) == 2 else 0
                place = (const(line), sym("r"), sym("x") * step + at[-1])
                low.emit(Store(tile, tuple(map(Index, place)), value))

        low.loop("r", const(0), rows, lambda: self._columns(one_vector))

    def _columns(self, body: Callable[[], None]) -> None:
        self.low.loop("x", const(0), const(self.width), body, vector=True)

    def _plain(self, products: str, tile: str, start: Expr, rows: Expr, column: Expr) -> None:
        """The same without filtering: a tap of a channel after the other, times all columns."""
        low, p, plain = self.low, self.p, self.found.plain
        left = low.buffer(p.operands[0], "in")
        totals = {at: self._product(products, n) for n, at in enumerate(self._grid(RESULTS))}

        def one_tap() -> None:
            digits = {n: sym(n) for n, _, _ in plain.digits}
            depth = const(0)
            for name, _, size in plain.digits:
                depth = depth + sym(name) * size
            flat = p.base + (start + sym("r")) * p.primitive.row_stride + depth
            place = split_index(flat, left.shape, low.facts)
            weight = Load(left.name, tuple(map(Index, place)), p.dtype)
            for at, total in totals.items():
                moved = dict(digits)
                for axis, yes, x in zip(plain.axes, self.found.filtered, at, strict=True):
                    if yes:
                        moved[axis.shifts[0][0]] = axis.shift().substitute(digits) + x
                where = Index(self.stripe.place(moved) + column + sym("x"))
                term = Op("mul", (weight, Load(self.stripe.name, (where,), p.dtype)), p.dtype)
                low.emit(Store(products, total.indices, Op("add", (total, term), p.dtype)))

        def taps(left: Sequence[tuple[str, Expr]]) -> None:
            if not left:
                return self._columns(one_tap)
            (name, size), *rest = left
            low.loop(name, const(0), size, lambda: taps(rest))

        def clear() -> None:
            for total in totals.values():
                low.emit(Store(products, total.indices, Const(0.0, p.dtype)))

        def one_row() -> None:
            self._columns(clear)
            taps([(n, size) for n, size, _ in plain.digits])

        low.loop("r", const(0), rows, one_row)
        self._interleave(tile, rows, totals)

    def _finish(
        self, tile: str, start: Expr, rows: Expr, column: Expr, count: Expr, down: int, across: int
    ) -> None:
        """Stores a tile, its rows of results one after the other."""
        y0, x0, lines, _ = self.stripe.part()
        plain, x0 = self.found.plain.axes, x0 * across
        wide = minimum(plain[-1].size - x0, self.wide * across, self.low.facts)
        if len(plain) == 1:
            count = minimum(count * across, wide - column * across, self.low.facts)
            return self.finish(
                (tile, const(0)), start, rows, column * across, count, self.pitch, wide, (y0, x0)
            )
        for line in range(down):
            left = plain[0].size - y0 * down - line
            lines = minimum(lines, floordiv(left + (down - 1), down), self.low.facts)
            self.finish(
                (tile, const(line)), start, rows, column * across, count * across,
                self.pitch * across, wide, (y0 * down + line, x0), down, lines,
            )  # fmt: skip
