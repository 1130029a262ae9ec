"""Lines of a result that a product's tile ends in, fetched while the tile is computed.

The stores at a tile's end would wait for them: a store that misses the caches first reads the line
that it overwrites, and rows of a tile are too far apart for the hardware to see them coming.
Source: Intel 64 and IA-32 Optimization Reference Manual, section 9.3 (PREFETCHW).
"""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.kernel_ir import For, If, Statement, Store, TileProduct

from .bodies import is_walk
from .chosen_rows import ChosenRowWriter
from .ir import Value

LINE = 64


class FetchWriter(ChosenRowWriter):
    """The function of a kernel, with what its products' tiles fetch ahead."""

    def first_of(self, body: Sequence[Statement]) -> int:
        match body:
            case [TileProduct() | If(body=(TileProduct(),)), following, *_]:
                self._fetch_ahead(following)
        return super().first_of(body)

    def _fetch_ahead(self, s: Statement) -> None:
        """Asks for the lines that a nest of loops will store."""
        if not isinstance(s, For):
            return
        lo, hi = self.index(s.lo), self.index(s.hi)
        if s.vector:
            for store in s.body:
                if isinstance(store, Store) and store.buffer in self.results:
                    self._fetch_row(s, store, lo, hi)
        elif len(s.body) == 1:

            def row(i: Value, _: list[Value]) -> list[Value]:
                self.scopes[-1].indices[s.index] = i
                self._fetch_ahead(s.body[0])
                return []

            self._loop(lo, hi, [], row, [], {s.index}, False, False)

    def _fetch_row(self, s: For, store: Store, lo: Value, hi: Value) -> None:
        memory = self.memory[store.buffer]
        if not is_walk(store, memory.shape, s.index):
            return
        code, shift = self.code, (LINE // memory.dtype.itemsize).bit_length() - 1
        count = ((hi - lo) + (1 << shift) - 1).ashr(shift)

        def line(i: Value, _: list[Value]) -> list[Value]:
            self.scopes[-1].indices[s.index] = lo + i.shl(shift)
            at = self._address(memory, store.indices)
            code.line(f"call void @llvm.prefetch.p0(ptr {at.text}, i32 1, i32 3, i32 1)")
            return []

        self._loop(code.const(0, "i64"), count, [], line, [], {s.index}, False, True)
