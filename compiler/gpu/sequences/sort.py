"""Sorting scratch by a team: a bitonic network whose comparisons all put the lesser first.

With every comparator in one direction, missing elements behind the end act as the greatest, so
that any number of elements can be sorted (Batcher's network with flipped first stages). Ties are
decided by the position before, which makes the sort stable.
"""

from __future__ import annotations

from stagefuse.compiler.gpu import scalars
from stagefuse.compiler.gpu.ir import Code, Value
from stagefuse.compiler.gpu.loops import Carry
from stagefuse.compiler.kernel_ir import SortRow
from stagefuse.dsl.dims import as_expr, const, sym
from stagefuse.dsl.dtypes import DType

from .digits import DigitWriter


class SortWriter(DigitWriter):
    """The body of a kernel, as far as its sorts go."""

    def sort(self, s: SortRow) -> None:
        code = self.code
        count = self.index(as_expr(s.count))
        kind = count.type
        keys, order = self.memory[s.keys], self.memory[s.order]
        here = (sym("at'"), None)

        def number(carry: Carry) -> Carry:
            place = self.index(here[0], "i64")
            self.write(order, self.address(order, here), [place])
            return carry

        self.spread([("at'", const(0), as_expr(s.count))], 1, [], number, unroll=False, at_once=1)
        self.barrier()
        size = code.variable(kind, code.const(2, kind))
        half = code.variable(kind, code.const(1, kind))
        step = code.variable(kind, code.const(0, kind))
        grow, done = code.label("merge"), code.label("sorted")
        with code.loop_scope(), self.scope():
            code.start(grow)
            size, half, step = (Value(code, v.text, kind, code.depth) for v in (size, half, step))
            code.branch_if(half.compare("lt", count), done, holds=False)
            self._stage(s, keys.dtype, size - 1, half)
            code.set(step, half.lshr(1))
            self._halving(s, keys.dtype, step)
            code.set(half, size)
            code.set(size, size.shl(1))
            code.branch(grow)
        code.start(done)

    def _halving(self, s: SortRow, dtype: DType, step: Value) -> None:
        code = self.code
        head, done = code.label("halve"), code.label("merged")
        with code.loop_scope(), self.scope():
            code.start(head)
            inner = Value(code, step.text, step.type, code.depth)
            code.branch_if(inner.compare("gt", 0), done, holds=False)
            self._stage(s, dtype, inner, inner)
            bits = "64" if step.type == "i64" else "32"
            code.write(f"shr.u{bits}", step, step, code.const(1, "i32"))
            code.branch(head)
        code.start(done)

    def _stage(self, s: SortRow, dtype: DType, flip: Value, half: Value) -> None:
        """Compares each element whose number does not have the bit `half` with the one whose number
        differs in the bits of `flip`, of which that is the highest."""
        code = self.code
        keys, order = self.memory[s.keys], self.memory[s.order]
        count, last = self.index(as_expr(s.count), flip.type), as_expr(s.count) - 1
        below, mask = half - 1, half + half - 1
        pairs = ((count + mask) & (mask ^ -1)).lshr(1)
        here, there = "here'", "other'"

        def compare(carry: Carry) -> Carry:
            pair = self.index(sym("pair'"), flip.type)
            mine = pair + (pair & (below ^ -1))
            other = mine ^ flip
            with self.when(other.compare("lt", count)), self.named(
                **{here: (mine, const(0), last), there: (other, const(0), last)}
            ):
                places = [(sym(here), None), (sym(there), None)]
                at_keys = [self.address(keys, p) for p in places]
                at_order = [self.address(order, p) for p in places]
                a, b = (self._key(self._access(keys, at, 1)[0], dtype) for at in at_keys)
                i, j = (self._access(order, at, 1)[0] for at in at_order)
                with self.when(before(code, b, a, j, i, dtype, s.descending)):
                    self.write(keys, at_keys[0], [b])
                    self.write(keys, at_keys[1], [a])
                    self.write(order, at_order[0], [j])
                    self.write(order, at_order[1], [i])
            return carry

        with self.named(**{"pairs'": (pairs, const(0), as_expr(s.count))}):
            loops = [("pair'", const(0), sym("pairs'"))]
            self.spread(loops, 1, [], compare, unroll=False, at_once=1)
        self.barrier()

    def _key(self, raw: Value, dtype: DType) -> Value:
        return scalars.from_memory(self.code, raw, dtype)


def before(
    code: Code, b: Value, a: Value, j: Value, i: Value, dtype: DType, descending: bool
) -> Value:
    """Whether b at position j comes before a at i: NaN goes last, first if descending."""
    unsigned = dtype.kind == "uint" or dtype.is_bool
    ahead = b.compare("gt" if descending else "lt", a, unsigned)
    same = b.compare("eq", a)
    if dtype.is_float:
        odd, other = a.is_nan(), b.is_nan()
        ahead = ahead | ((other & (odd ^ 1)) if descending else (odd & (other ^ 1)))
        same = same | (odd & other)
    return ahead | (same & j.compare("lt", i))
