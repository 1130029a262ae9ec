"""Happens-before: what each warp knows of the others, and how it learns it.

Barriers, releases that are acquired through the memory they were made at, and fences hand over
what a warp knows: for each other warp, up to which clock. See `races.py` for the clocks.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .arrays import EVERY, lanes_by_warp, warps_of
from .clocks import ALL, LANES, Clocks, Gathering, Known, Place, Released, join_known

if TYPE_CHECKING:
    from .barriers import Barrier
    from .machine import Batch, Group
    from .memory import Arena

Array = NDArray[Any]
Without = tuple[Array, int]
"""The clocks of a block's lanes with those left out that a warp's lanes had alone, and how many
these are."""


class HappensBefore:
    """The clocks of a launch, and what makes order between accesses."""

    def __init__(self) -> None:
        self.released: dict[Place, Released] = {}

    def clocks(self, batch: Batch) -> Clocks:
        """The clocks of a batch."""
        found = batch.state.get("clocks")
        if found is None:
            per = batch.stride // 32
            found = batch.state["clocks"] = Clocks(
                np.ones(batch.warps, np.int64), np.zeros(batch.warps, np.int64),
                np.zeros(batch.warps, np.int64), np.zeros((batch.warps, per), np.int64),
            )  # fmt: skip
            found.met[:] = 1
        assert isinstance(found, Clocks)
        return found

    def arrive(self, batch: Batch, barrier: Barrier, threads: Array) -> None:
        """Threads come to a barrier: what they know is for those that will wait there."""
        clocks = self.clocks(batch)
        per = batch.stride // 32
        if barrier.gathering is None:
            barrier.gathering = Gathering(np.zeros((batch.blocks, per), np.int64))
        gathering = barrier.gathering
        warps = warps_of(threads)
        self._share(batch, warps)
        blocks = warps // per
        np.maximum.at(gathering.clocks, blocks, clocks.knows[warps])
        np.maximum.at(gathering.clocks, (blocks, warps % per), clocks.clock[warps])
        if clocks.foreign or clocks.fenced or clocks.seen or clocks.relayed:
            for warp in warps.tolist():
                if warp in clocks.foreign:
                    join_known(gathering.foreign.setdefault(warp // per, {}), clocks.foreign[warp])
                if warp in clocks.fenced:
                    gathering.fenced.add(warp // per)
                for known in (clocks.seen.get(warp), clocks.relayed.get(warp)):
                    if known:
                        join_known(gathering.seen.setdefault(warp // per, {}), known)
        clocks.tick(warps)

    def opened(self, batch: Batch, barrier: Barrier, threads: Array) -> None:
        """Threads that waited at a barrier go on."""
        clocks, gathering = self.clocks(batch), barrier.gathering
        assert isinstance(gathering, Gathering)
        per = batch.stride // 32
        warps = warps_of(threads)
        blocks = warps // per
        clocks.knows[warps] = np.maximum(clocks.knows[warps], gathering.clocks[blocks])
        clocks.met[warps] = clocks.clock[warps]
        clocks.ticks += 1
        if gathering.foreign or gathering.fenced or gathering.seen:
            for warp in warps.tolist():
                if warp // per in gathering.foreign:
                    join_known(clocks.foreign.setdefault(warp, {}), gathering.foreign[warp // per])
                if warp // per in gathering.fenced:
                    clocks.fenced[warp] = self.knowledge(batch, warp, EVERY)
                if warp // per in gathering.seen:
                    join_known(clocks.relayed.setdefault(warp, {}), gathering.seen[warp // per])

    def closed(self, barrier: Barrier, blocks: Array) -> None:
        """A barrier of blocks begins anew."""
        if barrier.gathering is not None:
            gathering = barrier.gathering
            gathering.clocks[blocks] = 0
            for block in np.flatnonzero(blocks).tolist():
                gathering.foreign.pop(block, None)
                gathering.fenced.discard(block)
                gathering.seen.pop(block, None)

    def warp(self, batch: Batch, threads: Array) -> None:
        """Lanes met."""
        clocks = self.clocks(batch)
        warps = warps_of(threads)
        self._share(batch, warps)
        clocks.tick(warps)
        clocks.met[warps] = clocks.clock[warps]

    def together(self, batch: Batch, g: Group) -> None:
        """Lanes do something together that orders nothing."""
        clocks = self.clocks(batch)
        if clocks.alone:
            self._share(batch, warps_of(g.threads()))
        if g.sel is None:
            clocks.joined[:] = clocks.clock
        else:
            warps = warps_of(g.threads())
            clocks.joined[warps] = clocks.clock[warps]

    def _share(self, batch: Batch, warps: Array) -> None:
        """Lanes of warps do something together: what one learnt alone, the others know now."""
        clocks, per = self.clocks(batch), batch.stride // 32
        if clocks.alone:
            for warp in clocks.alone.keys() & set(warps.tolist()):
                clocks.share(warp, batch.first + warp // per)

    def fence(
        self, batch: Batch, threads: Array, narrow: bool = False, total: bool = False
    ) -> None:
        """Threads execute a fence; a `narrow` one is for their own block (`.cta`).

        A `total` one (`.sc`) also comes behind what others of the block saw before a barrier:
        such fences have one order, which causality agrees with (PTX ISA, "Fence-SC").
        """
        self._learn_seen(batch, threads, narrow)
        clocks = self.clocks(batch)
        if total and not narrow and clocks.relayed:
            for warp in warps_of(threads).tolist():
                block = batch.first + warp // (batch.stride // 32)
                clocks.learn(warp, block, clocks.relayed.pop(warp, {}))
        self.release(batch, threads, narrow)

    def acquire(
        self, batch: Batch, arena: Arena, index: Array, threads: Array, narrow: bool = False
    ) -> None:
        """Threads read with `acquire`: what was released there is known to them now."""
        self.observe(batch, arena, index, threads, narrow)
        self._learn_seen(batch, threads, narrow)

    def release(self, batch: Batch, threads: Array, narrow: bool = False) -> None:
        """Threads are about to write with `release`."""
        clocks = self.clocks(batch)
        for warp, lanes in lanes_by_warp(threads):
            known = self.knowledge(batch, warp, lanes)
            for fenced in (clocks.near_fenced,) if narrow else (clocks.near_fenced, clocks.fenced):
                made = dict(known)
                join_known(made, fenced.get(warp, {}))  # what other lanes' fences made known
                fenced[warp] = made
            clocks.tick(warp)

    def knowledge(self, batch: Batch, warp: int, lanes: Array | None = None) -> Known:
        """All that a warp knows now, accesses of its own included.

        With `lanes`, which of these alone speak: what other lanes did since they last met is not
        part of it.
        """
        clocks, per = self.clocks(batch), batch.stride // 32
        block, at = batch.first + warp // per, warp % per
        own = clocks.knows[warp].copy()
        made = {**clocks.foreign.get(warp, {}), block: own}
        if lanes is None:
            own[at] = clocks.clock[warp]
        else:
            own[at] = max(own[at], clocks.met[warp] - 1, clocks.joined[warp])
            mine = made.get(block + LANES)
            mine = np.zeros(batch.stride, np.int64) if mine is None else mine.copy()
            mine[at * 32 + lanes] = clocks.clock[warp]
            made[block + LANES] = mine
        for known in clocks.of_lanes(warp, EVERY if lanes is None else lanes):
            join_known(made, known)
        return made

    def _publish(
        self, batch: Batch, arena: Arena, index: Array, threads: Array, narrow: bool
    ) -> None:
        """Strong writes hand over what their warps knew at their last fence."""
        clocks, per = self.clocks(batch), batch.stride // 32
        if not (clocks.near_fenced or clocks.seen or clocks.relayed):
            return
        far, near = dict[int, Without](), dict[int, Without]()
        for at, thread in zip(index.tolist(), threads.tolist(), strict=True):
            warp = thread >> 5
            block = batch.first + warp // per
            for seen in () if narrow else (clocks.seen.get(warp), clocks.relayed.get(warp)):
                if seen:
                    place = self.released.setdefault((id(arena), at, ALL), Released())
                    join_known(place.relayed, seen)
                    place.version += 1
            known = None if narrow else clocks.fenced.get(warp)
            if known is not None:
                known = self._of_lane(batch, known, block, thread, far)
                self.released.setdefault((id(arena), at, ALL), Released()).add(known)
            known = clocks.near_fenced.get(warp)
            if known is not None:
                known = self._of_lane(batch, known, block, thread, near)
                self.released.setdefault((id(arena), at, block), Released()).add(known)

    def _of_lane(
        self, batch: Batch, known: Known, block: int, thread: int, without: dict[int, Without]
    ) -> Known:
        """What one lane hands over: of the fences of other lanes only those before they met.

        `without` keeps, for this instruction, what warps know without lanes' own fences.
        """
        clocks, warp = self.clocks(batch), thread >> 5
        first, mine = warp * 32 % batch.stride, known[block + LANES]
        found = without.get(warp)
        if found is None:
            met = max(int(clocks.met[warp]), int(clocks.joined[warp]) + 1)
            late = mine[first : first + 32] >= met
            base = mine.copy()
            base[first : first + 32][late] = 0
            found = without[warp] = base, int(np.count_nonzero(late))
        base, count = found
        at = first + thread % 32
        if count == int(base[at] != mine[at]):  # no other lane has a fence since
            return known
        row = base.copy()
        row[at] = mine[at]
        return {**known, block + LANES: row}

    def observe(
        self, batch: Batch, arena: Arena, index: Array, threads: Array, narrow: bool = False
    ) -> None:
        """Threads read with a strong operation, to which a later fence may give an order."""
        if not self.released:
            return
        clocks, per = self.clocks(batch), batch.stride // 32
        for at, thread in zip(index.tolist(), threads.tolist(), strict=True):
            warp = thread >> 5
            near = (id(arena), at, batch.first + warp // per)
            self._take(clocks, warp, near, clocks.near_seen)
            if not narrow:
                self._take(clocks, warp, (id(arena), at, ALL), clocks.seen)

    def _take(self, clocks: Clocks, warp: int, place: Place, into: dict[int, Known]) -> None:
        released = self.released.get(place)
        if released is None or clocks.versions.get((warp, place)) == released.version:
            return
        clocks.versions[warp, place] = released.version
        join_known(into.setdefault(warp, {}), released.known)
        if released.relayed:
            join_known(clocks.relayed.setdefault(warp, {}), released.relayed)

    def _learn_seen(self, batch: Batch, threads: Array, narrow: bool = False) -> None:
        clocks = self.clocks(batch)
        if not (clocks.seen or clocks.near_seen):
            return
        for warp in warps_of(threads).tolist():
            block = batch.first + warp // (batch.stride // 32)
            clocks.learn(warp, block, clocks.near_seen.pop(warp, {}))
            if not narrow:
                clocks.learn(warp, block, clocks.seen.pop(warp, {}))
