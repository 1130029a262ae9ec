"""What happened before what, as the families with asynchronous parts need it.

A thin layer over the race detector; without one, only groups are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

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


def bulk_agents(batch: Batch, thread: int) -> tuple[Agent, Agent]:
    """Who reads the source, and who writes the destination, of a copy in a thread's bulk group."""
    return Agent(None, None), Agent(None, None)


def bulk_commit(batch: Batch, threads: Array) -> None:
    """Closes the open bulk group of some threads."""


def bulk_wait(batch: Batch, threads: Array, pending: int, reads_only: bool) -> None:
    """Orders threads after all their bulk groups but the last `pending` closed ones."""


def async_read(batch: Batch, thread: int, arena: Arena, index: Array, agent: Agent) -> None:
    """An agent that a thread set going reads bytes."""


def async_write(
    batch: Batch, thread: int, arena: Arena, index: Array, agent: Agent, atomic: bool = False
) -> None:
    """An agent that a thread set going writes bytes."""


__all__ = [
    *("Agent", "Clock", "acquire", "async_read", "async_write", "barrier_agent", "bulk_agents"),
    *("bulk_commit", "bulk_wait", "join", "publish"),
]
del np
