"""Barriers that live in shared memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.runtime.emulator.access import places
from stagefuse.runtime.emulator.barrier_object import (
    BarrierMisuse,
    BarrierObject,
    pending_of,
    phase_of,
)
from stagefuse.runtime.emulator.errors import Stop
from stagefuse.runtime.emulator.operands import Get, address, getter, putter
from stagefuse.runtime.emulator.order import (
    Clock,
    acquire,
    comes_behind,
    comes_behind_fence,
    initialisation_fence,
    join,
    origin,
    proxy_fence,
    publish,
    visit,
)
from stagefuse.runtime.emulator.program import Control, Run, Site, Step
from stagefuse.runtime.emulator.turns import let_others_run

from . import control, effect
from .cluster import ClusterBarrier
from .copies import copies_of

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Batch, Group, Machine

Array = NDArray[Any]
Object = BarrierObject[Clock]


def space_of(site: Site, default: str = "") -> str:
    """The state space that a form names, "" for a generic address."""
    return site.word("S", default)


def objects(batch: Batch) -> dict[int, Object]:
    """The barriers of a batch, by their place in its shared memory."""
    found: dict[int, Object] = batch.state.setdefault("mbarriers", {})
    return found


def located(g: Group, space: str, addresses: Array) -> Iterator[tuple[int, Array, Array]]:
    """Each barrier that threads name: its place, the threads, their positions in the group.

    Raises: Stop where an address is not in shared memory, or misaligned.
    """
    threads = g.threads()
    for part in places(g, space, addresses, 8, threads):
        if part.space != "shared":
            raise Stop("out-of-bounds", "an mbarrier lies in shared memory", int(part.threads[0]))
        where = np.arange(g.n) if part.where is None else part.where
        first = int(part.index[0])
        if (part.index == first).all():
            yield first, part.threads, where
            continue
        for index in np.unique(part.index):
            mine = part.index == index
            yield int(index), part.threads[mine], where[mine]


def offset_of(batch: Batch, index: int) -> int:
    """Where a place of a batch's shared memory lies in its block's."""
    return index % batch.shared.stride if batch.shared.stride else index


def find(batch: Batch, index: int, threads: Array | int) -> Object:
    """The barrier at a place, for threads that use it.

    Raises: Stop where none was initialised, or nothing orders that before.
    """
    who = np.atleast_1d(np.asarray(threads))
    found = objects(batch).get(index)
    if found is None:
        raise Stop("uninitialised", f"no mbarrier was initialised at {offset_of(batch, index):#x} "
                   "of shared memory", int(who[0]))  # fmt: skip
    others = who[who != found.maker]  # who made it may use it at once, and no other lane
    for thread in others if len(others) < 2 else others[np.diff(others // 32, prepend=-1) > 0]:
        if int(thread) // 32 in found.known_to:
            continue
        if not comes_behind(batch, int(thread), found.origin):
            raise Stop("race", "an mbarrier is used with nothing that orders this after its "
                       "initialisation", int(thread))  # fmt: skip
        found.known_to.add(int(thread) // 32)
    return found


def counted_from(batch: Batch, index: int, barrier: Object, thread: int) -> None:
    """A thread's copy counts on a barrier, by the async proxy.

    For copies of its own block a barrier of the block is taken to be enough, since Triton and
    libcu++ put nothing else there.
    Raises: Stop where a copy of another block does, and no fence made the barrier known to it.
    """
    if index // batch.shared.stride == batch.block_of[thread] or thread // 32 in barrier.fenced_for:
        return
    if not comes_behind_fence(batch, thread, barrier.origin):
        raise Stop("race", "an asynchronous copy of another block counts on an mbarrier, with no "
                   "`fence.mbarrier_init` or `fence.proxy.async` since its initialisation",
                   thread)  # fmt: skip
    barrier.fenced_for.add(thread // 32)


@contextmanager
def using(thread: int) -> Iterator[None]:
    """What may be a wrong use of a barrier is a fault of the thread."""
    try:
        yield
    except BarrierMisuse as misuse:
        raise Stop("barrier", f"mbarrier: {misuse}", thread) from None


def advanced(batch: Batch, barrier: Object) -> None:
    """After a change of a barrier, lets those look again who wait for a phase to complete.

    Where one is, they run before who completed it goes on.
    """
    batch.machine.progress += 1
    batch.unpark("mbarrier.try_wait", "mbarrier.try_wait_parity")
    if barrier.phase != barrier.announced:
        barrier.announced = barrier.phase
        let_others_run(batch.running)


@effect("mbarrier.init")
def _init(site: Site) -> Run:
    where, count, space = address(site, "a"), getter(site, site.operand("n"), "u32"), space_of(site)

    def run(g: Group) -> None:
        counts = np.broadcast_to(count(g), g.n)
        batch = g.batch
        batch.state.setdefault("serials", [])
        for index, threads, at in located(g, space, where(g)):
            n, thread = int(counts[at[0]]), int(threads[0])
            if index in objects(batch) or len(threads) > 1:
                raise Stop("barrier", f"the mbarrier at {offset_of(batch, index):#x} of shared "
                           "memory is initialised again, with no `mbarrier.inval` before",
                           int(threads[-1]))  # fmt: skip
            batch.shared.hold(index, True)
            mark = origin(batch, thread)
            clock = publish(batch, threads)
            with using(thread):
                made = BarrierObject(n, join, clock, clock, serial=len(batch.state["serials"]))
            batch.state["serials"].append(index)
            made.origin, made.maker = mark, thread
            objects(batch)[index] = made
        batch.machine.progress += 1

    return run


@effect("mbarrier.inval")
def _inval(site: Site) -> Run:
    where, space = address(site, "a"), space_of(site)

    def run(g: Group) -> None:
        for index, threads, _ in located(g, space, where(g)):
            find(g.batch, index, threads)
            del objects(g.batch)[index]
            g.batch.shared.hold(index, False)

    return run


def _arrival(site: Site, drop: bool, expects: bool) -> Run:
    """Arrivals of each thread, one or `n`, perhaps with bytes that are announced first."""
    where, space = address(site, "a"), space_of(site)
    number = getter(site, site.operand("n"), "u32") if site.has("n") else None
    put = putter(site, site.operand(_result(site)), "b64")
    relaxed = site.word("R") == "relaxed"

    def run(g: Group) -> None:
        batch = g.batch
        given = np.broadcast_to(number(g), g.n) if number is not None else np.ones(g.n, np.uint32)
        states = np.zeros(g.n, np.uint64)
        for index, threads, at in located(g, space, where(g)):
            thread = int(threads[0])
            barrier = find(batch, index, threads)
            if not relaxed and batch.machine.cluster != (1, 1, 1):
                visit(batch, index // batch.shared.stride, threads,
                      ClusterBarrier.of_batch(batch).phase)
            clock = None if relaxed else publish(batch, threads)
            total = int(given[at].astype(np.int64).sum())
            if expects:
                with using(thread):
                    barrier.expect(total)
                total = len(at)
            states[at] = barrier.state(barrier.phase, barrier.pending)
            while total:
                some = min(total, barrier.pending) or total
                with using(thread):
                    barrier.arrive(some, clock, drop)
                total -= some
            advanced(batch, barrier)
        put(g, states)

    return run


def _result(site: Site) -> str:
    return next(spec.name for spec in site.match.form.specs if spec.is_result)


@effect("mbarrier.arrive")
def _arrive(site: Site) -> Run:
    return _arrival(site, False, False)


@effect("mbarrier.arrive_expect_tx")
def _arrive_expect(site: Site) -> Run:
    return _arrival(site, False, True)


@effect("mbarrier.arrive_drop")
def _drop(site: Site) -> Run:
    return _arrival(site, True, False)


@effect("mbarrier.arrive_drop_expect_tx")
def _drop_expect(site: Site) -> Run:
    return _arrival(site, True, True)


def _bytes(site: Site, change: Callable[[Batch, Object, int, Array], None]) -> Run:
    where, space = address(site, "a"), space_of(site)
    number = getter(site, site.operand("n"), "u32")

    def run(g: Group) -> None:
        given = np.broadcast_to(number(g), g.n)
        for index, threads, at in located(g, space, where(g)):
            thread = int(threads[0])
            barrier, total = find(g.batch, index, threads), int(given[at].astype(np.int64).sum())
            with using(thread):
                change(g.batch, barrier, total, threads)
            advanced(g.batch, barrier)

    return run


@effect("mbarrier.expect_tx")
def _expect(site: Site) -> Run:
    return _bytes(site, lambda batch, barrier, n, threads: barrier.expect(n))


@effect("mbarrier.complete_tx")
def _complete(site: Site) -> Run:
    return _bytes(
        site, lambda batch, barrier, n, threads: barrier.deliver(n, publish(batch, threads))
    )


def _ask(site: Site, parity: bool) -> Callable[[Group], Array]:
    """A function that says for which threads the phase they ask for is complete."""
    where, space = address(site, "a"), space_of(site)
    phase: Get = getter(site, site.operand("b"), "u32" if parity else "b64")
    relaxed = site.word("A") == "relaxed"

    def ask(g: Group) -> Array:
        asked = np.broadcast_to(phase(g), g.n)
        found = np.zeros(g.n, np.bool_)
        for index, threads, at in located(g, space, where(g)):
            barrier = find(g.batch, index, threads)
            if parity:
                complete = (asked[at] & 1) != (barrier.phase & 1)
            else:
                complete = np.array([barrier.has_passed(phase_of(int(x))) for x in asked[at]])
            found[at] = complete
            if complete.any() and not relaxed:
                acquire(g.batch, threads[complete], barrier.completed)
        return found

    return ask


def _test(site: Site, parity: bool) -> Run:
    ask, put = _ask(site, parity), putter(site, site.operand("p"), "pred")

    def run(g: Group) -> None:
        found = ask(g)
        if not found.all():
            g.look(g.threads())
        put(g, found)

    return run


@effect("mbarrier.test_wait")
def _test_state(site: Site) -> Run:
    return _test(site, False)


@effect("mbarrier.test_wait_parity")
def _test_parity(site: Site) -> Run:
    return _test(site, True)


def _why(site: Site, parity: bool) -> Callable[[Group], str]:
    """A function that says what the threads of a group wait for."""
    where, space = address(site, "a"), space_of(site)
    phase: Get = getter(site, site.operand("b"), "u32" if parity else "b64")

    def why(g: Group) -> str:
        index, threads, at = next(iter(located(g, space, where(g))))
        barrier, asked = find(g.batch, index, threads), np.broadcast_to(phase(g), g.n)
        number = int(asked[at[0]]) & 1 if parity else phase_of(int(asked[at[0]]))
        left = f"and {barrier.bytes} bytes"
        if barrier.bytes < 0:
            left = f"and got {-barrier.bytes} bytes that none announced"
        return (
            f"waits for phase {'of parity ' if parity else ''}{number} of the mbarrier at "
            f"{offset_of(g.batch, index):#x}, which is in phase {barrier.phase} and lacks "
            f"{barrier.pending} of {barrier.expected} arrivals {left}"
        )

    return why


def _try(site: Site, parity: bool) -> Control:
    """Threads wait until the phase is complete: how long at most is for the implementation."""
    ask, put = _ask(site, parity), putter(site, site.operand("p"), "pred")
    why = _why(site, parity)

    def run(machine: Machine, g: Group, step: Step) -> bool:
        g.batch.state.setdefault("why", {})[id(step)] = why
        found = ask(g)
        count = int(np.count_nonzero(found))
        if count < g.n:
            g.batch.park(g.split(~found, g.n - count) if count else g, step)
            if not count:
                return False
            g.narrow(found, count)
        put(g, np.ones(g.n, np.bool_))
        g.pc += 1
        return True

    return run


@control("mbarrier.try_wait")
def _try_state(site: Site) -> Control:
    return _try(site, False)


@control("mbarrier.try_wait_parity")
def _try_parity(site: Site) -> Control:
    return _try(site, True)


@effect("mbarrier.pending_count")
def _pending_count(site: Site) -> Run:
    state = getter(site, site.operand("a"), "b64")
    put = putter(site, site.operand("d"), "u32")

    def run(g: Group) -> None:
        values = np.broadcast_to(state(g), g.n)
        put(g, np.array([pending_of(int(x)) for x in values], np.uint32))

    return run


@effect("mbarrier.async_arrive")
def _async_arrive(site: Site) -> Run:
    """An arrival when a thread's copies by `cp.async` have come; here they come at once.

    Without `noinc` the phase first lacks one more, so that the number of arrivals stays.
    """
    where, space, counts = address(site, "a"), space_of(site), "noinc" in site.match.slots

    def run(g: Group) -> None:
        batch = g.batch
        copies_of(batch).arrive(batch, g.threads(), None)
        for index, threads, at in located(g, space, where(g)):
            barrier, clock = find(batch, index, threads), publish(batch, threads)
            if not counts:
                barrier.pending += len(at)
            with using(int(threads[0])):
                barrier.arrive(len(at), clock)
            advanced(batch, barrier)

    return run


@effect("barrier.fence_init")
def _fence_init(site: Site) -> Run:
    """What was initialised is known behind a cluster barrier, even a relaxed one."""
    return lambda g: initialisation_fence(g.batch, g.threads())


@effect("barrier.proxy")
def _fence_proxy(site: Site) -> Run:
    """Only the async proxy is apart from ordinary accesses here."""
    if "async" not in site.match.slots:
        return lambda g: None
    return lambda g: proxy_fence(g.batch, g.threads())
