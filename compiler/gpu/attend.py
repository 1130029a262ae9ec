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

from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.kernel_ir import Attend, Const, Load
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym

from .attend_exact import ExactAttendWriter
from .attend_shape import Shape, Side, shape_of
from .ir import Value
from .kept import kept, where_kept
from .tensor import _mma as mma
from .tensor import tf32_parts

LOG2E = math.log2(math.e)
LOWEST = -math.inf
CHUNK_DEPTH = 16  # of sums that tensor cores make in tf32
Fragment = list[Value]


class AttendWriter(ExactAttendWriter):
    """The body of a kernel, as far as attention goes."""

    def attend(self, s: Attend) -> None:
        dtype = self.memory[s.queries.buffer].dtype
        _Attention(self, s, shape_of(s, dtype.itemsize), dtype.name).write()


class _Attention:
    """One statement being written."""

    def __init__(self, writer: AttendWriter, s: Attend, shape: Shape, kind: str) -> None:
        self.w, self.s, self.shape, self.kind, self.code = writer, s, shape, kind, writer.code
        self.half = shape.size == 2
        tile = writer.memory[s.dst]
        assert tile.start is not None
        whole = (tile.shape[0] * tile.shape[1] * 4).as_int() or 0
        writer.reserve(max(shape.bytes - whole, 0))  # the stages lie where the tile will
        self.ring = tile.start
        lane = mod(sym("lane"), 32)
        self.warp, self.g, self.q = floordiv(sym("lane"), 32), floordiv(lane, 4), mod(lane, 4)
        values = (*post_order(s.score), *post_order(s.keep))
        self.loads = any(isinstance(v, Load) for v in values)

    # Order

    def write(self) -> None:
        code, w, s, shape = self.code, self.w, self.s, self.shape
        self.copy(shape.queries, const(0), s.rows, self.ring)
        code.line("cp.async.commit_group;")
        first = floordiv(s.lo, shape.block, w.facts)
        behind = floordiv(s.hi + (shape.block - 1), shape.block, w.facts)
        start, end = w.index(first, "i32"), w.index(behind, "i32")
        held: list[Fragment] | None = None
        if shape.held:
            code.line("cp.async.wait_group 0;")
            code.line("bar.sync 0;")
            held = [self.query(k) for k in range(0, shape.queries.wide, self.deep)]
            code.line("bar.sync 0;")
        self.fetch(first, code.const(0, "i32"), start.compare("lt", end))
        lowest, zero = code.const(LOWEST, "float"), code.const(0.0, "float")
        self.most = [code.variable("float", lowest) for _ in range(2)]
        self.total = [code.variable("float", zero) for _ in range(2)]
        across = shape.values.wide // 8
        self.sums = [code.variable("float", zero) for _ in range(across * 4)]
        block = code.variable("i32", start)
        stage = code.variable("i32", code.const(0, "i32"))
        head, done = code.label("keys"), code.label("attended")
        with code.loop_scope(), w.scope():
            code.start(head)
            now, at = (Value(code, v.text, "i32", code.depth) for v in (block, stage))
            code.branch_if(now.compare("lt", end), done, holds=False)
            with w.named(**{"kb'": (now, first, behind - 1)}):
                code.line("cp.async.wait_group 0;")
                code.line("bar.sync 0;")
                other = code.const(shape.stage_bytes, "i32") - at
                self.fetch(sym("kb'") + 1, other, (now + 1).compare("lt", end))
                scores = self.scores(at, held)
                self.correct(self.weigh(scores))
                self.sum_values(at, scores)
            code.write("add.s32", block, block, code.const(1, "i32"))
            code.set(stage, other)
            code.branch(head)
        code.start(done)
        self.finish(end.compare("gt", start))

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
            self.copy(shape.keys, block, self.s.hi, at)
            self.copy(shape.values, block, self.s.hi, at + shape.keys.elements * shape.size)
        code.start(skip)
        code.line("cp.async.commit_group;")

    def copy(self, side: Side, block: Expr, end: Expr, target: Value) -> None:
        """Brings a block of keys below `end`; what is not there becomes zeros."""
        w, lanes = self.w, self.w.team.lanes
        chunk = self.chunk(side)
        chunks = side.inner // chunk
        wide = min(1 << (chunks - 1).bit_length(), lanes)
        down = lanes // wide
        x, y = mod(sym("lane"), wide) * chunk, floordiv(sym("lane"), wide)
        mine = x if side.along else y
        left = w.index(end - block * side.count - mine)
        at = target + w.index(y * side.pitch + x, "i32") * self.shape.size
        memory = w.memory[side.operand.buffer]
        for i in range(-(-chunks // wide)):
            for n in range(-(-side.outer // down)):
                inner, outer = x + i * wide * chunk, y + n * down
                own = w.holds("lt", inner, const(side.inner)) if (i + 1) * wide > chunks else None
                if (n + 1) * down > side.outer:
                    here = w.holds("lt", outer, const(side.outer))
                    own = here if own is None else own & here
                key, feature = (inner, outer) if side.along else (outer, inner)
                beyond = i * wide * chunk if side.along else n * down
                there = left.compare("gt", beyond)
                if side.wide > side.features:
                    there = there & w.holds("lt", feature, const(side.features))
                size = self.present(there, left - beyond, chunk, side.along)
                source = w.address(memory, (side.place(block, key, feature), None))
                offset = (n * down * side.pitch + i * wide * chunk) * self.shape.size
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
            for _ in range(shape.block // 8)
        ]
        base = self.ring + shape.start + at
        steps = range(0, side.wide, self.deep)
        queries: Sequence[Fragment | None] = held or [None] * len(steps)
        if self.half:
            for k, query in zip(steps, queries, strict=True):
                a = query or self.query(k)
                for n in range(0, shape.block, 16):
                    b = self.half_fragments(side, base, n, k)
                    for j in range(2):
                        mma(self.w, found[n // 8 + j], a, b[2 * j :][:2], f"m16n8k16 {self.kind}")
            return found
        apart, along = side.steps  # neighbouring keys are columns of this product
        start = base + self.w.index(self.g * apart + self.q * along, "i32") * 4
        for begin in range(0, len(steps), CHUNK_DEPTH // 8):
            group = list(zip(steps, queries, strict=True))[begin : begin + CHUNK_DEPTH // 8]
            halves = [query or self.query(k) for k, query in group]
            rows = [[tf32_parts(code, v) for v in fragment] for fragment in halves]
            for n, own in enumerate(found):
                columns = [
                    [
                        self.split(start, (n * 8 * apart + (k + 4 * p) * along) * 4)
                        for p in range(2)
                    ]
                    for k, _ in group
                ]
                self.w.add_product(own, rows, columns)
        return found

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
        base = self.ring + shape.start + shape.keys.elements * shape.size + at
        if self.half:
            for k in range(0, shape.block, 16):
                a = self.packed(weights[k // 8], weights[k // 8 + 1])
                for n in range(0, side.wide, 16):
                    b = self.half_fragments(side, base, n, k)
                    for j in range(2):
                        own = self.sums[(n // 8 + j) * 4 :][:4]
                        mma(self.w, own, a, b[2 * j :][:2], f"m16n8k16 {self.kind}")
            return
        along, apart = side.steps
        start = base + self.w.index(self.q * 2 * along + self.g * apart, "i32") * 4
        for begin in range(0, shape.block, CHUNK_DEPTH):
            blocks = range(begin, min(begin + CHUNK_DEPTH, shape.block), 8)
            halves = [[weights[k // 8][n] for n in (0, 2, 1, 3)] for k in blocks]
            rows = [[tf32_parts(self.code, v) for v in fragment] for fragment in halves]
            for n in range(side.wide // 8):
                columns = [
                    [
                        self.split(start, ((k + p) * along + n * 8 * apart) * 4)
                        for p in range(2)
                    ]
                    for k in blocks
                ]
                self.w.add_product(self.sums[n * 4 :][:4], rows, columns)

    def packed(self, first: Fragment, second: Fragment) -> Fragment:
        """The weights of sixteen keys as the left operand of a product."""
        code = self.code
        pairs = [(x[2 * h], x[2 * h + 1]) for x in (first, second) for h in range(2)]
        return [code.pure(f"cvt.rn.{self.kind}x2.f32", "i32", b, a) for a, b in pairs]

    # Weights

    def weigh(self, scores: list[Fragment]) -> list[Value]:
        """Makes scores weights, in place; what the sums so far are to be multiplied by.

        In blocks whose keys all are there and kept nothing is masked.
        """
        code, w, s, shape = self.code, self.w, self.s, self.shape
        factors = [code.variable("float", code.const(1.0, "float")) for _ in range(2)]
        begin = sym("kb'") * shape.block
        easy = kept(s.keep, s.row, s.key).inside(s.mr, sym("kb'"), shape.block)
        score = where_kept(s.score, s.keep)
        if easy is None or self.loads:
            self.weigh_block(scores, factors, score, s.keep)
            return factors
        whole = w.holds("le", begin + shape.block, s.hi)
        for least in easy:
            whole = whole & w.holds("ge", least, const(0))
        masked, done = code.label("masked"), code.label("weighed")
        code.branch_if(whole, masked, holds=False)
        with code.branch_scope(), w.scope():
            self.weigh_block(scores, factors, score, None)
        code.branch(done)
        code.start(masked)
        with code.branch_scope(), w.scope():
            self.weigh_block(scores, factors, score, s.keep)
        code.start(done)
        return factors

    def weigh_block(
        self,
        scores: list[Fragment],
        factors: list[Value],
        score: KernelValue,
        keep: KernelValue | None,
    ) -> None:
        """The exponentials of a block's scores. `keep`: where they are kept; None if everywhere,
        and every key is there."""
        code = self.code
        found = [
            [self.element(n, e, raw, score, keep) for e, raw in enumerate(fragment)]
            for n, fragment in enumerate(scores)
        ]
        if keep is not None:
            found = self.cut(found)
        for half in range(2):
            most = self.most[half]
            for x in (fragment[2 * half + e] for fragment in found for e in range(2)):
                most = code.emit("max.NaN.f32", "float", most, x)
            most = self.quad("max.NaN.f32", most)
            nothing = most.compare("eq", LOWEST)
            shift = self.shift(nothing.select(code.const(0.0, "float"), most))
            code.set(factors[half], self.exp(self.most[half], shift))
            code.set(self.most[half], most)
            total = self.total[half]
            code.write("mul.rn.f32", total, total, factors[half])
            part: Value | None = None
            for n, fragment in enumerate(found):
                for e in (2 * half, 2 * half + 1):
                    weight = self.exp(fragment[e], shift)
                    if part is None:
                        part = weight
                    else:
                        part = code.emit("add.rn.f32", "float", part, weight)
                    code.set(scores[n][e], weight)
            assert part is not None
            code.write("add.rn.f32", total, total, part)

    def element(
        self, n: int, e: int, raw: Value, score: KernelValue, keep: KernelValue | None
    ) -> Value:
        """The score of an element of a fragment, the lowest where it is not kept."""
        w, s = self.w, self.s
        row = self.warp * 16 + self.g + 8 * (e // 2)
        key = sym("kb'") * self.shape.block + n * 8 + self.q * 2 + e % 2
        there = None
        if self.loads:
            there = w.holds("lt", key, s.hi) & w.holds("lt", row, s.rows)
        with w.scope(), w.binding(**{s.row: row, s.key: key}), w.when(there):
            w.scopes[-1].locals[s.raw] = raw
            value = w.value(score)
            if keep is None or isinstance(keep, Const):
                return value
            return w.value(keep).select(value, LOWEST)

    def cut(self, scores: list[Fragment]) -> list[Fragment]:
        """Scores, the lowest for what is behind the last key."""
        begin = sym("kb'") * self.shape.block
        left = self.w.index(self.s.hi - begin - self.q * 2, "i32")
        lowest = self.code.const(LOWEST, "float")
        return [
            [left.compare("le", n * 8 + e % 2).select(lowest, x) for e, x in enumerate(fragment)]
            for n, fragment in enumerate(scores)
        ]

    def shift(self, most: Value) -> Value:
        """What `exp` takes for a maximum: for 16-bit operands it is scaled already, which leaves
        one instruction, and is the same for all weights of a row."""
        if not self.half:
            return most
        return self.code.emit("mul.rn.f32", "float", most, self.code.const(-LOG2E, "float"))

    def exp(self, x: Value, shift: Value) -> Value:
        """exp(x - the maximum)."""
        code = self.code
        scale = code.const(LOG2E, "float")
        if self.half:
            power = code.emit("fma.rn.f32", "float", x, scale, shift)
        else:
            below = code.emit("sub.rn.f32", "float", x, shift)
            power = code.emit("mul.rn.f32", "float", below, scale)
        return code.emit("ex2.approx.ftz.f32", "float", power)

    def quad(self, op: str, value: Value) -> Value:
        """The reduction over the four lanes that have a row."""
        code = self.code
        for step in (1, 2):
            other = code.fresh("float")
            code.line(f"shfl.sync.bfly.b32 {other.text}, {value.text}, {step}, 31, 0xffffffff;")
            value = code.emit(op, "float", value, other)
        return value

    def correct(self, factors: list[Value]) -> None:
        """Multiplies the sums so far by what their maxima have become less, if any lane's have."""
        code = self.code
        one = code.const(1.0, "float")
        tests = [code.emit("setp.eq.f32", "i1", x, one) for x in factors]
        same, all_same = code.emit("and.pred", "i1", *tests), code.fresh("i1")
        code.line(f"vote.sync.all.pred {all_same.text}, {same.text}, 0xffffffff;")
        done = code.label("same")
        code.branch_if(all_same, done)
        for n, x in enumerate(self.sums):
            code.write("mul.rn.f32", x, x, factors[n % 4 // 2])
        code.start(done)

    # Results

    def finish(self, some: Value) -> None:
        """The sums and totals to scratch, where the stages were."""
        code, w, s = self.code, self.w, self.s
        code.line("cp.async.wait_group 0;")
        code.line("bar.sync 0;")
        totals = [self.quad("add.rn.f32", x) for x in self.total]
        if isinstance(s.keep, Const):
            nan = code.const(math.nan, "float")
            for half, most in enumerate(self.most):
                lowest = most.compare("eq", LOWEST) & some
                totals[half] = lowest.select(nan, totals[half])
        done = code.label("exact")
        if not self.half:
            code.branch_if(w.any_odd([*self.sums, *totals]), done)
        with code.branch_scope(), w.scope():
            self.store(totals)
        if not self.half:
            end = code.label("stored")
            code.branch(end)
            code.start(done)
            with code.branch_scope(), w.scope():
                w.attend_exactly(s)
            code.start(end)
        w.unread |= {s.dst, s.totals}

    def store(self, totals: list[Value]) -> None:
        w, s = self.w, self.s
        first = w.holds("eq", self.q, const(0))
        for half, total in enumerate(totals):
            row = self.warp * 16 + self.g + 8 * half
            for n in range(-(-s.columns // 8)):
                place = row * s.dst_row + n * 8 + self.q * 2
                pair = self.sums[n * 4 + 2 * half :][:2]
                w.write(w.memory[s.dst], w.address(w.memory[s.dst], (place, None)), pair)
            with w.when(first):
                w.write(w.memory[s.totals], w.address(w.memory[s.totals], (row, None)), [total])
