"""Tensor copies: boxes of an array in global memory, to and from shared memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx import syntax as s

from ..access import places
from ..errors import Stop
from ..memory import ALLOCATION_BITS, Arena
from ..operands import Get, address, getter
from ..order import async_read, async_write, bulk_agents
from ..program import Run, Site
from ..swizzle import ALIGNMENT as SWIZZLE_ALIGNMENT
from ..swizzle import swizzle
from ..tensor_map import SIZE, EncodedMap, decode
from . import effect
from .bulk import (
    agent_of,
    deliver,
    destinations,
    one_by_one,
    place,
    put_bytes,
    reduced,
    values,
    written,
)

if TYPE_CHECKING:
    from ..machine import Group

Array = NDArray[Any]


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
    index = np.arange(start, start + SIZE)
    if start + SIZE > len(part.arena.bytes):
        raise Stop("out-of-bounds", "a tensor map has 128 bytes", thread)
    written(part.arena, index, thread)
    found = decode(part.arena.bytes[index].tobytes())
    if found is None:
        raise Stop("uninitialised", f"no tensor map at {at:#x}", thread)
    return found


class Box:
    """One box of a tensor: where its elements lie in global and in shared memory."""

    def __init__(self, g: Group, tensor: EncodedMap, start: tuple[int, ...], thread: int) -> None:
        if len(start) != tensor.rank:
            raise Stop("out-of-bounds", f"{len(start)} coordinates of a map with {tensor.rank} "
                       "dimensions", thread)  # fmt: skip
        self.tensor, self.thread = tensor, thread
        offset, self.inside = tensor.elements(start)
        size = tensor.dtype.itemsize
        each = np.arange(size)
        self.arena, base = _global_arena(g, tensor.address, thread)
        self.index: Array = ((base + offset[self.inside])[:, None] + each).reshape(-1)
        """The bytes of the elements inside the array, in the order of the box."""
        if self.index.size and (self.index.min() < 0 or self.index.max() >= self.arena.limit):
            raise Stop("out-of-bounds", "a tensor map describes more than its allocation", thread)

    def shared(self, g: Group, at: int) -> tuple[Arena, Array]:
        """The bytes of the box at a shared address, `[elements][size]`.

        Raises: Stop where the address is not aligned as the swizzle needs, or out of bounds.
        """
        tensor = self.tensor
        part = place(g, "shared", at, tensor.box_bytes, self.thread, SWIZZLE_ALIGNMENT[0])
        start = int(part.index[0])
        block = start // part.arena.stride * part.arena.stride
        within = start - block + np.arange(tensor.box_bytes)
        within = swizzle(within, tensor.swizzle)
        if int(within.max()) >= part.arena.limit:
            raise Stop("out-of-bounds", "a box ends beyond shared memory", self.thread)
        return part.arena, (block + within).reshape(-1, tensor.dtype.itemsize)


def _global_arena(g: Group, at: int, thread: int) -> tuple[Arena, int]:
    heap, number = g.batch.machine.heap, at >> ALLOCATION_BITS
    if not 0 < number <= len(heap.arenas):
        raise Stop("out-of-bounds", f"a tensor map of no memory, {at:#x}", thread)
    return heap.arenas[number - 1], at - (number << ALLOCATION_BITS)


def _start(coordinates: list[Array], i: int) -> tuple[int, ...]:
    return tuple(int(c[i]) for c in coordinates)


def _load(site: Site, multicast: bool) -> Run:
    to, bar, tensor = (address(site, name) for name in ("d", "m", "t"))
    mask = getter(site, site.operand("mask"), "b16") if multicast else None
    gets = _coordinates(site)

    def run(g: Group) -> None:
        to_, bar_, map_ = to(g), bar(g), tensor(g)
        masks = values(mask, g) if mask is not None else None
        coordinates = [values(get, g) for get in gets]
        for i, thread in one_by_one(g):
            box = Box(g, map_at(g, int(map_[i]), thread), _start(coordinates, i), thread)
            chosen = int(masks[i]) if masks is not None else None
            for at, b in destinations(g, thread, int(to_[i]), int(bar_[i]), chosen):
                _load_box(g, box, at, b)

    return run


def _load_box(g: Group, box: Box, at: int, bar: int) -> None:
    thread, tensor = box.thread, box.tensor
    written(box.arena, box.index, thread)
    agent = agent_of(g, bar, thread)
    async_read(g.batch, (thread,), box.arena, box.index, agent)
    arena, index = box.shared(g, at)
    data = np.empty(index.shape, np.uint8)
    data[:] = tensor.fill_bytes
    data[box.inside] = box.arena.bytes[box.index].reshape(-1, tensor.dtype.itemsize)
    async_write(g.batch, (thread,), arena, index.reshape(-1), agent)
    put_bytes(arena, index, data, thread)
    g.batch.machine.progress += 1
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

    def run(g: Group) -> None:
        map_, from_ = tensor(g), source(g)
        coordinates = [values(get, g) for get in gets]
        for i, thread in one_by_one(g):
            box = Box(g, map_at(g, int(map_[i]), thread), _start(coordinates, i), thread)
            _store_box(g, box, int(from_[i]), op)

    return run


def _store_box(g: Group, box: Box, at: int, op: str) -> None:
    thread, batch = box.thread, g.batch
    reader, writer = bulk_agents(batch, thread)
    arena, index = box.shared(g, at)
    # what lies outside the array is not read either: it need not have been written
    source = index[box.inside].reshape(-1)
    written(arena, source, thread)
    async_read(batch, (thread,), arena, source, reader)
    data = arena.bytes[source]
    if op:
        written(box.arena, box.index, thread)
        data = reduced(op, box.arena.bytes[box.index], data, box.tensor.dtype)
    async_write(batch, (thread,), box.arena, box.index, writer, atomic=bool(op))
    put_bytes(box.arena, box.index, data, thread)
    batch.machine.progress += 1


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
