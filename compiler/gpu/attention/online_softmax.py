"""Weights of attention: exponentials of a block's scores, and what of the sums so far remains.

A lane has two rows of a warp's sixteen, g and g + 8, of which it has the columns 2q and 2q + 1 of
every eight: the accumulators of `mma.sync` and of `wgmma` alike (PTX ISA 9.7.14.5 and 9.7.15.5).
"""

from __future__ import annotations

import math

from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.kernel_ir import Attend, Const, Load, Local, Op
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, mod, sym

from .exact import ExactAttendWriter
from .masks import kept, where_kept

LOG2E = math.log2(math.e)
LOWEST = -math.inf
WARP_ROWS = 16
Fragment = list[Value]


class Attending:
    """One statement being written: what all forms of its products have in common.

    `block`: keys at a time; `share`: those of them that a warp takes; `size`: bytes of shared
    memory that operands need, which lie where the results will.
    """

    def __init__(
        self, writer: ExactAttendWriter, s: Attend, kind: str, block: int, size: int
    ) -> None:
        self.w, self.s, self.kind, self.code = writer, s, kind, writer.code
        self.block, self.share = block, block // s.ways
        self.half = kind != "f32"
        tile = writer.memory[s.dst]
        assert tile.start is not None
        whole = (tile.shape[0] * tile.shape[1] * 4).as_int() or 0
        writer.reserve(max(size - whole, 0))
        self.ring = tile.start
        lane = mod(sym("lane"), 32)
        self.g, self.q = floordiv(lane, 4), mod(lane, 4)
        self.warp = floordiv(sym("lane"), 32 * s.ways)
        self.way = mod(floordiv(sym("lane"), 32), s.ways)
        values = (*post_order(s.score), *post_order(s.keep))
        self.loads = any(isinstance(v, Load) for v in values)
        self.scale = _scale(where_kept(s.score, s.keep), s.raw) if self.half else None

    def begin_sums(self) -> None:
        """Nothing is weighted yet."""
        code = self.code
        lowest, zero = code.const(LOWEST, "float"), code.const(0.0, "float")
        self.most = [code.variable("float", lowest) for _ in range(2)]
        self.total = [code.variable("float", zero) for _ in range(2)]
        across = -(-self.s.columns // (16 if self.half else 8)) * (2 if self.half else 1)
        self.sums = [code.variable("float", zero) for _ in range(across * 4)]
        self.factors = [code.variable("float", code.const(1.0, "float")) for _ in range(2)]

    # Weights

    @property
    def begin(self) -> Expr:
        """The first of this warp's keys in the block at hand."""
        return sym("kb'") * self.block + self.way * self.share

    def weigh(self, scores: list[Fragment]) -> None:
        """Makes scores weights, in place, and sets what the sums so far are to be multiplied by.

        In blocks whose keys all are there and kept for a warp's rows nothing is masked.
        """
        code, w, s = self.code, self.w, self.s
        mask = kept(s.keep, s.row, s.key).of_rows(self.warp * WARP_ROWS)
        easy = mask.inside(WARP_ROWS, self.begin, self.share)
        score = where_kept(s.score, s.keep)
        if easy is None or self.loads:
            return self.weigh_block(self.chosen(scores, score), scores)
        whole = w.holds("le", self.begin + self.share, s.hi)
        for least in easy:
            whole = whole & w.holds("ge", least, const(0))
        masked, done = code.label("masked"), code.label("weighed")
        code.branch_if(whole, masked, holds=False)
        with code.branch_scope(), w.scope():
            self.weigh_block(self.of_all(scores, score), scores)
        code.branch(done)
        code.start(masked)
        with code.branch_scope(), w.scope():
            ends = [mask.span(self.g + 8 * half, self.begin, s.hi) for half in range(2)]
            if None in ends:
                found = self.chosen(scores, score)
            else:
                found = self.between(self.of_all(scores, score), [e for e in ends if e])
            self.weigh_block(found, scores)
        code.start(done)

    def weigh_block(self, found: list[Fragment], scores: list[Fragment]) -> None:
        """The exponentials of a block's scores, the lowest where a key does not count, in place of
        what they were found from."""
        code = self.code
        for half in range(2):
            most = self.most[half]
            for x in (fragment[2 * half + e] for fragment in found for e in range(2)):
                most = code.emit("max.NaN.f32", "float", most, x)
            most = self.quad("max.NaN.f32", most)
            nothing = most.compare("eq", LOWEST)
            shift = self.shift(nothing.select(code.const(0.0, "float"), most))
            code.set(self.factors[half], self.exp(self.most[half], shift))
            code.set(self.most[half], most)
            total = self.total[half]
            code.write("mul.rn.f32", total, total, self.factors[half])
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

    def of_all(self, scores: list[Fragment], score: KernelValue) -> list[Fragment]:
        """The scores of a block whose keys all count."""
        return [
            [self.element(n, e, raw, score, None) for e, raw in enumerate(fragment)]
            for n, fragment in enumerate(scores)
        ]

    def chosen(self, scores: list[Fragment], score: KernelValue) -> list[Fragment]:
        """The same where the mask is asked for each, the lowest where one does not count."""
        found = [
            [self.element(n, e, raw, score, self.s.keep) for e, raw in enumerate(fragment)]
            for n, fragment in enumerate(scores)
        ]
        nothing = const(0)
        return self.between(found, [(nothing, self.s.hi - self.begin)] * 2)

    def element(
        self, n: int, e: int, raw: Value, score: KernelValue, keep: KernelValue | None
    ) -> Value:
        """The score of an element of a fragment, the lowest where it is not kept."""
        w, s = self.w, self.s
        row = self.warp * 16 + self.g + 8 * (e // 2)
        key = self.begin + n * 8 + self.q * 2 + e % 2
        there = None
        if self.loads:
            there = w.holds("lt", key, s.hi) & w.holds("lt", row, s.rows)
        with w.scope(), w.binding(**{s.row: row, s.key: key}), w.when(there):
            w.scopes[-1].locals[s.raw] = raw
            value = raw if self.scale else w.value(score)
            if keep is None or isinstance(keep, Const):
                return value
            return w.value(keep).select(value, LOWEST)

    def between(self, scores: list[Fragment], ends: list[tuple[Expr, Expr]]) -> list[Fragment]:
        """Scores, the lowest for keys before the first or from the last on, by the half of rows:
        distances from the first key of this warp's."""
        lowest, most = self.code.const(LOWEST, "float"), const(self.share)
        low, high = (
            [self.w.index(maximum(minimum(e[n], most), 0) - self.q * 2, "i32") for e in ends]
            for n in range(2)
        )
        begins = [e[0] == const(0) for e in ends]

        def element(x: Value, half: int, key: int) -> Value:
            x = high[half].compare("le", key).select(lowest, x)
            return x if begins[half] else low[half].compare("gt", key).select(lowest, x)

        return [
            [element(x, e // 2, n * 8 + e % 2) for e, x in enumerate(fragment)]
            for n, fragment in enumerate(scores)
        ]

    def shift(self, most: Value) -> Value:
        """What `exp` takes for a maximum: for 16-bit operands it is scaled already, which leaves
        one instruction, and is the same for all weights of a row."""
        if not self.half:
            return most
        scale = self.code.const(-LOG2E * (self.scale or 1.0), "float")
        return self.code.emit("mul.rn.f32", "float", most, scale)

    def exp(self, x: Value, shift: Value) -> Value:
        """exp(x - the maximum)."""
        code = self.code
        scale = code.const(LOG2E * (self.scale or 1.0), "float")
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

    # Results

    def finish(self, some: Value) -> None:
        """The sums and totals to scratch, where the stages were."""
        code, w, s = self.code, self.w, self.s
        code.line("cp.async.wait_group 0;")
        w.barrier()
        totals = [self.quad("add.rn.f32", x) for x in self.total]
        if isinstance(s.keep, Const) and not s.most:
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
        w.unread |= {s.dst, s.totals, s.most} - {""}

    def store(self, totals: list[Value]) -> None:
        w, s = self.w, self.s
        first = w.holds("eq", self.q, const(0))
        for half, (total, most) in enumerate(zip(totals, self.most, strict=True)):
            row = self.way * s.mr + self.warp * 16 + self.g + 8 * half
            for n in range(-(-s.columns // 8)):
                place = row * s.dst_row + n * 8 + self.q * 2
                pair = self.sums[n * 4 + 2 * half :][:2]
                w.write(w.memory[s.dst], w.address(w.memory[s.dst], (place, None)), pair)
            with w.when(first):
                found = [(s.totals, total)]
                if s.most:
                    scale = w.code.const(self.scale or 1.0, "float")
                    found.append((s.most, w.code.emit("mul.rn.f32", "float", most, scale)))
                for name, value in found:
                    w.write(w.memory[name], w.address(w.memory[name], (row, None)), [value])


def _scale(score: KernelValue, raw: str) -> float | None:
    """The positive number that scores are a product's results times of, if that is what they are:
    then the greatest is found before, and the powers of two take both factors at once."""
    if isinstance(score, Local):
        return 1.0 if score.name == raw else None
    if isinstance(score, Op) and score.fn == "mul":
        parts = sorted(score.args, key=lambda v: isinstance(v, Const))
        if isinstance(parts[0], Local) and isinstance(parts[1], Const) and parts[1].value > 0:
            return float(parts[1].value) if parts[0].name == raw else None
    return None
