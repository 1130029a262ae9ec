"""Products by tiles: calls of micro-kernels, and what those keep in scratch."""

from __future__ import annotations

import math

from stagefuse.compiler.kernel_ir import For, Kernel, TileProduct
from stagefuse.compiler.patterns.byte_operands import is_byte
from stagefuse.compiler.plan import CUT_ROWS
from stagefuse.dsl.dims import Expr, const, floordiv, mod
from stagefuse.dsl.dtypes import I32

from . import byte_tiles, cutting, halves, pieces, scalars, units
from .bodies import walk, written_buffers
from .dots import dots_text
from .dots import symbol as dots_symbol
from .fetch import FetchWriter
from .ir import Value
from .memory import Memory
from .module import Module
from .scratch import (
    SCRATCH_ALIGN,
    Cache,
    Source,
    byte_columns,
    caches_of,
    keeps,
    padded,
    places_of,
    source_of,
)
from .streams import LARGE_BYTES
from .tile import tile_text
from .tile_sums import TileShape
from .turns import Turn, turn_of, turn_text
from .turns import symbol as symbol_of_turn


def rows_of(s: TileProduct) -> str:
    """How the rows of a product's panel lie, in the words of `TileShape`."""
    return "places" if s.panel_place else "steps" if s.panel_row else "packed"


def is_whole(s: TileProduct) -> bool:
    return s.width is None or s.width.as_int() == s.nr


class ProductWriter(FetchWriter):
    """The function of a kernel, as far as its products go."""

    def __init__(self, kernel: Kernel, module: Module) -> None:
        super().__init__(kernel, module)
        self.caches: dict[Source, tuple[Cache, Value]] = {}
        self.cut: dict[Source, Value] = {}  # what was cut before the kernel runs
        self.has_tiles: Value | None = None
        self.has_pieces: Value | None = None  # tiles, or else dot products of bf16
        self.units: Value | None = None
        self.room: Value | None = None  # scratch of products of bytes
        self.is_first: Value | None = None

    def _tile(self, s: TileProduct) -> None:
        dst, a, panel = self.memory[s.dst], self.memory[s.a], self.memory[s.panel]
        if is_byte(a.dtype):
            self._bytes(s)
            return
        if {dst.dtype, a.dtype, panel.dtype} != {dst.dtype} or dst.dtype.bits < 32:
            raise TypeError("a tile product takes f32 or f64 throughout")
        if s.panel_col is not None and s.panel_col != const(1):
            self._dots(s, s.panel_col)
            return
        width = s.width or const(s.nr)
        rows, element = rows_of(s), scalars.REGISTER[dst.dtype.name]
        shape = TileShape(element, s.nr, rows, (s.nr, rows) in self.module.partial)
        if shape.symbol not in self.module.micro_kernels:
            self.module.micro_kernels[shape.symbol] = tile_text(shape, self.module.level)
        place, number = self._place, self._number
        table = self.places[s.panel_place, s.depth].text if s.panel_place else "null"
        if source_of(s) in self.caches:
            cache, kept = self.caches[source_of(s)]
            placed = rows == "places"
            symbol = pieces.symbol(s.nr, placed)
            self.module.micro_kernels[symbol] = pieces.tile_text(s.nr, placed, shape.symbol)
            half = halves.symbol(s.nr)
            self.module.micro_kernels[half] = halves.dots_text(s.nr)
            assert self.has_tiles is not None and self.has_pieces is not None
            use = self.has_pieces
            least = self.has_tiles.select(self.code.const(CUT_ROWS, "i64"), pieces.LEAST_ROWS)
            for rows_of_all in (cache.rows, cache.down):
                if rows_of_all is not None:
                    use = use & self.index(rows_of_all).compare("ge", least)
            if cache.across is not None and cache.across.as_int() is None:
                use = use & self.index(cache.across).compare("ge", pieces.LEAST_COLUMNS)
            kept = use.select(kept, self.code.value("null", "ptr"))
            ready, mark = self._ready(s, cache)
            self.code.line(
                f"call void @{symbol}({place(dst, s.dst_offset)}, {number(s.dst_row)},"
                f" {place(a, s.a_offset)}, {number(s.a_row)}, {place(panel, s.panel_offset)},"
                f" ptr {table}, {number(s.rows)}, {number(s.depth)}, {number(width)},"
                f" i1 {int(s.accumulate)}, ptr {kept.text}, i64 {cache.entries},"
                f" {number(cache.most)}, ptr {ready.text}, ptr {mark.text},"
                f" i1 {self.has_tiles.text})"
            )
            return
        self.code.line(
            f"call void @{shape.symbol}({place(dst, s.dst_offset)}, {number(s.dst_row)},"
            f" {place(a, s.a_offset)}, {number(s.a_row)}, {number(s.a_col)},"
            f" {place(panel, s.panel_offset)}, {number(s.panel_row or const(0))}, ptr {table},"
            f" {number(s.rows)}, {number(s.depth)}, {number(width)}, i1 {int(s.accumulate)})"
        )

    def _bytes(self, s: TileProduct) -> None:
        """A product of 8-bit integers."""
        dst, a, panel = self.memory[s.dst], self.memory[s.a], self.memory[s.panel]
        whole = s.a_col == const(1) and s.panel_col in (None, const(1))
        whole = whole and s.mr % byte_tiles.SLAB == 0
        integers = is_byte(panel.dtype) and a.dtype.is_int and panel.dtype.is_int
        if not whole or not integers or dst.dtype != I32 or self.room is None:
            raise TypeError("a product of bytes is of integers, in whole lines, into i32")
        left, right = ("s" if d.kind == "int" else "u" for d in (a.dtype, panel.dtype))
        product = byte_tiles.ByteProduct(left, right, s.nr, rows_of(s))
        if product.symbol not in self.module.micro_kernels:
            self.module.micro_kernels.update(product.texts(self.module.level))
        place, number = self._place, self._number
        table = self.places[s.panel_place, s.depth].text if s.panel_place else "null"
        units = "0" if self.units is None else self.units.text
        self.code.line(
            f"call void @{product.symbol}({place(dst, s.dst_offset)}, {number(s.dst_row)},"
            f" {place(a, s.a_offset)}, {number(s.a_row)}, {place(panel, s.panel_offset)},"
            f" {number(s.panel_row or const(0))}, ptr {table}, {number(s.rows)},"
            f" {number(s.depth)}, {number(s.width or const(s.nr))}, i1 {int(s.accumulate)},"
            f" ptr {self.room.text}, i32 {units})"
        )

    def _dots(self, s: TileProduct, step: Expr) -> None:
        """A product by a panel whose rows are adjacent, and its columns `step` apart."""
        if (s.panel_row, s.a_col) != (const(1), const(1)):
            raise TypeError("the columns of a panel or its rows, and a matrix's too, are adjacent")
        dst, a, panel = self.memory[s.dst], self.memory[s.a], self.memory[s.panel]
        element = scalars.REGISTER[dst.dtype.name]
        symbol = dots_symbol(element)
        if symbol not in self.module.micro_kernels:
            self.module.micro_kernels[symbol] = dots_text(element, self.module.level)
        place, number = self._place, self._number
        self.code.line(
            f"call void @{symbol}({place(dst, s.dst_offset)}, {number(s.dst_row)},"
            f" {place(a, s.a_offset)}, {number(s.a_row)}, {place(panel, s.panel_offset)},"
            f" {number(step)}, {number(s.rows)}, {number(s.depth)},"
            f" {number(s.width or const(s.nr))}, i1 {int(s.accumulate)})"
        )

    def _place(self, memory: Memory, offset: Expr) -> str:
        """Where an element is, as an argument of a call."""
        element, at = scalars.REGISTER[memory.dtype.name], self.index(offset)
        pointer = self.code.pure(
            f"getelementptr {element}, ptr {memory.pointer.text}, i64 {at.text}", "ptr"
        )
        return f"ptr {pointer.text}"

    def _number(self, expr: Expr) -> str:
        """A size as an argument of a call."""
        return f"i64 {self.index(expr).text}"

    def _tables(self) -> None:
        """Fills the tables of where panels' rows begin, at the thread's first range of a step."""
        found = list(places_of(self.kernel.body))
        for place, count in found:
            self.places[place, count] = self._scratch(padded(count * 8))
        if not found:
            return
        assert self.is_first is not None
        fill, after = self.code.label("tables"), self.code.label("filled")
        self.code.branch_if(self.is_first, fill, after)
        self.code.start(fill)
        with self._scope():
            for place, count in found:
                self._fill(self.places[place, count], place, count)
        self.code.branch(after)
        self.code.start(after)

    def _fill(self, table: Value, place: Expr, count: Expr) -> None:
        """A table of an expression over `k`, i64 each."""

        def body(k: Value, _: list[Value]) -> list[Value]:
            self.scopes[-1].indices["k"] = k
            at = self.code.pure(f"getelementptr i64, ptr {table.text}, i64 {k.text}", "ptr")
            found = self.index(place)
            self.code.line(f"store i64 {found.text}, ptr {at.text}, align 8{self._access()}")
            return []

        zero = self.code.const(0, "i64")
        self._loop(zero, self.index(count), [], body, [], {"k"}, True, True)

    def _open(self) -> None:
        """Has ready what products need from the first range of a step on."""
        self._note_first()  # at the very beginning of the scratch
        if columns := byte_columns(self.kernel):
            self.room = self._scratch(padded(const(byte_tiles.room(columns))))
        self._open_tiles()

    def _note_first(self) -> None:
        """Notes whether this is the thread's first range of a step: the first word of its scratch
        is then 0. What is kept there from range to range is made in the first one."""
        if not keeps(self.kernel):
            return
        mark = self._scratch(const(SCRATCH_ALIGN))
        seen = self.code.emit(f"load i64, ptr {mark.text}, align 8", "i64")
        self.code.line(f"store i64 1, ptr {mark.text}, align 8")
        self.is_first = seen.compare("eq", 0)

    # products of pieces

    def _open_tiles(self) -> None:
        """Has the thread's tiles ready and, at first, its caches empty."""
        found = caches_of(self.kernel) if self.module.level == "v4" else {}
        if not found and (self.room is None or self.module.level != "v4"):
            return
        code = self.code
        self.caches = {key: (cache, self._scratch(cache.size)) for key, cache in found.items()}
        slot = len(self.kernel.buffers) + len(self.kernel.dims)
        for number, key in enumerate(k for k, cache in found.items() if cache.rows is not None):
            self.cut[key] = self._slot(code.value("%args", "ptr"), slot + number, "ptr")
        self.units = units.loaded(code)
        self.has_tiles = units.has(code, self.units, "tiles")
        self.has_pieces = units.has(code, self.units, "tiles", "halves")
        begin, begun = code.label("tiles"), code.label("begun")
        code.branch_if(self.has_tiles, begin, begun)
        code.start(begin)
        code.line("call void @sf.pieces.begin()")
        code.branch(begun)
        code.start(begun)
        if not found:
            return
        assert self.is_first is not None
        clear, after = code.label("clear"), code.label("ready")
        code.branch_if(self.is_first & self.has_pieces, clear, after)
        code.start(clear)
        for _, place in self.caches.values():
            code.line(
                f"call void @llvm.memset.p0.i64(ptr align 64 {place.text}, i8 0,"
                f" i64 {pieces.HEADER}, i1 false)"
            )
        code.branch(after)
        code.start(after)

    def _ready(self, s: TileProduct, cache: Cache) -> tuple[Value, Value]:
        """Where the pieces of a panel that was cut beforehand lie, and its mark; or null."""
        null = self.code.value("null", "ptr")
        if cache.rows is None:
            return null, null
        self.module.cut_columns.add(s.nr)
        first = self.cut[source_of(s)]
        depth, each = self.memory[s.panel].shape[-2], cutting.panel_bytes(s.nr)
        all_steps = floordiv(depth + (cutting.STEP - 1), cutting.STEP)
        begin = floordiv(mod(s.panel_offset, depth * s.nr), s.nr * cutting.STEP)
        panel = floordiv(s.panel_offset, depth * s.nr) * (all_steps * each + cutting.MARK_BYTES)
        there = self.code.pure(f"icmp ne ptr {first.text}, null", "i1")

        def at(place: Expr) -> Value:
            offset = self.index(place).text
            pointer = self.code.pure(f"getelementptr i8, ptr {first.text}, i64 {offset}", "ptr")
            return there.select(pointer, null)

        return at(panel + begin * each), at(panel + all_steps * each)

    def _close_caches(self) -> None:
        if self.has_tiles is None:
            return
        code = self.code
        end, after = code.label("untile"), code.label("ended")
        code.branch_if(self.has_tiles, end, after)
        code.start(end)
        code.line("call void @sf.pieces.end()")
        code.branch(after)
        code.start(after)

    def _for(self, s: For) -> None:
        turn = turn_of(s, {name: memory.shape for name, memory in self.memory.items()})
        if turn is not None and self._may_turn(turn):
            self._turn(turn)
        else:
            super()._for(s)
        self._forget_panels(s)

    def _may_turn(self, turn: Turn) -> bool:
        """Whether a nest of loops writes scratch, or a result that is not streamed."""
        name = turn.store.buffer
        size = math.prod(e.as_int() or LARGE_BYTES for e in self.memory[name].shape)
        fits = size * self.memory[name].dtype.itemsize < LARGE_BYTES
        return (name not in self.results or fits) and name not in self.tiles

    def _turn(self, turn: Turn) -> None:
        """Copies a block of a matrix so that its rows become columns."""
        number, size = self._number, turn.load.stored.itemsize
        symbol = symbol_of_turn(size)
        if symbol not in self.module.micro_kernels:
            self.module.micro_kernels[symbol] = turn_text(size, self.module.level)
        rows, columns = turn.rows, turn.columns
        with self._inner_scope():
            for loop in (rows, columns):
                self.scopes[-1].indices[loop.index] = self.index(loop.lo)
            to, source = (
                self._address(self.memory[x.buffer], x.indices) for x in (turn.store, turn.load)
            )
        self.code.line(
            f"call void @{symbol}(ptr {to.text}, {number(turn.to)}, ptr {source.text},"
            f" {number(turn.step)}, {number(rows.hi - rows.lo)}, {number(columns.hi - columns.lo)})"
        )

    def _forget_panels(self, s: For) -> None:
        """What has been cut of panels that a loop writes is of no use any more."""
        written = written_buffers([s])
        if any(isinstance(x, TileProduct) for x in walk([s])):
            return
        for (_, panel, _), (_, place) in self.caches.items():
            if panel in written:
                at = self.code.pure(f"getelementptr i8, ptr {place.text}, i64 8", "ptr")
                self.code.line(f"store i64 0, ptr {at.text}, align 8")
