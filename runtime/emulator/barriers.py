"""Barriers of blocks: sixteen of them, of all threads or of a stated number (PTX ISA, "bar")."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import Stop
from .passed_by import passed_by
from .turns import let_others_run

if TYPE_CHECKING:
    from .machine import Batch, Group
    from .program import Step

Array = NDArray[Any]
Release = Callable[["Group"], None]


@dataclass
class Parked:
    """A group that waits, what it does when it is released, its instruction."""

    group: Group
    step: Step
    release: Release | None = None


@dataclass(eq=False)
class Barrier:
    """One barrier of each block of a batch."""

    arrived: Array
    expected: Array
    whole: Array
    """Whether each block's threads gave no number, so that all of the block's must come."""
    totals: dict[str, Array] = field(default_factory=dict)
    parked: list[Parked] = field(default_factory=list)
    gathering: Any = None
    """What those that have come know, for the race detector."""


class Barriers:
    """All barriers of a batch."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        self.known: dict[int, Barrier] = {}

    @property
    def is_waiting(self) -> bool:
        return any(barrier.parked for barrier in self.known.values())

    def __getitem__(self, number: int) -> Barrier:
        if number not in self.known:
            n = self.batch.blocks
            if not 0 <= number < 16:
                raise Stop("barrier", f"there is no barrier {number}, only 0 to 15")
            self.known[number] = Barrier(
                np.zeros(n, np.int64), np.zeros(n, np.int64), np.zeros(n, np.bool_)
            )
        return self.known[number]

    def arrive(
        self, g: Group, step: Step, number: int, count: int | None, *, waits: bool = True,
        release: Release | None = None, contribute: Callable[[Barrier], None] | None = None,
    ) -> bool:  # fmt: skip
        """A group comes to a barrier; gives whether all of its threads may go on.

        Those that wait are parked, and go on behind the instruction when the barrier opens.
        `contribute` adds to the barrier's totals; `release` runs for threads that go on.
        """
        batch = self.batch
        barrier = self[number]
        if count is not None and (count % 32 or count <= 0 or count > batch.stride):
            raise Stop("barrier", f"a barrier of {count} threads, which is no number of warps")
        here = np.bincount(g.of(batch.block_of), minlength=batch.blocks)
        came = here > 0
        expected = batch.block_threads if count is None else count
        partial = came & (barrier.arrived > 0) & (barrier.expected != expected)
        if partial.any():
            raise Stop("barrier", f"barrier {number} is waited for with {expected} threads here "
                       f"and {int(barrier.expected[partial][0])} elsewhere")  # fmt: skip
        if count is not None and batch.alive_count < batch.threads:
            here += self._absent(g)
        barrier.expected[came] = expected
        barrier.whole[came] = count is None
        barrier.arrived += here
        if contribute is not None:
            contribute(barrier)
        if (barrier.arrived > barrier.expected).any():
            raise Stop("barrier", f"more threads come to barrier {number} than it is for")
        if batch.machine.races is not None:
            batch.machine.races.arrive(batch, barrier, g.threads())
        if waits:
            barrier.parked.append(Parked(g, step, release))
        opened = came & self._is_complete(barrier)
        if opened.any():
            self._open(barrier, opened)
        if not waits:
            let_others_run(g)
            g.pc += 1
            return True
        return False

    def _absent(self, g: Group) -> Array:
        """For each block the lanes that ended, or never were, of warps that are all in a group.

        Warps are what is counted: one has come when all its lanes have that have not ended (PTX
        ISA, `barrier`: "marks warps' arrival").
        """
        batch = self.batch
        alive = np.count_nonzero(batch.alive.reshape(-1, 32), axis=1)
        absent = np.where(np.bincount(g.threads() // 32, minlength=batch.warps) == alive,
                          32 - alive, 0)  # fmt: skip
        absent[alive == 0] = 0
        found: Array = absent.reshape(batch.blocks, -1).sum(axis=1)
        return found

    def open_without_ended(self) -> None:
        """Opens the barriers that waited only for threads that have ended."""
        for barrier in self.known.values():
            opened = (barrier.arrived > 0) & self._is_complete(barrier)
            if opened.any():
                self._open(barrier, opened)

    def _is_complete(self, barrier: Barrier) -> Array:
        """In which blocks all threads have come, or ended where no number was given.

        Raises: Stop where a thread that ended passed the barrier by.
        """
        batch = self.batch
        complete: Array = barrier.arrived == barrier.expected
        if complete.all() or batch.alive_count == batch.blocks * batch.block_threads:
            return complete
        gone = batch.exists & ~batch.alive
        ended = np.bincount(batch.block_of[gone], minlength=batch.blocks)
        without = barrier.whole & (barrier.arrived + ended == barrier.expected)
        for entry in barrier.parked:
            passed = passed_by(batch, entry.group)
            if passed is not None and without.any():
                self._check_passed(barrier, entry, without, passed)
        complete |= without
        return complete

    def _check_passed(self, barrier: Barrier, entry: Parked, blocks: Array, passed: Array) -> None:
        """Raises: Stop where threads of blocks in which a group waits passed the barrier by."""
        own, threads = self.batch.block_of, entry.group.threads()
        for block in np.unique(own[threads][blocks[own[threads]]]).tolist():
            count = np.count_nonzero(passed & (own == block))
            if count:
                arrived, expected = int(barrier.arrived[block]), int(barrier.expected[block])
                stop = Stop(
                    "barrier", f"waits for {expected} threads, of which {arrived} came and {count} "
                    "went on behind the barrier and ended", int(threads[own[threads] == block][0]),
                )  # fmt: skip
                stop.instruction = entry.step.instruction
                raise stop

    def _open(self, barrier: Barrier, opened: Array) -> None:
        """Lets the threads of blocks go on whose barrier is complete."""
        batch = self.batch
        batch.machine.progress += 1
        races = batch.machine.races
        parked, barrier.parked = barrier.parked, []
        for entry in parked:
            g = entry.group
            free = opened[g.of(batch.block_of)]
            count = int(np.count_nonzero(free))
            if count < g.n:
                rest = g.split(~free, g.n - count)
                barrier.parked.append(Parked(rest, entry.step, entry.release))
                if not count:
                    continue
                g.narrow(free, count)
            if races is not None:
                races.opened(batch, barrier, g.threads())
            if entry.release is not None:
                entry.release(g)
            g.pc += 1
            batch.push(g)
        barrier.arrived[opened] = 0
        for total in barrier.totals.values():
            total[opened] = 0
        if races is not None:
            races.closed(barrier, opened)

    def why(self) -> list[tuple[Group, Step, str]]:
        """The groups that wait at barriers, where, and how many threads the barriers lack."""
        found = []
        for number, barrier in self.known.items():
            for entry in barrier.parked:
                block = self.batch.block_of[int(entry.group.threads()[0])]
                why = (f"barrier {number} waits for {barrier.expected[block]} threads, and "
                       f"{barrier.arrived[block]} came")  # fmt: skip
                found.append((entry.group, entry.step, why))
        return found
