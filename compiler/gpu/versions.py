"""Versions of a step for rows that are short, or whole vectors, before the one for all others."""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.cpu.bodies import walk
from stagefuse.compiler.kernel_ir import Alloc, Fold, For, Let, Statement, Store
from stagefuse.dsl.dims import Expr, const, sym

from .loops import Carry, Nest
from .streams import StreamWriter
from .teams import WARP, Team, shared_loops, smaller_of

SLOTS = 8
"""Vectors of a row that a lane has in its version for rows of usual lengths."""

ROWS_TOGETHER = 4
"""Rows of scratch that a warp reduces together: a row alone waits for each of its shuffles."""


class VersionWriter(StreamWriter):
    """The body of a kernel, as far as it depends on how long rows are."""

    def by_warps(self, s: For) -> None:
        """Rows, each done by a warp as a team of its own."""
        team = self.team
        before = self.symbols, self.facts, self.unread, self.unwritten
        lane = self.symbols["lane"]
        self.team = Team(WARP, team.lanes // WARP)
        self.symbols = {**self.symbols, "lane": lane & (WARP - 1)}
        self.facts = self.facts.with_ranges({"lane": (0, WARP - 1)})
        self._forget_bounds()
        self.unread, self.unwritten = set(), set()

        def body(row: Expr, carry: Carry) -> Carry:
            with self.binding(**{s.index: row}):
                self.versions(s.body)
            return carry

        first, ends = lane.lshr(5) + self.index(s.lo, "i32"), (s.lo, s.hi - 1)
        written = {x.buffer for x in walk(s.body) if isinstance(x, Store)}
        apart = all(self.memory[b].space == "global" for b in written)
        together = ROWS_TOGETHER if apart else 1
        end, step = self.resolve(s.hi), team.lanes // WARP
        self.strided(f"{s.index}'", first, end, step, [], body, ends, together)
        self.team = team
        self.symbols, self.facts, self.unread, self.unwritten = before
        self._forget_bounds()

    def versions(self, body: Sequence[Statement], told: bool = False) -> None:
        """The body; of one whose rows may be short, or whole vectors unless that is told, a version
        for those before it."""
        uneven = None if told else self._uneven_rows(body)
        cut = None if uneven else self._short_rows(body)
        code = self.code
        if uneven is not None:
            known = self.facts.with_divisor(sym(uneven), self.width)
            condition = (self.index(sym(uneven), "i32") & (self.width - 1)).compare("eq", 0)
        elif cut is not None:
            name, most = cut
            known = self.facts.with_ranges({name: (self.facts.ranges.get(name, (0,))[0], most)})
            condition = self.holds("le", sym(name), const(most))
        else:
            return self.statements(body)
        long, done = code.label("long"), code.label("done")
        code.branch_if(condition, long, holds=False)
        for facts in (known, self.facts):
            before, self.facts = self.facts, facts
            self._forget_bounds()
            with code.branch_scope(), self.scope():
                if facts is before and cut is not None:
                    self.statements(body)
                else:
                    self.versions(body, told or uneven is not None)
            self.facts = before
            self._forget_bounds()
            self.unread, self.unwritten = set(), set()
            if facts is not before:
                code.branch(done)
                code.start(long)
        code.start(done)

    def _uneven_rows(self, body: Sequence[Statement]) -> str | None:
        """The dimension that rows are long, if nobody knows whether it is a number of vectors."""
        if self.team.across or self.width & (self.width - 1) or not self._is_plain(body):
            return None
        holds_tiles = any(isinstance(s, Alloc) for s in walk(body))
        parts = [] if holds_tiles else self._parts_of_rows(body)
        for name, nest in [*self._rows(body), *self._areas(body), *parts]:
            if self.width_of(nest) < self.width:
                return name
        return None

    def _parts_of_rows(self, body: Sequence[Statement]) -> list[tuple[str, Nest]]:
        """The shared loops along parts of rows, which are whole vectors if rows are: up to so many
        of the elements that are left of a dimension."""
        found: list[tuple[str, Nest]] = []
        for nest in shared_loops(body):
            _, lo, hi = nest[-1]
            ends = [self.resolve(end - lo) for end in smaller_of(self.resolve(hi))]
            left = [e for e in ends if not self.divides(self.width, e)]
            if len(left) != 1 or len(ends) < 2:
                continue
            names = sorted(left[0].symbols() & set(self.kernel.dims))
            found += [(n, nest) for n in names if self.divides(self.width, left[0] - sym(n))]
        return found

    def _rows(self, body: Sequence[Statement]) -> list[tuple[str, Nest]]:
        """The shared loops along rows that are as long as a dimension. One that nothing goes along
        but a single loop among others is not worth a version of all of them."""
        nests = list(shared_loops(body))
        names = [self.resolve(nest[-1][2] - nest[-1][1]).as_symbol() for nest in nests]
        return [
            (name, nest)
            for name, nest in zip(names, nests, strict=True)
            if name in self.kernel.dims and name is not None
            and (names.count(name) > 1 or len(names) == 1)
        ]  # fmt: skip

    def _areas(self, body: Sequence[Statement]) -> list[tuple[str, Nest]]:
        """The shared loops that are as long as a product of dimensions, and the last of these: they
        are whole vectors if it is."""
        found: list[tuple[str, Nest]] = []
        for nest in shared_loops(body):
            extent = self.resolve(nest[-1][2] - nest[-1][1])
            names = [name for name in self.kernel.dims if name in extent.symbols()]
            if len(extent.terms) == 1 and len(names) > 1:
                found.append((names[-1], nest))
        return found

    def _is_plain(self, body: Sequence[Statement]) -> bool:
        return all(isinstance(s, For | Fold | Store | Let | Alloc) for s in body)

    def _short_rows(self, body: Sequence[Statement]) -> tuple[str, int] | None:
        """The dimension that rows are long, and a length up to which another version is better,
        whose lanes have fewer places for elements that may not be there."""
        if not self._is_plain(body):
            return None
        for name, nest in self._rows(body):
            (_, lo, hi), lanes = nest[-1], self.team.lanes * self.width_of(nest)
            most = self.most(hi - lo)
            if self.team.lanes == 1 or self.team.across:
                continue
            least, some = self.facts.bounds(sym(name))[0] or 0, SLOTS * lanes
            if most is None or most > some >= least:
                return name, some
            fewer = max(lanes, most // 4)
            if 2 * lanes <= most <= some and least <= fewer:
                return name, fewer
        return None
