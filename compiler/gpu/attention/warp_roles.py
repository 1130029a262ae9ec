"""Kernels of attention whose warps have roles, and whose blocks stay for many tiles of queries.

The keys and queries of the next tile come while what follows the last key of this one is computed,
which each warpgroup does of its own rows. With a mask that cuts the keys tiles have more or less to
do. Then some heads at a time, whose keys the L2 cache holds, are divided so that every block has
as much: their tiles, the longest first, go to the blocks from the first to the last, the next ones
from the last to the first.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace

from stagefuse.compiler.cpu.bodies import walk
from stagefuse.compiler.gpu.emit import KernelWriter
from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.teams import Team
from stagefuse.compiler.kernel_ir import Attend, For, Kernel, Statement
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.dsl.dims import Expr, const, minimum, sym
from stagefuse.dsl.facts import Facts

from .forms import GROUP_ROWS
from .warpgroup_tiles import GROUP, STAGES, GroupAttending

BLOCKS = 132
"""Blocks that stay: one for each SM of the largest device of the arch."""
TURNS = 2
"""Tiles that each of them takes of some heads."""
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
        form = self.attending.form
        readers = form.readers
        self.structure.append(
            f"wgmma of {kind}, {form.rows} queries by {form.keys} keys at a time, {STAGES} stages "
            f"by a warpgroup of its own, {readers} others multiply{' in turns' * form.turns}"
            + ", blocks stay for many tiles" * self.attending.stays
        )
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

        self.attending.by_roles(self._each_step, one_tile, self.team_number.type == "i64")
        self.team = team
        self.stays = self.attending.stays
        return minimum(self.count, const(BLOCKS)) if self.stays else self.count

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
        if not self.attending.stays:
            with self.at_step(self.team_number):
                body()
        elif self.differ:
            self._balanced(body)
        else:
            self._one_after_the_other(body)

    def _one_after_the_other(self, body: Callable[[], None]) -> None:
        """Tiles that are as long as each other, in their order."""
        code, kind = self.code, self.team_number.type
        end, apart = self.index(self.count, kind), self._apart()
        step = code.variable(kind, self.team_number)
        head, done = code.label("tile"), code.label("tiles")
        with code.loop_scope(), self.scope():
            code.start(head)
            now = Value(code, step.text, kind, code.depth)
            code.branch_if(now.compare("lt", end), done, holds=False)
            with self.at_step(now):
                body()
            code.set(step, now + apart)
            code.branch(head)
        code.start(done)

    def _balanced(self, body: Callable[[], None]) -> None:
        """Tiles of some heads after those of others, the last of them of up to twice as many."""
        code, kind, own = self.code, self.team_number.type, self.team_number
        apart, tiles = self._apart(), self.index(self.blocks, kind)
        heads = self.index(size_of([e for n, e in self.kernel.parallel if n != "mb"]), kind)
        one = code.const(1, kind)
        some = code.intrinsic("smax", code.unsigned_division(apart * TURNS, tiles), one)
        turned = apart - 1 - own
        first, begin, turn = (code.variable(kind, code.const(0, kind)) for _ in range(3))
        head, skip, done = code.label("tile"), code.label("none"), code.label("tiles")
        with code.loop_scope(), self.scope():
            code.start(head)
            start, at, way = (Value(code, v.text, kind, code.depth) for v in (first, begin, turn))
            is_last = (start + some * 2).compare("gt", heads)
            count = is_last.select(heads - start, some)
            place = at + way.compare("eq", 0).select(own, turned)
            code.branch_if(place.compare("lt", count * tiles), skip, holds=False)
            with code.branch_scope(), self.scope():
                tile = code.unsigned_division(place, count)
                step = (start + place - tile * count) * tiles + tile
                with self.at_step(step):
                    body()
            code.start(skip)
            after = at + apart
            over = after.compare("ge", count * tiles)
            code.branch_if(over & is_last, done)
            code.set(first, over.select(start + some, start))
            code.set(begin, over.select(code.const(0, kind), after))
            code.set(turn, way ^ 1)
            code.branch(head)
        code.start(done)

    def _apart(self) -> Value:
        """The number of blocks."""
        code, kind = self.code, self.team_number.type
        apart = code.pure("mov.u32", "i32", Value(code, "%nctaid.x", "i32"))
        return code.pure("cvt.u64.u32", "i64", apart) if kind == "i64" else apart
