"""Tiles of 16-bit matrix products by Hopper's warpgroup instructions.

Two warpgroups compute 64 rows each of a tile 128 rows high, straight from shared memory. Operands
lie there in rows of 128 bytes whose chunks of 16 are exchanged by the row's number, the 128-byte
swizzle of PTX ISA 9.7.15.5, "Asynchronous wgmma: matrix layouts and descriptors"; all lanes bring
them there by cp.async, two stages ahead of what is multiplied and one behind what still may be.
"""

from __future__ import annotations

from stagefuse.compiler.kernel_ir import For
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym

from .attend import AttendWriter
from .attend_groups import GROUP_ROWS
from .copies import Copies, Copy, Tile
from .ir import Value

STAGES = 4
DEPTH = 64  # of a stage: rows of 128 bytes
ROW_BYTES = 128
CHUNK = 8  # elements in 16 bytes
HIGH = 0x40000040
"""The upper half of a descriptor: swizzle of 128 bytes, 1024 bytes between groups of 8 rows."""


class WgmmaTile(Tile):
    """A tile whose stages are swizzled."""

    @property
    def left_bytes(self) -> int:
        return self.rows * ROW_BYTES

    @property
    def stage_bytes(self) -> int:
        panels = -(-self.columns // 64)
        right = self.columns * ROW_BYTES if self.is_deep else panels * DEPTH * ROW_BYTES
        return self.left_bytes + -(-right // 1024) * 1024


class SwizzledCopies(Copies):
    """Copies of 16 bytes to their place in a swizzled stage."""

    def _left_target(self, ring: Value, row: Expr, k: Expr) -> Value:
        target = self._swizzled(ring, const(0), row, floordiv(k, CHUNK))
        return target + self.writer.index(mod(k, CHUNK) * 2, "i32")

    def _right(self, ring: Value) -> list[Copy]:
        w, tile = self.writer, self.tile
        s, lanes = tile.s, w.team.lanes
        row, step = s.panel_row or const(s.nr), s.panel_col or const(1)
        across = (DEPTH if tile.is_deep else tile.columns) // CHUNK
        total = DEPTH * tile.columns // CHUNK
        found = []
        for n in range(-(-total // lanes)):
            flat = sym("lane") + n * lanes
            outer, chunk = floordiv(flat, across), mod(flat, across)
            k, column = (chunk * CHUNK, outer) if tile.is_deep else (outer, chunk * CHUNK)
            panel, inside = floordiv(column, s.nr), mod(column, s.nr)
            valid = w.holds("lt", panel, tile.panels)
            if s.width is not None:
                with w.binding(**{**w.bound, tile.name: w.resolve(tile.lo) + panel}):
                    valid = valid & w.holds("lt", inside, s.width)
            place = tile.first + panel * tile.step + k * row + inside * step
            start = const(tile.left_bytes)
            if not tile.is_deep:
                start = start + floordiv(chunk, CHUNK) * (DEPTH * ROW_BYTES)
            target = self._swizzled(ring, start, outer, mod(chunk, CHUNK))
            copy = self._at(target, s.panel, place, k, valid, row, tile.is_deep)
            copy.own = w.holds("lt", flat, const(total))
            found.append(copy)
        return found

    def _swizzled(self, ring: Value, start: Expr, row: Expr, chunk: Expr) -> Value:
        """The address of a chunk of a row: its number is that in memory, xor the row's."""
        w = self.writer
        moved = w.index(chunk, "i32") ^ w.index(mod(row, 8), "i32")
        return ring + w.index(start + row * ROW_BYTES, "i32") + moved.shl(4)

    def _at(
        self, target: Value, name: str, place: Expr, k: Expr, valid: Value, row: Expr, deep: bool
    ) -> Copy:
        w = self.writer
        source, step = self.source(name, place), w.index(row * (DEPTH * 2), "i64")
        return Copy(source, target, w.index(k, "i32"), valid, step, 16, deep)


class WgmmaWriter(AttendWriter):
    """The body of a kernel, as far as its products by warpgroups go."""

    has_wgmma = False

    def _tile_of(self, s: For) -> Tile | None:
        found = super()._tile_of(s)
        if found is None or not self.has_wgmma or found.size != 2:
            return found
        if found.rows != 2 * GROUP_ROWS or self.team.lanes != 256 or found.columns > 256:
            return found
        if found.s.panel_row is None:
            return found
        self.code.tables.add("aligned shared")
        return WgmmaTile(**{**vars(found), "depth": DEPTH, "stages": STAGES})

    def _multiply(self, tile: Tile, base: Expr) -> None:
        if not isinstance(tile, WgmmaTile):
            return super()._multiply(tile, base)
        code, s = self.code, tile.s
        ring = self._ring(tile)
        steps = self.index(floordiv(s.depth + (DEPTH - 1), DEPTH), "i32")
        copies = SwizzledCopies(self, tile, ring)
        ahead = STAGES - 2
        for n in range(ahead):
            copies.issue(n, code.const(n, "i32").compare("lt", steps))
        zero = code.const(0.0, "float")
        sums = [code.variable("float", zero) for _ in range(tile.columns // 2)]
        step = code.variable("i32", code.const(0, "i32"))
        read = code.variable("i32", code.const(0, "i32"))
        head, done = code.label("depth"), code.label("summed")
        with code.loop_scope(), self.scope():
            code.start(head)
            now = Value(code, step.text, "i32", code.depth)
            at = Value(code, read.text, "i32", code.depth)
            code.branch_if(now.compare("lt", steps), done, holds=False)
            code.line(f"cp.async.wait_group {ahead - 1};")
            code.line("fence.proxy.async.shared::cta;")
            code.line("bar.sync 0;")
            self._products(tile, ring, at, sums)
            end = STAGES * tile.stage_bytes
            later = at + ahead * tile.stage_bytes
            slot = later.compare("ge", end).select(later - end, later)
            copies.start((now + ahead).compare("lt", steps), slot)
            code.line("wgmma.wait_group.sync.aligned 1;")
            code.write("add.s32", step, step, code.const(1, "i32"))
            after = at + tile.stage_bytes
            code.set(read, after.compare("ge", end).select(code.const(0, "i32"), after))
            code.branch(head)
        code.start(done)
        code.line("wgmma.wait_group.sync.aligned 0;")
        code.line("cp.async.wait_group 0;")
        code.line("bar.sync 0;")
        self._store_groups(tile, base, sums)

    def _products(self, tile: Tile, ring: Value, at: Value, sums: list[Value]) -> None:
        """The products of a stage: this warpgroup's 64 rows by all columns, 16 deep at a time."""
        code = self.code
        group = self.index(floordiv(sym("lane"), 128), "i32")
        left = ring + at + group * (GROUP_ROWS * ROW_BYTES)
        right = ring + at + tile.left_bytes
        kind = self.memory[tile.s.a].dtype.name
        # rows of a stage run along the columns, or panels of 64 columns follow each other
        panel = 1 if tile.is_deep else DEPTH * ROW_BYTES >> 4
        stride = 2 * 16 if tile.is_deep else 16 * ROW_BYTES
        code.line("wgmma.fence.sync.aligned;")
        listed = ", ".join(v.text for v in sums)
        for k in range(DEPTH // 16):
            a = self._descriptor(left + k * 32, 1)
            b = self._descriptor(right + k * stride, panel)
            code.line(
                f"wgmma.mma_async.sync.aligned.m64n{tile.columns}k16.f32.{kind}.{kind} "
                f"{{{listed}}}, {a.text}, {b.text}, 1, 1, 1, 0, {int(not tile.is_deep)};"
            )
        code.line("wgmma.commit_group.sync.aligned;")

    def _descriptor(self, address: Value, leading: int) -> Value:
        """Where a matrix lies; `leading`: units of 16 bytes between its panels."""
        code = self.code
        low = ((address & 0x3FFFF).lshr(4)) | (leading << 16)
        found = code.fresh("i64")
        code.write("mov.b64", found, f"{{{low.text}, {code.const(HIGH, 'i32').text}}}")
        return found

    def _store_groups(self, tile: Tile, base: Expr, sums: list[Value]) -> None:
        memory = self.memory[tile.s.dst]
        lane = sym("lane")
        within = mod(lane, 32)
        g, q = floordiv(within, 4), mod(within, 4)
        first = floordiv(lane, 32) * 16 + g
        for n in range(tile.columns // 8):
            for half in range(2):
                place = base + (first + half * 8) * tile.s.dst_row + n * 8 + q * 2
                pair = sums[n * 4 + half * 2 :][:2]
                self.write(memory, self.address(memory, (place, None)), pair)
