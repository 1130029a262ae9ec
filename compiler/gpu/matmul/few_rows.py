"""Products of a few rows by panels that are computed: each lane multiplies what it computes.

A lane takes 16 adjacent columns of some rows of a panel, so that it reads codes 16 bytes at a time,
and adds up products by all rows of the left operand in registers. Lanes with the same columns
meet in shared memory.
"""

from __future__ import annotations

from stagefuse.compiler.gpu import scalars
from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.loops import Carry
from stagefuse.compiler.kernel_ir import TileProduct
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym

from .computed_operands import row_of_panel
from .lane_tiles import ProductWriter

MOST_ROWS = 4
"""Rows up to which tensor cores, whose tiles have more, do not pay."""
COLUMNS = 16
DEEP = 8
"""Rows of a panel that a lane takes at a time."""


class FewRowsWriter(ProductWriter):
    """The body of a kernel, as far as its products of few rows go."""

    def product(self, s: TileProduct) -> None:
        if s.element is None or s.mr > MOST_ROWS:
            return super().product(s)
        code, lane = self.code, sym("lane")
        self.structure.append(f"lanes multiply {s.mr} rows by {COLUMNS} columns that they compute")
        across = s.nr // COLUMNS
        down = self.team.lanes // across
        first, column = floordiv(lane, across), mod(lane, across) * COLUMNS
        own = self.holds("lt", lane, const(across * down))
        units = self.resolve(floordiv(s.depth + (DEEP - 1), DEEP))
        start = own.select(self.index(first, "i32"), self.index(units, "i32"))

        def step(unit: Expr, totals: Carry) -> Carry:
            return self._unit(s, unit * DEEP, column, totals)

        zeros = [code.const(0.0, "float")] * (s.mr * COLUMNS)
        totals = self.strided("unit'", start, units, down, zeros, step, (const(0), units - 1), 1)
        self._meet_columns(s, totals, (first, column, own), down)

    def _unit(self, s: TileProduct, first: Expr, column: Expr, totals: Carry) -> Carry:
        """The products of `DEEP` rows of a panel from `first` on, added to some totals."""
        code = self.code
        masks: list[Value | None] = [None] * DEEP
        if not self.divides(DEEP, self.resolve(s.depth)):
            masks = [self.holds("lt", first + n, s.depth) for n in range(DEEP)]
        rows = [self._left_row(s, row, first, masks) for row in range(s.mr)]
        for n in range(DEEP):
            right = row_of_panel(self, s, first + n, column, COLUMNS, masks[n], DEEP)
            totals = [
                code.fma(rows[at // COLUMNS][n], right[at % COLUMNS], total)
                for at, total in enumerate(totals)
            ]
        return totals

    def _left_row(
        self, s: TileProduct, row: int, first: Expr, masks: list[Value | None]
    ) -> list[Value]:
        """The elements of a row of the left operand at `DEEP` places of the depth."""
        memory, start = self.memory[s.a], s.a_offset + row * s.a_row + first * s.a_col
        width = 1
        if s.a_col == const(1) and masks[0] is None:
            width = min(self._vector(s.a, start), DEEP)
        some = self.holds("lt", const(row), s.rows)
        found: list[Value] = []
        for n in range(0, DEEP, width):
            with self.when(masks[n]), self.when(some):
                at = self.address(memory, (start + n * s.a_col, None))
                raws = self._access(memory, at, width)
            found += [scalars.from_memory(self.code, raw, memory.dtype) for raw in raws]
        return found

    def _meet_columns(
        self, s: TileProduct, totals: Carry, place: tuple[Expr, Expr, Value], down: int
    ) -> None:
        """Sums over the lanes that have the same columns, in their order, into the result."""
        code, (first, column, own) = self.code, place
        if self.in_loop():
            code.line("bar.sync 0;")  # what met here last may not have been read
        start = self.shared_address(self.reserve(down * s.mr * s.nr * 4))
        mine = start + self.index((first * s.mr * s.nr + column) * 4, "i32")
        held = [self._held(t) for t in totals]
        for n in range(0, len(held), 4):
            offset = (n // COLUMNS * s.nr + n % COLUMNS) * 4
            four = ", ".join(v.text for v in held[n : n + 4])
            guard = code.guarded(own)
            code.line(f"{guard}st.shared.v4.f32 [{mine.text}+{offset}], {{{four}}};")
        code.line("bar.sync 0;")
        memory, count, lanes = self.memory[s.dst], s.mr * s.nr, self.team.lanes
        for turn in range(-(-count // lanes)):
            flat = sym("lane") + turn * lanes
            at = start + self.index(flat * 4, "i32")
            some = self.holds("lt", flat, const(count))
            total: Value | None = None
            for n in range(down):
                part = code.fresh("float")
                code.set(part, code.const(0.0, "float"))
                code.write("ld.shared.f32", part, f"[{at.text}+{n * count * 4}]", guard=some)
                total = part if total is None else total + part
            assert total is not None
            row, c = floordiv(flat, s.nr), mod(flat, s.nr)
            with self.when(some):
                spot = self.address(memory, (s.dst_offset + row * s.dst_row + c, None))
                self.write(memory, spot, [total])
