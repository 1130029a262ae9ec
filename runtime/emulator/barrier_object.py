"""The state of an mbarrier: pending arrivals, pending bytes, phases, and the order they give.

PTX ISA, "mbarrier": a phase completes when as many arrivals as were expected have come and the
bytes that were announced have too; then the next begins, with the same number expected.

A clock is whatever the race detector uses to say what happened before; here it is only joined.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

Clock = TypeVar("Clock")

MOST_ARRIVALS = (1 << 20) - 1
MOST_BYTES = (1 << 20) - 1


class BarrierMisuse(Exception):
    """What is wrong with a use of an mbarrier, in words."""


@dataclass
class BarrierObject(Generic[Clock]):
    """One mbarrier. `completed` is the clock of all phases that are complete."""

    expected: int
    join: Callable[[Clock, Clock], Clock]
    current: Clock
    completed: Clock
    pending: int = 0
    bytes: int = 0
    phase: int = 0
    announced: int = 0
    """The phase that those who wait were last told of."""
    serial: int = 0
    """Tells apart barriers that were in one place one after the other."""
    origin: Any = None
    """Who initialised it, for whoever checks that its uses come behind that."""
    maker: int = -1
    """The thread that initialised it."""
    known_to: set[int] = field(default_factory=set)
    """Who was found to come behind that."""
    fenced_for: set[int] = field(default_factory=set)
    """Who was found to come behind a fence after that."""

    def __post_init__(self) -> None:
        if not 1 <= self.expected <= MOST_ARRIVALS:
            raise BarrierMisuse(f"a count of {self.expected}, not 1 to {MOST_ARRIVALS}")
        self.pending = self.expected

    def arrive(self, count: int, clock: Clock | None, drop: bool = False) -> int:
        """Counts arrivals, for good if `drop`; the phase that they are part of."""
        if count > self.pending:
            raise BarrierMisuse(
                f"{count} arrivals in a phase that lacks {self.pending} of {self.expected}"
            )
        phase = self.phase
        if clock is not None:
            self.current = self.join(self.current, clock)
        self.pending -= count
        if drop:
            self.expected -= count
        self._complete()
        return phase

    def expect(self, count: int) -> None:
        """Announces bytes, which the current phase then waits for."""
        self._count(count)

    def deliver(self, count: int, clock: Clock) -> None:
        """Counts bytes that have come; they may come before they are announced."""
        self.current = self.join(self.current, clock)
        self._count(-count)
        self._complete()

    def _count(self, count: int) -> None:
        if abs(self.bytes + count) > MOST_BYTES:
            raise BarrierMisuse(f"{self.bytes + count} bytes outstanding, more than {MOST_BYTES}")
        self.bytes += count

    def _complete(self) -> None:
        if self.pending == 0 and self.bytes == 0:
            self.completed = self.join(self.completed, self.current)
            self.phase += 1
            self.pending = self.expected

    def is_complete(self, parity: int) -> bool:
        """Whether the phase of that parity, the current or the one before, is complete."""
        return self.phase & 1 != parity & 1

    def has_passed(self, phase: int) -> bool:
        """Whether a phase, by the low bits that a state holds, is complete."""
        return self.phase & _PHASE_BITS != phase & _PHASE_BITS

    def state(self, phase: int, pending: int) -> int:
        """The opaque 64 bits that `arrive` gives: the phase, and what it lacked then."""
        return (phase & _PHASE_BITS) << 32 | pending


_PHASE_BITS = 0x7FFFFFFF


def phase_of(state: int) -> int:
    return state >> 32 & _PHASE_BITS


def pending_of(state: int) -> int:
    """The arrivals that the phase of a state lacked (`mbarrier.pending_count`)."""
    return state & 0xFFFFFFFF
