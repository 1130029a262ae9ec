"""Votes, shuffles, matches, reductions of a warp. The lanes have come together before these run."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx import syntax as s
from stagefuse.runtime.emulator.errors import Stop
from stagefuse.runtime.emulator.operands import Get, getter, putter, result_parts
from stagefuse.runtime.emulator.program import Run, Site
from stagefuse.runtime.emulator.unwritten import read_unwritten
from stagefuse.runtime.emulator.values import DTYPES

from . import effect

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Group

Array = NDArray[Any]
UNDEFINED = np.uint32(0xCDCDCDCD)
"""What a shuffle reads of a lane that does not take part: no value that anybody may rely on."""


def _full(g: Group, values: Any, fill: Any = 0) -> Array:
    """Values of a group's threads as rows of a warp each, `fill` for other lanes."""
    values = np.broadcast_to(values, (g.n,))
    if g.sel is None:
        return np.ascontiguousarray(values).reshape(-1, 32)
    whole = np.full(g.batch.threads, fill, values.dtype)
    whole[g.sel] = values
    return whole.reshape(-1, 32)


def _spread(g: Group, per_warp: Array) -> Array:
    """A value of each warp for each thread of a group."""
    found: Array = per_warp[g.threads() // 32]
    return found


def _masked(site: Site, g: Group, mask: Any) -> Array:
    """Which lanes take part: those in the group whose masks name them."""
    lanes = np.broadcast_to(mask, (g.n,)) >> (g.threads() % 32).astype(np.uint32)
    return _full(g, (lanes & np.uint32(1)).astype(np.bool_), False)


def _each_mask(mask: Get, run: Run) -> Run:
    """Runs for the threads of each mask on their own: a warp may be several groups of lanes."""

    def split(g: Group) -> None:
        masks = mask(g)
        if not getattr(masks, "ndim", 0) or bool((masks == masks[0]).all()):
            run(g)
            return
        sel, n = g.sel, g.n
        for each in np.unique(masks):
            held = masks == each
            g.narrow(held, int(np.count_nonzero(held)))
            run(g)
            g.sel, g.n = sel, n

    return split


def pack_bits(rows: Array) -> Array:
    """A word of each warp from 32 flags."""
    return np.packbits(rows, axis=1, bitorder="little").view(np.uint32)[:, 0]


@effect("warp.vote", "warp.ballot")
def vote(site: Site) -> Run:
    held, mask = getter(site, site.operand("a"), "pred"), getter(site, site.operand("m"), "b32")
    is_ballot = site.match.form.meaning == "warp.ballot"
    put = putter(site, site.operand("d"), "b32" if is_ballot else "pred")
    op = site.word("op")

    def run(g: Group) -> None:
        part = _masked(site, g, mask(g))
        rows = _full(g, held(g), False) & part
        if is_ballot:
            put(g, _spread(g, pack_bits(rows)))
            return
        some, every = rows.any(axis=1), ~(part & ~rows).any(axis=1)
        result = {"any": some, "all": every}.get(op, every | ~some)
        put(g, _spread(g, np.asarray(result)))

    return _each_mask(mask, run)


@effect("warp.shfl")
def shfl(site: Site) -> Run:
    """PTX ISA, "shfl.sync": c holds the clamp in its low five bits and a segment mask above."""
    a = getter(site, site.operand("a"), "b32")
    b, c = (getter(site, site.operand(n), "u32") for n in "bc")
    first, second = result_parts(site.operand("d"))
    put, also = putter(site, first, "b32"), putter(site, second, "pred")
    mode = site.word("mode")

    def run(g: Group) -> None:
        threads = g.threads()
        lane = threads & 31
        bval, cval = np.asarray(b(g)), np.asarray(c(g))
        if bval.ndim or cval.ndim:
            source, inside = _sources(mode, lane, bval, cval)
        else:
            lanes, within = _source_table(mode, int(bval), int(cval))
            source, inside = lanes[lane], within[lane]
        values = _full(g, a(g), UNDEFINED).reshape(-1)
        read = threads - lane + source
        put(g, values[read])
        also(g, inside)
        if g.batch.alive_count < g.batch.threads:
            _read_ended(site, g, first, read)

    return run


def _read_ended(site: Site, g: Group, result: s.Operand, read: Array) -> None:
    """What was read of lanes that have ended, or never were, is as if nothing wrote it."""
    late = ~g.batch.alive[read]
    if late.any():
        threads = g.threads()
        stop = Stop("uninitialised", f"reads lane {int(read[late][0]) % 32}, which is none of this "
                    "warp any more", int(threads[late][0]))  # fmt: skip
        read_unwritten(site, g, [result], threads, [late], stop)


def _sources(mode: str, lane: Array, b: Array, c: Array) -> tuple[Array, Array]:
    """The lane that each lane reads, and whether that is within its segment."""
    bval, cval = b.astype(np.int64) & 31, c.astype(np.int64)
    clamp, segment = cval & 31, (cval >> 8) & 31
    high = (lane & segment) | (clamp & ~segment)
    low = lane & segment
    source: Array = {
        "up": lambda: lane - bval,
        "down": lambda: lane + bval,
        "bfly": lambda: lane ^ bval,
        "idx": lambda: low | (bval & ~segment),
    }[mode]()
    inside = source >= high if mode == "up" else source <= high
    return np.where(inside, source, lane), np.broadcast_to(inside, lane.shape)


@lru_cache(maxsize=512)
def _source_table(mode: str, b: int, c: int) -> tuple[Array, Array]:
    return _sources(mode, np.arange(32), np.asarray(b), np.asarray(c))


@effect("warp.match_any")
def match_any(site: Site) -> Run:
    kind = site.word("T")
    a, mask = getter(site, site.operand("a"), kind), getter(site, site.operand("m"), "b32")
    put = putter(site, site.operand("d"), "b32")

    def run(g: Group) -> None:
        rows, part = _full(g, a(g)), _masked(site, g, mask(g))
        result = np.zeros(rows.shape, np.uint32)
        for lane in range(32):
            same = (rows == rows[:, lane : lane + 1]) & part
            result[:, lane] = pack_bits(same)
        put(g, g.of(result.reshape(-1)).copy())

    return _each_mask(mask, run)


@effect("warp.match_all")
def match_all(site: Site) -> Run:
    kind = site.word("T")
    a, mask = getter(site, site.operand("a"), kind), getter(site, site.operand("m"), "b32")
    first, second = result_parts(site.operand("d"))
    put, also = putter(site, first, "b32"), putter(site, second, "pred")

    def run(g: Group) -> None:
        rows, part = _full(g, a(g)), _masked(site, g, mask(g))
        leader = np.take_along_axis(rows, part.argmax(axis=1)[:, None], axis=1)
        same = ~((rows != leader) & part).any(axis=1)
        put(g, _spread(g, np.where(same, pack_bits(part), 0).astype(np.uint32)))
        also(g, _spread(g, same))

    return _each_mask(mask, run)


@effect("warp.redux")
def redux(site: Site) -> Run:
    op = site.word("op") or site.word("bool")
    kind = site.word("T") or "b32"
    a, mask = getter(site, site.operand("a"), kind), getter(site, site.operand("m"), "b32")
    put = putter(site, site.operand("d"), kind)
    dtype = DTYPES[kind]
    limit = np.iinfo(dtype)
    function: Any
    function, neutral = {
        "add": (np.add, 0), "min": (np.minimum, limit.max), "max": (np.maximum, limit.min),
        "and": (np.bitwise_and, limit.max), "or": (np.bitwise_or, 0), "xor": (np.bitwise_xor, 0),
    }[op]  # fmt: skip

    def run(g: Group) -> None:
        part = _masked(site, g, mask(g))
        rows = np.where(part, _full(g, a(g)), dtype.type(neutral))
        put(g, _spread(g, function.reduce(rows, axis=1, dtype=dtype)))

    return _each_mask(mask, run)


@effect("warp.activemask")
def activemask(site: Site) -> Run:
    put = putter(site, site.operand("d"), "b32")
    return lambda g: put(g, g.batch.lane_bits(g))


@effect("warp.elect")
def elect(site: Site) -> Run:
    mask = getter(site, site.operand("m"), "b32")
    first, second = result_parts(site.operand("d"))
    put, also = putter(site, first, "b32"), putter(site, second, "pred")

    def run(g: Group) -> None:
        chosen = _spread(g, _masked(site, g, mask(g)).argmax(axis=1))
        put(g, chosen.astype(np.uint32))
        also(g, chosen == g.threads() % 32)

    return _each_mask(mask, run)
