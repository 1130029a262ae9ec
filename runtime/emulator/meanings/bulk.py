"""Bulk and tensor copies. Each is done when it is issued; its order is that of its completion.

A copy in reads and writes as part of the phase of the mbarrier that counts its bytes; a copy out
as part of its thread's bulk group. Before the wait that covers it, no thread is ordered after it,
so that using its source or destination is a race whenever the copy really happens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from stagefuse.runtime.emulator.access import Part, peer_blocks, places, shared_byte
from stagefuse.runtime.emulator.errors import Stop
from stagefuse.runtime.emulator.memory import RANK_BITS
from stagefuse.runtime.emulator.operands import Get, address, elements, getter
from stagefuse.runtime.emulator.order import (
    Agent,
    async_read,
    async_write,
    barrier_agent,
    bulk_agents,
    bulk_commit,
    bulk_wait,
)
from stagefuse.runtime.emulator.program import Run, Site
from stagefuse.runtime.emulator.region import Region, count, span
from stagefuse.runtime.emulator.values import DTYPES

from . import effect
from .mbarrier import advanced, counted_from, find, using

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Batch, Group

Array = NDArray[Any]
_OFFSET = (1 << RANK_BITS) - 1
ALIGNMENT = 16

_COMBINE: dict[str, Callable[[Array, Array], Array]] = {
    "add": np.add,
    "min": np.fmin,
    "max": np.fmax,
    "and": np.bitwise_and,
    "or": np.bitwise_or,
    "xor": np.bitwise_xor,
    "inc": lambda old, top: np.where(old >= top, 0, old + 1).astype(old.dtype),
    "dec": lambda old, top: np.where((old == 0) | (old > top), top, old - 1).astype(old.dtype),
}


def element_dtype(type_: str) -> np.dtype[Any]:
    """The dtype in which elements of a PTX type are combined."""
    return np.dtype(ml_dtypes.bfloat16) if type_ == "bf16" else DTYPES[type_]


def reduced(op: str, old: Array, new: Array, dtype: np.dtype[Any]) -> Array:
    """`old op new`, element by element of `dtype`, in the units that both are in."""
    with np.errstate(all="ignore"):
        combined = _COMBINE[op](old.view(dtype), new.view(dtype))
    return np.ascontiguousarray(combined).view(old.dtype)


def one_by_one(g: Group) -> Iterator[tuple[int, int]]:
    """The threads of a group with their positions: copies are issued by few threads."""
    yield from enumerate(int(t) for t in g.threads())


def values(get: Get, g: Group) -> Array:
    """An operand of each thread."""
    found: Array = np.broadcast_to(get(g), g.n)
    return found


def place(g: Group, space: str, at: int, size: int, thread: int, align: int = ALIGNMENT) -> Part:
    """Where the bytes of a copy lie.

    Raises: Stop where they are out of bounds or not aligned.
    """
    if at % align:
        raise Stop("misaligned", f"address {at:#x} of a copy is no multiple of {align}", thread)
    who = np.array([thread])
    if space == "shared":
        start = shared_byte(g.batch, at, 1, thread)
        part = Part(g.batch.shared, np.array([start]), None, who, space)
    else:
        (part,) = places(g, space, np.array([at], np.int64), 1, who)
    start = int(part.index[0])
    within = start % part.arena.stride if part.arena.stride else start
    if within + size > part.arena.limit:
        raise Stop("out-of-bounds", f"{size} bytes at offset {within} of {part.arena.title}, which "
                   f"has {part.arena.limit} bytes", thread)  # fmt: skip
    return part


def sized(g: Group, size: int, thread: int) -> int:
    """The size of a bulk copy, which must be a multiple of 16."""
    if size % ALIGNMENT:
        raise Stop("misaligned", f"a copy of {size} bytes, no multiple of {ALIGNMENT}", thread)
    return size


def part_span(part: Part, size: int) -> Region:
    """The bytes from the start of a part on."""
    return span(part.arena, int(part.index[0]), size)


def move(
    batch: Batch, thread: int, source: Region, target: Region, reader: Agent, writer: Agent,
    op: str = "", dtype: Any = None,
) -> None:  # fmt: skip
    """Copies bytes, or combines elements of `dtype` with those that are there."""
    async_read(batch, (thread,), source, reader)
    source.check_written(thread)
    data = source.read()
    if op:
        target.check_written(thread)
        data = reduced(op, target.read().view(np.uint8), data.view(np.uint8), dtype)
    async_write(batch, (thread,), target, writer, atomic=bool(op))
    target.write(data, thread)
    moved(batch, source, target, bool(op))


def moved(batch: Batch, source: Region, target: Region, combines: bool = False) -> None:
    """Counts a copy that was made."""
    machine = batch.machine
    machine.progress += 1
    for region, what in ((source, "read"), (target, "atomic" if combines else "written")):
        space = "shared" if region.arena is batch.shared else "global"
        count(machine, space, what, region.size)


def barrier_at(g: Group, at: int, thread: int) -> int:
    """The place of the mbarrier at a shared address."""
    return shared_byte(g.batch, at, 8, thread)


def deliver(g: Group, at: int, thread: int, size: int, agent: Agent) -> None:
    """Counts the bytes of a copy on the mbarrier at a shared address."""
    barrier = find(g.batch, barrier_at(g, at, thread), thread)
    with using(thread):
        barrier.deliver(size, agent.clock)
    advanced(g.batch, barrier)


def agent_of(g: Group, at: int, thread: int, generic: bool = False) -> Agent:
    """Who does a copy, of the async or the `generic` proxy, that counts on the mbarrier at a
    shared address."""
    index = barrier_at(g, at, thread)
    barrier = find(g.batch, index, thread)
    if not generic:
        counted_from(g.batch, index, barrier, thread)
    return barrier_agent(g.batch, index, barrier.serial, barrier.phase)


def destinations(
    g: Group, thread: int, at: int, barrier: int, mask: int | None
) -> list[tuple[int, int]]:
    """Addresses of the data and of the mbarrier in each block that a copy goes to."""
    if mask is None:
        return [(at, barrier)]
    ranks = [r for r in range(16) if mask >> r & 1]
    peer_blocks(g.batch, np.full(len(ranks), thread), np.array(ranks))
    offset, bar = at & _OFFSET, barrier & _OFFSET
    return [(offset + (r + 1 << RANK_BITS), bar + (r + 1 << RANK_BITS)) for r in ranks]


def _load(site: Site, multicast: bool, source_space: str = "global", op: str = "") -> Run:
    to, source, bar = (address(site, name) for name in ("d", "a", "m"))
    size = getter(site, site.operand("n"), "u32")
    mask = getter(site, site.operand("mask"), "b16") if multicast else None
    dtype = element_dtype(site.word("T")) if op else None

    def run(g: Group) -> None:
        to_, from_, bar_, sizes = to(g), source(g), bar(g), values(size, g)
        masks = values(mask, g) if mask is not None else None
        for i, thread in one_by_one(g):
            n = sized(g, int(sizes[i]), thread)
            part = place(g, source_space, int(from_[i]), n, thread)
            chosen = int(masks[i]) if masks is not None else None
            for at, b in destinations(g, thread, int(to_[i]), int(bar_[i]), chosen):
                target = place(g, "shared", at, n, thread)
                agent = agent_of(g, b, thread)
                move(g.batch, thread, part_span(part, n), part_span(target, n), agent, agent, op,
                     dtype)  # fmt: skip
                deliver(g, b, thread, n, agent)

    return run


@effect("bulk.load")
def _bulk_load(site: Site) -> Run:
    return _load(site, False)


@effect("bulk.load_multicast")
def _bulk_load_multicast(site: Site) -> Run:
    return _load(site, True)


@effect("bulk.push")
def _push(site: Site) -> Run:
    return _load(site, False, "shared")


@effect("bulk.push_reduce")
def _push_reduce(site: Site) -> Run:
    return _load(site, False, "shared", site.word("redop"))


def _store(site: Site, op: str = "") -> Run:
    to, source = address(site, "d"), address(site, "a")
    size = getter(site, site.operand("n"), "u32")
    dtype = element_dtype(site.word("T")) if op else None

    def run(g: Group) -> None:
        to_, from_, sizes = to(g), source(g), values(size, g)
        for i, thread in one_by_one(g):
            n = sized(g, int(sizes[i]), thread)
            part = place(g, "shared", int(from_[i]), n, thread)
            target = place(g, "global", int(to_[i]), n, thread)
            reader, writer = bulk_agents(g.batch, thread)
            move(g.batch, thread, part_span(part, n), part_span(target, n), reader, writer, op,
                 dtype)  # fmt: skip

    return run


@effect("bulk.store")
def _bulk_store(site: Site) -> Run:
    return _store(site)


@effect("bulk.reduce")
def _bulk_reduce(site: Site) -> Run:
    return _store(site, site.word("redop"))


@effect("bulk.commit_group")
def _commit(site: Site) -> Run:
    def run(g: Group) -> None:
        bulk_commit(g.batch, g.threads())

    return run


@effect("bulk.wait_group")
def _wait(site: Site) -> Run:
    count = getter(site, site.operand("n"), "u32")
    reads_only = site.word("read") == "read"

    def run(g: Group) -> None:
        bulk_wait(g.batch, g.threads(), int(np.asarray(count(g)).reshape(-1)[0]), reads_only)

    return run


@effect("bulk.st_async")
def _st_async(site: Site) -> Run:
    to, bar = address(site, "d"), address(site, "m")
    parts = elements(site.operand("b"))
    gets = [getter(site, x, site.word("T")) for x in parts]
    size = element_dtype(site.word("T")).itemsize * len(parts)

    def run(g: Group) -> None:
        to_, bar_ = to(g), bar(g)
        columns = [values(get, g) for get in gets]
        data = np.stack(columns, axis=1).view(np.uint8).reshape(g.n, size)
        for i, thread in one_by_one(g):
            part = place(g, "shared", int(to_[i]), size, thread, size)
            agent = agent_of(g, int(bar_[i]), thread, True)
            target = part_span(part, size)
            async_write(g.batch, (thread,), target, agent, generic=True)
            target.write(data[i], thread)
            deliver(g, int(bar_[i]), thread, size, agent)
        g.batch.machine.progress += 1

    return run


@effect("bulk.red_async")
def _red_async(site: Site) -> Run:
    to, bar = address(site, "d"), address(site, "m")
    get, op = getter(site, site.operand("b"), site.word("T")), site.word("redop")
    dtype = element_dtype(site.word("T"))

    def run(g: Group) -> None:
        to_, bar_, data = to(g), bar(g), values(get, g)
        for i, thread in one_by_one(g):
            part = place(g, "shared", int(to_[i]), dtype.itemsize, thread, dtype.itemsize)
            target = part_span(part, dtype.itemsize)
            agent = agent_of(g, int(bar_[i]), thread, True)
            target.check_written(thread)
            async_write(g.batch, (thread,), target, agent, atomic=True, generic=True)
            target.write(reduced(op, target.read(), data[i : i + 1], dtype), thread)
            deliver(g, int(bar_[i]), thread, dtype.itemsize, agent)
        g.batch.machine.progress += 1

    return run
