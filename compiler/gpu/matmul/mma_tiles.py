"""Tiles of matrix products on tensor cores, those of f32 as exact as f32 arithmetic.

Operands come through shared memory (`async_copies`). Those of 16 and 8 bits are multiplied as they
are (`ldmatrix_tiles`). Each f32 is split into two tf32 values, and three products of them are
summed in f32; the fourth is below f32's rounding. Tensor cores truncate their sums, so that those
of a stage are added up outside (Ootomo and Yokota, "Recovering single precision accuracy from
Tensor Cores", 2022). An infinity or NaN does not survive the split: a block that finds one in its
result computes the tile again by multiply-adds. Fragments: PTX ISA 9.7.14.5, "mma.m16n8k8" for
.tf32.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

from stagefuse.compiler.cpu.bodies import walk
from stagefuse.compiler.gpu.ir import Code, Value
from stagefuse.compiler.gpu.teams import most_of
from stagefuse.compiler.kernel_ir import Alloc, For, TileProduct
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym
from stagefuse.dsl.dtypes import F32

from .async_copies import WARP_ROWS, Copies, Tile
from .computed_operands import Computed
from .ldmatrix_tiles import NarrowWriter
from .mma import NAMES, SPLIT, Kind, mma

STAGES = 3  # of a product alone in its kernel
DEPTH = 16  # of a stage, and of sums that tensor cores make
SHALLOW = 96  # depth that may come in one stage
ONCE_BYTES = 48 << 10  # of that stage
NARROW_BYTES = 64  # of a row of a stage of 16- and 8-bit operands
COMPUTED_BYTES = 80 << 10
"""Of stages twice as deep, where lanes compute the right operand: what they have under way is then
twice as much, and an SM of an A100 holds two blocks."""
TF32 = Kind("tf32", "tf32", 4, "f32")


_Parts = tuple[Value, Value]
"""An f32 as two tf32 values."""


class TensorWriter(NarrowWriter):
    """The body of a kernel, as far as its products by tensor cores go."""

    ring: tuple[Expr, int] | None = None
    by_lanes: frozenset[str] = frozenset()
    """The scratch of products that lanes compute."""

    def plain(self, s: For) -> None:
        tile = self._tile_of(s)
        if tile is None:
            self.by_lanes |= {t.dst for t in s.body if isinstance(t, TileProduct)}
            return super().plain(s)
        with self.choosing(tile.s):
            self._multiply(tile, tile.s.dst_offset.substitute({s.index: s.lo}))
        if tile.size < 4:  # nothing is split
            self.barrier()
            return
        code = self.code
        done = code.label("exact")
        code.branch_if(self.any_odd(self.sums), done, holds=False)
        with code.branch_scope(), self.scope():
            self.barrier()
            super().plain(s)
        code.start(done)

    def _tile_of(self, s: For) -> Tile | None:
        """The loop over panels as one product, if it is one of f32."""
        if not self.in_team or len(s.body) != 1 or not isinstance(s.body[0], TileProduct):
            return None
        t = s.body[0]
        most = most_of(s.lo, s.hi, self.facts)
        step = t.panel_offset.coefficient(s.index)
        apart = t.dst_offset.coefficient(s.index)
        if most is None or step is None or apart != const(t.nr) or t.accumulate:
            return None
        left, warps = self.memory[t.a], self.team.lanes // 32
        across = warps // max(t.mr // WARP_ROWS, 1)
        if left.dtype != F32 and left.dtype.name not in NAMES:
            return None
        if const(1) not in (t.a_row, t.a_col):
            return None
        if t.mr % WARP_ROWS or not across:
            return None
        begins = t.dst_offset.substitute({s.index: s.lo}) == const(0)
        room = (t.dst_row.as_int() or 0) // t.nr if begins and t.element is None else 0
        while most * t.nr % (8 * across) and most < room:
            most += 1  # by panels of zeros all warps have as many columns
        if most * t.nr % (8 * across):
            return None
        first = t.panel_offset.substitute({s.index: s.lo})
        inside = left.space == "shared"
        stages, depth = STAGES, DEPTH
        if left.dtype.bits < 32:
            depth = NARROW_BYTES // left.dtype.itemsize
        else:
            depth = DEPTH if self._is_alone() else 2 * DEPTH
        found = Tile(
            t, s.hi - s.lo, most, first, step, s.index, s.lo, stages, depth, inside,
            left.dtype.itemsize, warps,
        )  # fmt: skip
        if t.element is not None and found.size < 4:
            twice = replace(found, depth=2 * depth)
            return twice if twice.ring_bytes <= COMPUTED_BYTES else found
        deepest = self.facts.bounds(self.resolve(t.depth))[1]
        if deepest is None or not 0 < deepest <= SHALLOW or inside or found.size < 4:
            return found
        once = replace(found, stages=1, depth=-(-deepest // DEPTH) * DEPTH)
        return once if once.stage_bytes <= ONCE_BYTES else found

    def _is_alone(self) -> bool:
        """Whether the kernel has one product and no scratch but its tile."""
        found = [s for s in walk(self.kernel.body) if isinstance(s, TileProduct | Alloc)]
        return len(found) == 2

    def _ring(self, tile: Tile) -> Value:
        """The stages: over the tile, which is not yet in use, where there is nothing else."""
        size = tile.ring_bytes
        memory = self.memory[tile.s.dst]
        if self._is_alone() and memory.start is not None:
            known = (memory.shape[0] * memory.shape[1] * 4).as_int() or 0
            if size > known:
                self.reserve(size - known)
            return memory.start
        if self.ring is None or self.ring[1] < size:
            self.ring = (self.reserve(size), size)
        return self.shared_address(self.ring[0])

    # The product

    def _multiply(self, tile: Tile, base: Expr) -> None:
        code, s = self.code, tile.s
        kind = SPLIT if tile.size == 4 else str(self.kind_in(tile))
        self.structure.append(tile.said(f"mma.sync of {kind}"))
        ring = self._ring(tile)
        if s.a in self.by_lanes:
            self._fill_left(tile)
        steps = self.index(floordiv(s.depth + (tile.depth - 1), tile.depth), "i32")
        copies = (Copies if s.element is None else Computed)(self, tile, ring)
        for n in range(tile.stages - 1):
            copies.issue(n, code.const(n, "i32").compare("lt", steps))
        register = "float" if tile.size == 4 else self.kind_in(tile).register
        across = tile.columns // tile.warps_across // 8
        sums = [code.variable(register, code.const(0, register)) for _ in range(2 * across * 4)]
        self.sums = sums
        if tile.stages == 1:
            code.line("bar.sync 0;")
            copies.issue(0, code.const(1, "i1"))
            copies.ready()
            code.line("cp.async.wait_group 0;")
            code.line("bar.sync 0;")
            self._multiply_once(tile, ring, sums, across)
            code.line("bar.sync 0;")
            return self._store_tile(tile, base, sums, across)
        copies.ready()
        with self.over_stages(tile, steps) as (now, at):
            code.line(f"cp.async.wait_group {tile.stages - 2};")
            code.line("bar.sync 0;")
            later = now + (tile.stages - 1)
            copies.issue_next(later.compare("lt", steps), at, later)
            if tile.size < 4:
                self.narrow_stage(tile, ring, at, sums, across)
            else:
                self._multiply_stage(tile, ring, at, now, sums, across)
            copies.finish()
        code.line("cp.async.wait_group 0;")
        code.line("bar.sync 0;")
        self._store_tile(tile, base, sums, across)

    @contextmanager
    def over_stages(self, tile: Tile, steps: Value) -> Iterator[tuple[Value, Value]]:
        """A loop over the stages of a tile, so many: the number of one, and where it lies in the
        ring."""
        code = self.code
        step = code.variable("i32", code.const(0, "i32"))
        read = code.variable("i32", code.const(0, "i32"))
        head, done = code.label("depth"), code.label("summed")
        with code.loop_scope(), self.scope():
            code.start(head)
            now = Value(code, step.text, "i32", code.depth)
            at = Value(code, read.text, "i32", code.depth)
            code.branch_if(now.compare("lt", steps), done, holds=False)
            yield now, at
            code.write("add.s32", step, step, code.const(1, "i32"))
            after = at + tile.stage_bytes
            wrapped = after.compare("ge", tile.stages * tile.stage_bytes)
            code.set(read, wrapped.select(code.const(0, "i32"), after))
            code.branch(head)
        code.start(done)

    def _multiply_stage(
        self, tile: Tile, ring: Value, at: Value, now: Value, sums: list[Value], across: int
    ) -> None:
        """The products of the stage number `now`, which lies at `at` in the ring."""
        left = self._left_rows(tile, ring, at, now)
        right = self._right_start(tile, ring) + at
        for begin in range(0, tile.depth, DEPTH):
            self._multiply_step(tile, left, right, begin, sums, across)

    def _multiply_once(self, tile: Tile, ring: Value, sums: list[Value], across: int) -> None:
        """The products of the only stage, in a loop: written out they would be long."""
        code = self.code
        nothing = code.const(0, "i32")
        ((start, _), *_) = left = self._left_rows(tile, ring, nothing, nothing)
        right = self._right_start(tile, ring)
        (along, _), (down, _) = tile.right_steps, tile.left_steps
        places = [code.variable("i32", v) for v in (start, right)]
        stop = start + tile.depth * down * 4
        again = code.label("step")
        with code.loop_scope(), self.scope():
            code.line('.pragma "nounroll";')
            code.start(again)
            now_left, now_right = (Value(code, v.text, "i32", code.depth) for v in places)
            rows = [(now_left, offset) for _, offset in left]
            self._multiply_step(tile, rows, now_right, 0, sums, across)
            code.write("add.s32", now_left, now_left, code.const(DEPTH * down * 4, "i32"))
            code.write("add.s32", now_right, now_right, code.const(DEPTH * along * 4, "i32"))
            code.branch_if(now_left.compare("lt", stop), again)

    def _right_start(self, tile: Tile, ring: Value) -> Value:
        """Where this lane's part of the right operand begins in the first stage."""
        g, q, _, right = self.lane_place(tile)
        column = right * (tile.columns // tile.warps_across) + g
        along, apart = tile.right_steps
        return ring + self.index(q * along + column * apart, "i32") * 4 + tile.left_bytes

    def _multiply_step(
        self,
        tile: Tile,
        left: list[tuple[Value, int]],
        right: Value,
        begin: int,
        sums: list[Value],
        across: int,
    ) -> None:
        """The products of `DEPTH` elements of the depth from `begin` on."""
        (along, apart), (down, _) = tile.right_steps, tile.left_steps
        steps = range(begin, begin + DEPTH, 8)
        a = [
            [
                self._split(start, offset + (k + 4 * part) * down * 4)
                for part in range(2)
                for start, offset in left[m * 2 : m * 2 + 2]
            ]
            for m in range(2)
            for k in steps
        ]
        for n in range(across):
            b = [
                [
                    self._split(right, ((k + 4 * part) * along + n * 8 * apart) * 4)
                    for part in range(2)
                ]
                for k in steps
            ]
            for m in range(2):
                rows = a[m * len(steps) : (m + 1) * len(steps)]
                self.add_product(sums[(m * across + n) * 4 :][:4], rows, b)

    def add_product(
        self, sums: list[Value], rows: list[list[_Parts]], columns: list[list[_Parts]]
    ) -> None:
        """A fragment's products over a few steps, summed by themselves and then added."""
        code = self.code
        found = [code.variable("float", code.const(0.0, "float")) for _ in range(4)]
        for a, b in zip(rows, columns, strict=True):
            for x, y in ((1, 0), (0, 1), (0, 0)):  # the small products first
                mma(code, TF32, found, [r[x] for r in a], [c[y] for c in b])
        for total, part in zip(sums, found, strict=True):
            code.write("add.rn.f32", total, total, part)

    def _fill_left(self, tile: Tile) -> None:
        """Zeros beyond the rows and the depth of a left operand in scratch: lanes compute no more
        than there is, and whole fragments are read."""
        s, memory, code = tile.s, self.memory[tile.s.a], self.code
        deepest, pitch = (self.facts.bounds(self.resolve(e))[1] for e in (s.depth, s.a_row))
        assert memory.start is not None and pitch is not None
        wide = min(-(-(deepest or pitch) // tile.depth) * tile.depth, pitch)
        for n in range(-(-tile.rows * wide // self.team.lanes)):
            flat = sym("lane") + n * self.team.lanes
            row, k = floordiv(flat, wide), mod(flat, wide)
            none = self.holds("ge", row, s.rows) | self.holds("ge", k, s.depth)
            none = none & self.holds("lt", row, const(tile.rows))
            place = memory.start + self.index((s.a_offset + row * s.a_row + k) * 4, "i32")
            code.write("st.shared.f32", f"[{place.text}]", code.const(0.0, "float"), guard=none)

    def _left_rows(self, tile: Tile, ring: Value, at: Value, now: Value) -> list[tuple[Value, int]]:
        """Where this lane's four rows of the left operand begin, as address and offset."""
        g, q, down, _ = self.lane_place(tile)
        first, s = down * WARP_ROWS + g, tile.s
        if not tile.in_scratch:
            along, apart = tile.left_steps
            start = ring + self.index(first * apart + q * along, "i32") * 4 + at
            return [(start, n * 8 * apart * 4) for n in range(4)]
        memory = self.memory[s.a]
        assert memory.start is not None
        places = [s.a_offset + (first + n * 8) * s.a_row + q for n in range(4)]
        depth = now * (tile.depth * 4)
        return [(memory.start + self.index(p, "i32") * 4 + depth, 0) for p in places]

    def _split(self, at: Value, offset: int) -> tuple[Value, Value]:
        """An f32 of shared memory as two tf32 values."""
        value = self.code.fresh("float")
        self.code.write("ld.shared.f32", value, f"[{at.text}+{offset}]")
        return tf32_parts(self.code, value)

    def _store_tile(self, tile: Tile, base: Expr, sums: list[Value], across: int) -> None:
        memory = self.memory[tile.s.dst]
        g, q, down, right = self.lane_place(tile)
        for m in range(2):
            for half in range(2):
                row = down * WARP_ROWS + m * 16 + half * 8 + g
                for n in range(across):
                    column = right * (tile.columns // tile.warps_across) + n * 8 + q * 2
                    place = base + row * tile.s.dst_row + column
                    pair = sums[(m * across + n) * 4 + half * 2 :][:2]
                    self.write(memory, self.address(memory, (place, None)), pair)

    def any_odd(self, sums: list[Value]) -> Value:
        """Whether the block has a sum that is infinite or NaN."""
        code = self.code
        total: Value | None = None
        for value in sums:
            nothing = code.emit("mul.rn.f32", "float", value, code.const(0.0, "float"))
            total = nothing if total is None else code.emit("add.rn.f32", "float", total, nothing)
        assert total is not None
        odd = code.emit("setp.nan.f32", "i1", total, total)
        found = code.fresh("i1")
        who = f"1, {self.team.lanes}" if self.team.helpers else "0"
        code.line(f"bar.red.or.pred {found.text}, {who}, {odd.text};")
        self.unread, self.unwritten = set(), set()
        return found


def tf32_parts(code: Code, value: Value) -> _Parts:
    """An f32 as two tf32 values: rounded to nearest, and what rounding lost, cut off.

    `cvt.rna.tf32` would say so too, but ptxas makes five instructions of it. It differs in NaN
    alone, which may lose itself in the first and stays in the second.
    """
    keep = code.const(-1 << 13, "i32")
    half = code.pure("add.s32", "i32", value.bits(), code.const(1 << 12, "i32"))
    high = code.pure("and.b32", "i32", half, keep)
    rest = code.pure("sub.rn.f32", "float", value, high.as_float("float"))
    return high, code.pure("and.b32", "i32", rest.bits(), keep)
