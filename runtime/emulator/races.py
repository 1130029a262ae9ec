"""Races: two accesses to a byte, at least one a write, that nothing orders.

What orders accesses is *happens-before* (PTX ISA, "Memory Consistency Model"), never the order in
which the emulator happened to run them: barriers, `bar.warp.sync`, and releases that are acquired
through the memory they were made at, by fences or by instructions with an order. Strong
operations (atomic, volatile, relaxed, ...) do not race with each other.

How it is known. Each warp counts its *clock*, which goes up whenever it may hand something over.
An access is remembered in the shadow of its bytes as the thread and the warp's clock. Each warp
knows up to which clock it is behind each other warp (a vector clock, FastTrack: C. Flanagan,
S. Freund, PLDI 2009); an access whose clock is beyond that is unordered. Lanes of one warp are
ordered by the clock at which their warp last met, and where one of them releases, the clocks of
single threads are handed over, too.

A reader is remembered in two places, so of three readers and more one may be forgotten, and so it
is with strong writers: a race can be missed there, and none is made up. Writes of the value that is
already there do not count.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.dsl.frozen import frozen

from .clocks import CLOCK_BITS, LANES, THREAD_MASK, Clocks, knows
from .errors import Stop
from .happens_before import HappensBefore
from .trail import WRITES, Trail, accessor, placed
from .written import Written

if TYPE_CHECKING:
    from .granules import Granules
    from .machine import Batch
    from .memory import Arena
    from .program import Step

Array = NDArray[Any]
NEVER = 1 << 62
"""A clock that nobody comes behind."""
PENDING = np.int64((1 << 62) | (THREAD_MASK << 1))
"""The mark of bytes that a copy in the background will write: nothing is ordered with it."""


class Shadow:
    """What accesses to an arena are remembered: the last write, and up to two readers.

    Strong writes have no order among themselves, so behind them two more writes are remembered:
    the last weak one, and a strong one of another thread.
    """

    def __init__(self, size: int, granule: int) -> None:
        count = -(-size // granule) + 1
        self.granule = granule
        self.writes = np.zeros(count, np.int64)
        self.weak = np.zeros(count, np.int64)
        self.strong = np.zeros(count, np.int64)
        self.reads = np.zeros(count, np.int64)
        self.others = np.zeros(count, np.int64)
        self.was_written = self.was_read = self.has_others = self.has_behind = False
        """Whether anything is in these: most memory is only read, or only written."""
        self.written_upto = self.read_upto = 0
        """The highest clocks of what is remembered."""
        self.pending = 0
        """Granules that copies in the background will write."""

    def write(self, at: Any, records: Any, clock: int, sees: bool = False) -> None:
        """Remembers writes, at a clock or before it.

        Who `sees` what was there comes behind its last writers in the order of writes to one
        place, which all threads agree on (PTX ISA, "Coherence order").
        """
        is_strong = bool((records if np.ndim(records) == 0 else records[0]) & 1)
        if is_strong and self.was_written:
            self._keep(at, records, sees)
        self.writes[at] = records
        self.was_written = True
        self.written_upto = max(self.written_upto, clock)
        if is_strong and not sees and not isinstance(at, slice):
            lost = self.writes[at] != records
            if lost.any():  # of threads of one instruction
                self.strong[at[lost]] = records[lost] if np.ndim(records) else records
                self.has_behind = True

    def _keep(self, at: Any, records: Any, sees: bool) -> None:
        """Remembers what strong writes are about to cover."""
        old = self.writes[at]
        is_weak = (old & 1 == 0) & (old != 0)
        if is_weak.any():
            covered = pick(at, is_weak)
            self.weak[covered], self.strong[covered] = old[is_weak], 0
            self.has_behind = True
        if sees:
            self.strong[at] = 0
            return
        moved = (old & 1 == 1) & ((old ^ records) & (THREAD_MASK << 1) != 0)
        if moved.any():
            self.strong[pick(at, moved)] = old[moved]
            self.has_behind = True

    def read(self, at: Any, records: Any, clock: int, low: int = -1) -> None:
        """Remembers reads, at a clock or before it. Those of other threads go to the second
        place, but for those up to a clock that all have passed."""
        if self.was_read and self.read_upto > low:
            old = self.reads[at]
            moved = ((old ^ records) & (THREAD_MASK << 1) != 0) & (old != 0)
            if moved.any():
                self.others[pick(at, moved)] = old[moved]
                self.has_others = True
        self.reads[at] = records
        self.was_read = True
        self.read_upto = max(self.read_upto, clock)

    def written(self, at: Any, low: int = -1) -> Iterator[Array]:
        """The writes that are remembered of some granules, but for those up to a clock; behind
        weak ones is nothing."""
        if self.was_written and (self.written_upto > low or self.pending):
            yield (last := self.writes[at])
            if self.has_behind and (last & 1).any():
                yield self.weak[at]
                yield self.strong[at]

    def used(self, at: Any, low: int = -1) -> Iterator[tuple[Array, str]]:
        """The accesses that are remembered of some granules, but for those up to a clock, and
        what they did."""
        for old in self.written(at, low):
            yield old, "written"
        if self.was_read and self.read_upto > low:
            yield self.reads[at], "read"
            if self.has_others:
                yield self.others[at], "read"


class Races(HappensBefore):
    """The detector of a launch. `granules` are how many bytes are told apart."""

    def __init__(self, granules: Granules) -> None:
        super().__init__()
        self.granules = granules
        self.agents: dict[tuple[Any, ...], int] = {}
        """Numbers of the agents of asynchronous work, by what they are."""
        self.trail = Trail()

    # the state of a batch

    def shadow(self, arena: Arena) -> Shadow:
        if arena.shadow is None:
            fine = self.granules.shared if arena.name == "shared" else self.granules.globals
            arena.shadow = Shadow(arena.bytes.size, fine)
        shadow = arena.shadow
        assert isinstance(shadow, Shadow)
        return shadow

    def _records(self, batch: Batch, threads: Array, strong: bool) -> Array:
        """What is remembered of an access of threads now."""
        stamps = self._stamps(batch)
        if threads is not batch.all_threads:
            stamps = stamps[threads]
        return stamps | 1 if strong else stamps

    def _stamps(self, batch: Batch) -> Array:
        """What would be remembered of a weak access of each thread now."""
        clocks = self.clocks(batch)
        if clocks.stamped_at != clocks.ticks:
            if clocks.numbers is None:
                clocks.numbers = (batch.all_threads + (batch.first * batch.stride + 1)) << 1
                clocks.first = (batch.first + batch.block_of) * batch.stride + 1
            clocks.stamps = np.repeat(clocks.clock << CLOCK_BITS, 32) | clocks.numbers
            passed = clocks.knows.copy()
            within = np.arange(batch.warps) % passed.shape[1]
            passed[np.arange(batch.warps), within] = clocks.met - 1
            floor = passed.min(axis=1)
            clocks.floor = np.repeat(floor, 32)
            clocks.low, clocks.high = int(floor.min()), int(clocks.clock.max())
            clocks.stamped_at = clocks.ticks
        return clocks.stamps

    # accesses

    def read(
        self, batch: Batch, arena: Arena, index: Array, size: int, threads: Array, weak: bool,
        narrow: bool = False,
    ) -> None:  # fmt: skip
        """Threads read `size` bytes each. A strong access may be `narrow`: of scope `.cta`."""
        if arena.constant:
            return
        shadow = self.shadow(arena)
        now = _Now(self._records(batch, threads, not weak), threads, arena, index, narrow)
        records = now.records
        places = self._granules(shadow.granule, index, size)
        low, clock = self._settled(batch, arena), self.clocks(batch).high
        for at in places:
            for old in shadow.written(at, low):
                self._conflicts(batch, old, at, now, "read", "written")
            shadow.read(at, records, clock, low)
            if not isinstance(at, slice):
                lost = shadow.reads[at] != records
                if lost.any():
                    shadow.others[at[lost]] = records[lost]
                    shadow.has_others = True
        self.trail.note(batch, shadow, places, threads, not weak)

    def check_unchanged(self, arena: Arena, index: Array, size: int, threads: Array) -> None:
        """Raises: Stop where threads read by `ld.global.nc` what this launch wrote.

        PTX ISA, "ld.global.nc": its cache is not coherent, so nothing orders such a read after.
        """
        shadow = self.shadow(arena)
        for at in self._granules(shadow.granule, index, size) if shadow.was_written else ():
            written = shadow.writes[at] != 0
            if written.any():
                place = arena.place(int(index[written][0]))
                raise Stop("race", f"{place} is read by `ld.global.nc`, which is for what no "
                           "thread of the launch writes, and was written before",
                           int(threads[written][0]))  # fmt: skip

    def stored_together(self, batch: Batch, threads: Array) -> None:
        """Lanes store to volatile shared memory, all in one instruction."""
        stores = self._volatile_stores(batch)
        stores[threads] = stores.max() + 1

    def in_step(self, batch: Batch, arena: Arena, index: Array, size: int, threads: Array) -> None:
        """Lanes read volatile shared memory, and may rely on that lanes run in step.

        Such accesses do not race by the memory model, but nothing orders lanes of a warp (PTX ISA,
        "Independent thread scheduling"). A lane that waits for another one neither reads together
        with it nor stored together with it.
        """
        shadow, clocks = self.shadow(arena), self.clocks(batch)
        stores, reads = self._volatile_stores(batch), np.zeros(batch.threads, np.bool_)
        reads[threads] = True
        for at in self._granules(shadow.granule, index, size):
            old = shadow.writes[at]
            number = ((old >> 1) & THREAD_MASK) - 1 - batch.first * batch.stride
            found = (old != 0) & (number >> 5 == threads >> 5) & (number != threads)
            found &= old >> CLOCK_BITS >= clocks.met[threads >> 5]
            which = np.flatnonzero(found)
            writers, readers = number[which], threads[which]
            bad = reads[writers] | (stores[writers] == stores[readers])
            if bad.any():
                raise Stop("race", "a volatile place is read here and was written by lane "
                           f"{int(writers[bad][0]) % 32} of this warp, with no `bar.warp.sync` "
                           "between", int(readers[bad][0]))  # fmt: skip

    def _volatile_stores(self, batch: Batch) -> Array:
        """For each thread the number of its last store to volatile shared memory."""
        found = batch.state.get("volatile_stores")
        if found is None:
            found = batch.state["volatile_stores"] = np.zeros(batch.threads, np.int64)
        stores: Array = found
        return stores

    def write(
        self, batch: Batch, arena: Arena, index: Array, size: int, threads: Array, weak: bool,
        values: list[Array], narrow: bool = False,
    ) -> None:  # fmt: skip
        """Threads write `size` bytes each, the elements in `values`."""
        shadow = self.shadow(arena)
        now = _Now(self._records(batch, threads, not weak), threads, arena, index, narrow)
        new = Written(arena, index, values, len(threads))
        places = self._granules(shadow.granule, index, size)
        low, clock = self._settled(batch, arena), self.clocks(batch).high
        for at in places:
            for old, what in shadow.used(at, low):
                self._conflicts(batch, old, at, now, "written", what, new)
            shadow.write(at, now.records, clock)
            if not isinstance(at, slice):
                self._same_place(shadow, at, now.records, threads, new)
        self.trail.note(batch, shadow, places, threads, WRITES + (not weak))
        if not weak:
            self._publish(batch, arena, index, threads, narrow)

    def _same_place(
        self, shadow: Shadow, at: Array, records: Array, threads: Array, new: Written
    ) -> None:
        """Threads that write to one place in the same instruction, unless the same value."""
        lost = shadow.writes[at] != records
        if not lost.any():
            return
        order = np.argsort(at, kind="stable")
        twins = at[order][1:] == at[order][:-1]
        different = twins & new.differ(order[1:], order[:-1])
        if different.any():
            first = order[1:][different][0]
            raise Stop("race", "threads of one instruction write different values to one place, "
                       + new.arena.place(int(new.index[first])), int(threads[first]))  # fmt: skip

    def atomic(
        self, batch: Batch, arena: Arena, index: Array, size: int, threads: Array, order: str,
        narrow: bool = False, sees: bool = True,
    ) -> None:  # fmt: skip
        """Threads do atomic operations, with an order of "", relaxed, acquire, ...

        `sees` says that the program looks at what was there.
        """
        shadow = self.shadow(arena)
        if order in ("release", "acq_rel"):
            self.release(batch, threads, narrow)
        now = _Now(self._records(batch, threads, True), threads, arena, index, narrow)
        places = self._granules(shadow.granule, index, size)
        low, clock = self._settled(batch, arena), self.clocks(batch).high
        for at in places:
            for old, what in shadow.used(at, low):
                self._conflicts(batch, old, at, now, "written", what)
            shadow.write(at, now.records, clock, sees)
            if narrow:  # and other blocks at the same time
                far = ~self._is_near(batch, shadow.writes[at], threads)
                if far.any():
                    raise Stop("race", "threads of other blocks do atomic operations of scope "
                               "`.cta` at one place", int(threads[far][0]))  # fmt: skip
        self.trail.note(batch, shadow, places, threads, WRITES + 1)
        self._publish(batch, arena, index, threads, narrow)
        self.observe(batch, arena, index, threads, narrow)
        if order in ("acquire", "acq_rel"):
            self._learn_seen(batch, threads, narrow)

    def launched(self, batch: Batch, arena: Arena, index: Array, size: int, threads: Array) -> None:
        """Copies in the background begin, which will write these bytes at a time not known."""
        shadow = self.shadow(arena)
        now = _Now(self._records(batch, threads, False), threads, arena, index)
        places = self._granules(shadow.granule, index, size)
        low, clock = self._settled(batch, arena), self.clocks(batch).high
        for at in places:
            for old, what in shadow.used(at, low):
                self._conflicts(batch, old, at, now, "written", what)
            shadow.write(at, PENDING, clock)
            shadow.pending += len(threads)
        self.trail.note(batch, shadow, places, int(PENDING), WRITES)

    def landed(
        self, batch: Batch, arena: Arena, index: Array, size: int, threads: Array, step: Step
    ) -> None:
        """Copies of threads, begun by a step, are done, and these threads know it."""
        shadow = self.shadow(arena)
        records = self._records(batch, threads, False)
        places = self._granules(shadow.granule, index, size)
        for at in places:
            shadow.write(at, records, self.clocks(batch).high)
            shadow.pending -= len(threads)
        self.trail.note(batch, shadow, places, threads, WRITES, step)

    def _granules(self, granule: int, index: Array, size: int) -> list[Any]:
        """Positions in the shadow of accesses: one for each granule, as slices if they can be."""
        first = index // granule
        n = len(first)
        steps = range(max(-(-size // granule), 1))
        low = int(first[0])
        stride = int(first[1]) - low if n > 1 else 1
        if (
            stride > 0
            and int(first[-1]) == low + stride * (n - 1)
            and bool((first[1:] - first[:-1] == stride).all())
        ):
            return [slice(low + j, low + j + stride * (n - 1) + 1, stride) for j in steps]
        return [first + j for j in steps]

    # what is ordered

    def _settled(self, batch: Batch, arena: Arena) -> int:
        """A clock up to which accesses to an arena need no look, since all that reach it are
        behind them; of global memory, and what a cluster shares, none is known."""
        private = arena is batch.shared and batch.machine.cluster == (1, 1, 1)
        return self.clocks(batch).low if private else -1

    def _unordered(self, batch: Batch, old: Array, now: _Now) -> Array | None:
        """Which old accesses are not ordered before those that are made now."""
        records, threads = now.records, now.threads
        foreign = ((old ^ records) & (THREAD_MASK << 1) != 0) & (old != 0)
        if int(records[0]) & 1:
            apart = (old & 1) == 0
            foreign &= apart | ~self._is_near(batch, old, threads) if now.narrow else apart
        if not foreign.any():
            return None
        foreign &= ~self._is_long_ago(batch, old, threads)
        if not foreign.any():
            return None
        which = np.flatnonzero(foreign)
        before, mine = old[which], threads[which]
        clocks = self.clocks(batch)
        clock, number = before >> CLOCK_BITS, ((before >> 1) & THREAD_MASK) - 1
        their_warp = (number >> 5) - batch.first * (batch.stride // 32)
        my_warp = mine >> 5
        per = batch.stride // 32
        near = (their_warp // per == my_warp // per) & (number < THREAD_MASK - 1)
        inside = np.where(near, their_warp % per, 0)
        known = clocks.knows[my_warp, inside]
        ordered = near & np.where(
            their_warp == my_warp, clock < clocks.met[my_warp], clock <= known
        )
        for each in (32, 1) if clocks.foreign else ():
            late = np.flatnonzero(~ordered & (before != PENDING))
            if len(late):
                found = self._known_far(clocks, before[late], my_warp[late], batch.stride, each)
                ordered[late] = found
        bad = which[~ordered]
        if len(bad) and clocks.alone:
            bad = self._not_alone(clocks, batch.stride, bad, old, threads)
        return bad if len(bad) else None

    def _not_alone(
        self, clocks: Clocks, stride: int, bad: Array, old: Array, threads: Array
    ) -> Array:
        """Those of some accesses that also the thread itself did not learn of alone."""
        kept = []
        for at in bad.tolist():
            clock, number = int(old[at]) >> CLOCK_BITS, ((int(old[at]) >> 1) & THREAD_MASK) - 1
            known = clocks.of_thread(int(threads[at]))
            if old[at] == PENDING or not knows(known, number // stride, number % stride, clock):
                kept.append(at)
        return np.array(kept, np.int64)

    def _is_near(self, batch: Batch, old: Array, threads: Array) -> Array:
        """Which accesses are of the same block."""
        self._stamps(batch)
        first = self.clocks(batch).first
        if threads is not batch.all_threads:
            first = first[threads]
        within = ((old >> 1) & THREAD_MASK) - first
        near: Array = within.view(np.uint64) < np.uint64(batch.stride)
        return near

    def _is_long_ago(self, batch: Batch, old: Array, threads: Array) -> Array:
        """Accesses of the same block at a clock that all of it has passed: surely ordered."""
        near = self._is_near(batch, old, threads)
        floor = self.clocks(batch).floor
        if threads is not batch.all_threads:
            floor = floor[threads]
        near &= old >> CLOCK_BITS <= floor
        return near

    def _known_far(
        self, clocks: Clocks, before: Array, my_warp: Array, stride: int, each: int
    ) -> Array:
        """Whether accesses of other blocks are known to warps; with `each` 1, what single lanes
        made known of any block, and with 32, what whole warps did."""
        extra = LANES if each == 1 else 0
        clock, thread = before >> CLOCK_BITS, ((before >> 1) & THREAD_MASK) - 1
        block, within = thread // stride, thread % stride // each
        result = np.zeros(len(before), np.bool_)
        pairs = my_warp * (int(block.max()) + 1) + block
        order = np.argsort(pairs, kind="stable")  # those of a warp and a block side by side
        starts = np.flatnonzero(np.diff(pairs[order], prepend=-1))
        ends = [*starts[1:].tolist(), len(order)]
        firsts = order[starts]
        groups = zip(starts.tolist(), ends, my_warp[firsts].tolist(), block[firsts].tolist(),
                     strict=True)  # fmt: skip
        for start, end, warp, number in groups:
            known = clocks.foreign.get(warp, {}).get(number + extra)
            if known is not None:
                at = order[start:end]
                result[at] = clock[at] <= known[within[at]]
        return result

    def _conflicts(
        self, batch: Batch, old: Array, where: Any, now: _Now, does: str, did: str,
        values: Written | None = None,
    ) -> None:  # fmt: skip
        bad = self._unordered(batch, old, now)
        if bad is None:
            return
        if values is not None:
            bad = bad[values.changed[bad]]
            if not len(bad):
                return
        at = int(bad[0])
        granule = where.start + at * where.step if isinstance(where, slice) else int(where[at])
        stamp, shadow = int(old[at]), self.shadow(now.arena)
        step = self.trail.find(batch, shadow, stamp, WRITES * (did == "written"), granule)
        if stamp == PENDING:
            text = f"is {does} while a copy to it{placed(batch, step)} is on its way"
        else:
            text = (f"is {does} here and was {did} by {accessor(self, batch, stamp, step)}, "
                    "with nothing between that orders them")  # fmt: skip
        place = now.arena.place(int(now.index[at]))
        raise Stop("race", f"{place} {text}", int(now.threads[at]), step)


@frozen
class _Now:
    """An access that is made: its records, its threads, where it goes, whether its scope is the
    block."""

    records: Array
    threads: Array
    arena: Arena
    index: Array
    narrow: bool = False


def pick(at: Any, held: Array) -> Array:
    """The positions of `at` that are held."""
    if isinstance(at, slice):
        found: Array = np.flatnonzero(held) * (at.step or 1) + at.start
        return found
    picked: Array = at[held]
    return picked
