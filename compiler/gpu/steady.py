"""Stages whose teams have the same work at each step.

What such a stage reads that no step changes is read before the loop over the steps, as far as
registers go: the weights of a recurrent layer.
"""

from __future__ import annotations

from typing import Any

from stagefuse.compiler.kernel_ir import Fold, For, If, Statement, Store
from stagefuse.dsl.dims import Expr

from .ir import Value
from .stage import StageWriter
from .teams import WARP_TEAM, Team
from .values import Memory

HELD = 128
"""Registers of a lane for what stays in them."""


class SteadyWriter(StageWriter):
    """Writes a stage in which each warp has a place of the last axis."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self.team, self.in_team = WARP_TEAM, True
        self.held = 0
        self.starts: dict[str, int] = {}
        """The depths of registers that addresses are made of."""
        self.reading: dict[tuple[object, ...], tuple[Value, ...]] = {}

    def begin(self, team: Team, *args: Any) -> None:
        super().begin(team, *args)
        first = self.team_number
        end = self.index(self.count, first.type)
        self.mine = first.compare("lt", end)
        self.own = self.code.intrinsic("smin", first, end - 1)

    def run(self, blocks: Value) -> None:
        code = self.code
        if (self.facts.bounds(self.count)[0] or 0) < 1:
            return super().run(blocks)
        teams = blocks * self.team.per_block
        enough = teams.to("sext", self.own.type).compare(
            "ge", self.index(self.count, self.own.type)
        )
        rounds, done = code.label("rounds"), code.label("done")
        code.branch_if(enough, rounds, holds=False)
        code.branch_if(self.mine, done, holds=False)
        with code.branch_scope(leaves=code.depth), self.scope():
            self._body(self.own)
        code.branch(done)
        code.start(rounds)
        with code.branch_scope():
            super().run(blocks)
        code.start(done)

    def statement(self, s: Statement) -> None:
        """Sums one after the other read what they have in common once."""
        if isinstance(s, Fold):
            self.fetched = self.reading
            super().statement(s)
            self.fetched = None
            return
        if isinstance(s, Store | For | If):
            self.reading = {}
        super().statement(s)

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
