"""Kernels of attention whose warps have roles, and whose blocks stay for many tiles of queries.

The keys of the next tile come while what follows the last key of this one is computed, which each
warpgroup does of its own rows. With a mask that cuts the keys tiles have more or less to do: a
block takes two at a time, one of the longest and one of the shortest that are left of a head; and
where there are few tiles, each has a block of its own, so that the device can balance them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace

from stagefuse.compiler.cpu.bodies import walk
from stagefuse.compiler.kernel_ir import Attend, For, Kernel, Statement
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.facts import Facts

from .attend_groups import GROUP, GROUP_ROWS, GroupAttending
from .emit import KernelWriter
from .ir import Value
from .teams import Team

BLOCKS = 132
"""Blocks that stay: one for each SM of the largest device of the arch."""
MANY = 8
"""Tiles for each of them from which on they stay though tiles differ."""
ALL, OWN = 1, 8
"""The barrier of all that multiply, and that of the first warpgroup; the others' follow."""


def attends(kernel: Kernel) -> bool:
    return any(isinstance(s, Attend) for s in walk(kernel.body))


class RolesWriter(KernelWriter):
    """Writes the entry of an attention's kernel."""

    def __init__(
        self, kernel: Kernel, facts: Facts, shared_limit: int, lines: Mapping[KernelValue, int]
    ) -> None:
        super().__init__(kernel, facts, shared_limit, lines)
        self.team = replace(self.team, helpers=GROUP)
        self.waits_at = str(ALL)

    def barrier(self) -> None:
        self.code.line(f"bar.sync {self.waits_at}, {self.team.lanes};")
        self.unread, self.unwritten = set(), set()

    def _steps(self) -> Expr:
        (s,) = (s for s in self.kernel.body if isinstance(s, Attend))
        self.blocks = next(extent for name, extent in self.kernel.parallel if name == "mb")
        self.differ = "mb" in s.lo.symbols() | s.hi.symbols()
        threads = self.symbols["lane"]
        self.symbols = {**self.symbols, "thread": threads}
        kind = self.memory[s.queries.buffer].dtype.name
        self.attending = GroupAttending(self, s, kind, self.shared_limit)
        readers = self.attending.form.readers
        self.facts = self.facts.with_ranges({"thread": (0, readers * GROUP - 1)})
        body, team = self.kernel.body, self.team
        if self.attending.stays:
            body = tuple(map(self._of_group, body))
            self.symbols = {**self.symbols, "lane": threads & (GROUP - 1), "group": threads.lshr(7)}
            self.facts = self.facts.with_ranges({"lane": (0, GROUP - 1), "group": (0, readers - 1)})
            self.team = Team(GROUP, 1)
            self.waits_at = (self.symbols["group"] + OWN).text
        self._forget_bounds()

        def one_tile() -> None:
            self.versions(body)
            self.barrier()

        self.attending.by_roles(self._each_step, one_tile)
        self.team = team
        if not self.attending.stays:
            return self.count
        if not self.differ:
            return minimum(self.count, const(BLOCKS))
        if self.attending.form.readers > 2:  # measured: 213 us as they come, 262 in pairs
            return self.count
        many = minimum(floordiv(self.count, MANY * BLOCKS), const(1))
        return self.count - many * (self.count - BLOCKS)

    def _of_group(self, s: Statement) -> Statement:
        """A loop over the rows of a tile, as far as this warpgroup's go."""
        if not isinstance(s, For):
            return s
        first = sym("group") * GROUP_ROWS
        return replace(s, lo=first, hi=minimum(s.hi, first + GROUP_ROWS))

    def attend(self, s: Attend) -> None:
        self.attending.write()

    def _each_step(self, body: Callable[[], None]) -> None:
        """Runs for each of the block's steps, at which the parallel indices are bound."""
        code, kind = self.code, self.team_number.type
        apart = code.pure("mov.u32", "i32", Value(code, "%nctaid.x", "i32"))
        apart = code.pure("cvt.u64.u32", "i64", apart) if kind == "i64" else apart
        end = self.index(self.count, kind)
        pairs = code.const(0, kind)  # 1 if a block takes two at a time
        if self.differ:
            pairs = apart.compare("lt", end).select(code.const(1, kind), pairs)
        number = code.variable(kind, code.const(0, kind))
        head, done = code.label("tile"), code.label("tiles")
        with code.loop_scope(), self.scope():
            code.start(head)
            now = Value(code, number.text, kind, code.depth)
            first = (now.ashr(pairs) * apart + self.team_number).shl(pairs)
            step = first + (now & pairs)
            code.branch_if(step.compare("lt", end), done, holds=False)
            with self.at_step(step), self._longest_and_shortest(pairs):
                body()
            code.write(f"add.s{64 if kind == 'i64' else 32}", number, number, code.const(1, kind))
            code.branch(head)
        code.start(done)

    @contextmanager
    def _longest_and_shortest(self, pairs: Value) -> Iterator[None]:
        """Inside, tiles of a head are in another order: the first, the last, the second..."""
        if not self.differ:
            yield
            return
        place, pairs = self.index(sym("mb"), "i32"), pairs.to("trunc", "i32")
        half, last = place.ashr(pairs), self.index(self.blocks - 1, "i32")
        chosen = (place & pairs).compare("eq", 1).select(last - half, half)
        with self.named(tile=(chosen, const(0), self.blocks - 1)), self.binding(mb=sym("tile")):
            yield
