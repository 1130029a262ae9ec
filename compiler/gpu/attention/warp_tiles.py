"""Attention by `mma.sync`: scores in registers, exponentials there, and from there to values.

A warp has 16 rows of queries, and a lane two of them, g and g + 8, of which it has the columns 2q
and 2q + 1 of every eight: what comes out of one product is what goes into the next (Dao,
"FlashAttention-2", 2023). In 16 bits they are the fragments of PTX ISA 9.7.14.5, "mma.m16n8k16";
of tf32 ("mma.m16n8k8") they are if the columns 2q and 2q + 1 are given the places q and q + 4 of
the depth, and the rows of the values too. Keys and values come by cp.async, a block of keys ahead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.matmul.mma import SPLIT, Kind, mma
from stagefuse.compiler.gpu.matmul.mma_tiles import tf32_parts
from stagefuse.compiler.kernel_ir import Attend
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym

from .blocks import Side, shape_of
from .computed_keys import ComputingAttending
from .exact import ExactAttendWriter
from .online_softmax import Fragment

CHUNK_DEPTH = 16  # of sums that tensor cores make in tf32


class AttendWriter(ExactAttendWriter):
    """The body of a kernel, as far as attention goes."""

    def attend(self, s: Attend) -> None:
        dtype = self.memory[s.queries.buffer].dtype
        shape = shape_of(s, dtype.itemsize)
        ways = f", each block of them shared by {shape.ways} warps" if shape.ways > 1 else ""
        self.structure.append(
            f"mma.sync of {SPLIT if dtype.itemsize == 4 else dtype.name}, {s.mr} queries by "
            f"{shape.block} keys at a time, {shape.stages} stages by cp.async{ways}"
        )
        _Attention(self, s, shape, dtype.name).write()


class _Attention(ComputingAttending):
    """One statement being written for warps."""

    # Order

    def write(self) -> None:
        code, w, s, shape = self.code, self.w, self.s, self.shape
        self.copy(shape.queries, const(0), s.rows, self.ring)
        code.line("cp.async.commit_group;")
        first = floordiv(s.lo, shape.block, w.facts)
        behind = floordiv(s.hi + (shape.block - 1), shape.block, w.facts)
        start, end = w.index(first, "i32"), w.index(behind, "i32")
        held: list[Fragment] | None = None
        if shape.held and not shape.start:
            held = self.hold(0)
            code.line("bar.sync 0;")
        ahead = shape.stages - 1
        for n in range(ahead):
            at_n = code.const(n * shape.stage_bytes, "i32")
            self.fetch(first + n, at_n, (start + n).compare("lt", end))
            self.read_ahead(first + n)
            self.convert_all(at_n)
        if shape.held and shape.start:
            held = self.hold(ahead)
        self.begin_sums()
        block = code.variable("i32", start)
        stage = code.variable("i32", code.const(0, "i32"))
        head, done = code.label("keys"), code.label("attended")
        with code.loop_scope(), w.scope():
            code.start(head)
            now, at = (Value(code, v.text, "i32", code.depth) for v in (block, stage))
            code.branch_if(now.compare("lt", end), done, holds=False)
            with w.named(**{"kb'": (now, first, behind - 1)}):
                code.line(f"cp.async.wait_group {ahead - 1};")
                code.line("bar.sync 0;")
                around = ahead * shape.stage_bytes  # from a stage to the one before it
                free = at.compare("eq", 0).select(code.const(around, "i32"), at - shape.stage_bytes)
                self.fetch(sym("kb'") + ahead, free, (now + ahead).compare("lt", end))
                self.read_ahead(sym("kb'") + ahead)
                scores = self.scores(at, held)
                if self.waiting:
                    self.convert(free)
                self.weigh(scores)
                self.correct()
                if self.waiting:
                    self.convert(free)
                self.sum_values(at, scores)
                self.convert_all(free)
            code.write("add.s32", block, block, code.const(1, "i32"))
            last = at.compare("eq", around)
            code.set(stage, last.select(code.const(0, "i32"), at + shape.stage_bytes))
            code.branch(head)
        code.start(done)
        self.finish(end.compare("gt", start))

    def hold(self, under_way: int) -> list[Fragment]:
        """The queries, when but so many groups of copies are under way."""
        self.code.line(f"cp.async.wait_group {under_way};")
        self.code.line("bar.sync 0;")
        return [self.query(k) for k in range(0, self.shape.queries.wide, self.deep)]

    @property
    def deep(self) -> int:
        """The depth of one instruction."""
        return 16 if self.half else 8

    # Copies

    def fetch(self, block: Expr, stage: Value, some: Value) -> None:
        """Starts to bring a block of keys and values, if there is one."""
        code, shape = self.code, self.shape
        skip = code.label("fetched")
        at = self.ring + shape.start + stage
        code.branch_if(some, skip, holds=False)
        with code.branch_scope(), self.w.scope():
            if self.s.key_element is None:
                self.copy(shape.keys, block, self.s.hi, at)
            if self.s.value_element is None:
                self.copy(shape.values, block, self.s.hi, at + shape.keys.elements * shape.size)
        code.start(skip)
        code.line("cp.async.commit_group;")

    def copy(self, side: Side, block: Expr, end: Expr, target: Value) -> None:
        """Brings a block of keys below `end`; what is not there becomes zeros."""
        w, chunk = self.w, self.chunk(side)
        x, y, *_ = self.first(side, chunk)
        mine = x if side.along else y
        left = w.index(end - block * side.count - mine)
        at = target + w.index(y * side.pitch + x, "i32") * self.shape.size
        memory = w.memory[side.operand.buffer]
        for along, down, own in self.turns(side, chunk):
            inner, outer = x + along, y + down
            key, feature = (inner, outer) if side.along else (outer, inner)
            beyond = along if side.along else down
            there = left.compare("gt", beyond)
            if side.wide > side.features:
                there = there & w.holds("lt", feature, const(side.features))
            size = self.present(there, left - beyond, chunk, side.along)
            source = w.address(memory, (side.place(block, key, feature), None))
            offset = (down * side.pitch + along) * self.shape.size
            place = f"[{at.text}+{offset}]"
            self.one(place, source, chunk * self.shape.size, there, size, own)

    def present(self, there: Value, left: Value, chunk: int, along: bool) -> Value:
        """Bytes of a chunk that are there."""
        code, size = self.code, self.shape.size
        whole, nothing = code.const(chunk * size, "i32"), code.const(0, "i32")
        if not along or chunk == 1:
            return there.select(whole, nothing)
        room = left.to("trunc", "i32") * size
        return there.select(code.intrinsic("smin", room, whole), nothing)

    def one(
        self, place: str, source: str, size: int, there: Value, bytes: Value, own: Value | None
    ) -> None:
        code = self.code
        if size >= 4:
            way = "cg" if size == 16 else "ca"
            code.line(
                f"{code.guarded(own)}cp.async.{way}.shared.global {place}, {source}, "
                f"{size}, {bytes.text};"
            )
            return
        value = code.fresh("half")
        code.write("mov.b16", value, code.const(0, "i32"))
        code.write("ld.global.nc.b16", value, source, guard=there if own is None else there & own)
        code.write("st.shared.b16", place, value, guard=own)

    def chunk(self, side: Side) -> int:
        """Elements that one copy moves: adjacent, aligned, and not of two panels."""
        w, x, size = self.w, side.operand, self.shape.size
        key, feature = side.strides()
        if const(1) not in (key, feature):
            return 1
        outer = feature if side.along else key
        ends = [w.resolve(e) for e in (x.offset, outer, x.step)]
        inner = side.count if side.along else math.gcd(side.features, side.wide)
        for bytes in (16, 8, 4):
            count = bytes // size
            if inner % count == 0 and all(w.divides(count, e) for e in ends):
                return count
        return 1

    # Products

    def query(self, k: int) -> Fragment:
        """The fragment of this warp's queries from this depth on."""
        side = self.shape.queries
        pitch = side.pitch * self.shape.size
        if self.half:
            row = self.warp * 16 + mod(sym("lane"), 16)
            high = floordiv(mod(sym("lane"), 32), 16)
            at = self.ring + self.w.index(row * pitch + high * 16, "i32")
            return self.w.matrices(at, k * 2, 4, False)
        at = self.ring + self.w.index((self.warp * 16 + self.g) * pitch + self.q * 4, "i32")
        return [
            self.shared(at, (k + 4 * part) * 4 + half * 8 * pitch)
            for part in range(2)
            for half in range(2)
        ]

    def shared(self, at: Value, offset: int) -> Value:
        value = self.code.fresh("float")
        self.code.write("ld.shared.f32", value, f"[{at.text}+{offset}]")
        return value

    def split(self, at: Value, offset: int) -> tuple[Value, Value]:
        return tf32_parts(self.code, self.shared(at, offset))

    def scores(self, at: Value, held: list[Fragment] | None) -> list[Fragment]:
        """The products of queries and a block of keys: four of them for each eight keys."""
        code, shape = self.code, self.shape
        side = shape.keys
        found = [
            [code.variable("float", code.const(0.0, "float")) for _ in range(4)]
            for _ in range(shape.share // 8)
        ]
        base = self.own(side, self.ring + shape.start + at)
        steps = range(0, side.wide, self.deep)
        queries: Sequence[Fragment | None] = held or [None] * len(steps)
        if self.half:
            kind = Kind(self.kind, self.kind, 2, "f32")
            for k, query in zip(steps, queries, strict=True):
                a = query or self.query(k)
                for n in range(0, shape.share, 16):
                    b = self.half_fragments(side, base, n, k)
                    for j in range(2):
                        mma(self.code, kind, found[n // 8 + j], a, b[2 * j :][:2])
            return found
        apart, along = side.steps  # neighbouring keys are columns of this product
        start = base + self.w.index(self.g * apart + self.q * along, "i32") * 4
        for begin in range(0, len(steps), CHUNK_DEPTH // 8):
            group = list(zip(steps, queries, strict=True))[begin : begin + CHUNK_DEPTH // 8]
            halves = [query or self.query(k) for k, query in group]
            rows = [[tf32_parts(code, v) for v in fragment] for fragment in halves]
            for n, own in enumerate(found):
                columns = [
                    [self.split(start, (n * 8 * apart + (k + 4 * p) * along) * 4) for p in range(2)]
                    for k, _ in group
                ]
                self.w.add_product(own, rows, columns)
        return found

    def own(self, side: Side, base: Value) -> Value:
        """Where this warp's keys of a block begin."""
        apart = self.shape.share * side.steps[0] * self.shape.size
        return base + self.w.index(self.way * apart, "i32")

    def half_fragments(self, side: Side, base: Value, n: int, k: int) -> Fragment:
        """The right operand's fragments of 16 columns from n on, 16 deep from k on."""
        lane = mod(sym("lane"), 32)
        row, high = mod(lane, 8), floordiv(lane, 16)
        middle = mod(floordiv(lane, 8), 2)
        keys = side is self.shape.keys
        deep = side.along != keys  # whether memory runs along the depth of the product
        if deep:
            start, offset = (row + high * 8) * side.pitch + middle * 8, n * side.pitch + k
        else:
            start, offset = (row + middle * 8) * side.pitch + high * 8, k * side.pitch + n
        at = base + self.w.index(start, "i32") * 2
        return self.w.matrices(at, offset * 2, 4, not deep)

    def sum_values(self, at: Value, weights: list[Fragment]) -> None:
        """Adds the values of a block of keys, weighted."""
        shape = self.shape
        side = shape.values
        base = self.own(side, self.ring + shape.start + shape.keys.elements * shape.size + at)
        if self.half:
            kind = Kind(self.kind, self.kind, 2, "f32")
            for k in range(0, shape.share, 16):
                a = self.packed(weights[k // 8], weights[k // 8 + 1])
                for n in range(0, side.wide, 16):
                    b = self.half_fragments(side, base, n, k)
                    for j in range(2):
                        own = self.sums[(n // 8 + j) * 4 :][:4]
                        mma(self.code, kind, own, a, b[2 * j :][:2])
            return
        along, apart = side.steps
        start = base + self.w.index(self.q * 2 * along + self.g * apart, "i32") * 4
        for begin in range(0, shape.share, CHUNK_DEPTH):
            blocks = range(begin, min(begin + CHUNK_DEPTH, shape.share), 8)
            halves = [[weights[k // 8][n] for n in (0, 2, 1, 3)] for k in blocks]
            rows = [[tf32_parts(self.code, v) for v in fragment] for fragment in halves]
            for n in range(side.wide // 8):
                columns = [
                    [self.split(start, ((k + p) * along + n * 8 * apart) * 4) for p in range(2)]
                    for k in blocks
                ]
                self.w.add_product(self.sums[n * 4 :][:4], rows, columns)

    def packed(self, first: Fragment, second: Fragment) -> Fragment:
        """The weights of sixteen keys as the left operand of a product."""
        code = self.code
        pairs = [(x[2 * h], x[2 * h + 1]) for x in (first, second) for h in range(2)]
        return [code.pure(f"cvt.rn.{self.kind}x2.f32", "i32", b, a) for a, b in pairs]

    # What is so far

    def correct(self) -> None:
        """Multiplies the sums so far by what their maxima have become less, if any lane's have."""
        code = self.code
        one = code.const(1.0, "float")
        tests = [code.emit("setp.eq.f32", "i1", x, one) for x in self.factors]
        same, all_same = code.emit("and.pred", "i1", *tests), code.fresh("i1")
        code.line(f"vote.sync.all.pred {all_same.text}, {same.text}, 0xffffffff;")
        done = code.label("same")
        code.branch_if(all_same, done)
        for n, x in enumerate(self.sums):
            code.write("mul.rn.f32", x, x, self.factors[n % 4 // 2])
        code.start(done)
