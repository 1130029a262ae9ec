"""Operands of a product on their way into shared memory: a ring of stages, filled by cp.async.

PTX ISA 9.7.9.25.3.1, "cp.async": copies of 4, 8 or 16 bytes, of which the part beyond a size given
in a register is filled with zeros.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagefuse.compiler.gpu.folds import FoldWriter
from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.kernel_ir import TileProduct
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym
from stagefuse.dsl.frozen import frozen

from .gathered_operands import Gather

WARP_ROWS = 32
NOWHERE = 1 << 28


@frozen
class Tile:
    """A product of some adjacent panels, as statement and sizes. `panels`: how many there are
    (an expression), at most `most`; panel n begins at `first` + n * `step`, and is what the index
    `name` numbers from `lo` on. `in_scratch`: the left operand is in shared memory already.
    `size`: bytes of an element of the operands."""

    s: TileProduct
    panels: Expr
    most: int
    first: Expr
    step: Expr
    name: str
    lo: Expr
    stages: int
    depth: int
    in_scratch: bool
    size: int
    warps: int

    @property
    def columns(self) -> int:
        return self.most * self.s.nr

    @property
    def is_turned(self) -> bool:
        """Whether the rows of the left operand are adjacent in memory: a row of a stage is then
        what they have at a depth."""
        return self.s.a_col != const(1)

    @property
    def left_pitch(self) -> int:
        """Elements between rows of the left operand in shared memory: other banks."""
        return self.rows + 8 if self.is_turned else self.depth + 16 // self.size

    @property
    def left_steps(self) -> tuple[int, int]:
        """Elements between neighbours along the depth and along the rows, in shared memory."""
        return (self.left_pitch, 1) if self.is_turned else (1, self.left_pitch)

    @property
    def is_deep(self) -> bool:
        """Whether the depth is what is contiguous in memory: columns are then rows of a stage."""
        return self.s.panel_row == const(1)

    @property
    def pitch(self) -> int:
        """Elements between rows of the right operand in shared memory, which are in other banks:
        as the left one's, or those of eight more."""
        return self.depth + 16 // self.size if self.is_deep else self.columns + 8

    @property
    def right_steps(self) -> tuple[int, int]:
        """Elements between neighbours along the depth and along the columns, in shared memory."""
        return (1, self.pitch) if self.is_deep else (self.pitch, 1)

    @property
    def rows(self) -> int:
        return self.s.mr

    @property
    def warps_across(self) -> int:
        return self.warps // (self.rows // WARP_ROWS)

    @property
    def left_bytes(self) -> int:
        lines = self.depth if self.is_turned else self.rows
        return 0 if self.in_scratch else lines * self.left_pitch * self.size

    @property
    def stage_bytes(self) -> int:
        rows = self.columns if self.is_deep else self.depth
        return self.left_bytes + rows * self.pitch * self.size

    @property
    def ring_bytes(self) -> int:
        return self.stages * self.stage_bytes

    def said(self, operation: str, copies: str = "cp.async") -> str:
        """The product in words: what instructions of `operation` multiply."""
        left = "the left operand in shared memory, " * self.in_scratch
        right = ", the right operand computed by lanes" * (self.s.element is not None)
        return (
            f"{operation}, tiles of {self.rows} x {self.columns}, {left}{self.depth} of the depth "
            f"in each of {self.stages} stages by {copies}{right}"
        )


@dataclass
class Copy:
    """A lane's part of an operand: where it reads, where it writes in a stage, and how many
    elements from its first depth on there are; nothing where `valid` does not hold. `deep`: its
    elements are adjacent along the depth, and some may be beyond its end. `own`: whether this lane
    has it at all."""

    source: Value
    target: Value
    depth: Value
    valid: Value
    step: Value
    size: int
    deep: bool
    own: Value | None = None


class Copies:
    """The asynchronous copies of a lane, stage after stage."""

    def __init__(self, writer: FoldWriter, tile: Tile, ring: Value) -> None:
        self.writer, self.tile = writer, tile
        code, s = writer.code, tile.s
        self.stage = code.variable("i32", code.const(0, "i32"))
        self.gather = Gather(writer, s, tile.depth, tile.size) if s.a_indices else None
        left = [] if tile.in_scratch else self._left(ring)
        self.parts = [*left, *self._right(ring)]
        whole = writer.divides(tile.depth, writer.resolve(s.depth))
        self.left = None if whole else code.variable("i32", writer.index(s.depth, "i32"))
        if self.left is not None:  # a part that is not there begins beyond any depth
            for part in self.parts:
                part.depth = part.valid.select(part.depth, code.const(NOWHERE, "i32"))

    def _left(self, ring: Value) -> list[Copy]:
        w, tile = self.writer, self.tile
        s, lanes, width = tile.s, w.team.lanes, self._left_width()
        found = []
        for n in range(tile.rows * tile.depth // width // lanes):
            flat = sym("lane") + n * lanes
            across = (tile.rows if tile.is_turned else tile.depth) // width
            row, k = floordiv(flat, across), mod(flat, across) * width
            if tile.is_turned:
                row, k = k, row
            valid = w.holds("lt", row, s.rows)
            target = self._left_target(ring, row, k)
            if self.gather is not None:
                self.gather.add(target, row, k, valid)
                continue
            source = self.source(s.a, s.a_offset + row * s.a_row + k * s.a_col)
            step, place = w.index(s.a_col * (tile.depth * tile.size), "i64"), w.index(k, "i32")
            deep = not tile.is_turned
            found.append(Copy(source, target, place, valid, step, width * tile.size, deep))
        return found

    def _left_width(self) -> int:
        """Elements of the left operand that one copy moves: 16 bytes of aligned ones."""
        if self.gather is not None:
            return self.gather.width
        w, s, chunk = self.writer, self.tile.s, 16 // self.tile.size
        ends = (s.a_offset, s.a_col, s.rows) if self.tile.is_turned else (s.a_offset, s.a_row)
        return chunk if all(w.divides(chunk, w.resolve(e)) for e in ends) else 1

    def _left_target(self, ring: Value, row: Expr, k: Expr) -> Value:
        """Where an element of the left operand goes in the first stage."""
        along, apart = self.tile.left_steps
        return ring + self.writer.index((row * apart + k * along) * self.tile.size, "i32")

    def _right(self, ring: Value) -> list[Copy]:
        """Chunks of the panels: along whichever of depth and columns is contiguous."""
        w, tile = self.writer, self.tile
        s, lanes = tile.s, w.team.lanes
        row, step = s.panel_row or const(s.nr), s.panel_col or const(1)
        width = self._chunk(row, step)
        across = (tile.depth if tile.is_deep else tile.columns) // width
        total = tile.depth * tile.columns // width
        along, apart = tile.right_steps
        found = []
        for n in range(-(-total // lanes)):
            flat = sym("lane") + n * lanes
            outer, inner = floordiv(flat, across), mod(flat, across) * width
            k, column = (inner, outer) if tile.is_deep else (outer, inner)
            panel, inside = floordiv(column, s.nr), mod(column, s.nr)
            own = w.holds("lt", flat, const(total))
            valid = w.holds("lt", panel, tile.panels)
            if s.panel_row is not None and s.width is not None:
                with w.binding(**{**w.bound, tile.name: w.resolve(tile.lo) + panel}):
                    valid = valid & w.holds("lt", inside, s.width)
            place = tile.first + panel * tile.step + k * row + inside * step
            target = tile.left_bytes + (k * along + column * apart) * tile.size
            deep = tile.is_deep and width > 1
            copy = self._copy(ring, s.panel, place, target, k, valid, row, width, deep)
            copy.own = own
            found.append(copy)
        return found

    def _chunk(self, row: Expr, step: Expr) -> int:
        """Elements of the panels that one copy moves: 16 bytes of adjacent and aligned ones."""
        w, tile = self.writer, self.tile
        s, chunk = tile.s, 16 // tile.size
        if s.panel_row is None:
            return chunk
        other = step if tile.is_deep else row
        if not tile.is_deep and step != const(1):
            return 1
        ends = [other, tile.first, tile.step]
        if not tile.is_deep:
            ends.append(s.width or const(s.nr))
        return chunk if all(w.divides(chunk, w.resolve(e)) for e in ends) else 1

    def _copy(
        self, ring: Value, name: str, place: Expr, target: Expr, k: Expr, valid: Value, row: Expr,
        width: int, deep: bool,
    ) -> Copy:  # fmt: skip
        w = self.writer
        source = self.source(name, place)
        step = w.index(row * (self.tile.depth * self.tile.size), "i64")
        return Copy(
            source, ring + w.index(target, "i32"), w.index(k, "i32"), valid, step,
            width * self.tile.size, deep,
        )  # fmt: skip

    def source(self, name: str, place: Expr) -> Value:
        """A register with the address of an element, to be moved on."""
        code, memory = self.writer.code, self.writer.memory[name]
        text = self.writer.address(memory, (place, None))[1:-1]
        base, _, offset = text.partition("+")
        start = Value(code, base, "i64", code.depth)
        return code.variable("i64", start + int(offset or 0))

    def issue(self, number: int, some: Value) -> None:
        """Starts the copies of the stage of this number."""
        self.start(some, self.writer.code.const(number * self.tile.stage_bytes, "i32"))

    def issue_next(self, some: Value, reading: Value, number: Value) -> None:
        """Starts copies of the stage of this number into the one before that which is read."""
        self.start(some, self.before(reading))

    def before(self, reading: Value) -> Value:
        """The offset of the stage before one."""
        code, size = self.writer.code, self.tile.stage_bytes
        last = code.const((self.tile.stages - 1) * size, "i32")
        return reading.compare("eq", 0).select(last, reading - size)

    def ready(self) -> None:
        """Called when the first stages are issued: computes what is not copied of them."""

    def finish(self) -> None:
        """Computes what is not copied of the stage that `issue_next` started."""

    def fill(self, number: Value, into: Value) -> None:
        """Computes what is not copied of the stage of this number into an offset of the ring."""

    def start(self, some: Value, stage: Value) -> None:
        """Starts copies into the stage at an offset, if there is something left to copy."""
        code = self.writer.code
        skip = code.label("filled")
        code.branch_if(some, skip, holds=False)
        with code.branch_scope():
            for part in self.parts:
                self._one(part, stage)
            if self.gather is not None:
                self.gather.start(stage)
            if self.left is not None:
                code.write("sub.s32", self.left, self.left, code.const(self.tile.depth, "i32"))
        code.start(skip)
        code.line("cp.async.commit_group;")

    def _one(self, part: Copy, stage: Value) -> None:
        code = self.writer.code
        whole, nothing = code.const(part.size, "i32"), code.const(0, "i32")
        if self.left is None:
            size = part.valid.select(whole, nothing)
        elif part.size == 16 and part.deep:
            left = code.emit("sub.s32", "i32", self.left, part.depth)
            room = code.emit("shl.b32", "i32", left, code.const(self.tile.size // 2, "i32"))
            room = code.emit("max.s32", "i32", room, nothing)
            size = code.emit("min.s32", "i32", room, whole)
        else:
            some = code.emit("setp.gt.s32", "i1", self.left, part.depth)
            size = code.emit("selp.b32", "i32", whole, nothing, some)
        at = part.target + stage
        way = "cg" if part.size == 16 else "ca"
        code.line(
            f"{code.guarded(part.own)}cp.async.{way}.shared.global [{at.text}], "
            f"[{part.source.text}], {part.size}, {size.text};"
        )
        code.write("add.s64", part.source, part.source, part.step)
