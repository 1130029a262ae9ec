"""cp.async: data arrives where a thread waits for it, and not before."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx import syntax as s
from stagefuse.runtime.emulator import access
from stagefuse.runtime.emulator.arrays import distinct
from stagefuse.runtime.emulator.memory import Arena
from stagefuse.runtime.emulator.operands import address, getter
from stagefuse.runtime.emulator.program import Run, Site, Step

from . import effect

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Batch, Group

Array = NDArray[Any]


@dataclass
class Flight:
    """Copies that one instruction began: rows of bytes on their way to places of an arena."""

    arena: Arena
    index: Array
    rows: Array
    threads: Array
    number: Array
    """Of each thread, how many groups it had committed before."""
    step: Step


@dataclass
class Copies:
    """The copies of a batch that have not arrived."""

    committed: Array
    flights: list[Flight] = field(default_factory=list)

    def arrive(self, batch: Batch, threads: Array, open_groups: int | None) -> None:
        """Lets copies of threads arrive: all of them, or all but the last so many groups."""
        if not self.flights:
            return
        waits = np.zeros(batch.threads, np.bool_)
        waits[threads] = True
        left = []
        for flight in self.flights:
            done = waits[flight.threads]
            if open_groups is not None:
                done = done & (flight.number < self.committed[flight.threads] - open_groups)
            if done.any():
                _land(batch, flight, done)
            if not done.all():
                rest = ~done
                left.append(
                    Flight(flight.arena, flight.index[rest], flight.rows[rest],
                           flight.threads[rest], flight.number[rest], flight.step)
                )  # fmt: skip
        self.flights = left


def _land(batch: Batch, flight: Flight, done: Array) -> None:
    index, rows, threads = flight.index[done], flight.rows[done], flight.threads[done]
    machine = batch.machine
    machine.progress += 1
    if machine.races is not None:
        machine.races.landed(batch, flight.arena, index, rows.shape[1], threads, flight.step)
    words = np.ascontiguousarray(rows).view(np.uint32)
    for j in range(words.shape[1]):
        flight.arena.store(index + 4 * j, np.ascontiguousarray(words[:, j]))


def copies_of(batch: Batch) -> Copies:
    """The copies of a batch that are on their way."""
    found = batch.state.get("copies")
    if found is None:
        found = batch.state["copies"] = Copies(np.zeros(batch.threads, np.int64))
    assert isinstance(found, Copies)
    return found


def _begin(g: Group, to: Array, source: Array, size: int, sizes: Array) -> None:
    """Starts copies of `size` bytes, of which each thread reads its own number."""
    batch, threads = g.batch, g.threads()
    rows = np.zeros((g.n, size), np.uint8)
    for count in distinct(sizes):
        if count:
            which = np.flatnonzero(sizes == count)
            _read(g, source[which], threads[which], min(int(count), size), rows, which)
    parts = access.places(g, "shared", to, size, threads)
    (part,) = parts
    machine = batch.machine
    key = ("shared", "written")
    machine.traffic[key] = machine.traffic.get(key, 0) + g.n * size
    if machine.races is not None:
        machine.races.launched(batch, part.arena, part.index, size, threads)
    part.arena.check_free(part.index, size, threads)
    if part.arena.valid is not None:  # whoever looks before the wait sees nothing
        part.arena.forget(part.index, size)
    copies = copies_of(batch)
    number = copies.committed[threads]
    copies.flights.append(Flight(part.arena, part.index, rows, threads, number, batch.at))


def _read(g: Group, source: Array, threads: Array, count: int, rows: Array, which: Array) -> None:
    width = next(w for w in (16, 8, 4, 2, 1) if count % w == 0)
    machine = g.batch.machine
    whole = count if count & (count - 1) == 0 else 1
    for part in access.places(g, "global", source, whole, threads):
        arena, index, where, who, space = part.unpacked
        key = (space, "read")
        machine.traffic[key] = machine.traffic.get(key, 0) + len(index) * count
        if machine.races is not None:
            machine.races.read(g.batch, arena, index, count, who, True)
        access.check_written(arena, index, count, who)
        item = min(width, 8)
        at = which if where is None else which[where]
        for j in range(0, count, item):
            values = arena.load(index + j, np.dtype(f"u{item}"))
            rows[at, j : j + item] = np.ascontiguousarray(values).view(np.uint8).reshape(-1, item)


def _size(site: Site) -> int:
    size = site.operand("size")
    assert isinstance(size, s.Immediate)
    if size.value not in ((4, 8, 16) if site.word("C") == "ca" else (16,)):
        raise site.error(f"cp.async.{site.word('C')} of {size.value} bytes")
    return size.value


@effect("async.copy")
def copy(site: Site) -> Run:
    to, source, size = address(site, "d"), address(site, "a"), _size(site)
    count = getter(site, site.operand("n"), "u32") if site.has("n") else None

    def run(g: Group) -> None:
        sizes = np.full(g.n, size) if count is None else np.broadcast_to(count(g), (g.n,))
        _begin(g, to(g), source(g), size, sizes.astype(np.int64))

    return run


@effect("async.copy_unless")
def copy_unless(site: Site) -> Run:
    """Where the predicate holds, the source is not read and zeros are written."""
    to, source, size = address(site, "d"), address(site, "a"), _size(site)
    skip = getter(site, site.operand("p"), "pred")

    def run(g: Group) -> None:
        sizes = np.where(np.broadcast_to(skip(g), (g.n,)), 0, size)
        _begin(g, to(g), source(g), size, sizes)

    return run


@effect("async.commit_group")
def commit_group(site: Site) -> Run:
    def run(g: Group) -> None:
        copies_of(g.batch).committed[g.threads()] += 1

    return run


@effect("async.wait_group", "async.wait_all")
def wait_group(site: Site) -> Run:
    stated = site.operand("n") if site.has("n") else None
    n = stated.value if isinstance(stated, s.Immediate) else None

    def run(g: Group) -> None:
        copies_of(g.batch).arrive(g.batch, g.threads(), n)

    return run
