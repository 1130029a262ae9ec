"""Tiles of products of 16- and 8-bit operands by Hopper's warpgroup instructions.

Two warpgroups compute 64 rows each of a tile 128 rows high, straight from shared memory. Operands
lie there in rows of 128 bytes whose chunks of 16 are exchanged by the row's number, the 128-byte
swizzle of PTX ISA 9.7.15.5, "Asynchronous wgmma: matrix layouts and descriptors"; all lanes bring
them there by cp.async, two stages ahead of what is multiplied and one behind what still may be.
"""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.cpu.bodies import walk
from stagefuse.compiler.gpu.attention.forms import GROUP_ROWS
from stagefuse.compiler.gpu.attention.warp_tiles import AttendWriter
from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.kernel_ir import Fold, For
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym

from .async_copies import Copies, Copy, Tile
from .computed_operands import Computed
from .mma import BYTES, Kind, wgmma

STAGES = 4
FEWER_STAGES, NARROW_COLUMNS = 3, 128
"""Of tiles whose right operand is computed, and of tiles of so many columns whose rows are reduced:
an SM then holds two blocks, of which one multiplies while the other computes."""
ROW_BYTES = 128  # of a stage along the depth
CHUNK_BYTES = 16
PANEL = 64
"""Columns of a row of an operand whose columns are adjacent, of 16 bits each."""
PANEL_BYTES = PANEL * ROW_BYTES
"""Of such rows in a stage: its depth is as many elements."""
MOST_ROUGH_COLUMNS = 192
"""Of a tile whose sums are found twice over, those of a stage and those of all stages."""
HIGH = 0x40000040
"""The upper half of a descriptor: swizzle of 128 bytes, 1024 bytes between groups of 8 rows."""


class WgmmaTile(Tile):
    """A tile whose stages are swizzled."""

    @property
    def left_bytes(self) -> int:
        return self.rows * ROW_BYTES

    @property
    def stage_bytes(self) -> int:
        panels = -(-self.columns // PANEL)
        right = self.columns * ROW_BYTES if self.is_deep else panels * PANEL_BYTES
        return self.left_bytes + -(-right // 1024) * 1024


class SwizzledCopies(Copies):
    """Copies of 16 bytes to their place in a swizzled stage."""

    @property
    def chunk(self) -> int:
        """Elements of a copy."""
        return CHUNK_BYTES // self.tile.size

    def _left_target(self, ring: Value, row: Expr, k: Expr) -> Value:
        start = const(0)
        if self.tile.is_turned:  # panels of 64 rows follow each other
            start, row, k = floordiv(row, PANEL) * PANEL_BYTES, k, mod(row, PANEL)
        target = self._swizzled(ring, start, row, floordiv(k, self.chunk))
        return target + self.writer.index(mod(k, self.chunk) * self.tile.size, "i32")

    def _right(self, ring: Value) -> list[Copy]:
        w, tile = self.writer, self.tile
        s, lanes = tile.s, w.team.lanes
        row, step = s.panel_row or const(s.nr), s.panel_col or const(1)
        across = (tile.depth if tile.is_deep else tile.columns) // self.chunk
        total = tile.depth * tile.columns // self.chunk
        found = []
        for n in range(-(-total // lanes)):
            flat = sym("lane") + n * lanes
            outer, chunk = floordiv(flat, across), mod(flat, across)
            inner = chunk * self.chunk
            k, column = (inner, outer) if tile.is_deep else (outer, inner)
            panel, inside = floordiv(column, s.nr), mod(column, s.nr)
            valid = w.holds("lt", panel, tile.panels)
            if s.width is not None:
                with w.binding(**{**w.bound, tile.name: w.resolve(tile.lo) + panel}):
                    valid = valid & w.holds("lt", inside, s.width)
            place = tile.first + panel * tile.step + k * row + inside * step
            start = const(tile.left_bytes)
            if not tile.is_deep:
                start = start + floordiv(chunk, 8) * PANEL_BYTES
            target = self._swizzled(ring, start, outer, mod(chunk, 8))
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
        source, step = self.source(name, place), w.index(row * ROW_BYTES, "i64")
        return Copy(source, target, w.index(k, "i32"), valid, step, 16, deep)


class SwizzledComputed(Computed, SwizzledCopies):
    """The same for a right operand that is computed: chunks of rows of 64 columns."""

    widths = (CHUNK_BYTES // 2,)

    def target(self, row: Expr, column: Expr, n: int) -> tuple[Value, int]:
        start = floordiv(column, PANEL) * PANEL_BYTES + self.tile.left_bytes
        return self._swizzled(self.ring, start, row + n, floordiv(mod(column, PANEL), 8)), 0


class WgmmaWriter(AttendWriter):
    """The body of a kernel, as far as its products by warpgroups go."""

    has_wgmma = False

    def _tile_of(self, s: For) -> Tile | None:
        found = super()._tile_of(s)
        if found is None or not self.has_wgmma or found.size > 2:
            return found
        if found.rows != 2 * GROUP_ROWS or self.team.lanes != 256 or found.columns > 256:
            return found
        if found.s.panel_row is None and found.s.element is None:
            return found
        if self.kind_in(found).is_rough and found.columns > MOST_ROUGH_COLUMNS:
            return found
        self.code.tables.add("aligned shared")
        depth = ROW_BYTES // found.size
        reduces = any(isinstance(x, Fold) for x in walk(self.kernel.body))
        fewer = found.s.element is not None or (reduces and found.columns <= NARROW_COLUMNS)
        stages = FEWER_STAGES if fewer else STAGES
        return WgmmaTile(**{**vars(found), "depth": depth, "stages": stages})

    def _multiply(self, tile: Tile, base: Expr) -> None:
        if not isinstance(tile, WgmmaTile):
            return super()._multiply(tile, base)
        code, s = self.code, tile.s
        ring = self._ring(tile)
        kind = self.kind_in(tile)
        self.structure.append(tile.said(f"wgmma of {kind}"))
        steps = self.index(floordiv(s.depth + (tile.depth - 1), tile.depth), "i32")
        copies = (SwizzledCopies if s.element is None else SwizzledComputed)(self, tile, ring)
        ahead = tile.stages - 2
        for n in range(ahead):
            copies.issue(n, code.const(n, "i32").compare("lt", steps))
        copies.ready()
        sums = self.sums_of(kind, tile.columns)
        parts = self.sums_of(kind, tile.columns) if kind.is_rough else sums
        with self.over_stages(tile, steps) as (now, at):
            code.line(f"cp.async.wait_group {ahead - 1};")
            code.line("fence.proxy.async.shared::cta;")
            code.line("bar.sync 0;")
            self._products(tile, ring, at, parts)
            end = tile.stages * tile.stage_bytes
            later = at + ahead * tile.stage_bytes
            slot = later.compare("ge", end).select(later - end, later)
            copies.start((now + ahead).compare("lt", steps), slot)
            copies.fill(now + ahead, slot)
            code.line(f"wgmma.wait_group.sync.aligned {0 if kind.is_rough else 1};")
            self.add_parts(kind, sums, parts)
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
        kind = self.kind_in(tile)
        # rows of a stage run along the columns, or panels of 64 columns follow each other
        panel = 1 if tile.is_deep else PANEL_BYTES >> 4
        down, along = (
            kind.depth * ROW_BYTES if turned else BYTES
            for turned in (tile.is_turned, not tile.is_deep)
        )
        code.line("wgmma.fence.sync.aligned;")
        for k in range(tile.depth // kind.depth):
            a = self.descriptor(left + k * down, 1)
            b = self.descriptor(right + k * along, panel)
            adds = "0" if kind.is_rough and not k else "1"
            turned = tile.is_turned, not tile.is_deep
            wgmma(code, kind, tile.columns, sums, a, b, adds, turned)
        code.line("wgmma.commit_group.sync.aligned;")

    def sums_of(self, kind: Kind, columns: int) -> list[Value]:
        """What a lane has of the sums of 64 rows by so many columns, all 0."""
        zero = self.code.const(0, kind.register)
        return [self.code.variable(kind.register, zero) for _ in range(columns // 2)]

    def add_parts(self, kind: Kind, sums: Sequence[Value], parts: Sequence[Value]) -> None:
        """Adds what a stage gave where that was not added by the tensor cores."""
        for total, part in zip(sums, parts, strict=True) if kind.is_rough else ():
            self.code.write("add.rn.f32", total, total, part)

    def descriptor(self, address: Value, leading: int) -> Value:
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
