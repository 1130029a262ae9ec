"""The race detector's part for asynchronous work (what an agent is: `order.py`)."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .arrays import lanes_by_warp
from .clocks import (
    AGENTS,
    CLOCK_BITS,
    INITIALISED,
    LANES,
    PROXIED,
    THREAD_MASK,
    Clocks,
    Known,
    join_known,
    knows,
)
from .errors import Stop
from .races import NEVER, PENDING, Races
from .trail import WRITES, accessor

if TYPE_CHECKING:
    from .machine import Batch
    from .region import Region

Array = NDArray[Any]


def hand_over(races: Races, batch: Batch, threads: Array) -> Known:
    """What these threads know now, for others; what they do next is not part of it."""
    made: Known = {}
    clocks = races.clocks(batch)
    for warp, lanes in _speakers(batch, threads):
        join_known(made, races.knowledge(batch, warp, lanes))
        clocks.tick(warp)
    return made


def _speakers(batch: Batch, threads: Array) -> Iterator[tuple[int, Array | None]]:
    """Each warp of threads, and which of its lanes are among them: `None` where all are."""
    for warp, lanes in lanes_by_warp(threads):
        whole = len(lanes) == min(32, batch.block_threads - warp * 32 % batch.stride)
        yield warp, None if whole else lanes


def learn(races: Races, batch: Batch, threads: Array, known: Known) -> None:
    """These threads come behind all of what was handed over; other lanes of their warps do once
    they do something together."""
    clocks, per = races.clocks(batch), batch.stride // 32
    for warp, lanes in lanes_by_warp(threads):
        alive = np.count_nonzero(batch.alive[warp * 32 : warp * 32 + 32])
        if len(lanes) >= alive:
            clocks.learn(warp, batch.first + warp // per, known)
            continue
        alone = clocks.alone.setdefault(warp, {})
        for thread in (warp * 32 + lanes).tolist():
            join_known(alone.setdefault(thread, {}), known)


def stamp_of(races: Races, batch: Batch, thread: int) -> int:
    """What is remembered of something that a thread does now."""
    clock = int(races.clocks(batch).clock[thread >> 5])
    return (clock << CLOCK_BITS) | (batch.first * batch.stride + thread + 1) << 1


def is_behind(races: Races, batch: Batch, thread: int, stamp: int) -> bool:
    """Whether what a thread does now comes behind the initialisation that was remembered."""
    clock, number = stamp >> CLOCK_BITS, ((stamp >> 1) & THREAD_MASK) - 1
    block, within = number // batch.stride, number % batch.stride
    if _comes_before(races, batch, thread, block, within, clock):
        return True
    return bool(_is_known(races.clocks(batch), thread, block + INITIALISED, within, clock))


def is_fenced(races: Races, batch: Batch, thread: int, stamp: int) -> bool:
    """Whether a thread comes behind a fence that made what was remembered known to other proxies:
    one for initialisations, or for the async proxy."""
    clock, number = stamp >> CLOCK_BITS, ((stamp >> 1) & THREAD_MASK) - 1
    block, within = number // batch.stride, number % batch.stride
    clocks = races.clocks(batch)
    return any(_is_known(clocks, thread, block + key, within, clock)
               for key in (INITIALISED, PROXIED))  # fmt: skip


def _is_known(clocks: Clocks, thread: int, block: int, within: Any, clock: Any) -> Any:
    """Whether a thread knows what threads of another block, or an agent, did at clocks."""
    found = knows(clocks.foreign.get(thread >> 5, {}), block, within, clock)
    if thread >> 5 in clocks.alone:
        found = found | knows(clocks.of_thread(thread), block, within, clock)
    return found


def initialisation_fence(races: Races, batch: Batch, threads: Array) -> None:
    """What these threads know is known to all that a relaxed cluster barrier orders later."""
    _also_known_as(races, batch, threads, INITIALISED)


def hand_over_initialisations(races: Races, batch: Batch, threads: Array) -> Known:
    """What `initialisation_fence` said of these threads, for others."""
    made: Known = {}
    clocks = races.clocks(batch)
    for warp, lanes in lanes_by_warp(threads):
        for known in (clocks.foreign.get(warp, {}), *clocks.of_lanes(warp, lanes)):
            join_known(made, {b: k for b, k in known.items() if b & INITIALISED})
    return made


def proxy_fence(races: Races, batch: Batch, threads: Array) -> None:
    """What these threads know becomes visible to the async proxy."""
    _also_known_as(races, batch, threads, PROXIED)


def _also_known_as(races: Races, batch: Batch, threads: Array, key: int) -> None:
    clocks = races.clocks(batch)
    for warp, lanes in _speakers(batch, threads):
        known = races.knowledge(batch, warp, lanes)
        foreign = clocks.foreign.setdefault(warp, {})
        join_known(foreign, {b + key: k for b, k in known.items() if b & ~LANES < AGENTS})
        clocks.tick(warp)


def async_access(
    races: Races, batch: Batch, threads: Iterable[int], region: Region, agent: tuple[int, int], *,
    writes: bool = False, strong: bool = False, every: bool = False, generic: bool = False,
) -> None:  # fmt: skip
    """An agent, by its number and time, accesses a region for the threads that set it going.

    Raises: Stop where an access before is not ordered before that in the program of any of them,
    or with `every` of each of them; an ordinary write must be behind a proxy fence, too, unless
    the access is `generic`, in the proxy of ordinary ones.
    """
    shadow = races.shadow(region.arena)
    at = region.granules(shadow.granule)
    number, time = agent
    record = (time << CLOCK_BITS) | ((AGENTS + number) * batch.stride + 1) << 1 | int(strong)
    who = [[thread] for thread in threads] if every else [list(threads)]

    for old in shadow.written(at):
        _check(races, batch, who, old, record, "written", writes, region, generic)
    if writes:
        _check(races, batch, who, shadow.reads[at], record, "read", True, region)
        _check(races, batch, who, shadow.others[at], record, "read", True, region)
        shadow.write(at, record, NEVER)
    else:
        shadow.read(at, record, NEVER)
    races.trail.note(batch, shadow, [at], record, WRITES * writes + strong)


def block_ends(races: Races, batch: Batch, block: int, visits: Iterable[int]) -> None:
    """The last threads of a block end, and its shared memory with them.

    `visits` are what is remembered of other blocks' use of its mbarriers.
    Raises: Stop where another block or an asynchronous copy used that memory, with nothing that
    orders this before.
    """
    warps = range(block * (batch.stride // 32), (block + 1) * (batch.stride // 32))
    threads = [warp * 32 for warp in warps]
    for warp in warps if races.clocks(batch).alone else ():
        races.clocks(batch).share(warp, batch.first + block)
    stamps = np.array([*_strangers(batch, block), *visits], np.int64)
    late = ~_ordered(races, batch, threads, stamps)
    if late.any():
        stamp, shadow = int(stamps[late][0]), races.shadow(batch.shared)
        find = races.trail.find
        step = find(batch, shadow, stamp, WRITES) or find(batch, shadow, stamp, 0)
        who = accessor(races, batch, stamp, step)
        raise Stop("race", f"the block ends and with it shared memory that {who} used, with "
                   "nothing between that orders them", threads[0], step)  # fmt: skip


def _strangers(batch: Batch, block: int) -> set[int]:
    """What is remembered in a block's shared memory of accesses by others than its threads."""
    arena, shadow = batch.shared, batch.shared.shadow
    if shadow is None:
        return set()
    first, last = (n * arena.stride // shadow.granule for n in (block, block + 1))
    found: set[int] = set()
    held = (shadow.writes, shadow.weak, shadow.strong, shadow.reads, shadow.others)
    for remembered in held:
        old = remembered[first:last]
        within = ((old >> 1) & THREAD_MASK) - 1 - (batch.first + block) * batch.stride
        far = old[(within.view(np.uint64) >= np.uint64(batch.stride)) & (old != 0)]
        found.update(far[np.flatnonzero(np.diff(far, prepend=0))].tolist())
    return found - {int(PENDING)}


def _check(
    races: Races, batch: Batch, groups: list[list[int]], old: Array, record: int, what: str,
    writes: bool, region: Region, generic: bool = False,
) -> None:  # fmt: skip
    """`old` are accesses that were made to the granules of a region.

    Raises: Stop where one is unordered for all threads of one of the groups.
    """
    first, stamps = int(old[0]), old[:1]
    if (old != first).any():
        stamps = old[(old != 0) & (old != record) & (old & record & 1 == 0)]
    elif first in (0, record) or first & record & 1:
        return
    if not len(stamps):
        return
    is_write, parts = what == "written" and not generic, _by_block(stamps, batch.stride)
    behind: set[tuple[int, ...]] = batch.state.setdefault("behind", set())
    single = int(stamps[0]) if len(stamps) == 1 else 0
    for threads in groups:
        key = (is_write, single, *threads)
        if single and key in behind:
            continue
        late = ~_ordered(races, batch, threads, stamps, parts, proxied=is_write)
        if not late.any():
            behind.add(key)  # and always will be
            continue
        bad = stamps[late][:1]
        fence = is_write and _ordered(races, batch, threads, bad).all()
        missing = "no `fence.proxy.async`" if fence else "nothing"
        shadow, stamp = races.shadow(region.arena), int(bad[0])
        granule = int(region.granules(shadow.granule)[np.flatnonzero(old == bad)[0]])
        where = region.arena.place(granule * shadow.granule)
        step = races.trail.find(batch, shadow, stamp, WRITES * (what == "written"), granule)
        text = (f"{where} is {'written' if writes else 'read'} by an asynchronous copy or product "
                f"and was {what} by {accessor(races, batch, stamp, step)}, with {missing} between "
                "that orders them")  # fmt: skip
        raise Stop("race", text, threads[0], step)


def _ordered(
    races: Races, batch: Batch, threads: list[int], stamps: Array,
    parts: list[_Part] | None = None, proxied: bool = False,
) -> Array:  # fmt: skip
    """Which accesses before are ordered before what any of some threads sets going now.

    With `proxied` writes of threads must be behind a proxy fence, too. `parts` are the accesses
    by block, where these are known.
    """
    found = np.zeros(len(stamps), np.bool_)
    for block, at, within, clock in parts or _by_block(stamps, batch.stride):
        fenced = proxied and block < AGENTS
        for thread in threads:
            if fenced:
                known = _is_known(races.clocks(batch), thread, block + PROXIED, within, clock)
            else:
                known = _comes_before(races, batch, thread, block, within, clock)
            found[at] |= known
    return found


_Part = tuple[int, Any, Any, Any]
"""A block, which of some accesses it made, their threads in it, their clocks."""


def _by_block(stamps: Array, stride: int) -> list[_Part]:
    """Accesses by the block that made them; of one access numbers, which are quicker."""
    if len(stamps) == 1:
        stamp = int(stamps[0])
        first, inside = divmod(((stamp >> 1) & THREAD_MASK) - 1, stride)
        return [(first, 0, inside, stamp >> CLOCK_BITS)]
    clock, number = stamps >> CLOCK_BITS, ((stamps >> 1) & THREAD_MASK) - 1
    blocks: Array = number // stride
    within = number - blocks * stride
    found = set(blocks.tolist())
    if len(found) == 1:
        return [(found.pop(), slice(None), within, clock)]
    return [(block, at, within[at], clock[at]) for block in found for at in [blocks == block]]


def _comes_before(
    races: Races, batch: Batch, thread: int, block: int, within: Any, clock: Any
) -> Any:
    """Whether what threads of a block did at clocks comes before what a thread does now."""
    clocks, per, warp = races.clocks(batch), batch.stride // 32, thread >> 5
    known = _is_known(clocks, thread, block, within, clock)
    if block == batch.first + warp // per:
        known = known | (within == thread % batch.stride)
        known = known | (clock <= clocks.knows[warp, within >> 5])
        known = known | ((within >> 5 == warp % per) & (clock < clocks.met[warp]))
    return known
