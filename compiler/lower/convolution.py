"""Convolutions, and products whose panels are rows of a tensor as it lies, by stretches.

A step copies the part of the source that its columns see into a stripe. Columns are counted flat
over it, the gap between its rows included, and row k of a panel is the stripe from some place on. A
source whose rows are adjacent anyway is read where it lies.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from stagefuse.compiler.cpu.values import renamed
from stagefuse.compiler.fusion.join_operands import THIN, THIN_NARROW
from stagefuse.compiler.graph import flatten_index, split_index
from stagefuse.compiler.kernel_ir import Alloc, Const, Index, Load, Op, Store, TileProduct, Value
from stagefuse.compiler.patterns.filtering import filtering_of
from stagefuse.compiler.patterns.panel_width import LANES, PANELS, panels_time
from stagefuse.compiler.patterns.windows import (
    FEW_ROWS,
    Windows,
    is_worth_it,
    step_in_place,
    windows_of,
)
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, mod, sym

from .blocks import Parallel
from .expressions import at_least_one, product_of
from .few_rows import is_converted, lower_few_rows
from .filtered import Filtered
from .product import Depth, Matrix, Product, product_of_group
from .products import either, lower_contract
from .stretches import STEPS, STRIPE, Stretches
from .stripe import Stripe
from .values import Lowering

STRETCH = 480
"""Columns of a step where any number will do: ten panels of 48, five vectors of AVX-512 in six."""
SHALLOW = 512
"""Rows of the other matrix that stay in the first-level cache for all rows of a result."""
ADJACENT, TOGETHER = 512, 4
"""Columns of a step where rows are read where they lie, eight panels of 64; of few rows so many
times as many."""
BAND, BYTE_BAND = 32, 256
"""Rows of the other matrix that few rows take at a time; the same of 8 bits."""
CLOSE, WAYS = 4096, 8
"""Rows that lie a multiple of so many bytes apart share a set of the first-level cache, which has
so many ways: it keeps no band of more rows than that."""
FEWEST, FAR = 2, 4
"""Rows of a product for which bands are so short with AVX-512; how many times CLOSE is very far."""
NEAR = 1 << 12
"""Elements of the other matrix up to which it stays in the first-level cache without bands."""
COPIED, COPIED_CLOSE, COPIED_CLOSE_NARROW, LINE = 40, 32, 12, 64
"""Rows of a product for which bands of the other matrix are copied; where its rows displace each
other in the cache, and where panels are narrow too; bytes of a line of the cache."""
COPIED_BAND = 64
"""Rows of a band that is copied."""
SPREAD = 8
"""Shifts along a row that may lie in planes of their own."""
HIGH = 64
"""Rows that an image is taken to have where that is not known."""


def lower_product(low: Lowering) -> Parallel:
    """A product by stretches of its source where that is better, else with packed panels."""
    p = product_of_group(low, low.group.anchor)
    windows = None
    if p.operands[1] in low.group.packs:
        windows = windows_of(low.graph, p.ref.node)
    wanted = windows is not None and is_worth_it(low.graph, p.ref.node, windows)
    step = None if windows is None else step_in_place(low.graph, windows)
    if low.group.thin and step is None and (found := lower_few_rows(low, p)) is not None:
        return found
    if windows is None or not (wanted or low.group.thin):
        return lower_contract(low)
    most, source = low.facts.bounds(p.rows)[1], low.graph.type(windows.source)
    depth = p.depth.as_int()
    few = low.group.thin or (most is not None and most <= FEW_ROWS)
    few = few or (depth is not None and depth <= SHALLOW)
    alone = low.group.packs[p.operands[1]].members == {p.operands[1].node}
    alone = alone or (low.group.thin and is_converted(low, p))
    if few and alone and source.dtype == p.stored and step is not None:
        return _Direct(low, p, windows, step).lower()
    filtering = filtering_of(low.graph, p.ref.node) if len(p.operands) > 2 else None
    if filtering is not None:
        return Filtered(low, p, filtering).lower()
    return _Striped(low, p, windows).lower()


class _Operands(NamedTuple):
    """The buffers of the left matrix and of the other one, of whose columns those from `first` on
    are taken: column 0 of its first row is at `base`, rows are `step` apart. Where it is `copied`,
    that is a band of scratch for those columns of some rows."""

    left: str
    other: str
    base: Expr
    step: Expr
    first: Expr
    copied: bool = False


class _Direct(Stretches):
    """Rows of panels read where they lie.

    Few rows of the matrix wait for the other one's: they take it in bands of some of its rows, so
    that it is read along its lines.
    """

    def __init__(self, low: Lowering, p: Product, windows: Windows, step: Expr) -> None:
        super().__init__(low, p, windows)
        self.step = step
        self.columns = product_of([a.size for a in windows.axes])
        self.width = self._width()
        self.p = p.tiled(low, self.width)
        most = low.facts.bounds(p.rows)[1]
        self.converts = is_converted(low, p)
        alone = len(windows.axes) == 1
        in_bands = most is None or most <= (FEW_ROWS if alone else self.p.row_tile)
        in_bands = in_bands or (low.group.thin and most is not None and most > FEW_ROWS)
        depth, columns = p.depth.as_int(), self.columns.as_int()
        is_near = depth is not None and columns is not None and depth * columns <= NEAR
        is_near = is_near or (depth is not None and depth <= self.band)
        self.is_thin = (in_bands and not is_near) or self.converts
        highest = FEW_ROWS if most is None or not self.is_thin else min(most, FEW_ROWS)
        if self.is_thin and low.group.thin:
            highest = min(highest, THIN_NARROW if p.panel == LANES else THIN)
        self.tiles = max(1, -(-highest // self.p.row_tile))

    @property
    def band(self) -> int:
        """Rows of the other matrix that are taken at a time."""
        return BYTE_BAND if self.p.of_bytes else BAND

    def _width(self) -> int:
        """The width of panels that takes the least time; there may be fewer columns in the last.
        Of few rows the widest: a row of it is the more bytes that lie side by side."""
        columns = self.columns.as_int()
        widths = sorted(PANELS, reverse=True) if self.low.group.thin else list(PANELS)
        if columns is None:
            return widths[0]
        return min(widths, key=lambda width: panels_time(columns, width))

    def _apart(self, lines: int = 1) -> Expr:
        """What is 0 where rows of the other matrix are a multiple of so many times CLOSE apart, and
        less elsewhere."""
        return -mod(self.step, lines * CLOSE // self.p.dtype.itemsize, self.low.facts)

    def _are_close(self) -> list[Expr]:
        """What is at least 0 where rows of the other matrix displace each other in the cache, and a
        band of as many as it has ways takes less time: of few rows, since a short band makes tiles
        of more rows dear; with AVX2, whose tiles read a line of each row at a time, of any number
        where the rows are very far apart."""
        rows, facts = self.p.rows, self.low.facts
        if self.p.panel != LANES:
            return [self._apart(), FEWEST - rows]
        return [self._apart(), maximum(WAYS - rows, self._apart(FAR), facts)]

    def _is_copied(self) -> Expr:
        """What is at least 0 where a band of the other matrix is copied to scratch first."""
        rows, facts = self.p.rows, self.low.facts
        least = COPIED_CLOSE_NARROW if self.p.panel == LANES else COPIED_CLOSE
        return maximum(rows - COPIED, minimum(rows - least, self._apart(), facts), facts)

    def lower(self) -> Parallel:
        """Of few rows a step takes as many stretches of columns together as leave two steps: the
        other matrix is read the faster the longer its rows are. Where that is not known, the step
        of each stretch but the first of them is empty."""
        low, p = self.low, self.p
        stretch, most = ADJACENT // self.width * self.width, self._together()
        pieces = floordiv(self.columns + (stretch - 1), stretch, low.facts)
        few = maximum(const(1), minimum(const(most), THIN + most - p.rows, low.facts), low.facts)
        together = minimum(maximum(floordiv(pieces, 2), 1), few, low.facts)
        if known := together.as_int():
            stretch, together, most = stretch * known, const(1), 1
            pieces = floordiv(self.columns + (stretch - 1), stretch, low.facts)
        parallel = [*self.outer, self.blocks(), ("nb", pieces)]
        low.bind(parallel)
        first = sym("nb") * stretch
        whole = [-mod(sym("nb"), together, low.facts)]
        count = minimum(self.columns - first, together * stretch, low.facts)
        low.when(whole, lambda: self._step(first, count, most * stretch))
        return parallel, at_least_one(p.depth) * stretch

    def _together(self) -> int:
        """Stretches of columns that a step of few rows may take together: of many, of bytes, and
        with AVX2 of what is converted to a band of scratch, one is as quick."""
        alone = self.p.of_bytes or (self.converts and self.p.panel == LANES)
        return TOGETHER if self.is_thin and not alone else 1

    def _step(self, first: Expr, count: Expr, most: int) -> None:
        """So many columns from `first` on, `most` at most."""
        left = self.low.buffer(self.p.operands[0], "in").name
        there = _Operands(left, *self.read(), first)
        if self.is_thin:
            self._by_bands(there, count, most)
        else:
            self._whole(there, count)

    def _whole(self, there: _Operands, count: Expr) -> None:
        """Products over the whole depth, stored in the result at once where that may be."""
        low, p, width = self.low, self.p, const(self.width)
        tile, result, first = self.tile(), p.result(low), there.first

        def product(start: Expr, rows: Expr, column: Expr, wanted: Expr) -> None:
            def in_tile() -> None:
                sums = Matrix(tile, -start * width - column, width)
                self._multiply(there, sums, start, rows, column, wanted, p.all_of_it)
                self._store(tile, start, rows, first + column, wanted)

            if result is None:
                return in_tile()
            to = replace(result, start=result.start + first)
            either(
                low, [wanted - self.width],
                lambda: self._multiply(there, to, start, rows, column, wanted, p.all_of_it),
                in_tile,
            )  # fmt: skip

        self.tiles_of(count, product)

    def _by_bands(self, there: _Operands, count: Expr, most: int) -> None:
        """Products by bands of the depth. What they add up to is in rows of scratch, of `most`
        columns and a line, so that these do not displace each other in the cache either."""
        low, p, first = self.low, self.p, there.first
        name, wide = low.name("sums"), most + LINE // p.dtype.itemsize
        block = p.row_tile * self.tiles
        low.emit(Alloc(name, p.dtype, (const(1), const(block), const(wide))))
        top = sym("mb") * block
        sums = Matrix(name, -top * wide, const(wide))

        def band(operands: _Operands, piece: Depth) -> None:
            if operands.copied:
                self.copy(operands, piece, count)
            self.tiles_of(
                count, lambda s, r, c, w: self._multiply(operands, sums, s, r, c, w, piece)
            )

        def in_bands(operands: _Operands, size: int) -> None:
            def piece(begin: Expr, adds: bool) -> Depth:
                return Depth(begin, minimum(p.depth - begin, const(size), low.facts), adds=adds)

            band(operands, piece(const(0), False))
            bands = floordiv(p.depth + (size - 1), size, low.facts)
            low.loop("kb", const(1), bands, lambda: band(operands, piece(sym("kb") * size, True)))

        def copied() -> None:
            in_bands(self.band_of(there, wide), COPIED_BAND)

        def in_place() -> None:
            either(
                low, self._are_close(), lambda: in_bands(there, WAYS),
                lambda: in_bands(there, self.band),
            )  # fmt: skip

        def by_rows() -> None:
            if self.converts:
                return copied()
            alone = low.group.thin and p.panel != LANES
            if len(self.windows.axes) > 1 or alone:
                return in_place()
            either(low, [self._is_copied()], copied, in_place)

        def one_column() -> None:
            self.tiles_of(const(1), lambda s, r, c, w: self._one_column(there, sums, s, r))

        def some_columns() -> None:
            if len(self.windows.axes) > 1:
                return by_rows()
            either(low, [1 - p.rows], lambda: self._one_row(there, name, top, count), by_rows)

        if p.of_bytes:
            in_bands(there, self.band)
        elif self.converts:
            some_columns()
        else:
            either(low, [1 - self.columns, 1 - there.step], one_column, some_columns)
        rows = minimum(p.rows - top, const(block), low.facts)
        self._store(name, top, rows, first, count)

    def _one_row(self, there: _Operands, sums: str, top: Expr, count: Expr) -> None:
        """A row by a matrix, of which several rows are added up side by side."""
        low, p, many = self.low, self.p, self.low.schedule.rows_together
        left = there.left
        shape = low.graph.type(p.operands[0]).shape
        here = (const(0), const(0), sym("c"))
        total = Load(sums, tuple(map(Index, here)), p.dtype)

        def put(value: Value) -> None:
            low.emit(Store(sums, tuple(map(Index, here)), value))

        def product() -> Value:
            at = p.base + top * p.primitive.row_stride + sym("k")
            x = Load(left, tuple(map(Index, split_index(at, shape, low.facts))), p.dtype)
            return Op("mul", (x, self._element(sym("k"), there.first + sym("c"))), p.dtype)

        def step() -> None:
            put(Op("add", (total, product()), p.dtype))

        def steps() -> None:
            turns, low.facts = low.facts, low.facts.with_ranges({"k": (0, p.depth - 1)})
            value = product()
            low.facts = turns
            found = [renamed(value, {"k": sym("k") * many + n}) for n in range(many)]
            while len(found) > 1:
                pairs = zip(found[::2], found[1::2], strict=True)
                found = [Op("add", pair, p.dtype) for pair in pairs]
            put(Op("add", (total, found[0]), p.dtype))

        def over_columns(body: Callable[[], None]) -> None:
            low.loop("c", const(0), count, body, vector=True)

        over_columns(lambda: put(Const(0.0, p.dtype)))
        whole = floordiv(p.depth, const(many), low.facts)
        low.loop("k", const(0), whole, lambda: over_columns(steps))
        low.loop("k", whole * many, p.depth, lambda: over_columns(step))

    def _store(self, sums: str, start: Expr, rows: Expr, column: Expr, count: Expr) -> None:
        """What the kernel stores of rows from `start` of scratch, `count` columns from `column`."""
        wide, zero = self.windows.axes[-1].size, (const(0), const(0))
        self.finish((sums, const(0)), start, rows, column, count, wide, wide, zero)

    def _one_column(self, read: _Operands, to: Matrix, start: Expr, rows: Expr) -> None:
        """A matrix by a vector, whose elements are adjacent: dot products with rows."""
        p, stride = self.p, self.p.primitive.row_stride
        self.low.emit(
            TileProduct(
                to.name, to.start + start * to.step, to.step, read.left, p.base + start * stride,
                stride, const(1), read.other, read.base, rows, p.depth, p.row_tile, self.width,
                False, const(1), const(1), p.depth,
            )
        )  # fmt: skip

    def _multiply(
        self, read: _Operands, to: Matrix, start: Expr, rows: Expr, column: Expr, wanted: Expr,
        piece: Depth,
    ) -> None:  # fmt: skip
        """A stretch of the depth of one tile."""
        p, stride = self.p, self.p.primitive.row_stride
        skipped = const(0) if read.copied else piece.begin * read.step
        self.low.emit(
            TileProduct(
                to.name, to.start + start * to.step + column, to.step, read.left,
                p.base + start * stride + piece.begin, stride, const(1), read.other,
                read.base + read.first + column + skipped, rows, piece.length, p.row_tile,
                self.width, piece.adds, wanted, read.step, const(1),
            )
        )  # fmt: skip

    def read(self) -> tuple[str, Expr, Expr]:
        """Where the rows of the other matrix lie in the source: the place of column 0 of the first
        row, and the step from row to row."""
        low, windows = self.low, self.windows
        offset = flatten_index(windows.indices, low.graph.type(windows.source).shape)
        at_first = {f"d{a.axis}": 0 for a in windows.axes} | {n: 0 for n, _, _ in windows.digits}
        return low.buffer(windows.source, "in").name, offset.substitute(at_first), self.step

    def band_of(self, there: _Operands, step: int) -> _Operands:
        """The other matrix with a band of scratch for some of its rows, which are `step` apart."""
        name = self.low.name("band")
        self.low.emit(Alloc(name, self.p.dtype, (const(COPIED_BAND), const(step))))
        return there._replace(other=name, base=-there.first, step=const(step), copied=True)

    def copy(self, band: _Operands, piece: Depth, count: Expr) -> None:
        """Fills a band of scratch with rows of the other matrix, and converts them."""
        row, column = sym("k"), sym("c")

        def element() -> None:
            value = self._element(piece.begin + row, band.first + column)
            self.low.emit(Store(band.other, (Index(row), Index(column)), value))

        def one_row() -> None:
            self.low.loop("c", const(0), count, element, vector=True)

        self.low.loop("k", const(0), piece.length, one_row)

    def _element(self, row: Expr, column: Expr) -> Value:
        """An element of the other matrix, converted."""
        low, (axis,) = self.low, self.windows.axes
        here = {**self.windows.at(row), f"d{axis.axis}": column}
        place = tuple(Index(e.substitute(here, low.facts)) for e in self.windows.indices)
        with low.part(low.group.packs[self.p.operands[1]], {}):
            return low.value(self.windows.source, place, ())


class _Striped(Stretches):
    """Rows of panels in a stripe of the source that each step copies."""

    def __init__(self, low: Lowering, p: Product, windows: Windows) -> None:
        super().__init__(low, p, windows)
        cost = self._take(windows)
        along = windows.axes[-1]
        whole = self.wide == along.size and self.pitch != along.size
        if whole and 0 < along.last < SPREAD:
            spread = replace(windows, axes=(*windows.axes[:-1], replace(along, spread=True)))
            if self._take(spread) >= cost or self.wide != along.size:
                self._take(windows)
        stripe = self.stripe
        self.p = p.tiled(low, self.width)
        stripe.shape(self.rows, self.wide, self.pitch, self.width)

    def _take(self, windows: Windows) -> float:
        """Decides all sizes for a stripe of some windows; the cycles that this takes."""
        self.stripe = Stripe(self.low, windows, self.p.stored)
        self.wide, self.pitch = self.stripe.columns(*self._most())
        cost, self.rows, self.width, self.tiles = self._choice()
        return cost

    def _most(self) -> tuple[int, int]:
        """Columns of a step at most, and where their number is not known."""
        stripe = self.stripe
        depth = (stripe.channels * (stripe.phases * (1 + stripe.above))).as_int()
        if depth is None:
            return STRETCH, 240
        most = max(STRIPE // depth // 48 * 48, 48)
        return most, min(most, STRETCH)

    def _choice(self) -> tuple[float, int, int, int]:
        """What costs least of what is known: cycles, rows, the width of panels and tiles down."""
        p, low, stripe = self.p, self.low, self.stripe
        along, across = stripe.along, stripe.across
        height = 1 if across is None else across.size.as_int() or HIGH
        if along.size.as_int() is None:
            height = 1
        pitch, wide = self.pitch.as_int(), self.wide.as_int()
        channels, depth = stripe.channels.as_int(), p.depth.as_int()
        matrix = p.rows.as_int() or FEW_ROWS
        if pitch is None or wide is None or channels is None or depth is None:
            return 0.0, 1, 48, -(-matrix // low.schedule.row_tile[48])
        pieces = -(-(along.size.as_int() or wide) // wide)
        work = matrix * depth / 2
        return self.cheapest(
            stripe, height, pieces, (pitch, wide, channels, matrix), STEPS,
            lambda columns, width, _: panels_time(columns, width) * work,
        )  # fmt: skip

    def lower(self) -> Parallel:
        low, p, stripe = self.low, self.p, self.stripe
        parallel = [*self.outer, *stripe.steps(), self.blocks()]
        low.bind(parallel)
        y0, x0, rows, wide = stripe.part()
        stripe.alloc()
        with low.part(low.group.packs[p.operands[1]], {}):
            stripe.fill(low.graph.nodes[p.operands[1].node].operands[0], self.windows.fill)
        left, tile = low.buffer(p.operands[0], "in"), self.tile()
        panel_place = stripe.place(self.stripe.windows.at(sym("k")))

        def one_tile(start: Expr, count: Expr, column: Expr, wanted: Expr) -> None:
            low.emit(
                TileProduct(
                    tile, const(0), const(self.width), left.name,
                    p.base + start * p.primitive.row_stride, p.primitive.row_stride, const(1),
                    stripe.name, column, count, p.depth, p.row_tile, self.width,
                    width=wanted, panel_place=panel_place,
                )
            )  # fmt: skip
            place = (tile, const(0))
            self.finish(place, start, count, column, wanted, self.pitch, wide, (y0, x0))

        self.tiles_of((rows - 1) * self.pitch + wide, one_tile)
        return parallel, at_least_one(p.depth) * (self.rows * self.wide)
