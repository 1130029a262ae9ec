"""Attention by multiply-adds, a lane a row: what infinities and NaN in f32 make of it.

The two tf32 values that an f32 is split into cannot hold an infinity: a block that finds one, or a
NaN, in its sums computes them again here.
"""

from __future__ import annotations

import math

from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.loops import Carry
from stagefuse.compiler.gpu.matmul.mma_tiles import TensorWriter
from stagefuse.compiler.kernel_ir import Attend, Const, Operand
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.dims import Expr, const, sym

LOG2E = math.log2(math.e)


class ExactAttendWriter(TensorWriter):
    """The body of a kernel, as far as attention by multiply-adds goes."""

    def attend_exactly(self, s: Attend) -> None:
        code = self.code
        lane = sym("lane")
        out = code.label("idle")
        code.branch_if(self.holds("lt", lane, s.rows), out, holds=False)
        zero = code.const(0.0, "float")
        dst, totals = self.memory[s.dst], self.memory[s.totals]

        def cleared(carry: Carry) -> Carry:
            place = lane * s.dst_row + sym("c'")
            self.write(dst, self.address(dst, (place, None)), [self._held(zero)])
            return carry

        with code.branch_scope(), self.scope(), self.binding(**{s.row: lane}):
            self.loop("c'", const(0), const(s.columns), [], cleared)
            lowest = code.const(-math.inf, "float")
            carry = [lowest, zero]
            most, total = self.loop(s.key, s.lo, s.hi, carry, lambda c: self._one_key(s, c))
            if s.most:
                self._only_way(s, most)
            elif isinstance(s.keep, Const):
                some = self.holds("gt", s.hi, s.lo) & most.compare("eq", -math.inf)
                total = some.select(code.const(math.nan, "float"), total)
            self.write(totals, self.address(totals, (lane, None)), [total])
        code.start(out)

    def _only_way(self, s: Attend, greatest: Value) -> None:
        """The first way has all keys, and the others none."""
        code = self.code
        zero = self._held(code.const(0.0, "float"))
        dst, totals, most = (self.memory[n] for n in (s.dst, s.totals, s.most))
        self.write(most, self.address(most, (sym("lane"), None)), [greatest])
        for way in range(1, s.ways):
            row = sym("lane") + way * s.mr

            def cleared(carry: Carry, row: Expr = row) -> Carry:
                place = row * s.dst_row + sym("c'")
                self.write(dst, self.address(dst, (place, None)), [zero])
                return carry

            self.loop("c'", const(0), const(s.columns), [], cleared)
            self.write(totals, self.address(totals, (row, None)), [zero])
            nothing = self._held(code.const(-math.inf, "float"))
            self.write(most, self.address(most, (row, None)), [nothing])

    def _one_key(self, s: Attend, carry: Carry) -> Carry:
        """One more key."""
        code, before, total = self.code, carry[0], carry[1]
        key, k = sym(s.key), sym("k'")

        def step(sums: Carry) -> Carry:
            left = self._at(s.queries, s.queries.place(sym("lane"), k))
            right = self._of(s, s.keys, s.keys.place(k, key, self.facts), s.key_element, k)
            return [code.fma(left, right, sums[0])]

        zero = code.const(0.0, "float")
        (raw,) = self.loop("k'", const(0), const(s.depth), [zero], step)
        with self.scope():
            self.scopes[-1].locals[s.raw] = Value(code, raw.text, "float", code.depth)
            keep = self.value(s.keep)
            score = keep.select(self.value(s.score), -math.inf)
        most = code.emit("max.NaN.f32", "float", before, score)
        safe = most.compare("eq", -math.inf).select(zero, most)
        factor, weight = self._exp(before, safe), self._exp(score, safe)
        after = code.emit("fma.rn.f32", "float", total, factor, self._held(weight))
        dst = self.memory[s.dst]

        def column(carry: Carry) -> Carry:
            at = self.address(dst, (sym("lane") * s.dst_row + sym("c'"), None))
            (old,) = self._loaded(dst, at, 1)
            old = code.emit("mul.rn.f32", "float", old, factor)
            place, c = s.values.place(key, sym("c'"), self.facts), sym("c'")
            value = self._of(s, s.values, place, s.value_element, c)
            self.write(dst, at, [code.emit("fma.rn.f32", "float", weight, value, old)])
            return carry

        self.loop("c'", const(0), const(s.columns), [], column)
        return [most, after]

    def _of(
        self, s: Attend, x: Operand, place: Expr, element: KernelValue | None, feature: Expr
    ) -> Value:
        """An element of keys or values, which may be computed."""
        if element is None:
            return self._at(x, place)
        with self.scope(), self.binding(**{s.feature: feature}):
            return self.value(element)

    def _at(self, x: Operand, place: Expr) -> Value:
        memory = self.memory[x.buffer]
        (raw,) = self._access(memory, self.address(memory, (place, None)), 1)
        return raw

    def _exp(self, x: Value, most: Value) -> Value:
        code = self.code
        shifted = code.emit("sub.rn.f32", "float", x, most)
        scaled = code.emit("mul.rn.f32", "float", shifted, code.const(LOG2E, "float"))
        return code.emit("ex2.approx.ftz.f32", "float", scaled)
