"""What is ordered with asynchronous work: copies and products that others do for a thread.

To the race detector, who does such work is an *agent* of its own, with a clock that counts what it
completes in order: the phases of one mbarrier, the bulk groups of one thread, the product groups
of one warpgroup. Threads learn an agent's clock where they wait for it. Here an agent is a block
beyond the grid, so that its clock travels with all that threads hand over.

Accesses of agents are made through the *async proxy*. What threads wrote before is only visible to
it behind a `fence.proxy.async` on the way (PTX ISA, "Proxies"; "proxy-preserved base causality
order"). So a warp also knows of each block up to which clock it is behind a proxy fence, as the
knowledge of another block beyond the grid. `st.async` and `red.async` need no such fence: they are
of the generic proxy (CUDA C++ programming guide, "Async thread and async proxy").
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.dsl.frozen import frozen

from .async_races import (
    async_access,
    block_ends,
    hand_over,
    hand_over_initialisations,
    is_behind,
    is_fenced,
    learn,
    stamp_of,
)
from .async_races import initialisation_fence as fence_initialisation
from .async_races import proxy_fence as fence_proxy
from .clocks import AGENTS, Known, join_known
from .errors import Stop
from .races import Races
from .region import Region

if TYPE_CHECKING:
    from .machine import Batch

Array = NDArray[Any]
Clock = Known | None


@frozen
class Agent:
    """Who does asynchronous work: a number, and how far it has come when this work is done."""

    number: int
    time: int
    clock: Clock
    """What a thread learns that waits for the work."""


_NOBODY = Agent(0, 0, None)


def _races(batch: Batch) -> Races | None:
    found = batch.machine.races
    return found


def publish(batch: Batch, threads: Array) -> Clock:
    """What these threads make known by a release: all that happened before for them."""
    races = _races(batch)
    return hand_over(races, batch, threads) if races is not None else None


def acquire(batch: Batch, threads: Array, clock: Clock) -> None:
    """Orders what these threads do next after all of a clock."""
    races = _races(batch)
    if races is not None and clock:
        learn(races, batch, threads, clock)


def publish_initialisations(batch: Batch, threads: Array) -> Clock:
    """What a relaxed arrival hands over: the barriers initialised before a fence for them."""
    races = _races(batch)
    return hand_over_initialisations(races, batch, threads) if races is not None else None


def initialisation_fence(batch: Batch, threads: Array) -> None:
    """Threads execute a `fence.mbarrier_init`."""
    races = _races(batch)
    if races is not None:
        fence_initialisation(races, batch, threads)


def origin(batch: Batch, thread: int) -> int | None:
    """A mark of what a thread does now, for `comes_behind`."""
    races = _races(batch)
    return stamp_of(races, batch, thread) if races is not None else None


def comes_behind(batch: Batch, thread: int, mark: int | None) -> bool:
    """Whether what a thread does now is ordered after what was marked."""
    races = _races(batch)
    return races is None or mark is None or is_behind(races, batch, thread, mark)


def comes_behind_fence(batch: Batch, thread: int, mark: int | None) -> bool:
    """Whether a fence for initialisations, or the async proxy, stands between the mark and what a
    thread does now."""
    races = _races(batch)
    return races is None or mark is None or is_fenced(races, batch, thread, mark)


def join(a: Clock, b: Clock) -> Clock:
    """All that either clock knows."""
    if not a or not b:
        return a or b
    made = dict(a)
    join_known(made, b)
    return made


def _agent(batch: Batch, name: tuple[Any, ...], time: int) -> Agent:
    races = _races(batch)
    if races is None:
        return _NOBODY
    number = races.agents.setdefault((batch.first, *name), len(races.agents))
    return Agent(number, time, {AGENTS + number: np.full(batch.stride // 32, time, np.int64)})


def barrier_agent(batch: Batch, index: int, serial: int, phase: int) -> Agent:
    """Who does copies whose bytes count in this phase of the mbarrier at a place.

    `serial` tells barriers apart that were at this place one after the other.
    """
    return _agent(batch, ("mbarrier", index, serial), phase + 1)


def product_agent(batch: Batch, warpgroup: int, number: int) -> Agent:
    """Who reads the operands of the products in a group of a warpgroup."""
    return _agent(batch, ("products", warpgroup), number)


class BulkGroups:
    """The bulk groups of each thread, by number from 1: which are open, read, complete."""

    def __init__(self, batch: Batch) -> None:
        self.open: Array = np.ones(batch.threads, np.int64)
        """The number of the group that copies now join."""
        self.last: Array = np.zeros(batch.threads, np.int64)
        """The last group that has copies."""
        self.read: Array = np.zeros(batch.threads, np.int64)
        """The last group whose sources are known to have been read."""

    @classmethod
    def of_batch(cls, batch: Batch) -> BulkGroups:
        found = batch.state.get("bulk_groups")
        if found is None:
            found = batch.state["bulk_groups"] = cls(batch)
        assert isinstance(found, BulkGroups)
        return found


def _bulk(batch: Batch, thread: int, number: int) -> tuple[Agent, Agent]:
    return (
        _agent(batch, ("bulk read", thread), number),
        _agent(batch, ("bulk write", thread), number),
    )


def bulk_agents(batch: Batch, thread: int) -> tuple[Agent, Agent]:
    """Who reads the source, and who writes the destination, of a copy in a thread's bulk group."""
    groups = BulkGroups.of_batch(batch)
    groups.last[thread] = groups.open[thread]
    return _bulk(batch, thread, int(groups.open[thread]))


def bulk_commit(batch: Batch, threads: Array) -> None:
    """Closes the open bulk group of some threads."""
    BulkGroups.of_batch(batch).open[threads] += 1


def bulk_wait(batch: Batch, threads: Array, pending: int, reads_only: bool) -> None:
    """Orders threads after all their bulk groups but the last `pending` closed ones."""
    groups = BulkGroups.of_batch(batch)
    upto = groups.open[threads] - 1 - pending
    groups.read[threads] = np.maximum(groups.read[threads], upto)
    for thread, number in zip(threads.tolist(), upto.tolist(), strict=True):
        if number > 0 and groups.last[thread]:
            reader, writer = _bulk(batch, thread, number)
            acquire(batch, np.array([thread]), reader.clock)
            if not reads_only:
                acquire(batch, np.array([thread]), writer.clock)


def exits(batch: Batch, threads: Array) -> None:
    """Threads end.

    Raises: Stop where others may still use the shared memory that ends with them.
    """
    groups = batch.state.get("bulk_groups")
    if groups is not None and (late := groups.last[threads] > groups.read[threads]).any():
        raise Stop("race", "ends while its bulk copies may still read shared memory: "
                   "`cp.async.bulk.wait_group` comes first", int(threads[late][0]))  # fmt: skip
    races = _races(batch)
    if races is None or (batch.machine.cluster == (1, 1, 1) and not races.agents):
        return
    left = batch.alive.copy()
    left[threads] = False
    visits = visitors(batch)
    for block in np.unique(batch.block_of[threads]).tolist():
        if not left[block * batch.stride : (block + 1) * batch.stride].any():
            marks = [mark for mark, _ in visits.get(block, {}).values()]
            block_ends(races, batch, block, marks)


def visitors(batch: Batch) -> dict[int, dict[int, tuple[int, int]]]:
    """For a block, the last use of its mbarriers by each warp of other blocks: what is remembered
    of it, and how often the warp had arrived at the barrier of the cluster by then."""
    found: dict[int, dict[int, tuple[int, int]]] = batch.state.setdefault("visitors", {})
    return found


def visit(batch: Batch, block: int, threads: Array, arrivals: Array) -> None:
    """Threads use an mbarrier of a block, which it must not end before.

    `arrivals` is how often each thread of the batch arrived at the barrier of its cluster.
    """
    for thread in threads[batch.block_of[threads] != block].tolist():
        mark = origin(batch, thread)
        if mark is not None:
            visitors(batch).setdefault(block, {})[thread // 32] = mark, int(arrivals[thread])


def visits_end(batch: Batch, threads: Array, opened: Array) -> None:
    """Threads leave the barrier of their cluster, which opened so often for each of them.

    Even where the barrier is relaxed, and hands over nothing else, visits before it are over.
    """
    if visits := visitors(batch):
        for thread in threads[np.unique(batch.block_of[threads], return_index=True)[1]].tolist():
            block, times = int(batch.block_of[thread]), int(opened[thread])
            kept = {w: m for w, m in visits.get(block, {}).items() if m[1] >= times}
            visits[block] = kept


def proxy_fence(batch: Batch, threads: Array) -> None:
    """Threads execute a `fence.proxy.async`: what they know is visible to the async proxy."""
    races = _races(batch)
    if races is not None:
        fence_proxy(races, batch, threads)


def async_read(
    batch: Batch, threads: Iterable[int], region: Region, agent: Agent, every: bool = False
) -> None:
    """An agent that threads set going reads bytes, in the order of one or of `every` thread."""
    races = _races(batch)
    if races is not None and region.index.size:
        async_access(races, batch, threads, region, (agent.number, agent.time), every=every)


def async_write(
    batch: Batch, threads: Iterable[int], region: Region, agent: Agent, atomic: bool = False,
    generic: bool = False,
) -> None:  # fmt: skip
    """An agent that threads set going writes bytes."""
    races = _races(batch)
    if races is not None and region.index.size:
        who = (agent.number, agent.time)
        async_access(
            races, batch, threads, region, who, writes=True, strong=atomic, generic=generic
        )
