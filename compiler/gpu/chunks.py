"""Operands of a warpgroups' f32 product on their way into shared memory, in few registers.

Eight lanes copy 128 bytes that are adjacent in memory; what a lane copies of a stage lies in steps,
so that it keeps one address of each operand and knows the others from it.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym

from .copies import Tile
from .folds import FoldWriter
from .ir import Value

ACROSS = 8  # lanes side by side
CHUNK = 4  # elements in 16 bytes
BYTES = 16


@dataclass
class _Part:
    """A copy: bytes beyond the operand's first one in memory (an expression) and in a stage, how
    far along the depth, and whether it is of a row or column that there is (None: it is)."""

    source: Expr
    target: int
    k: int
    room: int | None


@dataclass
class _Operand:
    """A lane's copies of an operand. `room`: rows or columns from its first one on."""

    parts: list[_Part]
    address: Value
    target: Value
    step: Value
    k: Value
    room: Value
    deep: bool


class ChunkCopies:
    """The asynchronous copies of a lane, stage after stage; both operands have 16 bytes adjacent
    and aligned, and the right one is one panel."""

    def __init__(self, writer: FoldWriter, tile: Tile, ring: Value) -> None:
        self.w, self.tile, self.ring, self.code = writer, tile, ring, writer.code
        s = tile.s
        self.operands = [self._left(), self._right()]
        whole = writer.divides(tile.depth, writer.resolve(s.depth))
        code = self.code
        self.left = None if whole else code.variable("i32", writer.index(s.depth, "i32"))

    def _left(self) -> _Operand:
        s, tile = self.tile.s, self.tile
        row, k = floordiv(sym("lane"), ACROSS), mod(sym("lane"), ACROSS) * CHUNK
        place = s.a_offset + row * s.a_row + k
        parts = self._rows(tile.rows, s.a_row, row, s.rows)
        return self._operand(s.a, place, parts, row * tile.left_pitch + k, k, s.rows - row, True)

    def _right(self) -> _Operand:
        s, tile, lanes = self.tile.s, self.tile, self.w.team.lanes
        outer, inner = floordiv(sym("lane"), ACROSS), mod(sym("lane"), ACROSS) * CHUNK
        row, step = s.panel_row, s.panel_col
        assert row is not None and step is not None and s.width is not None
        width = s.width.substitute({tile.name: tile.lo})
        start = tile.left_bytes // 4
        if tile.is_deep:
            parts = self._rows(tile.columns, step, outer, width)
            place, target = outer * step + inner, start + outer * tile.pitch + inner
            return self._operand(
                s.panel, tile.first + place, parts, target, inner, width - outer, True
            )
        parts = []
        for column in range(0, tile.columns, ACROSS * CHUNK):
            there = self.w.holds("lt", inner + column, width).known == 1
            for k in range(0, tile.depth, lanes // ACROSS):
                offset = row * (4 * k) + column * 4
                target_bytes = (k * tile.pitch + column) * 4
                parts.append(_Part(offset, target_bytes, k, None if there else column))
        place, target = outer * row + inner, start + outer * tile.pitch + inner
        return self._operand(
            s.panel, tile.first + place, parts, target, outer, width - inner, False
        )

    def _rows(self, count: int, step: Expr, first: Expr, end: Expr) -> list[_Part]:
        """Copies of rows along the depth, a few of them a step."""
        found = []
        apart = self.w.team.lanes // ACROSS
        for n in range(0, count, apart):
            there = self.w.holds("lt", first + n, end).known == 1
            target = n * self.tile.left_pitch * 4
            found.append(_Part(step * (4 * n), target, 0, None if there else n))
        return found

    def _operand(
        self, name: str, place: Expr, parts: list[_Part], target: Expr, k: Expr, room: Expr,
        deep: bool,
    ) -> _Operand:  # fmt: skip
        w, code = self.w, self.code
        memory, tile = w.memory[name], self.tile
        text = w.address(memory, (place, None))[1:-1]
        base, _, offset = text.partition("+")
        start = Value(code, base, "i64", code.depth) + int(offset or 0)
        row = tile.s.panel_row
        assert row is not None
        step = w.index((row if not deep else const(1)) * (tile.depth * 4), "i64")
        return _Operand(
            parts, code.variable("i64", start), self.ring + w.index(target, "i32") * 4, step,
            w.index(k, "i32"), w.index(room, "i32"), deep,
        )  # fmt: skip

    def issue(self, number: int, some: Value) -> None:
        """Starts the copies of the stage of this number."""
        self.start(some, self.code.const(number * self.tile.stage_bytes, "i32"))

    def start(self, some: Value, stage: Value) -> None:
        """Starts copies into the stage at an offset, if there is something left to copy."""
        code = self.code
        skip = code.label("filled")
        code.branch_if(some, skip, holds=False)
        with code.branch_scope():
            for operand in self.operands:
                self._copy(operand, operand.target + stage)
                code.write("add.s64", operand.address, operand.address, operand.step)
            if self.left is not None:
                code.write("sub.s32", self.left, self.left, code.const(self.tile.depth, "i32"))
        code.start(skip)
        code.line("cp.async.commit_group;")

    def _copy(self, operand: _Operand, target: Value) -> None:
        code = self.code
        sizes: dict[int, Value] = {}
        for part in operand.parts:
            if part.k not in sizes:
                sizes[part.k] = self._size(operand, part.k)
            size = sizes[part.k]
            if part.room is not None:
                there = code.emit("setp.gt.s32", "i1", operand.room, code.const(part.room, "i32"))
                size = code.emit("selp.b32", "i32", size, code.const(0, "i32"), there)
            source, offset = self._source(operand, part)
            code.line(
                f"cp.async.cg.shared.global [{target.text}+{part.target}], "
                f"[{source.text}+{offset}], {BYTES}, {size.text};"
            )

    def _source(self, operand: _Operand, part: _Part) -> tuple[Value, int]:
        """A part's address, as a register and bytes beyond it."""
        known = part.source.as_int()
        if known is not None:
            return operand.address, known
        constant = next((c for m, c in part.source.terms if m == ()), 0)
        beyond = self.w.index(part.source - constant, "i64")
        return self.code.emit("add.s64", "i64", operand.address, beyond), constant

    def _size(self, operand: _Operand, k: int) -> Value:
        """How many of 16 bytes there are along the depth."""
        code = self.code
        whole, nothing = code.const(BYTES, "i32"), code.const(0, "i32")
        if self.left is None:
            return whole
        left = code.emit("sub.s32", "i32", self.left, operand.k)
        if not operand.deep:
            some = code.emit("setp.gt.s32", "i1", left, code.const(k, "i32"))
            return code.emit("selp.b32", "i32", whole, nothing, some)
        room = code.emit("shl.b32", "i32", left, code.const(2, "i32"))
        room = code.emit("max.s32", "i32", room, nothing)
        return code.emit("min.s32", "i32", room, whole)
