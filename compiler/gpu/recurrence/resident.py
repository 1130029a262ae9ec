"""A recurrence as one kernel: its blocks stay while all steps run.

The kernels of a step are stages of the loop over the steps. The blocks go round the teams of each,
and between stages of which one needs what another wrote they wait for each other: at a counter in
global memory that each block adds one to, released, and that all read, acquired, until it has
come far enough (as the grid barrier of CUDA's cooperative groups; PTX ISA, "Memory Consistency
Model"). All blocks must be at work at once: there are no more than multiprocessors have room for.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from stagefuse.compiler.gpu.emit import Entry
from stagefuse.compiler.gpu.index import IndexWriter
from stagefuse.compiler.gpu.ir import Code, Value
from stagefuse.compiler.gpu.teams import Team, is_plain
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, sym
from stagefuse.dsl.facts import Facts

from .apart import is_apart
from .stage import Stage, StageWriter
from .steady import SteadyWriter

MOST_BLOCKS = 128
"""Blocks of a recurrence. On an H200 so many took 1.2 us to wait for each other and see what was
written, 4 of them 0.9."""
FEW_LANES = 128
"""Lanes of a block whose teams are smaller than it: where units have a warp, few of an SM are
quicker. So many lanes may have all registers in two blocks of an SM."""
ROOM = 32 << 10
"""Shared memory of which two blocks fit an SM of every arch."""


class ResidentWriter:
    """Writes the entry of a recurrence, and of those inside it.

    `counts` are the steps of each. The entry takes the address of each of `buffers` buffers, that
    of a counter, which is 0 before, `dims`, and the status. There is no counter unless a block
    `waits` for others: one may be enough, and lanes may be `apart` (`is_apart`).
    """

    def __init__(
        self,
        stages: Sequence[Stage],
        counts: Mapping[str, Expr],
        buffers: int,
        dims: Sequence[str],
        facts: Facts,
        shared_limit: int,
    ) -> None:
        self.counts, self.buffers, self.dims = counts, buffers, tuple(dims)
        self.code = Code()
        self.index = IndexWriter(facts)
        self.index.code = self.code
        kinds = (SteadyWriter if stage.steady else StageWriter for stage in stages)
        self.writers = [
            kind(stage, self.code, shared_limit) for kind, stage in zip(kinds, stages, strict=True)
        ]
        self.written = {n for s in stages for n in s.touches(("out", "inout"))}
        self.threads, self.teams = _teams(self.writers)
        self.apart = len(stages) == 1 and is_apart(self.writers[0])
        self.grid = self.work() if self.apart else minimum(self.work(), MOST_BLOCKS)
        self.waits = not self.apart and facts.bounds(self.grid)[1] not in (0, 1)

    @property
    def has_products(self) -> bool:
        return any(w.stage.steady for w in self.writers)

    def entry(self, name: str, notes: Sequence[str]) -> Entry:
        """The whole function; `notes` are comments at its top. Raises Unfit."""
        code = self.code
        for note in notes:
            code.comment(note)
        pointers = self.buffers + self.waits
        slots = [*["u64"] * pointers, *["s64"] * len(self.dims), "u64"]
        values = [self._parameter(name, n, kind) for n, kind in enumerate(slots)]
        params = [code.pure("cvta.to.global.u64", "i64", v) for v in values[:pointers]]
        status = code.pure("cvta.to.global.u64", "i64", values[-1])
        dims = dict(zip(self.dims, values[pointers:-1], strict=True))
        for writer, team in zip(self.writers, self.teams, strict=True):
            writer.status = status
            self._name(writer, dims)
            writer.begin(team, params, self.written)
        self._name(self.index, dims)
        self.counter = params[-1]
        self.thread = code.pure("mov.u32", "i32", Value(code, "%tid.x", "i32"))
        self.blocks = code.pure("mov.u32", "i32", Value(code, "%nctaid.x", "i32"))
        self.reached = code.variable("i32", code.const(0, "i32"))
        self._loop(list(self.writers), 0)
        code.line("ret;")
        shared = const(0)
        for writer in self.writers:
            shared = maximum(shared, writer.shared)
        most = self.index.facts.bounds(shared)[1]
        together = 2 if self.threads == FEW_LANES and most is not None and most <= ROOM else 1
        declared = ",\n".join(f"\t.param .{kind} {name}_{n}" for n, kind in enumerate(slots))
        lines = [
            f".visible .entry {name}(", declared,
            f") .reqntid {self.threads}, 1, 1 .minnctapersm {together}",
            "{", *code.registers(), *code.text(), "}",
        ]  # fmt: skip
        return Entry(
            name, "\n".join(lines), Team(self.threads, 1), self.grid, shared, None,
            frozenset(code.tables), (), not self.apart, together=together if self.waits else 0,
            structure=self._said(),
        )  # fmt: skip

    def _said(self) -> str:
        """The recurrence in words, and what of it multiplies."""
        waits = ", blocks wait for each other between them" if self.waits else ""
        inside = [text for writer in self.writers for text in writer.structure]
        return "; ".join(dict.fromkeys([f"one launch for all steps{waits}", *inside]))

    def work(self) -> Expr:
        """The blocks that the stage with most teams has work for."""
        most = const(0)
        for writer, team in zip(self.writers, self.teams, strict=True):
            most = maximum(most, floordiv(writer.count + (team.per_block - 1), team.per_block))
        return most

    def _parameter(self, name: str, number: int, kind: str) -> Value:
        raw = self.code.fresh("i64")
        self.code.line(f"ld.param.{kind} {raw.text}, [{name}_{number}];")
        return raw

    def _name(self, writer: IndexWriter, dims: Mapping[str, Value]) -> None:
        for dim, raw in dims.items():
            small = writer.is_small(sym(dim))
            writer.symbols[dim] = raw.to("trunc", "i32") if small else raw

    # Steps

    def _loop(self, writers: Sequence[StageWriter], depth: int) -> None:
        """Stages in order, those of recurrences that are `depth` deep in loops."""
        pending: list[StageWriter] = []
        first = 0
        while first < len(writers):
            nest = writers[first].stage.nest
            step = nest[depth] if len(nest) > depth else ""
            end = first + 1
            while (
                step
                and end < len(writers)
                and writers[end].stage.nest[depth : depth + 1] == (step,)
            ):
                end += 1
            inside = writers[first:end]
            if pending:
                self._between(any(_conflict(a, b) for a in pending for b in inside), pending)
            if step:
                self._turns(step, inside, depth)
            else:
                inside[0].run(self.blocks)
            pending += inside  # also behind a loop, which may have had no turn
            first = end

    def _turns(self, step: str, writers: Sequence[StageWriter], depth: int) -> None:
        """A loop over steps, after each of which all blocks wait for each other."""
        code, count = self.code, self.counts[step]
        kind = "i32" if all(w.is_small(sym(step)) for w in (*writers, self.index)) else "i64"
        counter = code.variable(kind, code.const(0, kind))
        head, done = code.label("step"), code.label("steps")
        with code.loop_scope():
            code.start(head)
            turn = Value(code, counter.text, kind, code.depth)
            code.branch_if(turn.compare("lt", self.index.index(count, kind)), done, holds=False)
            for writer in (*writers, self.index):
                small = writer.is_small(sym(step))
                value = turn if small == (kind == "i32") else turn.to("sext", "i64")
                writer.symbols = {**writer.symbols, step: value}
                writer._forget_bounds()
            self._loop(writers, depth + 1)
            if not self.apart:
                self._between(True, [])
            code.write(f"add.s{kind[1:]}", counter, counter, code.const(1, kind))
            code.branch(head)
        code.start(done)

    def _between(self, needed: bool, pending: list[StageWriter]) -> None:
        """What is between stages: all blocks wait for each other, or the lanes of each."""
        self.code.line("bar.sync 0;")
        if needed and self.waits:
            self._barrier()
            pending.clear()

    def _barrier(self) -> None:
        """All blocks wait for each other; one thread of each speaks for it."""
        code = self.code
        code.write("add.s32", self.reached, self.reached, self.blocks)
        waits, come = code.label("waits"), code.label("come")
        code.branch_if(self.thread.compare("eq", 0), come, holds=False)
        code.line(f"red.release.gpu.global.add.u32 [{self.counter.text}], 1;")
        code.start(waits)
        seen, short = code.fresh("i32"), code.fresh("i1")
        code.line(f"ld.acquire.gpu.global.u32 {seen.text}, [{self.counter.text}];")
        code.line(f"sub.s32 {seen.text}, {seen.text}, {self.reached.text};")
        code.line(f"setp.lt.s32 {short.text}, {seen.text}, 0;")
        code.line(f"@{short.text} bra {waits};")
        code.start(come)
        code.line("bar.sync 0;")


def _conflict(a: StageWriter, b: StageWriter) -> bool:
    """Whether one of two stages writes what the other touches."""
    every, writes = ("in", "out", "inout"), ("out", "inout")
    return bool(
        a.stage.touches(writes) & b.stage.touches(every)
        or a.stage.touches(every) & b.stage.touches(writes)
    )


def _teams(writers: Sequence[StageWriter]) -> tuple[int, list[Team]]:
    """The threads of a block in which all stages can have their teams, and those teams."""
    blocks = [w.team.threads for w in writers if w.team.is_block and not is_plain(w.kernel.body)]
    threads = max(blocks, default=FEW_LANES)
    return threads, [
        replace(w.team, lanes=threads) if w.team.is_block
        else replace(w.team, per_block=threads // w.team.lanes)
        for w in writers
    ]  # fmt: skip
