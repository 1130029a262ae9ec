"""What follows a product whose sums warpgroups hold in registers: a warp finishes its own 16 rows.

8 rows by 64 columns at a time go through shared memory that no other warp uses, so that lanes have
adjacent elements, and what is read and stored with them comes in vectors. Lane l has the rows l / 4
and l / 4 + 8 of its warp's, of these the columns 2 (l % 4) and the next of every eight (PTX ISA
9.7.15.5.1, "Register fragments": D of wgmma m64nNk16).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from stagefuse.compiler.cpu.bodies import work_of
from stagefuse.compiler.gpu.emit import KernelWriter
from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.loops import Carry
from stagefuse.compiler.gpu.memory import Memory, Slot
from stagefuse.compiler.kernel_ir import Alloc, For, If, Kernel, Let, Statement, Store, TileProduct
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.frozen import frozen

from .tensor_stores import (
    BOX_BYTES,
    PLACES,
    Outgoing,
    await_copies,
    commit,
    store_box,
)

ROWS = 128
"""Of a tile: 16 of each warp."""
PIECE_ROWS = 8
PIECES = (64, 48, 32, 16, 8)
"""Columns of a piece, the most first."""
PITCH = PIECES[0] + 8
"""Elements from a row of a piece to the next, so that four rows lie in different banks."""
PIECE_BYTES = PIECE_ROWS * PITCH * 4
LIGHT = 12
"""Operations on an element after a product that are written out for every piece."""


@frozen
class Form:
    """A kernel's body: what comes first, its product, and what is stored of each element where a
    condition holds. `plain`: as if it held everywhere."""

    first: tuple[Statement, ...]
    product: TileProduct
    columns: int
    condition: KernelValue | None
    stores: tuple[Statement, ...]
    plain: tuple[Statement, ...]


def form_of(kernel: Kernel) -> Form | None:
    """The body of a product's kernel, if it is one that can be finished in pieces."""
    first = [s for s in kernel.body if not isinstance(s, Alloc | For)]
    allocs = [s for s in kernel.body if isinstance(s, Alloc)]
    loops = [s for s in kernel.body if isinstance(s, For)]
    if len(allocs) != 1 or len(loops) != 2 or any(not isinstance(s, Let) for s in first):
        return None
    products, rows = loops
    if len(products.body) != 1 or len(rows.body) != 1:
        return None
    (product,), (columns,) = products.body, rows.body
    if not isinstance(product, TileProduct) or not isinstance(columns, For):
        return None
    condition, stores = None, columns.body
    if len(stores) == 1 and isinstance(stores[0], If):
        condition, stores = stores[0].condition, stores[0].body
    if not all(isinstance(s, Let | Store) for s in stores) or product.panel_row is None:
        return None
    width = columns.hi.as_int()
    if width is None or (rows.index, columns.index) != ("r", "c"):
        return None
    inner = replace(columns, body=stores)
    plain: tuple[Statement, ...] = (*allocs, replace(rows, body=(inner,)))
    return Form(tuple(first), product, width, condition, stores, plain)


class PieceWriter(KernelWriter):
    """The entry of a product's kernel, as far as what follows the product goes."""

    form: Form
    all_rows: Expr
    all_columns: Expr
    """Of the product."""
    pieces_start: Expr
    outgoing: tuple[Outgoing, ...] = ()
    """Results that tensor copies store; else lanes do."""
    outgoing_start: Expr

    def finish(self, warp: Value, sums: Sequence[Value]) -> None:
        """The rows of a warp, piece by piece: `sums` are what each of its lanes has of the tile."""
        code, columns = self.code, self.form.columns
        if self.outgoing:
            return self._finish_directly(warp, sums)
        start = self.shared_address(self.pieces_start) + warp * PIECE_BYTES
        first = warp * (2 * PIECE_ROWS)
        if self.is_light:
            for begin, wide in self._stretches():
                for half in range(2):
                    self._piece(start, sums, half, begin, wide)
                    row = first + half * PIECE_ROWS
                    self._finish_piece(start, row, code.const(begin, "i32"), wide)
            return
        wide = next(n for n in PIECES if columns % n == 0)
        count = columns // wide * 2

        def one_piece(carry: Carry) -> Carry:
            piece = self.symbols["piece"]
            stored = code.label("stored")
            for n in range(count):
                other = code.label("other")
                code.branch_if(piece.compare("eq", n), other, holds=False)
                self._piece(start, sums, n % 2, n // 2 * wide, wide)
                code.branch(stored)
                code.start(other)
            code.start(stored)
            row = first + (piece & 1) * PIECE_ROWS
            self._finish_piece(start, row, piece.lshr(1) * wide, wide)
            return carry

        end, step = code.const(count, "i32"), code.const(1, "i32")
        ends = (const(0), const(count - 1))
        self._counted("piece", code.const(0, "i32"), end, step, ends, [], one_piece)

    def _piece(self, start: Value, sums: Sequence[Value], half: int, begin: int, wide: int) -> None:
        """Stores a piece, when all lanes have read the one before."""
        lane = self.symbols["lane"]
        at = start + lane.lshr(2) * (PITCH * 4) + (lane & 3) * 8
        self.barrier()
        for n in range(wide // 8):
            place = (begin // 8 + n) * 4 + half * 2
            pair = ", ".join(v.text for v in sums[place : place + 2])
            self.code.line(f"st.shared.v2.b32 [{at.text}+{n * 32}], {{{pair}}};")

    def _finish_piece(self, start: Value, row: Value, column: Value, wide: int) -> None:
        """What follows the product, for the piece that begins at a row and column of the tile."""
        self.barrier()
        ends = {"row'": (row, const(0), const(ROWS - PIECE_ROWS)),
                "column'": (column, const(0), const(self.form.columns - wide))}  # fmt: skip
        self.multiples |= {"row'": PIECE_ROWS, "column'": 16 if wide % 16 == 0 else 8}
        with self.named(**ends), self.scope():
            self._elements(start - (row * PITCH + column) * 4, wide)

    # Results that tensor copies store

    @property
    def direct_rows(self) -> int:
        """Rows of a piece that is computed where its sums are: all of a warp's, or half of them."""
        narrow = sum(out.dtype.itemsize for out in self.outgoing) <= 2
        return 2 * PIECE_ROWS if narrow else PIECE_ROWS

    @property
    def outgoing_bytes(self) -> int:
        """Of a place for a piece of every result."""
        rows = self.direct_rows
        return sum(rows * PIECES[0] * out.dtype.itemsize for out in self.outgoing)

    def _place(self, warp: Value, number: Value | int) -> Value:
        """A place of a warp for a piece."""
        start = self.shared_address(self.outgoing_start)
        return start + (warp * PLACES + number) * self.outgoing_bytes

    def _stretches(self) -> Iterator[tuple[int, int]]:
        """First columns and widths of a tile's pieces."""
        begin = 0
        while begin < self.form.columns:
            wide = next(n for n in PIECES if n <= self.form.columns - begin)
            yield begin, wide
            begin += wide

    def _finish_directly(self, warp: Value, sums: Sequence[Value]) -> None:
        """The rows of a warp, whose elements are computed in pairs where their sums are."""
        code, rows = self.code, self.direct_rows
        halves = [(0, 1)] if rows > PIECE_ROWS else [(0,), (1,)]
        pieces = [(begin, wide, h) for begin, wide in self._stretches() for h in halves]
        for number, (begin, wide, own) in enumerate(pieces):
            row = warp * (2 * PIECE_ROWS) + own[0] * PIECE_ROWS
            place = self._place(warp, number % PLACES)
            begins_anew = number == 0 and len(pieces) % PLACES  # the last one was in this place too
            await_copies(code, 0 if begins_anew else PLACES - 1, self.first_lane(), read=True)
            self.barrier()
            with self.scope():
                for half in own:
                    self._direct_half(warp, place, sums, half, own[0], begin, wide)
            boxes = [(out, out.boxes(wide)) for out in self.outgoing]
            self._send(place, row, code.const(begin, "i32"), rows, boxes)

    def _direct_half(self, warp: Value, place: Value, sums: Sequence[Value], half: int, above: int,
                     begin: int, wide: int) -> None:  # fmt: skip
        """8 rows of a piece, of which `above` is the first half of the warp's rows."""
        lane = self.symbols["lane"]
        row = warp * (2 * PIECE_ROWS) + half * PIECE_ROWS + lane.lshr(2)
        ends = {"row'": (row, const(0), const(ROWS - 1)),
                "pair'": ((lane & 3) * 2, const(0), const(6))}  # fmt: skip
        self.multiples["pair'"] = 2
        with self.named(**ends), self.scope():
            for n in range(0, wide, 8):
                at = (begin + n) // 2 + half * 2
                self._pair(place, sums[at : at + 2], half - above, begin, n, wide)

    def _pair(self, place: Value, pair: Sequence[Value], half: int, begin: int, n: int, wide: int
              ) -> None:  # fmt: skip
        """Two adjacent elements of each result, in the first or second 8 rows of a piece that
        begins at a column, in 8 columns from `n` on."""
        form, lane = self.form, self.symbols["lane"]
        (made,) = [s for s in self.kernel.body if isinstance(s, Alloc)]
        row, column = sym("row'"), sym("pair'") + (begin + n)
        memory = Memory(made.name, made.dtype, (const(ROWS), const(PITCH)), "registers")
        self.memory[made.name] = memory
        with (
            self.slot_of(Slot("c", column, 2), None),
            self.binding(r=row, c=column),
        ):
            for value, _ in zip(pair, self.elements(), strict=True):
                memory.cells[self.resolve(sym("r") * PITCH + sym("c"))] = value
            with self.when(self._inside()):
                for s in form.stores:
                    if isinstance(s, Let):
                        self.statement(s)
                        continue
                    assert isinstance(s, Store)
                    values = [self.value(s.value) for _ in self.elements()]
                    out = next(o for o in self.outgoing if o.buffer == s.buffer)
                    start, within = self._in_box(place, out, lane, n, wide)
                    within += half * PIECE_ROWS * self._row_bytes(out, n, wide)
                    kept = Memory(s.buffer, out.dtype, (), "shared")
                    self.write(kept, f"[{start.text}+{within}]", values)
                self.forget()

    def _in_box(self, place: Value, out: Outgoing, lane: Value, n: int, wide: int
                ) -> tuple[Value, int]:  # fmt: skip
        """Where a lane stores its pair of columns `n` to `n` + 7 of a piece: an address, and what
        is to be added."""
        size, row = out.dtype.itemsize, lane.lshr(2)
        before = self.outgoing[: self.outgoing.index(out)]
        within = sum(self.direct_rows * PIECES[0] * o.dtype.itemsize for o in before)
        first, columns, swizzle = out.box_at(n, wide)
        within += first * self.direct_rows * size
        byte = (lane & 3) * (2 * size)
        if not swizzle:
            return place + row * (columns * size) + byte, within + (n - first) * size
        chunk = byte.lshr(4) + (n - first) * size // 16
        return place + row * BOX_BYTES + (chunk ^ row).shl(4) + (byte & 15), within

    def _row_bytes(self, out: Outgoing, n: int, wide: int) -> int:
        return out.box_at(n, wide)[1] * out.dtype.itemsize

    def _send(
        self, place: Value, row: Value, column: Value, rows: int,
        boxes: Sequence[tuple[Outgoing, Sequence[tuple[int, int, int]]]],
    ) -> None:  # fmt: skip
        """Starts the copies of a piece of every result, which all lanes have made."""
        code, first = self.code, self.first_lane()
        batch = self.kernel.parallel[:-2]
        (down, _), (across, _) = self.kernel.parallel[-2:]
        column = self.index(sym(across) * self.form.columns).to("trunc", "i32") + column
        row = self.index(sym(down) * ROWS).to("trunc", "i32") + row
        code.line("fence.proxy.async.shared::cta;")
        self.barrier()
        for out, parts in boxes:
            outer = [self.index(sym(name), "i32") for name in out.outer(batch)]
            size = out.dtype.itemsize
            for at, columns, swizzle in parts:
                box = (rows, columns)
                map = self.tensor_map(out.map(batch, self.all_rows, self.all_columns, box, swizzle))
                source = place + at * rows * size
                store_box(code, map, (column + at, row, *outer), source, first)
            place = place + rows * PIECES[0] * size
        commit(code, first)

    def _inside(self) -> Value | None:
        """Whether the element at hand is one of the matrix."""
        rows = self.form.product.rows
        full = self.facts.is_nonneg(self.resolve(rows) - ROWS)
        mask = None if full else self.holds("lt", sym("r"), rows)
        if self.form.condition is not None:
            assert self.slot is not None
            with self.scope(), self.binding(c=self.slot.first):
                inside = self.value(self.form.condition)
            mask = inside if mask is None else mask & inside
        return mask

    @property
    def is_light(self) -> bool:
        """Whether what follows is written out for every piece."""
        return work_of(self.form.stores) <= LIGHT and self._is_even()

    def _is_even(self) -> bool:
        """Whether rows of the result are whole vectors. Others are single elements: many, whose
        places would take registers if all pieces were written out."""
        return self.form.condition is None or self.divides(self.width, self.all_columns)

    def _elements(self, origin: Value, wide: int) -> None:
        """Every element of a piece, of a tile that would begin at `origin`."""
        form = self.form
        (made,) = [s for s in self.kernel.body if isinstance(s, Alloc)]
        shape = (const(ROWS), const(PITCH))
        self.memory[made.name] = Memory(made.name, made.dtype, shape, "shared", origin)
        loops = [
            ("r", sym("row'"), sym("row'") + PIECE_ROWS),
            ("c", sym("column'"), sym("column'") + wide),
        ]
        even = self._is_even()

        def visit(carry: Carry) -> Carry:
            with self.when(self._inside()):
                self.statements(form.stores)
            return carry

        self.spread(loops, self.width if even else 1, [], visit)
