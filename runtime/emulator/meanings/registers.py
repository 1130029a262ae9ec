"""`setmaxnreg`: warps give registers back to their block, and wait until they get more."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx import syntax as s
from stagefuse.runtime.emulator.arrays import warps_of
from stagefuse.runtime.emulator.errors import Stop
from stagefuse.runtime.emulator.program import Code, Control, Site, Step

from . import control

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Batch, Group, Machine

Array = NDArray[Any]
FILE = 65536
"""The 32-bit registers of a multiprocessor."""
MOST = 256


class RegisterPool:
    """The registers of each warp, and those that each block has to give away."""

    def __init__(self, batch: Batch) -> None:
        self.of_warp: Array = np.full(batch.warps, at_entry(batch), np.int64)
        self.free: Array = np.zeros(batch.blocks, np.int64)
        """Registers for one thread of a warp, so that 32 of them are one here."""
        self.asked: list[list[Step]] = [[] for _ in range(batch.warps)]
        """What each warp executed."""

    @classmethod
    def of_batch(cls, batch: Batch) -> RegisterPool:
        found = batch.state.get("register_pool")
        if found is None:
            found = batch.state["register_pool"] = cls(batch)
        assert isinstance(found, RegisterPool)
        return found


def at_entry(batch: Batch) -> int:
    """The registers with which a thread starts: what the kernel says, else what ptxas takes.

    That is the most a `setmaxnreg.inc` asks for, but no more than fit for all threads of a block
    of the size that the kernel is said to be for.
    """
    code = batch.machine.entry
    said = code.function.directive("maxnreg")
    if said is not None:
        return int(said[0])
    limit = code.function.directive("reqntid") or code.function.directive("maxntid")
    threads = math.prod(map(int, limit)) if limit is not None else batch.stride
    return min(most_asked(code), FILE // threads // 8 * 8)


def most_asked(code: Code) -> int:
    """The largest number that a `setmaxnreg.inc` of the kernel asks for."""
    found = [
        step.instruction.operands[0]
        for step in code.steps
        if step.match.form.opcode == "setmaxnreg" and step.match.get("A") == "inc"
    ]
    return max((x.value for x in found if isinstance(x, s.Immediate)), default=MOST)


def check_together(batch: Batch, pool: RegisterPool, warp: int, step: Step) -> None:
    """Notes that a warp executes a step.

    Raises: Stop where another warp of its warpgroup executed another one instead (PTX ISA,
    "setmaxnreg": all of a warpgroup execute the same).
    """
    per, turn = batch.stride // 32, len(pool.asked[warp])
    first = warp // per * per + warp % per // 4 * 4
    for other in range(first, min(first + 4, warp // per * per + per)):
        theirs = pool.asked[other]
        if len(theirs) > turn and theirs[turn] is not step:
            raise Stop("barrier", "another warp of this warpgroup executed another `setmaxnreg`, "
                       f"at line {theirs[turn].instruction.line}", warp * 32)  # fmt: skip
    pool.asked[warp].append(step)


@control("registers.setmaxnreg")
def _setmaxnreg(site: Site) -> Control:
    x = site.operand("n")
    if not isinstance(x, s.Immediate) or x.value % 8 or not 24 <= x.value <= MOST:
        raise site.error(f"the number of registers is a multiple of 8 from 24 to {MOST}")
    number, grows = x.value, site.word("A") == "inc"

    def run(machine: Machine, g: Group, step: Step) -> bool:
        batch = g.batch
        if not batch.converge(g, step, None):
            return False
        pool = RegisterPool.of_batch(batch)
        blocked = np.zeros(batch.warps, np.bool_)
        for warp in warps_of(g.threads()).tolist():
            block = warp * 32 // batch.stride
            needed = number - int(pool.of_warp[warp])
            if not grows and needed > 0:
                raise Stop("barrier", f"gives back registers down to {number}, and has "
                           f"{number - needed}", warp * 32)  # fmt: skip
            if needed > pool.free[block]:
                blocked[warp] = True
                continue
            check_together(batch, pool, warp, step)
            pool.free[block] -= needed
            pool.of_warp[warp] = number
        if not grows:
            machine.progress += 1
            batch.unpark("registers.setmaxnreg")
        waits = blocked[g.threads() // 32]
        count = int(np.count_nonzero(waits))
        if count:
            batch.park(g.split(waits, count) if count < g.n else g, step)
            if count == g.n:
                return False
            g.narrow(~waits, g.n - count)
        g.pc += 1
        return True

    return run
