"""Atomic operations: threads that hit the same address are served one after the other."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx.types import TYPES
from stagefuse.runtime.emulator import floats as fl
from stagefuse.runtime.emulator.access import Part, places
from stagefuse.runtime.emulator.errors import Stop
from stagefuse.runtime.emulator.operands import address, elements, getter, putter
from stagefuse.runtime.emulator.program import Run, Site
from stagefuse.runtime.emulator.turns import wrote
from stagefuse.runtime.emulator.unwritten import is_read
from stagefuse.runtime.emulator.values import DTYPES

from . import effect
from .memory import order_of, space_of

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Group

Array = NDArray[Any]
Update = Callable[[Array, Array], Array]
"""Old values and operands to new values."""


_HALVES: dict[str, Update] = {"add": fl.odd_sum, "min": np.fmin, "max": np.fmax}


def _half_update(op: str, kind: str) -> Update:
    """An operation on 16-bit floats, given as their bits."""

    def update(old: Array, b: Array) -> Array:
        x, y = (np.ascontiguousarray(v).view(fl.U16) for v in (old, b))
        if kind.startswith("bf16"):
            new = fl.to_bf16(_HALVES[op](*(fl.from_bf16(v).astype(fl.F64) for v in (x, y))))
        else:
            half = _HALVES[op](*(v.view(fl.F16).astype(fl.F64) for v in (x, y)))
            new = fl.to_f16(half).view(fl.U16)
        return np.ascontiguousarray(new).view(old.dtype)

    return update


def _update(op: str, kind: str) -> Update:
    if kind.removesuffix("x2") in ("f16", "bf16"):
        return _half_update(op, kind)
    updates: dict[str, Update] = {
        "add": np.add,
        "min": np.minimum,
        "max": np.maximum,
        "and": np.bitwise_and,
        "or": np.bitwise_or,
        "xor": np.bitwise_xor,
        "exch": lambda old, b: b,
        "inc": lambda old, b: np.where(old >= b, 0, old + 1).astype(old.dtype),
        "dec": lambda old, b: np.where((old == 0) | (old > b), b, old - 1).astype(old.dtype),
    }
    return updates[op]


def _bits_dtype(kind: str) -> np.dtype[Any]:
    """How memory holds a type: 16-bit floats as bits."""
    return np.dtype(np.uint16) if kind == "f16" else DTYPES[kind]


def serve(
    memory: Array, at: Array, operands: list[Array], update: Callable[..., Array],
    scan: np.ufunc | None = None,
) -> Array:  # fmt: skip
    """Applies updates to `memory[at]` in the order of threads; gives the old values.

    Threads are served in rounds: in each, the next thread of every address. Where few addresses
    have many threads, each has one running total instead, if `scan` makes those of the update.
    """
    order = _by_address(at)
    sorted_at = at[order]
    starts = np.flatnonzero(np.r_[True, sorted_at[1:] != sorted_at[:-1]])
    if len(starts) == len(at):
        old = memory[at]
        memory[at] = update(old, *operands)
        return old
    ends = np.r_[starts[1:], len(at)]
    old_sorted = np.empty(len(at), memory.dtype)
    if scan is not None and len(starts) <= 64 < len(at):
        b = operands[0][order]
        for cell, first, last in zip(sorted_at[starts].tolist(), starts, ends, strict=True):
            chain = scan.accumulate(np.r_[memory[cell], b[first:last]], dtype=memory.dtype)
            old_sorted[first:last] = chain[:-1]
            memory[cell] = chain[-1]
    else:
        lengths = ends - starts
        for k in range(int(lengths.max())):
            active = starts[lengths > k] + k
            who, cells = order[active], sorted_at[active]
            values = memory[cells]
            old_sorted[active] = values
            memory[cells] = update(values, *[x[who] for x in operands])
    result = np.empty_like(old_sorted)
    result[order] = old_sorted
    return result


def _by_address(at: Array) -> Array:
    """The order of addresses, and of threads at one; short numbers are sorted digit by digit."""
    low = int(at.min())
    near = int(at.max()) - low < 1 << 16
    order: Array = np.argsort((at - low).astype(np.uint16) if near else at, kind="stable")
    return order


_SCANS: dict[str, np.ufunc] = {"add": np.add, "min": np.minimum, "max": np.maximum,
                               "and": np.bitwise_and, "or": np.bitwise_or,
                               "xor": np.bitwise_xor}  # fmt: skip


def _apply(memory: Array, at: Array, operands: list[Array], op: str, update: Any) -> Array:
    scan = _SCANS.get(op)
    return serve(memory, at, operands, update, scan if update is scan else None)


def atomic(
    g: Group, site_space: str, order: str, narrow: bool, addresses: Array, size: int,
    act: Callable[[Part, Array | None], None], sees: bool = True,
) -> None:  # fmt: skip
    """Runs `act` on each part of memory that atomics go to, with what all of them share.

    `sees` says whether the program looks at what was there.
    """
    machine = g.batch.machine
    g.look(addresses)
    threads = g.threads()
    for part in places(g, site_space, addresses, size, threads):
        arena = part.arena
        if arena.constant or part.space not in ("global", "shared"):
            raise Stop("out-of-bounds", f"an atomic on {arena.title}", int(part.threads[0]))
        arena.check_free(part.index, size, part.threads)
        if machine.races is not None:
            machine.races.atomic(
                g.batch, arena, part.index, size, part.threads, order, narrow, sees
            )
        missing = arena.unwritten(part.index, size) if size <= 8 else None
        if missing is not None:
            at = int(np.flatnonzero(missing)[0])
            raise Stop("uninitialised", f"nothing wrote {arena.place(int(part.index[at]))}",
                       int(part.threads[at]))  # fmt: skip
        key = (part.space, "atomic")
        machine.traffic[key] = machine.traffic.get(key, 0) + len(part.index) * size
        act(part, part.where)
    if g.batch.ready:
        wrote(g, addresses)


def _picked(x: Any, g: Group, where: Array | None) -> Array:
    values = np.broadcast_to(x, (g.n,))
    return np.ascontiguousarray(values if where is None else values[where])


@effect("atomic.atom", "atomic.red")
def atom(site: Site) -> Run:
    kind, op = site.word("T"), site.word("op")
    space, order, narrow = space_of(site), order_of(site), site.word("scope") == "cta"
    at = address(site, "a")
    dtype = _bits_dtype(kind)
    size = TYPES[kind].size_bytes
    parts = elements(site.operand("b"))
    gets = [getter(site, x, kind) for x in parts]
    update = _update(op, kind)
    has_result = site.match.form.opcode == "atom"
    results = elements(site.operand("d")) if has_result else ()
    puts = [putter(site, x, kind) for x in results]
    sees = any(is_read(site.code, x) for x in results)
    if kind == "b128":
        dtype = DTYPES["b128"]

    def run(g: Group) -> None:
        values = [np.broadcast_to(get(g), (g.n,)) for get in gets]
        old = np.empty((len(gets), g.n), dtype)

        def act(part: Part, where: Array | None) -> None:
            view = part.arena.view(dtype)
            for j, value in enumerate(values):
                b = _picked(value, g, where).view(dtype)
                index = part.index // size + j
                found = _apply(view, index, [b], op, update)
                if where is None:
                    old[j] = found
                else:
                    old[j, where] = found
            g.batch.machine.progress += 1

        atomic(g, space, order, narrow, at(g), size * len(gets), act, sees)
        for put, before in zip(puts, old, strict=bool(puts)):
            put(g, before.view(DTYPES[kind]))

    return run


@effect("atomic.cas")
def cas(site: Site) -> Run:
    kind = site.word("T")
    space, order, narrow = space_of(site), order_of(site), site.word("scope") == "cta"
    at = address(site, "a")
    b, c = (getter(site, site.operand(n), kind) for n in "bc")
    put = putter(site, site.operand("d"), kind)
    dtype, size = DTYPES[kind], TYPES[kind].size_bytes

    def update(old: Array, compare: Array, value: Array) -> Array:
        return np.where(old == compare, value, old)

    def run(g: Group) -> None:
        compare, value = b(g), c(g)
        old = np.empty(g.n, dtype)

        def act(part: Part, where: Array | None) -> None:
            mine = [_picked(x, g, where) for x in (compare, value)]
            found = serve(part.arena.view(dtype), part.index // size, mine, update)
            if bool(((found == mine[0]) & (mine[0] != mine[1])).any()):
                g.batch.machine.progress += 1
            if where is None:
                old[:] = found
            else:
                old[where] = found

        atomic(g, space, order, narrow, at(g), size, act)
        put(g, old)

    return run
