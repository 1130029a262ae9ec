"""What warps know of each other: vector clocks, and what of them is handed over."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Place = tuple[int, int, int]
"""A location that something was released at: its arena's identity, its byte, and the block that
may acquire it, or `ALL`."""
ALL = -1

CLOCK_BITS = 40
THREAD_MASK = (1 << (CLOCK_BITS - 1)) - 1
AGENTS = 1 << 26
"""Numbers of blocks from here on are agents of asynchronous work (`order.py`), not of the grid."""
PROXIED = 1 << 40
"""Added to a block's number: its clocks that are known behind a proxy fence."""
INITIALISED = 1 << 41
"""Added to a block's number: its clocks that a fence.mbarrier_init made known."""
LANES = 1 << 42
"""Added to any of these: clocks of single threads, where what is known of lanes differs."""

Known = dict[int, Array]
"""For blocks by their number in the grid, the clock of each of their warps that is known."""


@dataclass
class Clocks:
    """What the warps of a batch know."""

    clock: Array
    met: Array
    """The clock of each warp at which its lanes last met."""
    joined: Array
    """The clock of each warp when its lanes last did something together, such as a shuffle: no
    order between their accesses, but enough for one lane to speak for the others."""
    knows: Array
    """For each warp, the clock that it knows of each warp of its block."""
    foreign: dict[int, Known] = field(default_factory=dict)
    """For a warp, what it knows of other blocks."""
    fenced: dict[int, Known] = field(default_factory=dict)
    """For a warp, what it knew at its last fence: what its strong writes hand over."""
    near_fenced: dict[int, Known] = field(default_factory=dict)
    """The same for its own block, for which a fence of scope `.cta` is enough."""
    seen: dict[int, Known] = field(default_factory=dict)
    """For a warp, what its strong reads saw, which its next fence makes known."""
    near_seen: dict[int, Known] = field(default_factory=dict)
    relayed: dict[int, Known] = field(default_factory=dict)
    """For a warp, what others saw so before a barrier or a strong write that it read: only a
    `fence.sc` makes that known."""
    alone: dict[int, dict[int, Known]] = field(default_factory=dict)
    """For a warp and some of its threads, what these learnt and others did not, since they met."""
    versions: dict[tuple[int, Place], int] = field(default_factory=dict)
    """Which version of what was released at a place a warp has seen."""
    ticks: int = 0
    """How often any clock went up."""
    stamped_at: int = -1
    stamps: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    floor: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    """For each thread a clock up to which it is behind all warps of its block."""
    low: int = 0
    """A clock up to which all are behind all warps of their blocks."""
    high: int = 0
    """The highest clock of a warp."""
    first: Array = field(default_factory=lambda: np.zeros(0, np.int64))
    """For each thread the number of its block's first thread, as records have it."""
    numbers: Array | None = None

    def tick(self, warps: Any) -> None:
        """Lets clocks of warps go up."""
        self.clock[warps] += 1
        self.ticks += 1

    def learn(self, warp: int, block: int, known: Known) -> None:
        """All lanes of a warp of a block come behind what is known."""
        own, per = known.get(block), self.knows.shape[1]
        if own is not None:
            self.knows[warp] = np.maximum(self.knows[warp], own)
            # lanes of this warp, too, come behind what was handed over of it
            self.met[warp] = max(int(self.met[warp]), int(own[warp % per]) + 1)
        if len(known) > (own is not None):
            foreign = self.foreign.setdefault(warp, {})
            join_known(foreign, known)
            foreign.pop(block, None)

    def of_lanes(self, warp: int, lanes: Any) -> list[Known]:
        """What some lanes of a warp learnt alone."""
        found = self.alone.get(warp)
        if found is None:
            return []
        return [found[t] for t in (warp * 32 + lanes).tolist() if t in found]

    def of_thread(self, thread: int) -> Known:
        """What a thread learnt alone."""
        found = self.alone.get(thread >> 5)
        return found.get(thread, {}) if found is not None else {}

    def share(self, warp: int, block: int) -> None:
        """Lanes of a warp do something together: what one learnt alone all know now."""
        for known in self.alone.pop(warp, {}).values():
            self.learn(warp, block, known)


@dataclass
class Released:
    """What was handed over at a place, and how often."""

    known: Known = field(default_factory=dict)
    relayed: Known = field(default_factory=dict)
    """What writers there had seen only, or others of their block."""
    version: int = 0

    def add(self, known: Known) -> None:
        join_known(self.known, known)
        self.version += 1


@dataclass
class Gathering:
    """What those that came to a barrier bring, by block of the batch."""

    clocks: Array
    foreign: dict[int, Known] = field(default_factory=dict)
    fenced: set[int] = field(default_factory=set)
    seen: dict[int, Known] = field(default_factory=dict)


def join_known(into: Known, other: Known) -> None:
    """Adds what else is known. Clocks that are known are never changed in place, so that those
    which travel from thread to thread stay the same arrays, and joining them again costs little."""
    if not into:
        into.update(other)
        return
    for block, known in other.items():
        mine = into.get(block)
        if mine is None:
            into[block] = known
        elif mine is not known:
            into[block] = np.maximum(mine, known)


def knows(known: Known, block: int, within: Any, clock: Any) -> Any:
    """Whether what a thread of a block did at a clock is known, of its warp or of itself; of
    several threads and clocks for each."""
    warps, lanes = known.get(block), known.get(block + LANES)
    return (warps is not None and clock <= warps[within >> 5]) | (
        lanes is not None and clock <= lanes[within]
    )
