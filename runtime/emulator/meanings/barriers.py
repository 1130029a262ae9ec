"""Barriers, fences, bar.warp.sync."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stagefuse.runtime.emulator.barriers import Barrier
from stagefuse.runtime.emulator.lanes import check_masks
from stagefuse.runtime.emulator.operands import Get, getter, putter
from stagefuse.runtime.emulator.program import Control, Run, Site, Step

from . import control, effect

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Group, Machine


def _is_aligned(site: Site) -> bool:
    return site.match.form.opcode == "bar" or "aligned" in site.match.slots


def _each_barrier(numbers: Any, g: Group, act: Any) -> bool:
    """Calls `act(group, number)` for the threads of each barrier; whether the group goes on."""
    first = numbers if not getattr(numbers, "ndim", 0) else numbers[0]
    if not getattr(numbers, "ndim", 0) or bool((numbers == first).all()):
        return bool(act(g, int(first)))
    for number in np.unique(numbers):
        held = numbers == number
        part = g.split(held, int(np.count_nonzero(held)))
        if act(part, int(number)):
            g.batch.push(part)
    return False


def _count_of(count: Get | None, g: Group) -> int | None:
    if count is None:
        return None
    values = np.atleast_1d(count(g))
    return int(values[0])


def _barrier(site: Site, waits: bool) -> Control:
    number = getter(site, site.operand("a"), "u32")
    count = getter(site, site.operand("b"), "u32") if site.has("b") else None
    aligned = _is_aligned(site)

    def run(machine: Machine, g: Group, step: Step) -> bool:
        if aligned and not g.batch.converge(g, step, None):
            return False

        def act(part: Group, n: int) -> bool:
            return part.batch.barriers.arrive(part, step, n, _count_of(count, part), waits=waits)

        return _each_barrier(number(g), g, act)

    return run


@control("barrier.sync")
def sync(site: Site) -> Control:
    return _barrier(site, True)


@control("barrier.arrive")
def arrive(site: Site) -> Control:
    return _barrier(site, False)


@control("barrier.red")
def red(site: Site) -> Control:
    """A barrier that counts, or joins, a predicate of its threads."""
    number = getter(site, site.operand("a"), "u32")
    count = getter(site, site.operand("b"), "u32") if site.has("b") else None
    held = getter(site, site.operand("c"), "pred")
    op = site.word("op") or "popc"
    put = putter(site, site.operand("d"), "u32" if op == "popc" else "pred")
    aligned = _is_aligned(site)

    def run(machine: Machine, g: Group, step: Step) -> bool:
        if aligned and not g.batch.converge(g, step, None):
            return False

        def act(part: Group, n: int) -> bool:
            flags = np.broadcast_to(held(part), (part.n,))
            blocks = part.of(part.batch.block_of)

            def contribute(barrier: Barrier) -> None:
                for name, mine in (("true", flags), ("false", ~flags)):
                    total = barrier.totals.setdefault(name, np.zeros(part.batch.blocks, np.int64))
                    total += np.bincount(blocks[mine], minlength=len(total))

            def release(free: Group) -> None:
                totals = part.batch.barriers[n].totals
                of = free.of(free.batch.block_of)
                if op == "popc":
                    put(free, totals["true"][of].astype(np.uint32))
                elif op == "and":
                    put(free, totals["false"][of] == 0)
                else:
                    put(free, totals["true"][of] > 0)

            return part.batch.barriers.arrive(
                part, step, n, _count_of(count, part), release=release, contribute=contribute
            )

        return _each_barrier(number(g), g, act)

    return run


@control("barrier.warp")
def warp(site: Site) -> Control:
    mask = getter(site, site.operand("a"), "b32")

    def run(machine: Machine, g: Group, step: Step) -> bool:
        check_masks(g, mask(g))
        if not g.batch.converge(g, step, mask):
            return False
        if machine.races is not None:
            machine.races.warp(g.batch, g.threads())
        g.pc += 1
        return True

    return run


@effect("barrier.fence")
def fence(site: Site) -> Run:
    narrow = "cta" in site.match.slots.values()
    total = site.word("O", "sc") == "sc"  # as `membar` is

    def run(g: Group) -> None:
        races = g.batch.machine.races
        if races is not None:
            races.fence(g.batch, g.threads(), narrow, total)

    return run


@effect("barrier.griddepcontrol")
def griddepcontrol(site: Site) -> Run:
    """A grid starts when the one before it has ended."""
    return lambda g: None
