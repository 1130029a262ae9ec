"""Tiles of f32 matrix products by Hopper's warpgroup instructions, three tf32 products each.

A warpgroup computes 64 rows. It reads them from shared memory straight into fragments and splits
them there (PTX ISA 9.7.15.5.1, "Register Fragments for wgmma.mma_async"); the columns are split
into two matrices in shared memory, swizzled rows of 128 bytes along the depth, which is how tf32
operands must lie, whatever way they lie in memory. Tensor cores truncate their sums, so that those
of a stage go to registers of their own and are added up outside. Where tensor copies bring the
operands, warps have roles (`tf32_roles`). Here all lanes bring them by cp.async and split, stages
ahead of what is multiplied: panels that lie in no steps.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from stagefuse.compiler.gpu.attention.forms import GROUP_ROWS
from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.kernel_ir import For
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym

from .async_copies import Copies, Tile
from .clusters import ClusterWriter
from .computed_operands import Computed
from .mma import SPLIT
from .tensor_loads import Matrices, Slot
from .tf32_roles import RoleProduct
from .tf32_split import (
    CHUNK,
    DEPTH,
    PRODUCTS,
    ROW_BYTES,
    STEP,
    BoxTile,
    SplitTile,
    parts_of,
    split_column,
)

WIDEST = 128  # columns of a tile
STAGES = 4
GROUP_LANES = 128

_Parts = tuple[list[Value], list[Value]]
"""The higher and the lower parts of a lane's elements for one instruction: four registers each."""


class SplitWriter(ClusterWriter):
    """The body of a kernel, as far as its f32 products by warpgroups go. `tiled`: what its tiles
    are of, if tensor copies can bring them."""

    tiled: Matrices | None = None

    def barrier(self) -> None:
        if not self.team.helpers:
            return super().barrier()
        self.code.line(f"bar.sync 1, {self.team.lanes};")
        self.unread, self.unwritten = set(), set()

    def _tile_of(self, s: For) -> Tile | None:
        found = super()._tile_of(s)
        if found is None or not self.has_wgmma or found.size != 4 or found.in_scratch:
            return found
        lanes, columns = self.team.lanes, found.columns
        if lanes * GROUP_ROWS != found.rows * GROUP_LANES or columns > WIDEST or columns % 16:
            return found
        if columns * DEPTH // CHUNK % lanes:
            return found
        self.code.tables.add("aligned shared")
        kind = SplitTile if self.tiled is None else BoxTile
        return kind(**{**vars(found), "depth": DEPTH, "stages": STAGES})

    def _multiply(self, tile: Tile, base: Expr) -> None:
        if not isinstance(tile, SplitTile):
            return super()._multiply(tile, base)
        ring = self._ring(tile)
        copies = "tensor copies" if isinstance(tile, BoxTile) else "cp.async"
        shared = f", divided among {self.cluster} blocks of a cluster" if self.cluster > 1 else ""
        self.structure.append(tile.said(f"wgmma of {SPLIT}", copies) + shared)
        if isinstance(tile, BoxTile):
            self.sums = RoleProduct(self, tile, ring).write()
        else:
            self.sums = _SplitProduct(self, tile, ring).write()
        self._store_groups(tile, base, self.sums)
        if self.cluster > 1:
            self.sums = self.sum_of_cluster(tile, base)


@dataclass
class _Column:
    """Four elements of a column along the depth: where they lie, and where their parts go."""

    source: Value
    target: Value


class _SplitProduct:
    """One product being written."""

    def __init__(self, writer: SplitWriter, tile: SplitTile, ring: Value) -> None:
        self.w, self.tile, self.code = writer, tile, writer.code
        self.parts, self.raw = ring, ring + 4 * tile.part_bytes
        s = tile.s
        begin, self.length = writer.own_stretch(tile)
        row = const(s.nr) if s.panel_row is None else s.panel_row
        here = {"k": begin + sym("k")}
        own = replace(
            s, a_offset=s.a_offset + begin * s.a_col, depth=self.length,
            a_indices=tuple(e.substitute(here) for e in s.a_indices),
            a_guard=tuple(e.substitute(here) for e in s.a_guard),
        )  # fmt: skip
        stretch = replace(tile, s=own, first=tile.first + begin * row)
        if s.element is None:
            self.copies = Copies(writer, stretch, self.raw)
        else:
            self.copies = Computed(writer, stretch, self.raw, begin)
        self.columns = self._columns()

    def write(self) -> list[Value]:
        """The loop over the depth; gives the sums of this lane."""
        code, tile, w = self.code, self.tile, self.w
        self.steps = w.index(floordiv(self.length + (DEPTH - 1), DEPTH), "i32")
        for n in range(tile.stages - 1):
            self._fetch(code.const(n, "i32"), code.const(n, "i32"))
        self.copies.ready()
        count = tile.columns // 2
        self.sums = self._zeros("float", count)
        self.found = [self._zeros("float", count // tile.halves) for _ in range(2)]
        self.fragments: list[list[_Parts]] = [
            [(self._zeros("i32", 4), self._zeros("i32", 4)) for _ in range(DEPTH // STEP)]
            for _ in range(2)
        ]
        step, number, parity = (code.variable("i32", code.const(n, "i32")) for n in (0, 1, 0))
        head, summed = code.label("depth"), code.label("summed")
        ends = [code.label("multiplied") for _ in range(2)]
        zero = code.const(0, "i32")
        self._split(zero, Slot(zero, zero), 0)
        with code.loop_scope(), w.scope():
            code.start(head)
            now, *place = (Value(code, v.text, "i32", code.depth) for v in (step, number, parity))
            slot = Slot(*place)
            for turn in range(2):
                code.branch_if((now + turn).compare("lt", self.steps), ends[turn], holds=False)
                self._multiply(turn)
                free = self._later(slot, tile.stages - 2).number
                self._fetch(now + (turn + tile.stages - 1), free)
                self._split(now + (turn + 1), slot, 1 - turn)
                slot = self._later(slot, 1)
            code.write("add.s32", step, step, code.const(2, "i32"))
            code.set(number, slot.number)
            code.set(parity, slot.parity)
            code.branch(head)
        for turn, end in enumerate(ends):
            code.start(end)
            code.line("wgmma.wait_group.sync.aligned 0;")
            for half in range(tile.halves):
                self._add(1 - turn if tile.halves == 1 else half)
            code.branch(summed)
        code.start(summed)
        code.line("cp.async.wait_group 0;")
        code.line("bar.sync 0;")
        return self.sums

    def _zeros(self, kind: str, count: int) -> list[Value]:
        zero = self.code.const(0.0 if kind == "float" else 0, kind)
        return [self.code.variable(kind, zero) for _ in range(count)]

    def _later(self, slot: Slot, stages: int) -> Slot:
        """The place in the ring of a stage some stages later, fewer than there are."""
        after, end = slot.number + stages, self.tile.stages
        wraps = after.compare("ge", end)
        return Slot(wraps.select(after - end, after), wraps.select(slot.parity ^ 1, slot.parity))

    def _fetch(self, stage: Value, slot: Value) -> None:
        """Starts the copies of a stage, if there is one."""
        start = slot * self.tile.stage_bytes
        self.copies.start(stage.compare("lt", self.steps), start)
        self.copies.fill(stage, start)

    # Products

    def _multiply(self, turn: int) -> None:
        """Starts the products of a stage. Where all columns are one instruction's, the sums of the
        stage before are added then; where they are two's, each is added before the next of it."""
        code, tile = self.code, self.tile
        for half in range(tile.halves):
            if tile.halves == 1:
                self._start(turn, 0, self.found[turn])
                code.line("wgmma.wait_group.sync.aligned 1;")
                self._add(1 - turn)
                continue
            code.line("wgmma.wait_group.sync.aligned 1;")
            self._add(half)
            self._start(turn, half, self.found[half])

    def _start(self, turn: int, half: int, found: list[Value]) -> None:
        """Starts the products of a stage by some columns."""
        code, tile = self.code, self.tile
        columns = tile.columns // tile.halves
        listed = ", ".join(v.text for v in found)
        start = self.parts + (2 * turn * tile.part_bytes + half * columns * ROW_BYTES)
        code.line("wgmma.fence.sync.aligned;")
        adds = 0
        for x, y in PRODUCTS:
            for n, parts in enumerate(self.fragments[turn]):
                a = ", ".join(v.text for v in parts[x])
                b = self.w.descriptor(start + (y * tile.part_bytes + n * STEP * 4), 1)
                code.line(
                    f"wgmma.mma_async.sync.aligned.m64n{columns}k8.f32.tf32.tf32 "
                    f"{{{listed}}}, {{{a}}}, {b.text}, {adds}, 1, 1;"
                )
                adds = 1
        code.line("wgmma.commit_group.sync.aligned;")

    def _add(self, number: int) -> None:
        """Adds what one of the two sets of registers holds to the sums."""
        found = self.found[number]
        first = number * len(found) if self.tile.halves == 2 else 0
        for total, part in zip(self.sums[first:], found, strict=False):
            self.code.write("add.rn.f32", total, total, part)

    # Splitting

    def _split(self, stage: Value, slot: Slot, turn: int) -> None:
        """Splits a stage in a place of the ring, if there is one."""
        code = self.code
        none = code.label("split")
        code.branch_if(stage.compare("lt", self.steps), none, holds=False)
        with code.branch_scope():
            start = self.raw + slot.number * self.tile.stage_bytes
            code.line(f"cp.async.wait_group {self.tile.stages - 2};")
            code.line("bar.sync 0;")
            self._split_rows(start, turn)
            for column in self.columns:
                source, offset = column.source + start, 2 * turn * self.tile.part_bytes
                split_column(code, self.tile, source, column.target, offset)
            code.line("fence.proxy.async.shared::cta;")
            code.line("bar.sync 0;")
        code.start(none)

    def _split_rows(self, start: Value, turn: int) -> None:
        code, tile = self.code, self.tile
        within = mod(sym("lane"), 32)
        row, q = floordiv(sym("lane"), 32) * 16 + floordiv(within, 4), mod(within, 4)
        along, apart = tile.left_steps
        first = start + self.w.index(row * apart + q * along, "i32") * 4
        for n, parts in enumerate(self.fragments[turn]):
            for register, (part, half) in enumerate((p, h) for p in range(2) for h in range(2)):
                place = ((n * STEP + part * 4) * along + half * 8 * apart) * 4
                value = code.fresh("float")
                code.line(f"ld.shared.f32 {value.text}, [{first.text}+{place}];")
                for target, found in zip(parts, parts_of(code, value), strict=True):
                    code.set(target[register], found)

    def _columns(self) -> list[_Column]:
        """What of a stage's columns this lane splits."""
        w, tile = self.w, self.tile
        along, apart = tile.right_steps
        found = []
        for n in range(tile.columns * DEPTH // CHUNK // w.team.lanes):
            flat = sym("lane") + n * w.team.lanes
            column, chunk = mod(flat, tile.columns), floordiv(flat, tile.columns)
            moved = w.index(chunk, "i32") ^ w.index(mod(column, 8), "i32")
            place = w.index(column * ROW_BYTES, "i32") + moved.shl(4)
            source = w.index(column * apart + chunk * (CHUNK * along), "i32") * 4
            found.append(_Column(source + tile.left_bytes, self.parts + place))
        return found
