"""What warpgroups have outstanding: groups of wgmma, and the registers that belong to them.

`wgmma.mma_async` reads its operands and writes its accumulators at some time until the
`wgmma.wait_group` that covers it. Here the arithmetic is done when it is issued, and the registers
are marked with the number of the group; using one before the wait is a race (PTX ISA, "Async
Proxy" of wgmma). Copies by `mov` keep the mark, since compilers rename accumulators with them and
the assembler gives both names one register.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import Stop

if TYPE_CHECKING:
    from .machine import Batch, Group

Array = NDArray[Any]
THREADS = 128


class Warpgroups:
    """All warpgroups of a batch, four warps each from the start of a block."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        per_block = -(-batch.stride // THREADS)
        within = batch.all_threads % batch.stride
        self.of: Array = batch.block_of * per_block + within // THREADS
        """The warpgroup of each thread."""
        n = batch.blocks * per_block
        self.open: Array = np.ones(n, np.int64)
        """The number of the group that products now join."""
        self.done: Array = np.zeros(n, np.int64)
        """The last group that is known to be complete."""
        self.used: Array = np.zeros(n, np.bool_)
        """Whether the open group has products."""
        self.fenced: Array = np.zeros(n, np.bool_)
        """Whether a `wgmma.fence` orders the registers of the next product."""
        self.waited: Array = np.zeros(n, np.bool_)
        """Whether a group was waited for since the last fence."""
        self._marks: dict[tuple[int, int], Array] = {}
        self._operands: dict[tuple[int, int], Array] = {}

    @classmethod
    def of_batch(cls, batch: Batch) -> Warpgroups:
        """The warpgroups of a batch, made when first needed."""
        found = batch.state.get("warpgroups")
        if found is None:
            found = batch.state["warpgroups"] = cls(batch)
        assert isinstance(found, Warpgroups)
        return found

    @property
    def is_idle(self) -> bool:
        """Whether nothing is outstanding at all."""
        return not self.used.any() and bool((self.open - 1 == self.done).all())

    def _of(self, table: dict[tuple[int, int], Array], g: Group, slot: int) -> Array:
        key = (id(g.frame), slot)
        found = table.get(key)
        if found is None:
            found = table[key] = np.zeros(self.batch.threads, np.int64)
        return found

    def mark(self, g: Group, threads: Array, results: list[int], operands: list[int]) -> None:
        """Notes that the open groups write some registers and read others."""
        number = self.open[self.of[threads]]
        for slot in results:
            self._of(self._marks, g, slot)[threads] = number
        for slot in operands:
            self._of(self._operands, g, slot)[threads] = number

    def check(self, g: Group, reads: list[int], writes: list[int], names: dict[int, str]) -> None:
        """Raises: Stop where an instruction uses a register of an outstanding product."""
        threads = g.threads()
        done = self.done[self.of[threads]]
        for slot in {*reads, *writes}:
            marks = self._marks.get((id(g.frame), slot))
            if marks is not None and (late := marks[threads] > done).any():
                raise Stop("race", f"{names[slot]} is used while a wgmma that writes it is "
                           "outstanding: `wgmma.wait_group` comes first",
                           int(threads[late][0]))  # fmt: skip
        for slot in writes:
            marks = self._operands.get((id(g.frame), slot))
            if marks is not None and (late := marks[threads] > done).any():
                raise Stop("race", f"{names[slot]} is written while a wgmma that reads it is "
                           "outstanding: `wgmma.wait_group` comes first",
                           int(threads[late][0]))  # fmt: skip

    def copy(self, g: Group, source: int, target: int) -> None:
        """A `mov` between registers: the target gets the mark of the source."""
        threads = g.threads()
        marks = self._marks.get((id(g.frame), source))
        target_marks = self._marks.get((id(g.frame), target))
        if marks is not None:
            self._of(self._marks, g, target)[threads] = marks[threads]
        elif target_marks is not None:
            target_marks[threads] = 0

    def forget(self, g: Group, slots: list[int]) -> None:
        """An ordinary instruction wrote registers: they belong to no product any more.

        Behind a wait, a fence is due before the next product. Where it stands among those writes
        is open: compilers move them over it, and the assembler puts them right.
        """
        if slots:
            groups = self.of[g.threads()]
            self.fenced[groups[self.waited[groups]]] = False
        for slot in slots:
            for table in (self._marks, self._operands):
                marks = table.get((id(g.frame), slot))
                if marks is not None:
                    marks[g.threads()] = 0

    def is_marked(self, g: Group, slot: int) -> bool:
        """Whether an outstanding product writes a register of one of these threads."""
        marks = self._marks.get((id(g.frame), slot))
        if marks is None:
            return False
        threads = g.threads()
        return bool((marks[threads] > self.done[self.of[threads]]).any())

    def fence(self, groups: Array) -> None:
        """Some warpgroups execute a `wgmma.fence`."""
        self.fenced[groups], self.waited[groups] = True, False

    def commit(self, groups: Array) -> None:
        """Closes the open group of some warpgroups."""
        self.open[groups] += 1
        self.used[groups] = False

    def wait(self, groups: Array, pending: int) -> None:
        """Completes all groups but the last `pending` ones that were closed."""
        upto = self.open[groups] - 1 - pending
        self.done[groups] = np.maximum(self.done[groups], upto)
        self.waited[groups] = True
