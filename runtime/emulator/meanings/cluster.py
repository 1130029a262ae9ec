"""Clusters of blocks: addresses of each other's shared memory, their barrier, registers."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.runtime.emulator.access import peer_blocks
from stagefuse.runtime.emulator.errors import Stop
from stagefuse.runtime.emulator.memory import RANK_BITS, SHARED_WINDOW
from stagefuse.runtime.emulator.operands import getter, putter
from stagefuse.runtime.emulator.order import (
    Clock,
    acquire,
    join,
    publish,
    publish_initialisations,
    visits_end,
)
from stagefuse.runtime.emulator.program import Control, Run, Site, Step
from stagefuse.runtime.emulator.special import cluster_rank

from . import control, effect

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Batch, Group, Machine

Array = NDArray[Any]
_OFFSET = (1 << RANK_BITS) - 1


@effect("cluster.mapa")
def _mapa(site: Site) -> Run:
    kind = site.word("T")
    window = 0 if "shared::cluster" in site.match.slots else SHARED_WINDOW
    base, rank = getter(site, site.operand("a"), kind), getter(site, site.operand("b"), "u32")
    put = putter(site, site.operand("d"), kind)
    dtype = np.dtype(f"u{int(kind[1:]) // 8}")

    def run(g: Group) -> None:
        at = np.broadcast_to(base(g), g.n).astype(np.int64) - window
        ranks = np.broadcast_to(rank(g), g.n).astype(np.int64)
        peer_blocks(g.batch, g.threads(), ranks)
        put(g, ((at & _OFFSET) + (ranks + 1 << RANK_BITS) + window).astype(dtype))

    return run


@effect("cluster.getctarank")
def _getctarank(site: Site) -> Run:
    kind = site.word("T")
    window = 0 if "shared::cluster" in site.match.slots else SHARED_WINDOW
    base = getter(site, site.operand("a"), kind)
    put = putter(site, site.operand("d"), "u32")

    def run(g: Group) -> None:
        at = np.broadcast_to(base(g), g.n).astype(np.int64) - window
        batch = g.batch
        own = cluster_rank(batch, batch.first + batch.block_of[g.threads()])
        ranks = at >> RANK_BITS
        put(g, np.where(ranks > 0, ranks - 1, own).astype(np.uint32))

    return run


class ClusterBarrier:
    """The barrier of each cluster of a batch: who arrived, and how often it opened."""

    def __init__(self, batch: Batch) -> None:
        self.batch = batch
        cx, cy, cz = batch.machine.cluster
        block = batch.first + np.arange(batch.blocks)
        lowest = peer_blocks_of(batch, block)
        _, self.of_block = np.unique(lowest, return_inverse=True)
        self.of: Array = self.of_block[batch.block_of]
        """The cluster of each thread."""
        n = int(self.of_block.max()) + 1
        self.opened: Array = np.zeros(n, np.int64)
        self.arrived: Array = np.zeros(batch.threads, np.bool_)
        self.phase: Array = np.zeros(batch.threads, np.int64)
        """How often each thread arrived."""
        self.clocks: dict[int, Clock] = {}
        self.complete: dict[int, Clock] = {}

    @classmethod
    def of_batch(cls, batch: Batch) -> ClusterBarrier:
        found = batch.state.get("cluster_barrier")
        if found is None:
            found = batch.state["cluster_barrier"] = cls(batch)
        assert isinstance(found, ClusterBarrier)
        return found

    def arrive(self, threads: Array, publishes: bool) -> None:
        """Counts threads.

        Raises: Stop where one arrives again before it waited.
        """
        again = self.arrived[threads]
        if again.any():
            raise Stop("barrier", "a second barrier.cluster.arrive before the wait",
                       int(threads[again][0]))  # fmt: skip
        self.arrived[threads] = True
        self.phase[threads] += 1
        for cluster in np.unique(self.of[threads]):
            mine = threads[self.of[threads] == cluster]
            hand_over = publish if publishes else publish_initialisations
            clock = join(self.clocks.get(int(cluster)), hand_over(self.batch, mine))
            self.clocks[int(cluster)] = clock
        self.open()

    def open(self) -> None:
        """Opens the barriers whose threads have all arrived, or ended."""
        batch = self.batch
        missing = np.bincount(
            self.of[batch.alive & ~self._has_arrived()], minlength=len(self.opened)
        )
        came = np.bincount(self.of[self._has_arrived() & batch.exists], minlength=len(self.opened))
        ready = (missing == 0) & (came > 0)
        if not ready.any():
            return
        self.opened[ready] += 1
        for cluster in np.flatnonzero(ready):
            self.complete[int(cluster)] = self.clocks.pop(int(cluster), None)
        batch.machine.progress += 1
        batch.unpark("cluster.wait")

    def _has_arrived(self) -> Array:
        found: Array = self.phase > self.opened[self.of]
        return found

    def passed(self, threads: Array) -> Array:
        """Which threads' phases are complete."""
        found: Array = self.phase[threads] <= self.opened[self.of[threads]]
        return found

    def leave(self, threads: Array) -> None:
        """Lets threads go on behind the wait."""
        self.arrived[threads] = False
        visits_end(self.batch, threads, self.opened[self.of])
        for cluster in np.unique(self.of[threads]):
            acquire(self.batch, threads[self.of[threads] == cluster],
                    self.complete.get(int(cluster)))  # fmt: skip


def peer_blocks_of(batch: Batch, block: Array) -> Array:
    """A number for each block, which blocks of one cluster share."""
    cx, cy, cz = batch.machine.cluster
    gx, gy, _ = batch.machine.grid
    x, y, z = block % gx // cx, block // gx % gy // cy, block // (gx * gy) // cz
    found: Array = x + gx * (y + gy * z)
    return found


@control("cluster.arrive")
def _arrive(site: Site) -> Control:
    relaxed = site.word("R") == "relaxed"
    aligned = "aligned" in site.match.slots

    def run(machine: Machine, g: Group, step: Step) -> bool:
        if aligned and not g.batch.converge(g, step, None):
            return False
        ClusterBarrier.of_batch(g.batch).arrive(g.threads(), not relaxed)
        g.pc += 1
        return True

    return run


@control("cluster.wait")
def _wait(site: Site) -> Control:
    def run(machine: Machine, g: Group, step: Step) -> bool:
        barrier = ClusterBarrier.of_batch(g.batch)
        barrier.open()
        threads = g.threads()
        if not barrier.arrived[threads].all():
            raise Stop("barrier", "barrier.cluster.wait without an arrive before it",
                       int(threads[~barrier.arrived[threads]][0]))  # fmt: skip
        passed = barrier.passed(threads)
        count = int(np.count_nonzero(passed))
        if count < g.n:
            g.batch.park(g.split(~passed, g.n - count) if count else g, step)
            if not count:
                return False
            g.narrow(passed, count)
        barrier.leave(g.threads())
        g.pc += 1
        return True

    return run
