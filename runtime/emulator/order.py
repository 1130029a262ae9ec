"""What happened before what, as the families with asynchronous parts need it.

A thin layer over the race detector; without one, only groups are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from .errors import Stop

if TYPE_CHECKING:
    from .machine import Batch
    from .memory import Arena

Array = NDArray[Any]
Clock = Any


@dataclass(frozen=True)
class Agent:
    """Who does an asynchronous operation, and `clock`, what its completion makes known."""

    name: Any
    clock: Clock


def publish(batch: Batch, threads: Array) -> Clock:
    """What these threads make known by a release: all that happened before for them."""
    return None


def acquire(batch: Batch, threads: Array, clock: Clock) -> None:
    """Orders what these threads do next after all of a clock."""


def join(a: Clock, b: Clock) -> Clock:
    """All that either clock knows."""
    return None


def barrier_agent(batch: Batch, thread: int, index: int, phase: int) -> Agent:
    """Who does a copy whose bytes count in this phase of the mbarrier at a place."""
    return Agent(None, None)


class BulkGroups:
    """The bulk groups of each thread, by number from 1: which are open, read, complete."""

    def __init__(self, batch: Batch) -> None:
        self.open: Array = np.ones(batch.threads, np.int64)
        """The number of the group that copies now join."""
        self.last: Array = np.zeros(batch.threads, np.int64)
        """The last group that has copies."""
        self.read: Array = np.zeros(batch.threads, np.int64)
        """The last group whose sources are known to have been read."""
        self.written: Array = np.zeros(batch.threads, np.int64)
        """The last group that is known to be complete."""

    @classmethod
    def of_batch(cls, batch: Batch) -> BulkGroups:
        found = batch.state.get("bulk_groups")
        if found is None:
            found = batch.state["bulk_groups"] = cls(batch)
        assert isinstance(found, BulkGroups)
        return found


def bulk_agents(batch: Batch, thread: int) -> tuple[Agent, Agent]:
    """Who reads the source, and who writes the destination, of a copy in a thread's bulk group."""
    groups = BulkGroups.of_batch(batch)
    groups.last[thread] = groups.open[thread]
    return Agent(None, None), Agent(None, None)


def product_agent(batch: Batch, warpgroup: int, number: int) -> Agent:
    """Who reads the operands of the products in a group of a warpgroup."""
    return Agent(None, None)


def bulk_commit(batch: Batch, threads: Array) -> None:
    """Closes the open bulk group of some threads."""
    BulkGroups.of_batch(batch).open[threads] += 1


def bulk_wait(batch: Batch, threads: Array, pending: int, reads_only: bool) -> None:
    """Orders threads after all their bulk groups but the last `pending` closed ones."""
    groups = BulkGroups.of_batch(batch)
    upto = groups.open[threads] - 1 - pending
    groups.read[threads] = np.maximum(groups.read[threads], upto)
    if not reads_only:
        groups.written[threads] = np.maximum(groups.written[threads], upto)


def exits(batch: Batch, threads: Array) -> None:
    """Threads end.

    Raises: Stop where copies of theirs may still read the shared memory that ends with them.
    """
    groups = batch.state.get("bulk_groups")
    if groups is None:
        return
    late = groups.last[threads] > groups.read[threads]
    if late.any():
        raise Stop("race", "ends while its bulk copies may still read shared memory: "
                   "`cp.async.bulk.wait_group` comes first", int(threads[late][0]))  # fmt: skip


def async_read(batch: Batch, thread: int, arena: Arena, index: Array, agent: Agent) -> None:
    """An agent that a thread set going reads bytes."""


def async_write(
    batch: Batch, thread: int, arena: Arena, index: Array, agent: Agent, atomic: bool = False
) -> None:
    """An agent that a thread set going writes bytes."""


__all__ = [
    *("Agent", "Clock", "acquire", "async_read", "async_write", "barrier_agent", "bulk_agents"),
    *("bulk_commit", "bulk_wait", "exits", "join", "product_agent", "publish"),
]
