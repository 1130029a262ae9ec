"""Matrix products by tiles, each finished by what follows it while it is in cache."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace

from stagefuse.compiler.cpu.pieces import LEAST_COLUMNS, LEAST_DEPTH
from stagefuse.compiler.graph import View
from stagefuse.compiler.kernel_ir import Alloc, Index, Load, Store, TileProduct, Value
from stagefuse.compiler.patterns.steps import lines_of
from stagefuse.compiler.schedule import Schedule
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, sym
from stagefuse.dsl.dtypes import F32

from .blocks import Parallel
from .expressions import as_dtype, at_least_one
from .panels import holds_codes, over_columns, pack, panel_scratch
from .product import Depth, Lines, Matrix, Panels, Product, product_of_group
from .values import Lowering


def lower_contract(low: Lowering) -> Parallel:
    """Blocks of rows by groups of panels: tiles are computed, then stored with what follows."""
    p = product_of_group(low, low.group.anchor)
    blocks = _Blocks(low, p)
    if blocks.deep:
        blocks.all_but_last()
        blocks.over_panels(lambda: blocks.over_tiles(blocks.last_of))
    else:
        blocks.over_panels(blocks.one_panel)
    return blocks.parallel, at_least_one(p.depth) * (blocks.group * p.panel)


class _Blocks:
    """Steps of a product: tiles of rows by panels, over the whole depth at once or over stretches
    of it. Where those are outside and panels inside it is `deep`: a step has a tile of scratch for
    each of its tiles."""

    def __init__(self, low: Lowering, p: Product) -> None:
        self.lines = lying(low, p) if p.of_bytes and p.operands[1] in low.group.packs else None
        packs = p.operands[1] in low.group.packs and self.lines is None
        if not p.of_bytes and not holds_codes(low, p):
            p = replace(p, row_tile=low.schedule.lone_tile.get(p.panel, p.row_tile))
        self.low, self.p = low, p
        tiles, self.whole = _blocking(low, p, packs)
        self.deep = not self.whole and not packs
        block = p.row_tile * tiles
        self.group = self.deep_group(block) if self.deep else low.schedule.panel_group
        blocks = floordiv(p.rows + (block - 1), block, low.facts)
        groups = floordiv(p.panels + (self.group - 1), self.group, low.facts)
        self.parallel = [*p.batch, ("mb", blocks), ("nb", groups)]
        low.bind(self.parallel)
        self.tile = tile_of(low, p, 1 if self.whole else tiles * self.group if self.deep else tiles)
        left = low.buffer(p.operands[0], "in").name
        self.matrix = Matrix(left, p.base, p.primitive.row_stride)
        self.first = sym("mb") * block
        self.end = minimum(self.first + block, p.rows)
        self.stretch = _stretch(low, p)
        held = p.depth if self.whole else const(self.stretch)
        self.scratch = panel_scratch(low, p, const(1), held) if packs else None
        self.place = const(0) if self.whole else sym("t")
        if self.deep:
            self.place = self.place + (sym("p") - sym("nb") * self.group) * tiles

    def deep_group(self, block: int) -> int:
        """Panels of a step. Where all rows are one block, two steps share the panels at least."""
        panels, group = self.p.panels.as_int(), self.low.schedule.deep_panels
        most = self.low.facts.bounds(self.p.rows)[1]
        if panels is None or most is None or most > block:
            return group
        return max(1, min(group, panels // 2))

    @property
    def stretches(self) -> Expr:
        return floordiv(self.p.depth + (self.stretch - 1), self.stretch, self.low.facts)

    @property
    def later(self) -> Depth:
        """The stretch `kb`, which is not the first."""
        begin, size = sym("kb") * self.stretch, const(self.stretch)
        length = minimum(self.p.depth - begin, size)
        return Depth(begin, length, packed=self.scratch is not None, adds=True)

    # Loops

    def over_tiles(self, body: Callable[[Expr, Expr], None]) -> None:
        """The body for each tile of rows, where it begins and how many rows it has."""
        rows = self.p.row_tile

        def one_tile() -> None:
            start = self.first + sym("t") * rows
            body(start, minimum(self.end - start, const(rows)))

        count = floordiv(self.end - self.first + (rows - 1), rows)
        self.low.loop("t", const(0), count, one_tile)

    def over_panels(self, body: Callable[[], None]) -> None:
        first = sym("nb") * self.group
        self.low.loop("p", first, minimum(first + self.group, self.p.panels), body)

    def in_stretches(self, body: Callable[[Depth], None]) -> None:
        """The body for each stretch of the depth; the first one does not add."""
        packed = self.scratch is not None
        body(Depth(const(0), minimum(const(self.stretch), self.p.depth), packed=packed))
        self.low.loop("kb", const(1), self.stretches, lambda: body(self.later))

    # What they do

    def pack(self, piece: Depth) -> None:
        if self.scratch:
            pack(self.low, self.p, self.scratch, sym("p"), const(0), piece)

    def multiply(
        self, start: Expr, count: Expr, piece: Depth, into: Matrix | None = None
    ) -> None:
        low, p = self.low, self.p
        panels = self.lines or (
            Panels(self.scratch, -sym("p")) if self.scratch else stored_panels(low, p)
        )
        target = (self.tile, self.place * (p.row_tile * p.panel), const(p.panel))
        if into is not None:
            target = (into.name, into.start + start * into.step + sym("p") * p.panel, into.step)
        emit_product(low, p, target, self.matrix, panels, start, count, piece=piece)

    def all_of(self, start: Expr, count: Expr) -> None:
        """A tile over the whole depth, and what follows."""
        low, p, whole = self.low, self.p, self.p.all_of_it

        def in_tile() -> None:
            self.multiply(start, count, whole)
            self.finish(start, count)

        result = p.result(low)
        if result is None:
            return in_tile()
        tests = [p.columns - (sym("p") + 1) * p.panel]
        if may_be_pieces(p):
            tests.append(p.rows - start - p.row_tile)
            in_rows = const(p.row_tile)
        else:
            in_rows = count
        either(low, tests, lambda: self.multiply(start, in_rows, whole, result), in_tile)

    def finish(self, start: Expr, count: Expr) -> None:
        finish_tile(self.low, self.p, self.tile, self.place, start, count, sym("p"))

    def multiply_all(self, piece: Depth) -> None:
        """The products of a stretch of a panel by all tiles."""
        self.pack(piece)
        self.over_tiles(lambda start, count: self.multiply(start, count, piece))

    def all_but_last(self) -> None:
        """Stretches of all panels, one after the other."""
        low, size = self.low, self.stretch
        first = Depth(const(0), const(size))
        more = [self.p.depth - size - 1]
        low.when(more, lambda: self.over_panels(lambda: self.multiply_all(first)))
        middle = self.stretches - 1
        low.loop(
            "kb", const(1), middle, lambda: self.over_panels(lambda: self.multiply_all(self.later))
        )

    def last_of(self, start: Expr, count: Expr) -> None:
        """The last stretch of a tile, perhaps its only one, and what follows while it is cached."""
        low, p = self.low, self.p
        last = maximum(self.stretches - 1, const(1), low.facts)

        def rest() -> None:
            low.loop("kb", last, self.stretches, lambda: self.multiply(start, count, self.later))
            self.finish(start, count)

        either(
            low, [const(self.stretch) - p.depth], lambda: self.all_of(start, count), rest
        )

    def one_panel(self) -> None:
        """All of a panel."""
        if not self.whole:
            self.in_stretches(self.multiply_all)
            return self.over_tiles(self.finish)
        self.pack(self.p.all_of_it)
        self.over_tiles(self.all_of)


def either(
    low: Lowering, tests: list[Expr], body: Callable[[], None], other: Callable[[], None]
) -> None:
    """One of two bodies: the first where expressions are at least 0."""
    open_ = [e for e in tests if not low.facts.is_nonneg(e)]
    if not open_:
        return body()
    fails = -functools.reduce(minimum, open_) - 1
    if not any(low.facts.is_nonneg(-e - 1) for e in open_):
        low.when(open_, body)
    low.when([fails], other)


def may_be_pieces(p: Product) -> bool:
    """Whether AMX may multiply by panels of this width and depth: it stores whole tiles."""
    depth, columns = p.depth.as_int(), p.columns.as_int()
    few = columns is not None and columns < LEAST_COLUMNS
    return p.dtype == F32 and not few and (depth is None or depth >= LEAST_DEPTH)


def _blocking(low: Lowering, p: Product, packs: bool) -> tuple[int, bool]:
    """Tiles down that a step computes, and whether over the whole depth at once."""
    schedule, depth = low.schedule, p.depth.as_int()
    if p.of_bytes:
        return 1, True  # the micro-kernel has stretches of its own
    high = max(1, p.row_tile // schedule.row_tile[p.panel])  # a tile is as many of the schedule's
    if depth is not None and not packs:
        row_bytes = p.row_tile * max(1, depth) * p.dtype.itemsize
        tiles = min(schedule.tiles_per_block // high, schedule.block_bytes // row_bytes)
        if tiles >= -(-min(4, schedule.tiles_per_block) // high):
            return tiles, True
    whole = depth is not None and depth <= _stretch(low, p)
    if packs:
        return max(1, schedule.packed_tiles // high), whole
    tiles = max(1, schedule.deep_tiles // high)
    if _steps(schedule, p, tiles) < schedule.deep_steps:
        tiles = max(1, tiles // 2)
    return tiles, whole


def _steps(schedule: Schedule, p: Product, tiles: int) -> float:
    """The steps of a product that takes so many tiles down; infinite where that is unknown."""
    rows, panels = p.rows.as_int(), p.panels.as_int()
    batch = [extent.as_int() for _, extent in p.batch]
    if rows is None or panels is None:
        return math.inf
    across, down = -(-panels // schedule.deep_panels), -(-rows // (p.row_tile * tiles))
    return across * down * math.prod(1 if extent is None else extent for extent in batch)


def _stretch(low: Lowering, p: Product) -> int:
    """The part of the sum that is done at a time where not all of it is."""
    return low.schedule.codes_block if holds_codes(low, p) else low.schedule.depth_block


def lying(low: Lowering, p: Product) -> Lines | None:
    """The panels of a product where what they would be packed from lies, in whole lines."""
    panels = low.graph.nodes[p.operands[1].node]
    lines = lines_of(low.graph, low.graph.nodes[p.ref.node])
    if lines is None or not isinstance(panels.primitive, View):
        return None
    at = {s: sym(n) for s, (n, _) in zip(panels.primitive.symbols, p.batch, strict=False)}
    first, along, across = (e.substitute(at, low.facts) for e in lines)
    return Lines(low.buffer(panels.operands[0], "in").name, first, along, across)


def row_blocks(low: Lowering, p: Product, block: int) -> tuple[str, Expr]:
    return "mb", floordiv(p.rows + (block - 1), block, low.facts)


def lower_chain(low: Lowering) -> Parallel:
    """Blocks of whole rows: a product into scratch, its row reductions there, the next product."""
    group, rows = low.group, low.group.rows
    assert rows is not None
    first = product_of_group(low, rows.anchor)
    last = replace(product_of_group(low, group.anchor), row_tile=first.row_tile)  # the same rows
    block = first.row_tile * low.schedule.packed_tiles
    parallel = [*first.batch, row_blocks(low, first, block)]
    low.bind(parallel)
    width = first.panels * first.panel
    scores = low.name("scores")
    low.emit(Alloc(scores, first.dtype, (const(first.row_tile), width)))
    tile = tile_of(low, last)
    matrix = Matrix(
        low.buffer(first.operands[0], "in").name, first.base, first.primitive.row_stride
    )
    keys, values = all_panels(low, first), all_panels(low, last)
    start_of = sym("mb") * block
    end = minimum(start_of + block, first.rows)

    def one_tile() -> None:
        start = start_of + sym("t") * first.row_tile
        count = minimum(end - start, const(first.row_tile))

        def score() -> None:
            emit_product(
                low, first, (scores, sym("p") * first.panel, width), matrix, keys, start, count
            )

        low.loop("p", const(0), first.panels, score)
        low.loop("r", const(0), count, lambda: row_between(low, first, scores, start))

        def one_panel() -> None:
            inside = Matrix(scores, -start * width, width)
            target = (tile, const(0), const(last.panel))
            emit_product(low, last, target, inside, values, start, count, "q")
            finish_tile(low, last, tile, const(0), start, count, sym("q"))

        low.loop("q", const(0), last.panels, one_panel)

    low.loop(
        "t", const(0), floordiv(end - start_of + (first.row_tile - 1), first.row_tile), one_tile
    )
    return parallel, at_least_one(first.depth + last.depth) * block


def row_between(low: Lowering, p: Product, scores: str, start: Expr) -> None:
    """The row kernel between two products, for one row: from its scratch into the same."""
    whole, rows = low.group, low.group.rows
    assert rows is not None
    row, column = start + sym("r"), f"d{len(rows.domain) - 1}"
    at = tuple(map(Index, p.place(low, row, sym(column))))

    def score(place: tuple[Value, ...]) -> Value:
        return Load(scores, (Index(sym("r")), place[-1]), p.dtype)

    def store() -> None:
        value = as_dtype(low.value(rows.roots[0], at, ()), p.dtype)
        low.emit(Store(scores, (Index(sym("r")), Index(sym(column))), value))

    with low.part(rows, {p.ref: score}):
        low.nest([(column, rows.domain[-1])], store)
    assert low.group is whole


def tile_of(low: Lowering, p: Product, count: int = 1) -> str:
    name = low.name("tile")
    low.emit(Alloc(name, p.dtype, (const(count), const(p.row_tile), const(p.panel))))
    return name


def stored_panels(low: Lowering, p: Product) -> Panels:
    return Panels(low.buffer(p.operands[1], "in").name, p.lead * p.panels)


def all_panels(low: Lowering, p: Product) -> Panels | Lines:
    """Every panel of the batch at hand: in memory, or packed here first, or where it lies."""
    if low.group.thin and (lines := lying(low, p)) is not None:
        return lines
    if p.operands[1] not in low.group.packs:
        return stored_panels(low, p)
    name = panel_scratch(low, p, p.panels, p.depth)
    low.loop("p", const(0), p.panels, lambda: pack(low, p, name, sym("p"), sym("p"), p.all_of_it))
    return Panels(name, const(0))


def emit_product(
    low: Lowering,
    p: Product,
    target: tuple[str, Expr, Expr],
    matrix: Matrix,
    panels: Panels | Lines,
    start: Expr,
    count: Expr,
    panel: str = "p",
    piece: Depth | None = None,
) -> None:
    """One TileProduct: `count` rows from `start`, into a target of (name, offset, row)."""
    name, offset, row = target
    piece = piece or p.all_of_it
    steps: tuple[Expr | None, Expr | None] = (None, None)
    if isinstance(panels, Lines):
        at = panels.first + sym(panel) * p.panel * panels.across + piece.begin * panels.along
        steps = (panels.along, panels.across)
    else:
        skip = const(0) if piece.packed else piece.begin * p.panel
        at = (panels.first + sym(panel)) * p.depth * p.panel + skip
    low.emit(
        TileProduct(
            name, offset, row, matrix.name,
            matrix.start + start * matrix.step + piece.begin, matrix.step, const(1),
            panels.name, at, count, piece.length, p.row_tile, p.panel, piece.adds,
            p.width(sym(panel)), *steps,
        )
    )  # fmt: skip


def finish_tile(
    low: Lowering, p: Product, tile: str, place: Expr, start: Expr, count: Expr, panel: Expr
) -> None:
    """What the kernel stores of a tile of `count` rows from `start`, in scratch at `place`."""
    if _lies_along_rows(p):
        return _finish_columns(low, p, tile, place, start, count, panel)

    def one_row() -> None:
        low.facts = low.facts.with_ranges({"r": (0, p.row_tile - 1)})
        over_columns(low, p, panel, element)

    def element(column: Expr) -> None:
        inside = Load(tile, (Index(place), Index(sym("r")), Index(column)), p.dtype)
        with low.part(low.group, {p.ref: lambda _: inside}):
            low.store(p.place(low, start + sym("r"), panel * p.panel + column))

    low.loop("r", const(0), count, one_row)


def _lies_along_rows(p: Product) -> bool:
    """Whether places of an image are the rows, and channels, an axis before them, the columns."""
    last = max(a for a, size in enumerate(p.domain) if size.as_int() != 1)
    columns = [a for a in p.primitive.columns if p.domain[a].as_int() != 1]
    return last in p.primitive.rows and len(columns) == 1


def _finish_columns(
    low: Lowering, p: Product, tile: str, place: Expr, start: Expr, count: Expr, panel: Expr
) -> None:
    """The same a column after the other, where the result lies along the rows."""
    wide = [p.domain[a] for a in p.primitive.rows if p.domain[a].as_int() != 1][-1]

    def element() -> None:
        row = sym("s") * wide + sym("r")
        inside = Load(tile, (Index(place), Index(row - start), Index(sym("c"))), p.dtype)
        with low.part(low.group, {p.ref: lambda _: inside}):
            low.store(p.place(low, row, panel * p.panel + sym("c")))

    def one_line() -> None:
        low.facts = low.facts.with_ranges({"r": (0, wide - 1)})
        skip = start - sym("s") * wide  # from the line's first row to the tile's
        begin, stop = maximum(skip, 0, low.facts), minimum(skip + count, wide, low.facts)
        low.loop("r", begin, stop, element, vector=True)

    def one_column() -> None:
        end = floordiv(start + count + (wide - 1), wide, low.facts)
        low.loop("s", floordiv(start, wide, low.facts), end, one_line)

    low.loop("c", const(0), p.width(panel), one_column)
