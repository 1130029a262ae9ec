"""Tensor copies: boxes of an array in global memory, to and from shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx import syntax as s
from stagefuse.runtime.emulator.access import places
from stagefuse.runtime.emulator.errors import Stop
from stagefuse.runtime.emulator.im2col import column
from stagefuse.runtime.emulator.memory import ALLOCATION_BITS, Arena
from stagefuse.runtime.emulator.operands import Get, address, elements, getter
from stagefuse.runtime.emulator.order import async_read, async_write, bulk_agents
from stagefuse.runtime.emulator.program import Run, Site
from stagefuse.runtime.emulator.region import Region, span
from stagefuse.runtime.emulator.swizzle import ALIGNMENT as SWIZZLE_ALIGNMENT
from stagefuse.runtime.emulator.swizzle import swizzle
from stagefuse.runtime.emulator.tensor_map import SIZE, EncodedMap, decode

from . import effect
from .bulk import (
    agent_of,
    deliver,
    destinations,
    moved,
    one_by_one,
    place,
    reduced,
    values,
)

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Group

Array = NDArray[Any]
_STEP = 16
"""Bytes, of which a box begins at a multiple in its rows: for others an H200 stops with an illegal
instruction. The ISA asks for no more than that addresses and strides are (cp.async.bulk.tensor)."""


def _coordinates(site: Site) -> list[Get]:
    x = site.operand("t")
    assert isinstance(x, s.Address)
    return [getter(site, c, "s32") for c in x.coordinates]


def map_at(g: Group, at: int, thread: int) -> EncodedMap:
    """The tensor map at a generic address.

    Raises: Stop where there is none.
    """
    if at % 64:
        raise Stop("misaligned", f"a tensor map at {at:#x}, no multiple of 64", thread)
    (part,) = places(g, "", np.array([at], np.int64), 8, np.array([thread]))
    start = int(part.index[0])
    if start + SIZE > len(part.arena.bytes):
        raise Stop("out-of-bounds", "a tensor map has 128 bytes", thread)
    place = span(part.arena, start, SIZE)
    place.check_written(thread)
    _check_seen(g, place, thread)
    found = decode(place.read().tobytes())
    if found is None:
        raise Stop("uninitialised", f"no tensor map at {at:#x}", thread)
    return found


def _changes(place: Region) -> tuple[int, bytes]:
    """What tells of the changes that this launch made to a map: none is `(0, b"")`."""
    shadow, stamps = place.arena.shadow, b""
    if shadow is not None and shadow.was_written:
        written = shadow.writes[place.granules(shadow.granule)]
        stamps = written.tobytes() if written.any() else b""
    return place.arena.maps.get(int(place.index[0]), 0), stamps


def _seen(g: Group, place: Region, thread: int) -> tuple[dict[Any, Any], tuple[int, int, int]]:
    """What blocks acquired of maps, and the place of this block's there."""
    key = int(g.batch.block_of[thread]), id(place.arena), int(place.index[0])
    return g.batch.state.setdefault("maps", {}), key


def note_seen(g: Group, place: Region, thread: int) -> None:
    """A thread acquires a tensor map, for its block."""
    known, key = _seen(g, place, thread)
    known[key] = _changes(place)


def _check_seen(g: Group, place: Region, thread: int) -> None:
    """Raises: Stop where the launch changed a map and the block has not acquired what it is now.

    PTX ISA, "fence.proxy.tensormap": copies read maps through a proxy of their own.
    """
    changes = _changes(place)
    if g.batch.machine.races is None or changes == (0, b""):
        return
    known, key = _seen(g, place, thread)
    if known.get(key) != changes:
        raise Stop("race", f"the tensor map at {place.arena.place(int(place.index[0]))} was "
                   "changed by this launch, and this block has no "
                   "`fence.proxy.tensormap::generic.acquire` since", thread)  # fmt: skip


class Box:
    """One box of a tensor: where its elements lie in global and in shared memory."""

    def __init__(
        self, g: Group, tensor: EncodedMap, start: tuple[int, ...], thread: int, *,
        combines: bool = False, moves: tuple[int, ...] | None = None,
    ) -> None:  # fmt: skip
        if len(start) != tensor.rank:
            raise Stop("out-of-bounds", f"{len(start)} coordinates of a map with {tensor.rank} "
                       "dimensions", thread)  # fmt: skip
        if bool(tensor.lower) != (moves is not None):
            used, made = ("im2col", "tiles") if moves is not None else ("tiles", "im2col")
            raise Stop("out-of-bounds", f"a copy of {used} with a map for {made}", thread)
        if start[0] * tensor.dtype.itemsize % _STEP:
            raise Stop("misaligned", f"coordinate {start[0]} of the innermost dimension is "
                       f"{start[0] * tensor.dtype.itemsize} bytes into a row, no multiple of "
                       f"{_STEP}", thread)  # fmt: skip
        if not combines:
            tensor, start = tensor.widest(start)
        self.tensor, self.thread = tensor, thread
        offset, self.inside = (
            tensor.elements(start) if moves is None else column(tensor, start, moves)
        )
        arena, base = _global_arena(g, tensor.address, thread)
        index = base + offset[self.inside]
        size = tensor.dtype.itemsize
        if index.size and (index.min() < 0 or index.max() + size > arena.limit):
            raise Stop("out-of-bounds", "a tensor map describes more than its allocation", thread)
        self.outside = Region(arena, index, size)
        """The elements that lie in the array, in global memory, in the order of the box."""

    def shared(self, g: Group, at: int) -> Region:
        """All elements of the box at a shared address.

        Raises: Stop where the address is not aligned as the swizzle needs, or out of bounds.
        """
        tensor, unit = self.tensor, self.tensor.dtype.itemsize
        part = place(g, "shared", at, tensor.box_bytes, self.thread, SWIZZLE_ALIGNMENT[0])
        start, stride = int(part.index[0]), part.arena.stride
        block = start // stride * stride
        within = swizzle(np.arange(start - block, start - block + tensor.box_bytes, unit),
                         tensor.swizzle)  # fmt: skip
        if int(within.max()) + unit > part.arena.limit:
            raise Stop("out-of-bounds", "a box ends beyond shared memory", self.thread)
        return Region(part.arena, block + within, unit)


def _global_arena(g: Group, at: int, thread: int) -> tuple[Arena, int]:
    heap, number = g.batch.machine.heap, at >> ALLOCATION_BITS
    if not 0 < number <= len(heap.arenas):
        raise Stop("out-of-bounds", f"a tensor map of no memory, {at:#x}", thread)
    return heap.arenas[number - 1], at - (number << ALLOCATION_BITS)


def _start(coordinates: list[Array], i: int) -> tuple[int, ...]:
    return tuple(int(c[i]) for c in coordinates)


def _moves(site: Site) -> list[Get] | None:
    """How a copy of im2col moves its pixels: the offsets of a load; a store has none."""
    if not any(word.startswith("im2col") for word in site.match.slots):
        return None
    if not site.has("o"):
        return []
    return [getter(site, x, "b16") for x in elements(site.operand("o"))]


def _moved_by(moves: list[Array] | None, i: int, rank: int) -> tuple[int, ...] | None:
    if moves is None:
        return None
    return tuple(int(m[i]) for m in moves) or (0,) * (rank - 2)


def _load(site: Site, multicast: bool) -> Run:
    to, bar, tensor = (address(site, name) for name in ("d", "m", "t"))
    mask = getter(site, site.operand("mask"), "b16") if multicast else None
    gets, offsets = _coordinates(site), _moves(site)

    def run(g: Group) -> None:
        to_, bar_, map_ = to(g), bar(g), tensor(g)
        moves = None if offsets is None else [values(get, g) for get in offsets]
        masks = values(mask, g) if mask is not None else None
        coordinates = [values(get, g) for get in gets]
        for i, thread in one_by_one(g):
            box = Box(g, map_at(g, int(map_[i]), thread), _start(coordinates, i), thread,
                      moves=_moved_by(moves, i, len(gets)))  # fmt: skip
            chosen = int(masks[i]) if masks is not None else None
            for at, b in destinations(g, thread, int(to_[i]), int(bar_[i]), chosen):
                _load_box(g, box, at, b)

    return run


def _load_box(g: Group, box: Box, at: int, bar: int) -> None:
    thread, tensor = box.thread, box.tensor
    agent = agent_of(g, bar, thread)
    async_read(g.batch, (thread,), box.outside, agent)
    box.outside.check_written(thread)
    target = box.shared(g, at)
    data = box.outside.read()
    if len(data) < target.index.size:
        whole = np.empty(target.index.size, data.dtype)
        whole[:] = tensor.fill.view(data.dtype)
        whole[box.inside] = data
        data = whole
    async_write(g.batch, (thread,), target, agent)
    target.write(data, thread)
    moved(g.batch, box.outside, target)
    deliver(g, bar, thread, tensor.box_bytes, agent)


@effect("bulk.tensor_load")
def _tensor_load(site: Site) -> Run:
    return _load(site, False)


@effect("bulk.tensor_load_multicast")
def _tensor_load_multicast(site: Site) -> Run:
    return _load(site, True)


def _store(site: Site, op: str) -> Run:
    tensor, source = address(site, "t"), address(site, "a")
    gets = _coordinates(site)
    moves = None if _moves(site) is None else (0,) * (len(gets) - 2)

    def run(g: Group) -> None:
        map_, from_ = tensor(g), source(g)
        coordinates = [values(get, g) for get in gets]
        done: set[tuple[int, ...]] = set()
        for i, thread in one_by_one(g):
            start = _start(coordinates, i)
            same = (thread // 32, int(map_[i]), int(from_[i]), *start)
            if same in done and not op:  # a warp stores the same box once: CUTLASS elects no lane
                bulk_agents(g.batch, thread)
                continue
            done.add(same)
            box = Box(g, map_at(g, int(map_[i]), thread), start, thread, combines=bool(op),
                      moves=moves)  # fmt: skip
            _store_box(g, box, int(from_[i]), op)

    return run


def _store_box(g: Group, box: Box, at: int, op: str) -> None:
    thread, batch = box.thread, g.batch
    reader, writer = bulk_agents(batch, thread)
    whole = box.shared(g, at)
    # what lies outside the array is not read either: it need not have been written
    source = Region(whole.arena, whole.index[box.inside], whole.unit)
    async_read(batch, (thread,), source, reader)
    source.check_written(thread)
    data = source.read()
    if op:
        box.outside.check_written(thread)
        data = reduced(op, box.outside.read(), data, box.tensor.dtype)
    async_write(batch, (thread,), box.outside, writer, atomic=bool(op))
    box.outside.write(data, thread)
    moved(batch, source, box.outside, bool(op))


@effect("bulk.tensor_store")
def _tensor_store(site: Site) -> Run:
    return _store(site, "")


@effect("bulk.tensor_reduce")
def _tensor_reduce(site: Site) -> Run:
    return _store(site, site.word("redop"))


@effect("bulk.prefetch_map")
def _prefetch_map(site: Site) -> Run:
    at = address(site, "a")

    def run(g: Group) -> None:
        addresses = at(g)
        if site.word("P") != "param":
            for i, thread in one_by_one(g):
                map_at(g, int(addresses[i]), thread)

    return run


@effect("bulk.prefetch", "bulk.prefetch_tensor")
def _prefetch(site: Site) -> Run:
    return lambda g: None
