"""Stages whose teams have the same work at each step.

What such a stage reads that no step changes is read before the loop over the steps, as far as
registers go: the weights of a recurrent layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.gpu.folds import combine
from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.loops import Carry
from stagefuse.compiler.gpu.memory import VECTOR_BYTES, Memory
from stagefuse.compiler.gpu.shuffles import shuffled
from stagefuse.compiler.gpu.teams import WARP, WARP_TEAM, Team
from stagefuse.compiler.kernel_ir import Fold, For, Index, Load, Statement, Store
from stagefuse.dsl.dims import Expr, const, minimum, mod, sym

from .stage import StageWriter

HELD = 96
"""Registers of a lane for what stays in them."""


ROWS = (1, 4, 16)
"""Rows that lanes sum together; there is a version for each."""
FEWER, BESIDE = 8, 60
"""As many at most where a lane holds more numbers of the columns than the second: beside 64, of
four columns of 512, sums of 16 rows spilled."""


class SteadyWriter(StageWriter):
    """Writes a stage in which each warp has a place of the last axis."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.turn_depth = 0
        self.settled = True  # each warp has one place
        self.team, self.in_team = WARP_TEAM, True
        self.held = 0
        self.starts: dict[str, int] = {}
        """The depths of registers that addresses are made of."""

    def begin(self, team: Team, *args: Any) -> None:
        super().begin(team, *args)
        self.structure.append("what no step changes stays in registers, as far as they go")
        first = self.team_number
        end = self.index(self.count, first.type)
        self.mine = first.compare("lt", end)
        self.own = self.code.intrinsic("smin", first, end - 1)

    def run(self, blocks: Value) -> None:
        code = self.code
        self.turn_depth = code.depth
        if (self.facts.bounds(self.count)[0] or 0) < 1:
            return super().run(blocks)
        teams = blocks * self.team.per_block
        enough = teams.to("sext", self.own.type).compare(
            "ge", self.index(self.count, self.own.type)
        )
        rounds, done = code.label("rounds"), code.label("done")
        code.branch_if(enough, rounds, holds=False)
        code.branch_if(self.mine, done, holds=False)
        with code.branch_scope(leaves=self.turn_depth), self.scope():
            self._body(self.own)
        code.branch(done)
        code.start(rounds)
        self.settled = False
        with code.branch_scope():
            super().run(blocks)
        self.settled = True
        code.start(done)

    # Rows

    def versions(self, body: Sequence[Statement], told: bool = False) -> None:
        self.statements(body)

    def share(self, s: For) -> None:
        """Rows, and sums for each: lanes share the sums of all, then each has a row of its own."""
        if not any(isinstance(x, Fold) for x in s.body):
            return super().share(s)
        code, extent, most = self.code, self.resolve(s.hi - s.lo), self.most(s.hi - s.lo)
        rows = self._versions(s)
        done = code.label("done")
        code.branch_if(self.holds("gt", extent, const(0)), done, holds=False)
        if most is None or most > rows[-1] or not self.settled:
            at_once = rows[-1] if self.settled else rows[0]

            def some(carry: Carry) -> Carry:
                self._some_rows(s, sym("some"), at_once)
                return carry

            start, step = self.index(const(0), "i32"), code.const(at_once, "i32")
            end, ends = self.index(extent, "i32"), (const(0), extent - 1)
            with code.branch_scope(leaves=self.turn_depth):
                self._counted("some", start, end, step, ends, [], some)
            code.start(done)
            return
        counts = [n for n in rows if n < most]
        for count in counts:
            more = code.label("more")
            code.branch_if(self.holds("le", extent, const(count)), more, holds=False)
            with code.branch_scope(leaves=self.turn_depth):
                self._some_rows(s, const(0), count)
            code.branch(done)
            code.start(more)
        with code.branch_scope(leaves=self.turn_depth):
            self._some_rows(s, const(0), rows[len(counts)])
        code.start(done)

    def _versions(self, s: For) -> tuple[int, ...]:
        """The numbers of rows that are summed together, the versions."""
        folds = [x for x in s.body if isinstance(x, Fold)]
        depths = [self.most(extent) for fold in folds for _, extent in fold.loops]
        held = sum(-(-n // WARP) for n in depths if n is not None)
        return ROWS if held <= BESIDE else (*ROWS[:-1], FEWER)

    def _some_rows(self, s: For, start: Expr, count: int) -> None:
        """At most `count` rows, a power of two, from a first one on."""
        code, folds = self.code, [x for x in s.body if isinstance(x, Fold)]
        rest = [x for x in s.body if not isinstance(x, Fold)]
        extent = self.resolve(s.hi - s.lo)
        own = start + mod(sym("lane"), count, self.facts)
        mask = self.symbols["lane"].compare("lt", count) & self.holds("lt", own, extent)
        before, self.in_team = self.in_team, False
        with self.scope():
            with self.binding(**{s.index: s.lo + own}), self.when(mask):
                for load in self._constant_loads(rest):
                    self.value(load)  # on the way while the sums are computed
            sums = self._sums(s, folds, start, extent, 0, count)
            step = WARP // 2
            while step >= count:
                sums = [
                    combine(code, f.kind, v, shuffled(code, v, step), f.dtype)
                    for f, v in zip(folds, sums, strict=True)
                ]
                step //= 2
            with self.binding(**{s.index: s.lo + own}), self.when(mask):
                for fold, total in zip(folds, sums, strict=True):
                    self.scopes[-1].locals[fold.name] = total
                self.statements(rest)
        self.in_team = before

    def _sums(
        self, s: For, folds: list[Fold], start: Expr, extent: Expr, first: int, count: int
    ) -> list[Value]:
        """The sums of rows, `first` to before `first + count`: in each lane those of the row whose
        number there has the lane's last bits. Rows beyond the last one are the last one again."""
        code = self.code
        if count == 1:
            row = minimum(start + first, extent - 1, self.facts)
            with self.scope(), self.binding(**{s.index: s.lo + row}):
                self.fetched = {}
                parts = [self._part(fold) for fold in folds]
                self.fetched = None
            return parts
        half = count // 2
        low = self._sums(s, folds, start, extent, first, half)
        high = self._sums(s, folds, start, extent, first + half, half)
        upper = (self.symbols["lane"] & half).compare("ne", 0)
        found = []
        for fold, a, b in zip(folds, low, high, strict=True):
            sent, kept = upper.select(a, b), upper.select(b, a)
            found.append(combine(code, fold.kind, kept, shuffled(code, sent, half), fold.dtype))
        return found

    def _constant_loads(self, body: Sequence[Statement]) -> list[Load]:
        """What statements read that no step changes, where it depends on no sum."""
        return [
            part
            for s in body
            if isinstance(s, Store)
            for part in post_order(s.value)
            if isinstance(part, Load) and self.memory[part.buffer].constant and not part.guard
            and all(isinstance(i, Index) for i in part.indices)
        ]  # fmt: skip

    def _part(self, s: Fold) -> Value:
        """A lane's part of a sum."""
        ((name, extent),) = s.loops
        width = VECTOR_BYTES // s.dtype.itemsize
        width = width if self.divides(width, self.resolve(extent)) else 1

        def visit(carry: Carry) -> Carry:
            found: Carry = []
            for number, _ in enumerate(self.elements()):
                found += self._step(s, [carry[number]])
            return found

        totals = self.spread([(name, const(0), extent)], width, self._start(s) * width, visit)
        total = totals[0]
        for other in totals[1:]:
            total = combine(self.code, s.kind, total, other, s.dtype)
        return total

    # What stays in registers

    def _moving_part(self, start: Value, expr: Expr, size: int) -> Value:
        at = super()._moving_part(start, expr, size)
        self.starts[at.text] = at.depth
        return at

    def _loaded(self, memory: Memory, at: str, count: int) -> tuple[Value, ...]:
        code = self.code
        start, guard = at[1:-1].partition("+")[0], self.active
        depth = self.starts.get(start)
        if not memory.constant or depth is None or self.held + count > HELD:
            return super()._loaded(memory, at, count)
        operands = [Value(code, start, "i64", depth), *([] if guard is None else [guard])]
        level = code.place(operands)
        if level == code.depth:
            return super()._loaded(memory, at, count)
        inner, code.scopes = code.scopes, code.scopes[: level + 1]
        try:
            found = super()._loaded(memory, at, count)
        finally:
            code.scopes = inner
        self.held += count
        return found
