"""Tiles of windows that others pool, whose operands come by tensor copies.

A tile is of so many pooling windows. Copies bring columns of pixels that go from window to window:
one of the first places of all of them, one of the second, and so on, which is what `im2col` maps
can do with a longer step. All warps that multiply store their sums, and then all of them pool.
"""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.loops import Carry
from stagefuse.compiler.gpu.memory import Memory
from stagefuse.compiler.gpu.teams import WARP, Team
from stagefuse.compiler.kernel_ir import Alloc, For
from stagefuse.dsl.dims import const

from .epilogue import PIECE_ROWS, ROWS
from .lowering import PADDING
from .persistent import GROUP, MOST_STAGES, READERS, PersistentWriter
from .ring import Ring


class PooledWriter(PersistentWriter):
    """Writes the entry of such a product's kernel."""

    def _stages(self, shared_limit: int) -> int:
        left = shared_limit - self._pieces_bytes()
        return min(left // Ring.bytes_of(1, self.stage_bytes), MOST_STAGES)

    def _pieces_bytes(self) -> int:
        return ROWS * (self.form.columns + PADDING) * 4

    def finish(self, warp: Value, sums: Sequence[Value]) -> None:
        """Pools a tile. `sums` are what each lane of the warps has of it, as in `epilogue`."""
        lane = self.symbols["lane"]
        start = self.shared_address(self.pieces_start)
        row = (self.form.columns + PADDING) * 4
        self._wait_for_all()  # all have read the tile before
        at = start + (warp * (2 * PIECE_ROWS) + lane.lshr(2)) * row + (lane & 3) * 8
        for n in range(self.form.columns // 8):
            for half in range(2):
                pair = ", ".join(v.text for v in sums[n * 4 + half * 2 :][:2])
                place = half * PIECE_ROWS * row + n * 32
                self.code.line(f"st.shared.v2.b32 [{at.text}+{place}], {{{pair}}};")
        self._wait_for_all()
        team, self.team = self.team, Team(READERS * GROUP, 1)
        thread = warp * WARP + lane
        with self.named(lane=(thread, const(0), const(READERS * GROUP - 1))), self.scope():
            self._windows_of(start)
        self.team = team

    def _wait_for_all(self) -> None:
        """The warps that multiply wait for each other."""
        self.code.line(f"bar.sync 1, {READERS * GROUP};")

    def _windows_of(self, start: Value) -> None:
        """Every window of a tile that lies at an address."""
        form = self.form
        (made,) = [s for s in self.kernel.body if isinstance(s, Alloc)]
        (rows,) = [s for s in form.plain if isinstance(s, For)]
        shape = (const(ROWS), const(form.columns + PADDING))
        self.memory[made.name] = Memory(made.name, made.dtype, shape, "shared", start)
        loops = [("r", rows.lo, rows.hi), ("c", const(0), const(form.columns))]

        def visit(carry: Carry) -> Carry:
            with self.when(self._inside()):
                self.statements(form.stores)
            return carry

        self.spread(loops, self.width if self._is_even() else 1, [], visit)
