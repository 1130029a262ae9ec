"""What loops read that is read before their elements.

Of loops that a lane runs by itself along what the kernel only reads, as down a column, several
steps are written out, and all their loads come first: ptxas neither writes out such a loop nor
moves its loads over its stores. Of rows that lie where data says, that is read once.
"""

from __future__ import annotations

from contextlib import ExitStack

from stagefuse.compiler.cpu.bodies import work_of
from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.kernel_ir import For, Index, Let, Load, Store
from stagefuse.dsl.dims import Expr

from .loops import LIGHT, Carry, LoopWriter
from .private import positions
from .teams import most_of, nest_of

AHEAD = 8
"""Steps that are written out."""


class StreamWriter(LoopWriter):
    """The body of a kernel, as far as lanes' own loops go."""

    def plain(self, s: For) -> None:
        loads = self._streamed(s)
        if not loads:
            return super().plain(s)
        last = self.resolve(s.hi)
        small = self.is_small(self.resolve(s.lo)) and self.is_small(last + AHEAD)
        start = self._value(self.resolve(s.lo), "i32" if small else "i64")

        def load(place: Expr) -> None:
            with self.binding(**{s.index: place}):
                for part in loads:
                    self.value(part)

        def body(place: Expr, carry: Carry) -> Carry:
            with self.binding(**{s.index: place}):
                self.statements(s.body)
            return carry

        self.straight = True
        self.strided(f"{s.index}'", start, last, 1, [], body, (s.lo, s.hi - 1), AHEAD, load)
        self.straight = False

    def share(self, s: For) -> None:
        before = self.noted
        with self.noting_late(), self.scope():
            if self.slot is None:
                self._find_rows(nest_of(s))
            found, self.noted = self.noted, before
            super().share(s)
            self.noted = found

    def _find_rows(self, nest: list[For]) -> None:
        """Reads the positions from data that all elements of a nest have."""
        own = {f.index for f in nest}
        for found, guard in positions(nest[-1].body).items():
            values = [self._unique(v) for v in (found, *guard)]
            if any(own & self.names(v) or self._is_volatile(v) for v in values):
                continue
            with ExitStack() as where:
                for f in nest:
                    where.enter_context(self.when(self.holds("gt", f.hi, f.lo)))
                where.enter_context(self.when(self.all_of(guard)))
                self.value(found)

    def _streamed(self, s: For) -> list[Load]:
        """What a loop with little to do reads at its position from what the kernel only reads;
        nothing if several steps are not worth writing out."""
        if self.team.lanes > 1 or self.slot is not None or work_of(s.body) * AHEAD > LIGHT:
            return []
        most = most_of(self.resolve(s.lo), self.resolve(s.hi), self.facts)
        if most is not None and most < 2 * AHEAD:
            return []
        if not all(isinstance(x, Let | Store) for x in s.body):
            return []
        found: dict[Load, None] = {}
        for x in s.body:
            assert isinstance(x, Let | Store)
            for part in post_order(x.value):
                if isinstance(part, Load) and self.memory[part.buffer].constant and not part.guard:
                    places = [i.expr.symbols() for i in part.indices if isinstance(i, Index)]
                    if len(places) == len(part.indices) and any(s.index in p for p in places):
                        found[part] = None
        return list(found)
