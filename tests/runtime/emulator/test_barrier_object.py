"""The phases of an mbarrier."""

import numpy as np
import pytest

from stagefuse.runtime.emulator.barrier_object import (
    BarrierMisuse,
    BarrierObject,
    pending_of,
    phase_of,
)


def barrier(count: int) -> BarrierObject[frozenset[str]]:
    return BarrierObject(count, frozenset.union, frozenset(), frozenset())


def test_arrivals_complete_a_phase_and_carry_order() -> None:
    b = barrier(2)
    assert b.is_complete(1) and not b.is_complete(0)  # the phase before the first is complete
    b.arrive(1, frozenset("x"))
    assert not b.is_complete(0) and b.completed == frozenset()
    b.arrive(1, frozenset("y"))
    assert b.is_complete(0) and b.completed == frozenset("xy") and b.pending == 2


def test_bytes_may_come_before_they_are_expected() -> None:
    b = barrier(1)
    b.deliver(64, frozenset({"copy"}))
    assert not b.is_complete(0)
    b.expect(64)
    b.arrive(1, frozenset())
    assert b.is_complete(0) and "copy" in b.completed


def test_phase_waits_for_bytes() -> None:
    b = barrier(1)
    b.expect(96)
    b.arrive(1, frozenset())
    b.deliver(64, frozenset())
    assert not b.is_complete(0)
    b.deliver(32, frozenset())
    assert b.is_complete(0)


def test_arrivals_that_leave_for_good() -> None:
    b = barrier(3)
    b.arrive(1, None, drop=True)
    b.arrive(2, None)
    assert b.phase == 1 and b.expected == b.pending == 2


def test_too_many_arrivals() -> None:
    with pytest.raises(BarrierMisuse, match="2 arrivals in a phase that lacks 1 of 1"):
        barrier(1).arrive(2, None)
    with pytest.raises(BarrierMisuse, match="count of 0"):
        barrier(0)


def test_state_holds_phase_and_count(rng: np.random.Generator) -> None:
    b = barrier(5)
    phase, pending = (int(v) for v in rng.integers(0, 2**20, 2))
    state = b.state(phase, pending)
    assert (phase_of(state), pending_of(state)) == (phase, pending)
    assert not b.has_passed(0) and b.has_passed(1)
