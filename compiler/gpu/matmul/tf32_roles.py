"""Tiles of f32 products on Hopper by warps with roles: some split the columns, some multiply.

A warpgroup whose left operand is in its registers cannot do much else while it multiplies. So one
more warpgroup brings stages by tensor copies, and splits their columns into two places in turn; the
others read their 64 rows, split them in registers, multiply, and add what a stage gave to their
sums, and where they are two they do so by turns (Shah and others, "FlashAttention-3", 2024, 3.1).
Those that split leave when all is split; the rest of the kernel is the others'.

Barriers in shared memory: `full` of a stage when its bytes have come, `ready` of a place when its
columns are split, `free` when they are multiplied; then all have read the stage, too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, TypeAlias

from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.teams import WARP
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym

from .ring import BARRIER_BYTES, arrive, wait
from .tensor_loads import BoxCopies, Slot
from .tf32_split import CHUNK, DEPTH, PRODUCTS, ROW_BYTES, STEP, SplitTile, parts_of, split_column
from .wgmma_tiles import HIGH

if TYPE_CHECKING:
    from .tf32_tiles import SplitWriter

GROUP = 128  # lanes of a warpgroup
PLACES = 2
REGISTERS = {1: (88, 168), 2: (72, 216)}
"""Of a thread that splits and of one that multiplies, by how many warpgroups do that."""
TURNS = 2
"""The first of the two barriers by which warpgroups take turns."""
Place: TypeAlias = Callable[[int, int, int], tuple[Value, int]]
"""The address and offset of an element of a fragment: of the instruction at this depth, its lower
or higher half of the depth and of the rows."""


class RoleProduct:
    """One product being written."""

    def __init__(self, writer: SplitWriter, tile: SplitTile, ring: Value) -> None:
        self.w, self.tile, self.code = writer, tile, writer.code
        self.groups = writer.team.lanes // GROUP
        self.parts, self.raw = ring, ring + 2 * PLACES * tile.part_bytes
        begin, length = writer.own_stretch(tile)
        self.steps = writer.index(floordiv(length + (DEPTH - 1), DEPTH), "i32")
        self.ready = writer.shared_address(writer.reserve(2 * PLACES * BARRIER_BYTES))
        self.free = self.ready + PLACES * BARRIER_BYTES
        counts = (self.ready, GROUP // WARP), (self.free, writer.team.lanes // WARP)
        others = [(b + n * BARRIER_BYTES, count) for b, count in counts for n in range(PLACES)]
        assert writer.tiled is not None
        self.boxes = BoxCopies(writer, tile, self.raw, writer.tiled, begin, others)

    def write(self) -> list[Value]:
        """The product; gives the sums of a lane that multiplies. The others are gone then."""
        code, w = self.code, self.w
        thread, lanes = w.symbols["lane"], w.team.lanes
        few, many = REGISTERS[self.groups]
        multiplies = code.label("multiplies")
        code.branch_if(thread.compare("lt", lanes), multiplies)
        with code.branch_scope(), w.scope():
            code.line(f"setmaxnreg.dec.sync.aligned.u32 {few};")
            with w.named(helper=(thread - lanes, const(0), const(GROUP - 1))):
                self._split_all()
            code.branch("$end")
        code.start(multiplies)
        code.line(f"setmaxnreg.inc.sync.aligned.u32 {many};")
        sums = self._multiply_all(thread)
        w.barrier()
        return sums

    # Stages

    @contextmanager
    def _stages(self) -> Iterator[tuple[Value, Slot, Value, Value]]:
        """A loop over the stages: the number of one, its slot, and the number of its place with
        the parity of that one's turn."""
        code = self.code
        stage, number, parity = (code.variable("i32", code.const(0, "i32")) for _ in range(3))
        head, done = code.label("stage"), code.label("stages")
        with code.loop_scope(), self.w.scope():
            code.start(head)
            now, *at = (Value(code, v.text, "i32", code.depth) for v in (stage, number, parity))
            code.branch_if(now.compare("lt", self.steps), done, holds=False)
            slot = Slot(*at)
            yield now, slot, now & 1, now.lshr(1) & 1
            after = slot.number + 1
            wraps = after.compare("eq", self.tile.stages)
            turned = slot.parity ^ 1
            code.write("add.s32", stage, stage, code.const(1, "i32"))
            code.set(number, wraps.select(code.const(0, "i32"), after))
            code.set(parity, wraps.select(turned, slot.parity))
            code.branch(head)
        code.start(done)

    def _arrive(self, barriers: Value, place: Value, first: Value) -> None:
        """Counts a warp, all lanes of which are here, at the barrier of a place."""
        self.code.line("bar.warp.sync 0xffffffff;")
        arrive(self.code, barriers + place * BARRIER_BYTES, first)

    # The warpgroup that splits

    def _split_all(self) -> None:
        code, w, tile = self.code, self.w, self.tile
        helper = w.symbols["helper"]
        leads, first = helper.compare("lt", WARP), (helper & (WARP - 1)).compare("eq", 0)
        ahead = tile.stages - PLACES
        for n in range(ahead):
            number = code.const(n, "i32")
            self.boxes.start(leads & number.compare("lt", self.steps), number, number)
        columns = self._columns()
        with self._stages() as (stage, slot, place, turn):
            wait(code, self.free + place * BARRIER_BYTES, turn ^ 1)
            later, room = slot.number + ahead, tile.stages
            later = later.compare("ge", room).select(later - room, later)
            after = stage + ahead
            self.boxes.start(leads & after.compare("lt", self.steps), after, later)
            self.boxes.wait(slot)
            start = self.boxes.place(slot.number) + tile.left_bytes
            target = self.parts + place * (2 * tile.part_bytes)
            for source, offset in columns:
                split_column(code, tile, start + source, target + offset)
            code.line("fence.proxy.async.shared::cta;")
            self._arrive(self.ready, place, first)

    def _columns(self) -> list[tuple[Value, Value]]:
        """What of a stage's columns this lane splits, four elements along the depth at a time:
        where they lie, and where their parts go."""
        w, tile = self.w, self.tile
        along, apart = tile.right_steps
        found = []
        for n in range(tile.columns * DEPTH // CHUNK // GROUP):
            flat = sym("helper") + n * GROUP
            column, chunk = mod(flat, tile.columns), floordiv(flat, tile.columns)
            moved = w.index(chunk, "i32") ^ w.index(mod(column, 8), "i32")
            place = w.index(column * ROW_BYTES, "i32") + moved.shl(4)
            k = chunk * CHUNK
            if tile.skips:
                k = floordiv(chunk, 2) * (2 * CHUNK) + mod(chunk, 2)
            plain = w.index((column * apart + k * along) * 4, "i32")
            found.append((place if tile.is_deep else plain, place))
        return found

    # Those that multiply

    def _multiply_all(self, thread: Value) -> list[Value]:
        code, tile = self.code, self.tile
        zero = code.const(0.0, "float")
        sums, found = (
            [code.variable("float", zero) for _ in range(tile.columns // 2)] for _ in range(2)
        )
        group = thread.lshr(7)
        first = (thread & (WARP - 1)).compare("eq", 0)
        own, other = group + TURNS, (TURNS + 1) - group
        if self.groups == 2:  # the first one begins
            code.line(f"@{group.compare('eq', 1).text} bar.arrive {TURNS}, {2 * GROUP};")
        with self._stages() as (_, slot, place, turn):
            self.boxes.wait(slot)
            fragments = self._rows(self.boxes.place(slot.number))
            wait(code, self.ready + place * BARRIER_BYTES, turn)
            if self.groups == 2:
                code.line(f"bar.sync {own.text}, {2 * GROUP};")
            self._start(fragments, place, found)
            if self.groups == 2:
                code.line(f"bar.arrive {other.text}, {2 * GROUP};")
            code.line("wgmma.wait_group.sync.aligned 0;")
            self._arrive(self.free, place, first)
            for total, part in zip(sums, found, strict=True):
                code.write("add.rn.f32", total, total, part)
        if self.groups == 2:
            code.line(f"@{group.compare('eq', 0).text} bar.sync {TURNS}, {2 * GROUP};")
        return sums

    def _rows(self, start: Value) -> list[tuple[list[Value], list[Value]]]:
        """This lane's elements of the left operand, split: for each instruction four registers of
        higher parts and four of lower ones."""
        code = self.code
        place = self._turned_place if self.tile.is_turned else self._place
        at = place(start)
        found = []
        for k in range(0, DEPTH, STEP):
            values = []
            for part in range(2):
                for half in range(2):
                    values.append(code.fresh("float"))
                    address, offset = at(k, part, half)
                    code.line(f"ld.shared.f32 {values[-1].text}, [{address.text}+{offset}];")
            high, low = zip(*(parts_of(code, v) for v in values), strict=True)
            found.append((list(high), list(low)))
        return found

    def _place(self, start: Value) -> Place:
        """Where this lane's elements are in rows along the depth."""
        w, (g, q) = self.w, self._in_fragment()
        row = floordiv(sym("lane"), WARP) * 16 + g
        first, swizzle = start + w.index(row * ROW_BYTES + q * 4, "i32"), w.index(g * 16, "i32")

        def at(k: int, part: int, half: int) -> tuple[Value, int]:
            return first + (swizzle ^ ((k + part * 4) * 4)), half * 8 * ROW_BYTES

        return at

    def _turned_place(self, start: Value) -> Place:
        """The same where a row has what 32 rows of the operand have at a depth."""
        w, (g, q) = self.w, self._in_fragment()
        warp = floordiv(sym("lane"), WARP)
        own, other = (2, 1) if self.tile.skips else (1, 4)
        place = floordiv(warp, 2) * (DEPTH * ROW_BYTES) + q * (own * ROW_BYTES) + mod(g, 4) * 4
        chunk = mod(warp, 2) * 4 + floordiv(g, 4)
        first = start + w.index(place, "i32")
        swizzle = (w.index(chunk, "i32") ^ w.index(q * own, "i32")).shl(4)

        def at(k: int, part: int, half: int) -> tuple[Value, int]:
            moved = swizzle ^ ((half * 2 ^ part * other) * 16)
            return first + moved, (k + part * other) * ROW_BYTES

        return at

    def _in_fragment(self) -> tuple[Expr, Expr]:
        """This lane's row and place of the depth in a fragment."""
        within = mod(sym("lane"), WARP)
        return floordiv(within, 4), mod(within, 4)

    def _start(
        self, fragments: list[tuple[list[Value], list[Value]]], place: Value, found: list[Value]
    ) -> None:
        """Starts the products of a stage."""
        code, tile = self.code, self.tile
        listed = ", ".join(v.text for v in found)
        start = self.parts + place * (2 * tile.part_bytes)
        low = (start & 0x3FFFF).lshr(4) | (1 << 16)
        high = code.const(HIGH, "i32")
        code.line("wgmma.fence.sync.aligned;")
        adds = 0
        for x, y in PRODUCTS:
            for n, parts in enumerate(fragments):
                a = ", ".join(v.text for v in parts[x])
                b = code.fresh("i64")
                own = low + (y * tile.part_bytes + n * STEP * 4 >> 4)
                code.write("mov.b64", b, f"{{{own.text}, {high.text}}}")
                code.line(
                    f"wgmma.mma_async.sync.aligned.m64n{tile.columns}k8.f32.tf32.tf32 "
                    f"{{{listed}}}, {{{a}}}, {b.text}, {adds}, 1, 1;"
                )
                adds = 1
        code.line("wgmma.commit_group.sync.aligned;")
