"""Products of 16- and 8-bit operands on Hopper by warps with roles; blocks stay for many tiles.

A block is three warpgroups. One thread of the last brings stages of both operands by tensor copies,
as far ahead as the ring is long, over the ends of tiles; the other two multiply 64 rows each by all
columns of a tile, and finish them: 8 rows at a time go through shared memory of their warp, so that
what follows the product is computed on adjacent elements, while the next tile's operands come.
Where tiles are wide, registers go from those that copy to those that multiply. Two blocks below
each other may be a cluster, and bring half of the right operand each, for both. Stages lie as in
`wgmma`. Tensor cores keep some 13 bits of a sum of f8: those of a stage, 128 of the depth, are
found by themselves, and added up by the warps while the other warpgroup multiplies (as in
DeepSeek-AI, "DeepSeek-V3 Technical Report", 2024, section 3.3.2).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace

from stagefuse.compiler.cpu.bodies import work_of
from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.private import vector_width
from stagefuse.compiler.gpu.teams import WARP, Team
from stagefuse.compiler.gpu.tensor_maps import TensorMap, are_steps, in_steps, start_of
from stagefuse.compiler.kernel_ir import Alloc, Checked, Kernel
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen

from .epilogue import LIGHT, PIECE_BYTES, ROWS, Form, PieceWriter
from .im2col_loads import PixelCopies, Pixels
from .mma import BYTES, kind_of, wgmma
from .ring import Ring, Stage, arrive, arrive_in_all, copy_box, elected, expect, wait
from .tensor_stores import PLACES, await_copies, outgoing_of
from .wgmma_tiles import CHUNK_BYTES, HIGH, PANEL, PANEL_BYTES, ROW_BYTES

GROUP = 128
"""Threads of a warpgroup."""
READERS = 2
"""Warpgroups that multiply."""
WARPS = READERS * GROUP // WARP
FEW, MANY = 40, 232
"""Registers of a thread that copies, and of one that multiplies: as many as all had before."""
CLUSTER = 2
"""Blocks below each other that bring the right operand for each other, if any do."""
LINE_BYTES = 128
"""Of the L2 cache."""
BLOCKS = 132
"""Blocks that stay: one for each SM of the largest device of the arch."""
TOGETHER = 16
"""Tiles below each other that run together, so that they share what they read."""
MOST_STAGES = 8
ENOUGH_STAGES = 4
"""That tensor copies of results leave."""


@frozen
class Whole:
    """The matrices that a kernel's tiles are of: `rows`, `columns`, and the elements at which the
    left and the right one begin in their buffers. `cluster`: blocks that bring the right one
    together. `pixels`: the left one as windows, if it is no matrix. Of a kernel that takes a part
    of the `depth`, `begin` is where that begins."""

    rows: Expr
    columns: Expr
    left: Expr
    right: Expr
    cluster: int
    pixels: Pixels | None = None
    begin: Expr = const(0)
    depth: Expr | None = None


def suits(
    whole: Whole, strides: Sequence[Expr], loops: Sequence[tuple[str, Expr]], facts: Facts
) -> bool:
    """Whether tensor maps can have the operands of a product, whose lines are `strides` apart, in a
    batch of these loops."""
    found = [in_steps(offset, loops) for offset in (whole.left, whole.right)]
    return are_steps(strides, facts) and all(
        steps is not None and len(steps) <= 3 and are_steps([step for *_, step in steps], facts)
        for steps in found
    )


def cluster_of(rows: Expr, strides: Sequence[Expr], size: int, facts: Facts) -> int:
    """How many blocks bring the right operand together. Clusters start later and wait for each
    other, but where rows of the operands do not begin with lines of the L2 cache, that is what
    limits: a box touches twice as many. `size`: bytes of an element."""
    most = facts.bounds(rows)[1]
    if (
        most is not None
        and most <= ROWS
        or all(facts.divides(s, LINE_BYTES // size) for s in strides)
    ):
        return 1
    return CLUSTER


class PersistentWriter(PieceWriter):
    """Writes the entry of a product's kernel."""

    def __init__(
        self,
        kernel: Kernel,
        facts: Facts,
        shared_limit: int,
        lines: Mapping[KernelValue, int],
        form: Form,
        whole: Whole,
    ) -> None:
        super().__init__(kernel, facts, shared_limit, lines)
        self.form, self.all_rows, self.all_columns = form, whole.rows, whole.columns
        self.whole, self.stays = whole, True
        self.team = Team((READERS + 1) * GROUP, 1)
        self.batch = kernel.parallel[:-2]
        named = zip(form.product.chosen, form.product.positions, strict=True)
        self.loops = [*self.batch, *((n, x.extent) for n, x in named if isinstance(x, Checked))]
        """What the places of operands move with."""
        types = {b.name: b.dtype for b in kernel.buffers}
        self.kind = kind_of(types[form.product.a], types[form.product.panel])
        self.depth = ROW_BYTES // self.kind.size
        """Of a stage."""
        self.is_deep = form.product.panel_row == const(1)
        self.is_turned = form.product.a_col != const(1)
        """Whether columns of the left operand are adjacent, not rows."""
        panels = -(-form.columns // PANEL)
        right = form.columns if self.is_deep else panels * PANEL
        # else all have enough
        self.hands_over = form.columns > 128 or work_of(form.stores) > LIGHT
        self.left_bytes = ROWS * ROW_BYTES
        self.stage_bytes = self.left_bytes + -(-right * ROW_BYTES // 1024) * 1024
        most = self.facts.bounds(whole.rows)[1]
        least = PANEL if self.is_turned else 8
        self.left_rows = ROWS if most is None else min(ROWS, max(-(-most // least), 1) * least)
        """That boxes of the left operand have: zeros beyond its rows would take a copy's time."""
        self.copied = (self.left_rows + right) * ROW_BYTES
        self.width = vector_width(self, form.plain)
        self.stages = self._stages(shared_limit)
        self.code.tables.update(("shared", "aligned shared"))
        self.boxes = 1 if self.is_deep else panels  # that a block brings of a stage
        part = form.columns if self.is_deep else PANEL
        self.box_rows = part // self.cluster
        if self.hands_over:  # ptxas wants to know what all have at first
            self.team = replace(self.team, resident=1)

    @property
    def cluster(self) -> int:
        return self.whole.cluster

    def _stages(self, shared_limit: int) -> int:
        """How many stages there is room for. Tensor copies store the results if enough are left."""
        (down, _), (across, _) = self.kernel.parallel[-2:]
        tile = sym(down) * ROWS, sym(across) * self.form.columns
        self.outgoing = outgoing_of(
            self.form.stores, self.kernel.buffers, self.batch, tile, self.facts
        )
        narrow = not self.kind.is_rough or self.form.columns <= 128  # others took 1.03 of the time
        if not (narrow and self.is_light and self.divides(2, self.all_columns)):
            self.outgoing = ()
        one = Ring.bytes_of(1, self.stage_bytes)
        stages = min((shared_limit - WARPS * PIECE_BYTES) // one, MOST_STAGES)
        left = min((shared_limit - self._pieces_bytes()) // one, MOST_STAGES)
        if left < min(stages, ENOUGH_STAGES):
            self.outgoing = ()
        return left if self.outgoing else stages

    def _pieces_bytes(self) -> int:
        """Of the pieces of all warps: of results that copies store, or else of sums."""
        return WARPS * (PLACES * self.outgoing_bytes if self.outgoing else PIECE_BYTES)

    def _plan_scratch(self) -> None:
        """Where stages and the pieces of warps lie."""
        self.arrays: list[tuple[Alloc, Expr]] = []
        # pieces of results that copies store are whole kibibytes
        if self.outgoing:
            self.outgoing_start = self.reserve(self._pieces_bytes())
        self.ring_start = self.reserve(Ring.bytes_of(self.stages, self.stage_bytes))
        if not self.outgoing:
            self.pieces_start = self.reserve(self._pieces_bytes())

    def _steps(self) -> Expr:
        code = self.code
        both = f", of the right operand for {self.cluster} blocks at once" * (self.cluster > 1)
        self.structure.append(
            f"wgmma of {self.kind}, tiles of {ROWS} x {self.form.columns}, {self.depth} of the "
            f"depth in each of {self.stages} stages by tensor copies{both}, blocks stay for many "
            "tiles"
        )
        thread = self.symbols["lane"]
        ring = Ring(self, self.ring_start, self.stages, self.stage_bytes, self.cluster)
        self._clear(ring, thread)
        ring.prepare(thread.compare("eq", 0), WARPS)
        copies, all_done = code.label("copies"), code.label("finished")
        code.branch_if(thread.compare("lt", READERS * GROUP), copies, holds=False)
        with code.branch_scope(), self.scope():
            if self.hands_over:
                code.line(f"setmaxnreg.inc.sync.aligned.u32 {MANY};")
            self._multiply_all(ring)
            code.branch(all_done)
        code.start(copies)
        with code.branch_scope(), self.scope():
            if self.hands_over:
                code.line(f"setmaxnreg.dec.sync.aligned.u32 {FEW};")
            code.branch_if(thread.compare("lt", READERS * GROUP + WARP), all_done, holds=False)
            code.branch_if(elected(code), all_done, holds=False)
            self._copy_all(ring)
        code.start(all_done)
        if self.cluster > 1:  # no block ends before others' arrivals at its barriers are done
            code.line("barrier.cluster.arrive;")
            code.line("barrier.cluster.wait;")
        return minimum(self.tiles, const(BLOCKS // self.cluster)) * self.cluster

    def _clear(self, ring: Ring, thread: Value) -> None:
        """Has zeros where boxes of few rows leave out those of a tile."""
        if self.left_rows == ROWS:
            return
        code, step = self.code, self.team.threads * CHUNK_BYTES
        zeros = ", ".join([code.const(0, "i32").text] * 4)
        at = thread * CHUNK_BYTES
        for begin in range(self.left_rows * ROW_BYTES, self.left_bytes, step):
            inside = at.compare("lt", self.left_bytes - begin)
            for n in range(self.stages):
                to = ring.start + at + (n * ring.size + begin)
                code.line(f"{code.guarded(inside)}st.shared.v4.b32 [{to.text}], {{{zeros}}};")
        code.line("fence.proxy.async.shared::cta;")

    # Tiles

    @property
    def down(self) -> Expr:
        """Tiles below each other, those of a cluster together."""
        (_, blocks), _ = self.kernel.parallel[-2:]
        return floordiv(blocks + (self.cluster - 1), self.cluster)

    @property
    def tiles(self) -> Expr:
        """All tiles, those of a cluster together."""
        total = self.down * self.kernel.parallel[-1][1]
        for _, extent in self.batch:
            total = total * extent
        return total

    def _each_tile(self, body: Callable[[], None]) -> None:
        """Runs for each of this block's tiles, whose place is then named."""
        code = self.code
        tile, apart = self._special("ctaid.x"), self._special("nctaid.x")
        if self.cluster > 1:
            tile, apart = (v.lshr(self.cluster.bit_length() - 1) for v in (tile, apart))
        tile, end = code.variable("i32", tile), self.index(self.tiles, "i32")
        head, done = code.label("tile"), code.label("tiles")
        with code.loop_scope(), self.scope():
            code.start(head)
            now = Value(code, tile.text, "i32", code.depth)
            code.branch_if(now.compare("lt", end), done, holds=False)
            with self.named(**self._places(now)):
                body()
            code.write("add.s32", tile, tile, apart)
            code.branch(head)
        code.start(done)

    def _special(self, name: str) -> Value:
        return self.code.pure("mov.u32", "i32", Value(self.code, f"%{name}", "i32"))

    def _places(self, tile: Value) -> dict[str, tuple[Value, Expr, Expr]]:
        """The batch, row and column of a tile: `TOGETHER` rows of them are taken column by column,
        then the next rows."""
        code = self.code
        *batch, (down, _), (across, groups) = self.kernel.parallel
        blocks = self.down
        high, wide = self.index(blocks, "i32"), self.index(groups, "i32")
        found: dict[str, tuple[Value, Expr, Expr]] = {}
        rest, inside = tile, tile
        if batch:
            rest = code.unsigned_division(tile, high * wide)
            inside = tile - rest * (high * wide)
        for name, extent in reversed(batch[1:]):
            before = code.unsigned_division(rest, self.index(extent, "i32"))
            found[name] = (rest - before * self.index(extent, "i32"), const(0), extent - 1)
            rest = before
        if batch:
            found[batch[0][0]] = (rest, const(0), batch[0][1] - 1)
        most = max(TOGETHER // self.cluster, 1)
        band = code.unsigned_division(inside, wide * most)
        first = band * most
        height = code.intrinsic("smin", high - first, code.const(most, "i32"))
        inside = inside - band * (wide * most)
        column = code.unsigned_division(inside, height)
        row = first + inside - column * height
        if self.cluster > 1:
            row = row * self.cluster + self._special("cluster_ctarank")
        found[down] = (row, const(0), blocks * self.cluster - 1)
        found[across] = (column, const(0), groups - 1)
        return found

    # Copies

    def _copy_all(self, ring: Ring) -> None:
        """The thread that fills stages."""
        code, s = self.code, self.form.product
        (down, _), (across, _) = self.kernel.parallel[-2:]
        turn = ring.turn(filling=True)
        windows = self._windows()
        left = None if windows else self._left_map()
        right = self._right_map()
        own = code.const(0, "i32")  # the first row of a stage's right operand that it brings
        if self.cluster > 1:
            own = self._special("cluster_ctarank") * self.box_rows

        def one_tile() -> None:
            row, column = self.index(sym(down) * ROWS), self.index(sym(across) * self.form.columns)
            row, column = row.to("trunc", "i32"), column.to("trunc", "i32")
            with self.choosing(s):
                ends = [self._batch_place(offset) for offset in (self.whole.left, self.whole.right)]
            if windows is not None:
                windows.begin_tile(sym(down))
            with self._depth(self.index(s.depth, "i32"), self.depth) as inside:
                k = inside + self.index(self.whole.begin, "i32")
                stage = turn.now()
                wait(code, stage.empty, stage.parity)
                expect(code, stage.full, self.copied)
                if left is None:
                    assert windows is not None
                    windows.copy(k, stage)
                elif self.is_turned:
                    for n in range(self.left_rows // PANEL):
                        to = stage.start + n * PANEL_BYTES
                        copy_box(code, left, (row + n * PANEL, k, *ends[0]), to, stage.full)
                else:
                    copy_box(code, left, (k, row, *ends[0]), stage.start, stage.full)
                target = stage.start + self.left_bytes
                for n in range(self.boxes):
                    start = (k, column + own) if self.is_deep else (column + n * PANEL, k + own)
                    to = target + n * PANEL_BYTES + own * ROW_BYTES
                    copy_box(code, right, (*start, *ends[1]), to, stage.full, self.cluster)
                turn.step(stage)

        self._each_tile(one_tile)

    def _batch_place(self, offset: Expr) -> list[Value]:
        """The indices of a map's outer dimensions, the innermost of them first."""
        steps = in_steps(offset, self.loops) or []
        return [self.index(sym(name), "i32") for name, _, _ in reversed(steps)]

    def _map(
        self, buffer: str, offset: Expr, inner: Sequence[Expr], stride: Expr, box: tuple[int, int]
    ) -> Value:
        steps = in_steps(offset, self.loops) or []
        sizes = (*(extent for _, extent, _ in steps), *inner)
        strides = (*(step for _, _, step in steps), stride)
        start = start_of(offset, self.loops)
        return self.tensor_map(
            TensorMap(buffer, start, sizes, strides, (*(1 for _ in steps), *box))
        )

    def _windows(self) -> PixelCopies | None:
        """How the left operand comes, if it is windows."""
        s, whole = self.form.product, self.whole
        if whole.pixels is None:
            return None
        stretch = whole.begin, whole.begin + s.depth - 1
        return PixelCopies(self, whole.pixels, s.a, (self.left_rows, self.depth), stretch)

    def _left_map(self) -> Value:
        s, whole = self.form.product, self.whole
        box, depth = (self.left_rows, self.depth), whole.depth or s.depth
        if self.is_turned:
            box = (self.depth, PANEL)
            return self._map(s.a, whole.left, (depth, whole.rows), s.a_col, box)
        return self._map(s.a, whole.left, (whole.rows, depth), s.a_row, box)

    def _right_map(self) -> Value:
        s, whole = self.form.product, self.whole
        assert s.panel_row is not None and s.panel_col is not None
        depth = whole.depth or s.depth
        if self.is_deep:
            box = (self.box_rows, self.depth)
            sizes = (whole.columns, depth)
            return self._map(s.panel, whole.right, sizes, s.panel_col, box)
        sizes = (depth, whole.columns)
        return self._map(s.panel, whole.right, sizes, s.panel_row, (self.box_rows, PANEL))

    @contextmanager
    def _depth(self, end: Value, step: int) -> Iterator[Value]:
        """A loop over the depth in steps."""
        code = self.code
        at = code.variable("i32", code.const(0, "i32"))
        head, done = code.label("depth"), code.label("summed")
        with code.loop_scope(), self.scope():
            code.start(head)
            now = Value(code, at.text, "i32", code.depth)
            code.branch_if(now.compare("lt", end), done, holds=False)
            yield now
            code.write("add.s32", at, at, code.const(step, "i32"))
            code.branch(head)
        code.start(done)

    # Products

    def _multiply_all(self, ring: Ring) -> None:
        """The warps that multiply, each with the 16 rows of its tiles that it finishes."""
        code, s, thread = self.code, self.form.product, self.symbols["lane"]
        self.symbols = {**self.symbols, "lane": thread & (WARP - 1)}
        self.facts = self.facts.with_ranges({"lane": (0, WARP - 1)})
        self._forget_bounds()
        team, self.team = self.team, Team(WARP, 1)
        turn = ring.turn(filling=False)
        kind, zero = self.kind, code.const(0, self.kind.register)
        sums = self.sums_of(kind, self.form.columns)
        parts = self.sums_of(kind, self.form.columns) if kind.is_rough else sums
        last = code.variable("i32", ring.barriers)  # the stage that was read last
        first_lane = self.first_lane()

        def release(where: Value) -> None:
            if self.cluster == 1:
                return arrive(code, last, first_lane & where)
            now = Value(code, last.text, "i32", code.depth)
            arrive_in_all(code, now, self.symbols["lane"], self.cluster, where)

        def one_tile() -> None:
            self.statements(self.form.first)
            depth = self.index(s.depth, "i32")
            for total in sums if kind.is_rough else ():
                code.set(total, zero)
            with self._depth(depth, self.depth) as k:
                stage = turn.now()
                wait(code, stage.full, stage.parity)
                if kind.is_rough:
                    self._add_stage(ring, stage, thread.lshr(7), "0", parts)
                    code.line("wgmma.wait_group.sync.aligned 0;")
                    code.set(last, stage.empty)
                    release(code.const(1, "i1"))
                    self.add_parts(kind, sums, parts)
                else:
                    self._add_stage(ring, stage, thread.lshr(7), k.compare("gt", 0).text, sums)
                    code.line("wgmma.wait_group.sync.aligned 1;")
                    release(k.compare("gt", 0))
                    code.set(last, stage.empty)
                turn.step(stage)
            if not kind.is_rough:
                code.line("wgmma.wait_group.sync.aligned 0;")
                some = depth.compare("gt", 0)
                release(some)
                if not self.facts.is_positive(self.resolve(s.depth)):
                    for total in sums:
                        code.set(total, zero, some ^ 1)
            self.finish(thread.lshr(5), sums)

        self._each_tile(one_tile)
        if self.outgoing:
            await_copies(code, 0, first_lane, read=False)
        self.team = team

    def _add_stage(
        self, ring: Ring, stage: Stage, group: Value, adds: str, sums: Sequence[Value]
    ) -> None:
        """The products of a stage: this warpgroup's 64 rows by all columns, 32 bytes of the depth
        at a time; added to the sums so far where `adds` holds."""
        code, columns, kind = self.code, self.form.columns, self.kind
        at = stage.number * (ring.size >> 4)
        left = descriptor(ring.start + group * (ROWS // READERS * ROW_BYTES), 1) + at
        # rows of a stage run along the columns, or panels of 64 columns follow each other
        panel = 1 if self.is_deep else PANEL_BYTES >> 4
        right = descriptor(ring.start + self.left_bytes, panel) + at
        turned = self.is_turned, not self.is_deep
        down, apart = (kind.depth * ROW_BYTES >> 4 if t else BYTES >> 4 for t in turned)
        code.line("wgmma.fence.sync.aligned;")
        for k in range(ROW_BYTES // BYTES):
            a, b = (
                self._whole_descriptor(left + down * k),
                self._whole_descriptor(right + apart * k),
            )
            wgmma(code, kind, columns, sums, a, b, "1" if k else adds, turned)
        code.line("wgmma.commit_group.sync.aligned;")

    def _whole_descriptor(self, low: Value) -> Value:
        code = self.code
        found = code.fresh("i64")
        code.write("mov.b64", found, f"{{{low.text}, {code.const(HIGH, 'i32').text}}}")
        return found


def descriptor(address: Value, leading: int) -> Value:
    """The lower half of a descriptor; `leading`: units of 16 bytes between panels."""
    return (address & 0x3FFFF).lshr(4) | (leading << 16)
