"""Tiles of f32 matrix products on tensor cores, as exact as f32 arithmetic.

Each f32 is split into two tf32 values, and three products of them are summed in f32; the fourth
is below f32's rounding. Tensor cores truncate their sums, so that those of a stage are added up
outside (Ootomo and Yokota, "Recovering single precision accuracy from Tensor Cores", 2022).
Operands come through shared memory in a ring of stages filled by cp.async. An infinity or NaN does
not survive the split: a block that finds one in its result computes the tile again by
multiply-adds. Fragments: PTX ISA 9.7.14.5.4, "mma.m16n8k8" for .tf32.
"""

from __future__ import annotations

from dataclasses import dataclass

from stagefuse.compiler.kernel_ir import For, TileProduct
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym

from .ir import Value
from .sort import SortWriter
from .teams import most_of

STAGES = 3
DEPTH = 16  # of a stage
PITCH = 20  # elements between rows of the left operand in shared memory
WARPS_DOWN, WARPS_ACROSS = 2, 2
ROWS = 64


@dataclass(frozen=True)
class _Tile:
    """A product of some adjacent panels, as statement and sizes. `panels`: how many there are
    (an expression), at most `most`; panel n begins at `first` + n * `step`, and is what the index
    `name` numbers from `lo` on."""

    s: TileProduct
    panels: Expr
    most: int
    first: Expr
    step: Expr
    name: str
    lo: Expr

    @property
    def columns(self) -> int:
        return self.most * self.s.nr

    @property
    def is_deep(self) -> bool:
        """Whether the depth is what is contiguous in memory: columns are then rows of a stage."""
        return self.s.panel_row == const(1)

    @property
    def pitch(self) -> int:
        """Elements between rows of the right operand in shared memory, which are in other banks:
        as the left one's, or those of eight more."""
        return PITCH if self.is_deep else self.columns + 8

    @property
    def right_steps(self) -> tuple[int, int]:
        """Elements between neighbours along the depth and along the columns, in shared memory."""
        return (1, self.pitch) if self.is_deep else (self.pitch, 1)

    @property
    def left_bytes(self) -> int:
        return ROWS * PITCH * 4

    @property
    def stage_bytes(self) -> int:
        rows = self.columns if self.is_deep else DEPTH
        return self.left_bytes + rows * self.pitch * 4


class TensorWriter(SortWriter):
    """The body of a kernel, as far as its products by tensor cores go."""

    def plain(self, s: For) -> None:
        tile = self._tile_of(s)
        if tile is None:
            return super().plain(s)
        self._multiply(tile, tile.s.dst_offset.substitute({s.index: s.lo}))
        code = self.code
        done = code.label("exact")
        code.branch_if(self._any_odd(), done, holds=False)
        with code.branch_scope(), self.scope():
            self.barrier()
            super().plain(s)
        code.start(done)

    def _tile_of(self, s: For) -> _Tile | None:
        """The loop over panels as one product, if it is one of f32."""
        if not self.in_team or len(s.body) != 1 or not isinstance(s.body[0], TileProduct):
            return None
        t = s.body[0]
        most = most_of(s.lo, s.hi, self.facts)
        step = t.panel_offset.coefficient(s.index)
        across = t.dst_offset.coefficient(s.index)
        if most is None or step is None or across != const(t.nr) or t.accumulate:
            return None
        plain = t.a_col == const(1) and t.mr == ROWS and self.team.lanes == 128
        if self.memory[t.a].dtype.name != "f32" or not plain or most * t.nr % 16:
            return None
        first = t.panel_offset.substitute({s.index: s.lo})
        return _Tile(t, s.hi - s.lo, most, first, step, s.index, s.lo)

    # The product

    def _multiply(self, tile: _Tile, base: Expr) -> None:
        code, s = self.code, tile.s
        memory = self.memory[s.dst]
        assert memory.start is not None
        known = memory.shape[0] * memory.shape[1] * 4
        missing = STAGES * tile.stage_bytes - (known.as_int() or 0)
        if missing > 0:
            self.reserve(missing)  # behind the tile, which is not yet in use
        ring = memory.start
        steps = self.index(floordiv(s.depth + (DEPTH - 1), DEPTH), "i32")
        copies = _Copies(self, tile, ring)
        for n in range(STAGES - 1):
            copies.issue(n, code.const(n, "i32").compare("lt", steps))
        zero = code.const(0.0, "float")
        across = tile.columns // WARPS_ACROSS // 8
        sums = [code.variable("float", zero) for _ in range(2 * across * 4)]
        self.sums = sums
        step = code.variable("i32", code.const(0, "i32"))
        read = code.variable("i32", code.const(0, "i32"))
        head, done = code.label("depth"), code.label("summed")
        with code.loop_scope(), self.scope():
            code.start(head)
            now = Value(code, step.text, "i32", code.depth)
            at = Value(code, read.text, "i32", code.depth)
            code.branch_if(now.compare("lt", steps), done, holds=False)
            code.line(f"cp.async.wait_group {STAGES - 2};")
            code.line("bar.sync 0;")
            copies.issue_next((now + (STAGES - 1)).compare("lt", steps), at)
            self._multiply_stage(tile, ring, at, sums, across)
            code.write("add.s32", step, step, code.const(1, "i32"))
            after = at + tile.stage_bytes
            wrapped = after.compare("ge", STAGES * tile.stage_bytes)
            code.set(read, wrapped.select(code.const(0, "i32"), after))
            code.branch(head)
        code.start(done)
        code.line("cp.async.wait_group 0;")
        code.line("bar.sync 0;")
        self._store_tile(tile, base, sums, across)

    def _lane(self) -> tuple[Expr, Expr, Expr, Expr]:
        """The lane's row and column in a fragment (g, q), and its warp's place (down, across)."""
        lane = sym("lane")
        within = mod(lane, 32)
        warp = floordiv(lane, 32)
        return (
            floordiv(within, 4), mod(within, 4), floordiv(warp, WARPS_ACROSS),
            mod(warp, WARPS_ACROSS),
        )  # fmt: skip

    def _multiply_stage(
        self, tile: _Tile, ring: Value, at: Value, sums: list[Value], across: int
    ) -> None:
        """The products of one stage."""
        code = self.code
        g, q, down, right = self._lane()
        left_at = ring + self.index((down * 32 + g) * PITCH + q, "i32") * 4 + at
        column = right * (tile.columns // WARPS_ACROSS) + g
        along, across_step = tile.right_steps
        place = self.index(q * along + column * across_step, "i32")
        right_at = ring + place * 4 + tile.left_bytes + at
        steps = range(0, DEPTH, 8)
        a = [
            [
                self._split(left_at, ((m * 16 + half * 8) * PITCH + k + 4 * part) * 4)
                for part in range(2)
                for half in range(2)
            ]
            for m in range(2)
            for k in steps
        ]
        for n in range(across):
            b = [
                [self._split(right_at, ((k + 4 * part) * along + n * 8 * across_step) * 4)
                 for part in range(2)]
                for k in steps
            ]  # fmt: skip
            for m in range(2):
                part_sums = [code.variable("float", code.const(0.0, "float")) for _ in range(4)]
                for number in range(len(steps)):
                    rows, columns = a[m * len(steps) + number], b[number]
                    for x, y in ((1, 0), (0, 1), (0, 0)):  # the small products first
                        _mma(self, part_sums, [r[x] for r in rows], [c[y] for c in columns])
                for total, part in zip(sums[(m * across + n) * 4 :][:4], part_sums, strict=True):
                    code.write("add.rn.f32", total, total, part)

    def _split(self, at: Value, offset: int) -> tuple[Value, Value]:
        """An f32 of shared memory as two tf32 values: rounded, and what rounding lost."""
        code = self.code
        value = code.fresh("float")
        code.write("ld.shared.f32", value, f"[{at.text}+{offset}]")
        high, low = code.fresh("i32"), code.fresh("i32")
        rest = code.fresh("float")
        code.write("cvt.rna.tf32.f32", high, value)
        code.write("sub.rn.f32", rest, value, high.as_float("float"))
        code.write("cvt.rna.tf32.f32", low, rest)
        return high, low

    def _store_tile(self, tile: _Tile, base: Expr, sums: list[Value], across: int) -> None:
        memory = self.memory[tile.s.dst]
        g, q, down, right = self._lane()
        for m in range(2):
            for half in range(2):
                row = down * 32 + m * 16 + half * 8 + g
                for n in range(across):
                    column = right * (tile.columns // WARPS_ACROSS) + n * 8 + q * 2
                    place = base + row * tile.s.dst_row + column
                    pair = sums[(m * across + n) * 4 + half * 2 :][:2]
                    self.write(memory, self.address(memory, (place, None)), pair)

    def _any_odd(self) -> Value:
        """Whether the block has a sum that is infinite or NaN."""
        code = self.code
        total: Value | None = None
        for value in self.sums:
            nothing = code.emit("mul.rn.f32", "float", value, code.const(0.0, "float"))
            total = nothing if total is None else code.emit("add.rn.f32", "float", total, nothing)
        assert total is not None
        odd = code.emit("setp.nan.f32", "i1", total, total)
        found = code.fresh("i1")
        code.line(f"bar.red.or.pred {found.text}, 0, {odd.text};")
        self.unread, self.unwritten = set(), set()
        return found


def _mma(w: TensorWriter, sums: list[Value], a: list[Value], b: list[Value]) -> None:
    d = ", ".join(v.text for v in sums)
    w.code.line(
        f"mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {{{d}}}, "
        f"{{{', '.join(v.text for v in a)}}}, {{{', '.join(v.text for v in b)}}}, {{{d}}};"
    )


@dataclass
class _Copy:
    """A lane's part of an operand: where it reads, where it writes in a stage, and how many
    elements from its first depth on there are; nothing where `valid` does not hold. `deep`: its
    elements are adjacent along the depth, and some may be beyond its end. `own`: whether this lane
    has it at all."""

    source: Value
    target: Value
    depth: Value | None
    valid: Value
    step: Value
    size: int
    deep: bool
    own: Value | None = None


class _Copies:
    """The asynchronous copies of a lane, stage after stage."""

    def __init__(self, writer: TensorWriter, tile: _Tile, ring: Value) -> None:
        self.writer, self.tile = writer, tile
        code = writer.code
        self.stage = code.variable("i32", code.const(0, "i32"))
        self.parts = [*self._left(ring), *self._right(ring)]
        s = tile.s
        whole = writer.divides(DEPTH, writer.resolve(s.depth))
        self.left = None if whole else code.variable("i32", writer.index(s.depth, "i32"))

    def _left(self, ring: Value) -> list[_Copy]:
        w, s = self.writer, self.tile.s
        aligned = all(w.divides(4, w.resolve(e)) for e in (s.a_offset, s.a_row))
        width = 4 if aligned else 1
        found = []
        lanes = w.team.lanes
        for n in range(ROWS * DEPTH // width // lanes):
            flat = sym("lane") + n * lanes
            row, k = floordiv(flat, DEPTH // width), mod(flat, DEPTH // width) * width
            valid = w.holds("lt", row, s.rows)
            place = s.a_offset + row * s.a_row + k
            target = (row * PITCH + k) * 4
            found.append(self._copy(ring, s.a, place, target, k, valid, const(1), width, True))
        return found

    def _right(self, ring: Value) -> list[_Copy]:
        """Chunks of the panels: along whichever of depth and columns is contiguous."""
        w, tile = self.writer, self.tile
        s, lanes = tile.s, w.team.lanes
        row, step = s.panel_row or const(s.nr), s.panel_col or const(1)
        width = self._chunk(row, step)
        across = (DEPTH if tile.is_deep else tile.columns) // width
        total = DEPTH * tile.columns // width
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
            target = tile.left_bytes + (k * along + column * apart) * 4
            deep = tile.is_deep and width > 1
            copy = self._copy(ring, s.panel, place, target, k, valid, row, width, deep)
            copy.own = own
            found.append(copy)
        return found

    def _chunk(self, row: Expr, step: Expr) -> int:
        """Elements of the panels that one copy moves: 4 where they are adjacent and aligned."""
        w, tile = self.writer, self.tile
        s = tile.s
        if s.panel_row is None:
            return 4
        other = step if tile.is_deep else row
        if not tile.is_deep and step != const(1):
            return 1
        ends = [other, tile.first, tile.step]
        if not tile.is_deep:
            ends.append(s.width or const(s.nr))
        return 4 if all(w.divides(4, w.resolve(e)) for e in ends) else 1

    def _copy(
        self, ring: Value, name: str, place: Expr, target: Expr, k: Expr, valid: Value, row: Expr,
        width: int, deep: bool,
    ) -> _Copy:  # fmt: skip
        w = self.writer
        code, memory = w.code, w.memory[name]
        text = w.address(memory, (place, None))[1:-1]
        base, _, offset = text.partition("+")
        start = Value(code, base, "i64", code.depth)
        source = code.variable("i64", start + int(offset or 0))
        step = w.index(row * (DEPTH * 4), "i64")
        return _Copy(
            source, ring + w.index(target, "i32"), w.index(k, "i32"), valid, step, width * 4, deep
        )

    def issue(self, number: int, some: Value) -> None:
        """Starts the copies of the stage of this number."""
        self._issue(some, self.writer.code.const(number * self.tile.stage_bytes, "i32"))

    def issue_next(self, some: Value, reading: Value) -> None:
        """Starts copies into the stage before the one that is read."""
        code, size = self.writer.code, self.tile.stage_bytes
        before = reading - size
        last = code.const((STAGES - 1) * size, "i32")
        self._issue(some, reading.compare("eq", 0).select(last, before))

    def _issue(self, some: Value, stage: Value) -> None:
        code = self.writer.code
        skip = code.label("filled")
        code.branch_if(some, skip, holds=False)
        with code.branch_scope():
            for part in self.parts:
                self._one(part, stage)
            if self.left is not None:
                code.write("sub.s32", self.left, self.left, code.const(DEPTH, "i32"))
        code.start(skip)
        code.line("cp.async.commit_group;")

    def _one(self, part: _Copy, stage: Value) -> None:
        code = self.writer.code
        size = part.valid.select(code.const(part.size, "i32"), code.const(0, "i32"))
        if self.left is not None and part.depth is not None:
            left = code.emit("sub.s32", "i32", self.left, part.depth)
            if part.size == 16 and part.deep:
                room = code.emit("shl.b32", "i32", left, code.const(2, "i32"))
                room = code.emit("max.s32", "i32", room, code.const(0, "i32"))
                size = code.emit("min.s32", "i32", room, size)
            else:
                some = code.emit("setp.gt.s32", "i1", left, code.const(0, "i32"))
                size = code.emit("selp.b32", "i32", size, code.const(0, "i32"), some)
        at = part.target + stage
        way = "cg" if part.size == 16 else "ca"
        code.line(
            f"{code.guarded(part.own)}cp.async.{way}.shared.global [{at.text}], "
            f"[{part.source.text}], {part.size}, {size.text};"
        )
        code.write("add.s64", part.source, part.source, part.step)
