"""Who made an access that a race is with: its thread, and where the program made it.

The race detector remembers of an access its thread and a clock. The instructions behind the last
accesses are kept here beside it, so that a message can name both sides; of older ones only the
thread is known.
"""

from __future__ import annotations

from collections import deque
from typing import TYPE_CHECKING, Any

import numpy as np

from .clocks import AGENTS, CLOCK_BITS, THREAD_MASK
from .errors import shortened

if TYPE_CHECKING:
    from .machine import Batch
    from .program import Step
    from .races import Races, Shadow

WRITES = 2
LARGE = 1 << 12
"""Threads of a batch from which on lists of places are not kept: they would not stay in a cache."""
MOST_THREADS = 1 << 17
"""Threads whose accesses are kept, about: where batches are small, those of more instructions."""


class Trail:
    """The last accesses: by whom and where to, and their instructions."""

    def __init__(self) -> None:
        self._last: deque[tuple[Shadow, list[Any], Any, int, int, Step]] | None = None

    def note(
        self, batch: Batch, shadow: Shadow, places: list[Any], who: Any, kind: int,
        step: Step | None = None,
    ) -> None:  # fmt: skip
        """An instruction accesses granules, `places` of a shadow.

        `who` are threads of the batch, or what is remembered of another agent. `kind` is a sum of
        `WRITES` and of 1 for a strong access.
        """
        if self._last is None:
            most = min(max(MOST_THREADS // batch.threads, 4), 1024)
            self._last = deque(maxlen=most)
        if batch.threads <= LARGE or isinstance(places[0], slice):
            self._last.append((shadow, places, who, kind, batch.first, step or batch.at))

    def find(
        self, batch: Batch, shadow: Shadow, stamp: int, kind: int, granule: int | None = None
    ) -> Step | None:
        """The instruction behind what is remembered of a granule, or of any, where it is kept."""
        if self._last is None:
            return None
        kind |= stamp & 1
        number = ((stamp >> 1) & THREAD_MASK) - 1
        for of, places, who, was, first, step in reversed(self._last):
            if of is not shadow or was != kind:
                continue
            mine = who == (stamp if isinstance(who, int) else number - first * batch.stride)
            if np.any(mine) and (
                granule is None or any(np.any(mine & _is_at(at, granule)) for at in places)
            ):
                found: Step = step
                return found
        return None


def _is_at(at: Any, granule: int) -> Any:
    """Which positions of an access are at a granule."""
    if isinstance(at, slice):
        at = np.arange(at.start, at.stop, at.step)
    return at == granule


def accessor(races: Races, batch: Batch, stamp: int, step: Step | None) -> str:
    """Who made the access that is remembered as `stamp`, in words, and at which instruction."""
    clock, number = stamp >> CLOCK_BITS, ((stamp >> 1) & THREAD_MASK) - 1
    block = number // batch.stride
    if block < AGENTS:
        at, thread = batch.position(number - batch.first * batch.stride)
        return f"block {at} thread {thread}{placed(batch, step)}"
    names = {n: name for name, n in races.agents.items()}
    _, kind, *rest = names.get(block - AGENTS, (0, "cp.async"))
    if kind == "mbarrier":
        kind += _phase(batch, rest[0], rest[1], clock - 1)
    return f"an asynchronous copy or product ({kind}){placed(batch, step)}"


def placed(batch: Batch, step: Step | None) -> str:
    """The place of an instruction in words, "" where it is not known."""
    if step is None:
        return ""
    loc = step.instruction.loc
    line = f", {batch.machine.program.module.file(loc.file)}:{loc.line}" if loc else ""
    return f" in `{shortened(str(step))}` (PTX line {step.instruction.line}{line})"


def _phase(batch: Batch, index: int, serial: int, phase: int) -> str:
    """Which phase of an mbarrier a copy counts in, and what its bytes then say of it."""
    found = batch.state["mbarriers"].get(index)
    text = f" at {index % batch.shared.stride:#x}, phase {phase}"
    if found is None or found.serial != serial or found.bytes >= 0:
        return text
    return f"{text}, where {-found.bytes} bytes more came than are expected"
