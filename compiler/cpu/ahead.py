"""Large matrices that rows are reduced of once: their lines are asked for some pages ahead.

The hardware's prefetching ends with a page and begins anew in the next: one core reads 11.8 GB/s
so, and 14.6 with what is asked for 8 KB before its turn, on the machine of docs/performance.md.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

from stagefuse.compiler.kernel_ir import Fold, Index, Load
from stagefuse.dsl.dims import Expr, sym

from .folds import FoldWriter
from .ir import Value
from .values import post_order

LARGE_BYTES = 4 << 20
"""Of a matrix that is not in the second-level cache when it is read."""
AHEAD_BYTES, BLOCK_BYTES, LINE = 8192, 2048, 64
"""How far ahead lines are asked for, and how much of a row is reduced between two times."""


class AheadWriter(FoldWriter):
    """The function of a kernel, with what its reductions of rows fetch ahead."""

    def _fold_row(
        self, s: Fold, size: Value, total: Value, fold: Callable[[Value, Value, Value], Value]
    ) -> Value:
        """Blocks of a row, each after lines are asked for as far ahead; then what is left of it."""
        (name, extent), matrices = s.loops[-1], self._matrices(s)
        if not matrices:
            return super()._fold_row(s, size, total, fold)
        block = BLOCK_BYTES // max(self.memory[m.buffer].dtype.itemsize for m in matrices)
        whole = (extent.as_int() or 0) // block * block

        def body(i: Value, totals: list[Value]) -> list[Value]:
            begin = i * block
            with self._inner_scope():
                self.scopes[-1].indices[name] = begin
                for matrix in matrices:
                    self._ask(matrix, block)
            return [fold(begin, begin + block, totals[0])]

        zero, count = self.code.const(0, "i64"), self.code.const(whole // block, "i64")
        (total,) = self._loop(zero, count, [total], body, [], {name}, False, False)
        return fold(self.code.const(whole, "i64"), size, total)

    def _matrices(self, s: Fold) -> list[Load]:
        """What a fold reads of large matrices, each element in one step of the kernel alone."""
        name, extent = s.loops[-1]
        inputs = {b.name: b for b in self.kernel.buffers if b.mode == "in"}
        steps = {n for n, e in self.kernel.parallel if e.as_int() != 1}
        known, found = extent.as_int(), dict[str, Load]()
        if len(s.loops) > 1 or known is None:
            return []
        for part in post_order(s.value):
            if not isinstance(part, Load) or part.buffer not in inputs or part.guard:
                continue
            sizes = [e.as_int() for e in inputs[part.buffer].shape]
            width = inputs[part.buffer].dtype.itemsize
            if None in sizes or math.prod(e or 0 for e in sizes) * width < LARGE_BYTES:
                continue
            if known * width >= 2 * BLOCK_BYTES and _is_own_row(part, name, steps):
                found.setdefault(part.buffer, part)
        return list(found.values())

    def _ask(self, matrix: Load, block: int) -> None:
        """Asks for as many lines as a block has."""
        code, memory = self.code, self.memory[matrix.buffer]
        at = self._address(memory, matrix.indices)
        for line in range(0, block * memory.dtype.itemsize, LINE):
            ahead = code.emit(f"getelementptr i8, ptr {at.text}, i64 {AHEAD_BYTES + line}", "ptr")
            code.line(f"call void @llvm.prefetch.p0(ptr {ahead.text}, i32 0, i32 3, i32 1)")


def _is_own_row(load: Load, name: str, steps: set[str]) -> bool:
    """Whether a load goes along a row that no other step of the kernel reads."""
    exprs: Sequence[Expr] = [v.expr for v in load.indices if isinstance(v, Index)]
    if len(exprs) < len(load.indices) or not exprs or exprs[-1] != sym(name):
        return False
    return steps <= frozenset[str]().union(*(e.symbols() for e in exprs[:-1]))
