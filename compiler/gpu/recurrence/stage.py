"""A kernel of a recurrence's step as a stage of the loop over all steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from stagefuse.compiler.gpu.emit import KernelWriter
from stagefuse.compiler.gpu.ir import Code, Value
from stagefuse.compiler.gpu.memory import Memory
from stagefuse.compiler.gpu.teams import WARP_TEAM, Team
from stagefuse.compiler.kernel_ir import Kernel
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.facts import Facts


class Unfit(Exception):
    """A recurrence that cannot be one kernel, with the reason in words."""


@dataclass(frozen=True, eq=False)
class Stage:
    """A kernel of a step: which of the entry's buffers are its own, and the recurrences around it,
    outermost first. The teams of one that is `steady` have the same work at each step, if there are
    as many as it has work for."""

    kernel: Kernel
    facts: Facts
    lines: Mapping[KernelValue, int]
    buffers: tuple[int, ...]
    nest: tuple[str, ...]
    steady: bool = False

    def touches(self, modes: Sequence[str]) -> set[int]:
        own = zip(self.buffers, self.kernel.buffers, strict=True)
        return {number for number, b in own if b.mode in modes}


class StageWriter(KernelWriter):
    """Writes a stage into the loop over the steps."""

    def __init__(self, stage: Stage, code: Code, shared_limit: int) -> None:
        super().__init__(stage.kernel, stage.facts, shared_limit, stage.lines)
        if self.team.is_part:  # teams go round the steps by themselves
            self.team = WARP_TEAM
        self.stage = stage
        self.code = code

    def begin(self, team: Team, params: Sequence[Value], written: set[int]) -> None:
        """What is computed before all steps. Raises Unfit."""
        self.team = team
        self._plan_scratch()
        if self.rounds:
            raise Unfit("what a step keeps for itself does not fit shared memory")
        for buffer, number in zip(self.kernel.buffers, self.stage.buffers, strict=True):
            self.memory[buffer.name] = Memory(
                buffer.name, buffer.dtype, buffer.shape, "global", params[number],
                number not in written,
            )  # fmt: skip
        self._lanes()
        self._set_up()

    def run(self, blocks: Value) -> None:
        """The stage at a step: its teams, shared by so many blocks."""
        code = self.code
        with self.scope():
            if self.kernel.parallel:
                kind = self.team_number.type
                self._rounds((blocks * self.team.per_block).to("sext", kind))
                return
            done = code.label("done")
            code.branch_if(self.team_number.compare("lt", 1), done, holds=False)
            with code.branch_scope():
                self.statements(self.kernel.body)
            code.start(done)
