"""What follows a product whose sums warpgroups hold in registers: a warp finishes its own 16 rows.

8 rows by 64 columns at a time go through shared memory that no other warp uses, so that lanes have
adjacent elements, and what is read and stored with them comes in vectors. Lane l has the rows l / 4
and l / 4 + 8 of its warp's, of these the columns 2 (l % 4) and the next of every eight (PTX ISA
9.7.15.5.1, "Register fragments": D of wgmma m64nNk16).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stagefuse.compiler.kernel_ir import Alloc, For, If, Kernel, Let, Statement, Store, TileProduct
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.frozen import frozen

from .emit import KernelWriter
from .ir import Value
from .loops import Carry, work_of
from .values import Memory

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
    all_columns: Expr
    """Of the product."""
    pieces_start: Expr

    def finish(self, warp: Value, sums: Sequence[Value]) -> None:
        """The rows of a warp, piece by piece: `sums` are what each of its lanes has of the tile."""
        code, columns = self.code, self.form.columns
        start = self.shared_address(self.pieces_start) + warp * PIECE_BYTES
        first = warp * (2 * PIECE_ROWS)
        if work_of(self.form.stores) <= LIGHT and self._is_even():
            begin = 0
            while begin < columns:
                wide = next(n for n in PIECES if n <= columns - begin)
                for half in range(2):
                    self._piece(start, sums, half, begin, wide)
                    row = first + half * PIECE_ROWS
                    self._finish_piece(start, row, code.const(begin, "i32"), wide)
                begin += wide
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

    def _is_even(self) -> bool:
        """Whether rows of the result are whole vectors. Others are single elements: many, whose
        places would take registers if all pieces were written out."""
        return self.form.condition is None or self.divides(self.width, self.all_columns)

    def _elements(self, origin: Value, wide: int) -> None:
        """Every element of a piece, of a tile that would begin at `origin`."""
        form, rows = self.form, self.form.product.rows
        (made,) = [s for s in self.kernel.body if isinstance(s, Alloc)]
        shape = (const(ROWS), const(PITCH))
        self.memory[made.name] = Memory(made.name, made.dtype, shape, "shared", origin)
        loops = [
            ("r", sym("row'"), sym("row'") + PIECE_ROWS),
            ("c", sym("column'"), sym("column'") + wide),
        ]
        even = self._is_even()
        full = self.facts.is_nonneg(self.resolve(rows) - ROWS)

        def visit(carry: Carry) -> Carry:
            assert self.slot is not None
            mask = None if full else self.holds("lt", sym("r"), rows)
            if form.condition is not None:
                with self.scope(), self.binding(c=self.slot.first):
                    inside = self.value(form.condition)
                mask = inside if mask is None else mask & inside
            with self.when(mask):
                self.statements(form.stores)
            return carry

        self.spread(loops, self.width if even else 1, [], visit)
