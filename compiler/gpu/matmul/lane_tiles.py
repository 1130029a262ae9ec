"""Tiles of matrix products: each lane keeps a few rows by four columns in registers."""

from __future__ import annotations

from stagefuse.compiler.gpu import scalars
from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.loops import Carry
from stagefuse.compiler.gpu.sequences.scatter import ScatterWriter
from stagefuse.compiler.graph import flatten_index
from stagefuse.compiler.kernel_ir import TileProduct
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym
from stagefuse.dsl.dtypes import DType

from .computed_operands import row_of_panel

COLUMNS = 4


class ProductWriter(ScatterWriter):
    """The body of a kernel, as far as its matrix products go."""

    def product(self, s: TileProduct) -> None:
        with self.choosing(s):
            self._product(s)

    def _product(self, s: TileProduct) -> None:
        code, kind = self.code, scalars.REGISTER[self.memory[s.dst].dtype.name]
        if not self.structure:  # else where tensor cores would lose infinities
            self.structure.append(f"lanes multiply, tiles of {s.mr} x {s.nr}")
        across = s.nr // COLUMNS
        down = self.team.lanes // across
        count = -(-s.mr // down)
        lane = sym("lane")
        first_row, column = floordiv(lane, across), mod(lane, across) * COLUMNS
        rows = [first_row + n * down for n in range(count)]
        own = self.holds("lt", lane, const(across * down))
        masks = [self.holds("lt", row, s.rows) & own for row in rows]
        zero = code.const(0, kind)

        def step(totals: Carry) -> Carry:
            k = sym("k'")
            with self.when(own):
                right = self._row_of_panel(s, k, column)
            found: Carry = []
            for n, row in enumerate(rows):
                with self.when(masks[n]):
                    left = self._left(s, row, k)
                sums = totals[n * COLUMNS : (n + 1) * COLUMNS]
                for b, total in zip(right, sums, strict=True):
                    found.append(code.fma(left, b, total) if b.is_float else left * b + total)
            return found

        totals = self.loop("k'", const(0), s.depth, [zero] * (count * COLUMNS), step)
        for n, row in enumerate(rows):
            with self.when(masks[n]):
                place = s.dst_offset + row * s.dst_row + column
                self._store_sums(s, place, totals[n * COLUMNS : (n + 1) * COLUMNS])

    def _left(self, s: TileProduct, row: Expr, k: Expr) -> Value:
        """An element of the left operand; 0 where it lies nowhere."""
        if not s.a_indices:
            return self._element(s, s.a_offset + row * s.a_row + k * s.a_col)
        place = flatten_index(s.a_indices, self.memory[s.a].shape)
        with self.choosing(s, row), self.binding(**{**self.bound, "i": row, "k": k}):
            there = self.code.const(1, "i1")
            for guard in s.a_guard:
                there = there & self.holds("ge", guard, const(0))
            with self.when(there):
                found = self._element(s, place)
        return there.select(found, self.code.const(0.0, found.type))

    def _element(self, s: TileProduct, place: Expr) -> Value:
        memory = self.memory[s.a]
        (raw,) = self._access(memory, self.address(memory, (place, None)), 1)
        return self._operand(s, raw, memory.dtype)

    def _operand(self, s: TileProduct, raw: Value, dtype: DType) -> Value:
        """A stored element as what is multiplied: of integers as wide as their sums, or products
        of 8 bits would wrap."""
        value, sums = scalars.from_memory(self.code, raw, dtype), self.memory[s.dst].dtype
        return value if dtype.is_float else scalars.convert(self.code, value, dtype, sums)

    def _vector(self, name: str, place: Expr) -> int:
        size = 16 // self.memory[name].dtype.itemsize
        return size if self.divides(size, self.resolve(place)) else 1

    def _row_of_panel(self, s: TileProduct, k: Expr, column: Expr) -> list[Value]:
        if s.element is not None:  # of rows in 16 bits it may not be rounded to them yet
            found = row_of_panel(self, s, k, column, COLUMNS, self.active)
            rows = self.memory[s.a].dtype
            return [scalars.round_to(self.code, v, rows) if v.is_float else v for v in found]
        memory = self.memory[s.panel]
        found = []
        if s.panel_row is not None and s.panel_col is not None:
            for n in range(COLUMNS):
                place = s.panel_offset + k * s.panel_row + (column + n) * s.panel_col
                with self.when(self.holds("lt", column + n, s.width or const(s.nr))):
                    (raw,) = self._access(memory, self.address(memory, (place, None)), 1)
                    found.append(self._operand(s, raw, memory.dtype))
            return found
        place = s.panel_offset + k * s.nr + column
        width = min(self._vector(s.panel, place), COLUMNS)
        for n in range(0, COLUMNS, width):
            raws = self._access(memory, self.address(memory, (place + n, None)), width)
            found += [self._operand(s, raw, memory.dtype) for raw in raws]
        return found

    def _store_sums(self, s: TileProduct, place: Expr, sums: list[Value]) -> None:
        memory = self.memory[s.dst]
        width = min(self._vector(s.dst, place), COLUMNS)
        for n in range(0, COLUMNS, width):
            at = self.address(memory, (place + n, None))
            values = sums[n : n + width]
            if s.accumulate:
                old = self._access(memory, at, width)
                values = [v + o for v, o in zip(values, old, strict=True)]
            self.write(memory, at, values)
