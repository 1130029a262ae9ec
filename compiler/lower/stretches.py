"""Products by stretches of columns: the loops over tiles, and what follows the product."""

from __future__ import annotations

from collections.abc import Callable

from stagefuse.compiler.graph import split_index
from stagefuse.compiler.kernel_ir import Alloc, Index, Load
from stagefuse.compiler.patterns.windows import Windows
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, sym

from .product import Product
from .stripe import Stripe
from .values import Lowering

STRIPE = 1 << 17
"""Elements of a stripe that, with a few rows of the matrix, fit the second-level cache."""
STEPS = 8
"""Steps that a product should have for threads to share."""
COPY = 0.3
"""Cycles to copy an element into a stripe: a vector of 16 takes some five, with its address."""


class Stretches:
    """What the ways of multiplying share."""

    width: int
    tiles: int

    def __init__(self, low: Lowering, p: Product, windows: Windows) -> None:
        self.low, self.p, self.windows = low, p, windows
        self.outer = [*p.batch, *((f"d{a}", p.domain[a]) for a in windows.outer)]

    def blocks(self) -> tuple[str, Expr]:
        block = self.p.row_tile * self.tiles
        return "mb", floordiv(self.p.rows + (block - 1), block, self.low.facts)

    def tiles_of(self, columns: Expr, body: Callable[[Expr, Expr, Expr, Expr], None]) -> None:
        """Runs a body for every panel of a number of columns and every tile down, given the first
        row and the number of rows, the first column and the number of columns."""
        low, p = self.low, self.p
        first = sym("mb") * (p.row_tile * self.tiles)
        end = minimum(first + p.row_tile * self.tiles, p.rows, low.facts)

        def one_panel() -> None:
            column = sym("p") * self.width
            count = minimum(columns - column, const(self.width), low.facts)

            def one_tile() -> None:
                start = first + sym("t") * p.row_tile
                body(start, minimum(end - start, const(p.row_tile), low.facts), column, count)

            if self.tiles == 1:
                return body(first, end - first, column, count)
            tiles = floordiv(end - first + (p.row_tile - 1), p.row_tile, low.facts)
            low.loop("t", const(0), tiles, one_tile)

        panels = floordiv(columns + (self.width - 1), self.width, low.facts)
        low.loop("p", const(0), panels, one_panel)

    def cheapest(
        self, stripe: Stripe, height: int, pieces: int, sizes: tuple[int, int, int, int],
        steps: int, time: Callable[[int, int, int], float],
    ) -> tuple[float, int, int, int]:  # fmt: skip
        """The cycles of what costs least: rows of windows in a step, the width of panels, tiles
        down.

        `sizes` are the pitch of rows, the columns of a piece, channels and rows of the matrix.
        `time` gives the cycles of two vectors of 16 columns by a row of the matrix that a band of
        `columns` takes with panels of a `width`, in so many parts: of the matrix, where there are
        few bands of the image, so that there are some `steps`. Each part copies its stripe again.
        """
        pitch, wide, channels, matrix = sizes
        best: tuple[float, int, int, int] | None = None
        for rows in range(1, height + 1):
            stored = channels * stripe.phases * (rows + stripe.above) * pitch
            if best and stored > STRIPE:
                break
            bands, columns = -(-height // rows), (rows - 1) * pitch + wide
            for width in (48, 64, 32):
                tiles = -(-matrix // self.low.schedule.row_tile[width])
                parts = min(tiles, -(-steps // (bands * pieces)))
                whole = bands * (time(columns, width, parts) + COPY * stored * parts)
                if best is None or whole < 0.995 * best[0]:
                    best = whole, rows, width, -(-tiles // parts)
        assert best is not None
        return best

    def tile(self, panels: int = 1) -> str:
        """Scratch for a tile of each of some panels."""
        name = self.low.name("tile")
        shape = (const(panels), const(self.p.row_tile), const(self.width))
        self.low.emit(Alloc(name, self.p.dtype, shape))
        return name

    def finish(
        self, tile: tuple[str, Expr], start: Expr, rows: Expr, column: Expr, count: Expr,
        pitch: Expr, wide: Expr, origin: tuple[Expr, Expr], every: int = 1,
        lines: Expr | None = None,
    ) -> None:  # fmt: skip
        """Stores `count` columns of a tile (its name and number) from `column` on.

        They are in rows of `pitch` of which `wide` are wanted; row and column 0 of them are at
        `origin` in the result, where their rows lie `every` apart. Of the rows there are so many
        `lines`, where the columns may be more.
        """
        low, p, axes = self.low, self.p, self.windows.axes

        def store(line: Expr, c: Expr, inside: Expr) -> None:
            at: dict[int, Expr] = {x: sym(f"d{x}") for x in p.primitive.batch}
            at.update({a: sym(f"d{a}") for a in self.windows.outer})
            lead = split_index(start + sym("r"), [p.domain[x] for x in p.primitive.rows], low.facts)
            at.update(zip(p.primitive.rows, lead, strict=True))
            at[axes[-1].axis] = origin[1] + c
            if len(axes) > 1:
                at[axes[0].axis] = origin[0] + line * every
            name, place = tile
            load = Load(name, (Index(place), Index(sym("r")), Index(inside)), p.dtype)
            with low.part(low.group, {p.ref: lambda _: load}):
                low.store([at.get(x, const(0)) for x in range(len(p.domain))])

        def one_line() -> None:
            skip = column - sym("s") * pitch  # from the line's first column to the tile's
            begin = maximum(skip, 0, low.facts)
            stop = minimum(skip + count, wide, low.facts)
            low.loop(
                "c", begin, stop, lambda: store(sym("s"), sym("c"), sym("c") - skip), vector=True
            )

        def flat() -> None:
            here = column + sym("c")
            low.loop("c", const(0), count, lambda: store(const(0), here, sym("c")), vector=True)

        def every_row(body: Callable[[], None]) -> None:
            low.loop("r", const(0), rows, body)

        def every_line(body: Callable[[], None]) -> None:
            end = floordiv(column + count + (pitch - 1), pitch, low.facts)
            end = end if lines is None else minimum(end, lines, low.facts)
            low.loop("s", floordiv(column, pitch, low.facts), end, body)

        if len(axes) == 1:
            every_row(flat)
        elif pitch == wide:  # lines without a gap may become one loop
            every_row(lambda: every_line(one_line))
        else:
            every_line(lambda: every_row(one_line))
