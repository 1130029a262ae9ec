"""Operands of a product that tensor copies bring, a stage of the depth at a time.

One thread starts the copies of a stage, whose barrier completes when all bytes have come. Rows
along the depth are 128 bytes, swizzled; a right operand whose columns are adjacent comes as rows of
them, a left one that is turned as swizzled rows of 32 elements each. What is beyond a matrix is
zero. PTX ISA 9.7.9.27, "cp.async.bulk.tensor", and 9.7.13.15, "mbarrier".
"""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.gpu.folds import FoldWriter
from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.tensor_maps import Loops, TensorMap, in_steps, start_of
from stagefuse.dsl.dims import Expr, sym
from stagefuse.dsl.frozen import frozen

from .async_copies import Tile
from .ring import BARRIER_BYTES, copy_box, elected, expect, wait

TURNED_ROWS = 32
"""Of a turned left operand that a box has beside each other: 128 bytes of f32, swizzled."""


@frozen
class Matrices:
    """What a kernel's tiles are of: `rows` and `columns`, the elements at which the left and the
    right operand begin in their buffers, over the batch, and the first row and column of the tile
    at hand."""

    rows: Expr
    columns: Expr
    left: Expr
    right: Expr
    row: Expr
    column: Expr
    batch: tuple[tuple[str, Expr], ...]


@frozen
class Slot:
    """A place in the ring, by its number, and the parity of the copies that fill it."""

    number: Value
    parity: Value


class BoxCopies:
    """Tensor copies of both operands into a ring of stages; `begin`: where the depth begins.
    `others`: more barriers to prepare, each with how many arrive at it."""

    def __init__(
        self,
        writer: FoldWriter,
        tile: Tile,
        ring: Value,
        matrices: Matrices,
        begin: Expr,
        others: Sequence[tuple[Value, int]] = (),
    ) -> None:
        self.w, self.tile, self.ring, self.of = writer, tile, ring, matrices
        self.code = writer.code
        size = BARRIER_BYTES * tile.stages
        self.barriers = writer.shared_address(writer.reserve(size))
        self.begin = writer.index(begin, "i32")
        self.row, self.column = (
            writer.index(e).to("trunc", "i32") for e in (matrices.row, matrices.column)
        )
        self.maps = self._left(), self._right()
        full = [(self.barriers + n * BARRIER_BYTES, 1) for n in range(tile.stages)]
        self._prepare([*full, *others])

    def _prepare(self, barriers: Sequence[tuple[Value, int]]) -> None:
        code = self.code
        skip = code.label("prepared")
        code.branch_if(self.w.index(sym("lane"), "i32").compare("eq", 0), skip, holds=False)
        with code.branch_scope():
            for barrier, count in barriers:
                code.line(f"mbarrier.init.shared::cta.b64 [{barrier.text}], {count};")
            code.line("fence.mbarrier_init.release.cluster;")
        code.start(skip)
        code.line("bar.sync 0;")

    def _map(self, buffer: str, offset: Expr, inner: Sequence[Expr], stride: Expr,
             box: tuple[int, int], swizzle: int) -> tuple[Value, list[Value]]:  # fmt: skip
        """A map's address, and the place of the batch at hand in its outer dimensions."""
        loops: Loops = self.of.batch
        steps = in_steps(offset, loops) or []
        map = TensorMap(
            buffer, start_of(offset, loops), (*(e for _, e, _ in steps), *inner),
            (*(step for _, _, step in steps), stride), (*(1 for _ in steps), *box), swizzle,
        )  # fmt: skip
        place = [self.w.index(sym(name), "i32") for name, _, _ in reversed(steps)]
        return self.w.tensor_map(map), place

    def _left(self) -> tuple[Value, list[Value]]:
        s, of, tile = self.tile.s, self.of, self.tile
        if tile.is_turned:
            box = (tile.depth, TURNED_ROWS)
            return self._map(s.a, of.left, (s.depth, of.rows), s.a_col, box, 128)
        sizes = (of.rows, s.depth)
        return self._map(s.a, of.left, sizes, s.a_row, (tile.rows, tile.depth), 128)

    def _right(self) -> tuple[Value, list[Value]]:
        s, of, tile = self.tile.s, self.of, self.tile
        assert s.panel_row is not None and s.panel_col is not None
        if tile.is_deep:
            box = (tile.columns, tile.depth)
            return self._map(s.panel, of.right, (of.columns, s.depth), s.panel_col, box, 128)
        box = (tile.depth, tile.columns)
        return self._map(s.panel, of.right, (s.depth, of.columns), s.panel_row, box, 0)

    def start(self, some: Value, stage: Value, slot: Value) -> None:
        """Starts the copies of a stage into a place of the ring, by a lane of the warp for which
        `some` holds, if it does for one."""
        code, tile = self.code, self.tile
        skip = code.label("filled")
        code.branch_if(some, skip, holds=False)
        with code.branch_scope():
            code.branch_if(elected(code), skip, holds=False)
            barrier, start = self.barriers + slot * BARRIER_BYTES, self.place(slot)
            k = self.begin + stage * tile.depth
            (left, outer), (right, beyond) = self.maps
            expect(code, barrier, (tile.rows + tile.columns) * tile.depth * tile.size)
            for n in range(tile.rows // TURNED_ROWS if tile.is_turned else 0):
                to = start + n * TURNED_ROWS * tile.depth * tile.size
                copy_box(code, left, (self.row + n * TURNED_ROWS, k, *outer), to, barrier)
            if not tile.is_turned:
                copy_box(code, left, (k, self.row, *outer), start, barrier)
            inner = (k, self.column) if tile.is_deep else (self.column, k)
            copy_box(code, right, (*inner, *beyond), start + tile.left_bytes, barrier)
        code.start(skip)

    def place(self, slot: Value) -> Value:
        return self.ring + slot * self.tile.stage_bytes

    def wait(self, slot: Slot) -> None:
        """Waits until a stage is there."""
        wait(self.code, self.barriers + slot.number * BARRIER_BYTES, slot.parity)
