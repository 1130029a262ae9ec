"""Accesses to memory: addresses to places in arenas, with all checks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.dsl.frozen import frozen

from .arrays import distinct
from .clocks import LANES
from .errors import Stop
from .memory import (
    ALLOCATION_BITS,
    CALL_PARAM,
    LOCAL_WINDOW,
    PARAM_WINDOW,
    RANK_BITS,
    SHARED_WINDOW,
    WINDOW_BITS,
    Arena,
    check_aligned,
)
from .special import cluster_rank
from .turns import wrote

if TYPE_CHECKING:
    from .machine import Batch, Group

Array = NDArray[Any]


@frozen
class Part:
    """Places in one arena, for the threads of a group at `where` (`None`: all)."""

    arena: Arena
    index: Array
    where: Array | None
    threads: Array
    space: str

    @property
    def unpacked(self) -> tuple[Arena, Array, Array | None, Array, str]:
        return self.arena, self.index, self.where, self.threads, self.space


def places(g: Group, space: str, addresses: Array, size: int, threads: Array) -> list[Part]:
    """Where accesses of `size` bytes go; almost always one arena.

    Raises: Stop where an access is misaligned or out of bounds.
    """
    try:
        check_aligned(addresses, size, threads)
    except Stop as stop:
        bad = int(addresses[np.flatnonzero(addresses & (size - 1))[0]])
        found = g.batch.machine.heap.place(bad) if space in ("", "global", "const") else ""
        stop.message += f" ({found})" if found else ""
        raise
    return _in_space(g, space, addresses, size, threads)


def _in_space(g: Group, space: str, addresses: Array, size: int, threads: Array) -> list[Part]:
    batch = g.batch
    match space:
        case "shared" | "shared::cta" | "shared::cluster":
            return [_shared(batch, addresses, size, threads)]
        case "global" | "const":
            return _global(g, addresses, size, threads)
        case "local":
            return [_strided(batch.local, batch.local_base, addresses, size, threads, "local")]
        case "param" | "param::entry":
            if not int(addresses[0]) & CALL_PARAM:
                return [_flat(batch.machine.params, addresses, size, threads, "param")]
            return _call_params(g, addresses, size, threads)
        case _:
            return _generic(g, addresses, size, threads)


def _generic(g: Group, addresses: Array, size: int, threads: Array) -> list[Part]:
    if int(addresses.max()) < SHARED_WINDOW and int(addresses.min()) >= 0:
        return _global(g, addresses, size, threads)
    windows = addresses >> WINDOW_BITS
    parts = []
    for window in np.unique(windows):
        name = {SHARED_WINDOW: "shared", LOCAL_WINDOW: "local", PARAM_WINDOW: "param::entry",
                0: "global"}.get(int(window) << WINDOW_BITS)  # fmt: skip
        where = np.flatnonzero(windows == window)
        inside = addresses[where] - (int(window) << WINDOW_BITS)
        if name is None:
            bad = int(addresses[where[0]]) & ((1 << 64) - 1)
            raise Stop("out-of-bounds", f"no memory at {bad:#x}", int(threads[where[0]]))
        if name == "param::entry":
            found = [_flat(g.batch.machine.params, inside, size, threads[where], "param")]
        else:
            found = _in_space(g, name, inside, size, threads[where])
        if len(where) == len(addresses):
            return found
        parts += [replace(p, where=where if p.where is None else where[p.where]) for p in found]
    return parts


def _global(g: Group, addresses: Array, size: int, threads: Array) -> list[Part]:
    heap = g.batch.machine.heap
    low, high = int(addresses.min()), int(addresses.max())
    number = low >> ALLOCATION_BITS
    if number == high >> ALLOCATION_BITS:
        if not 0 < number <= len(heap.arenas):
            at = f"no memory at {low & ((1 << 64) - 1):#x}"
            raise Stop("out-of-bounds", at + heap.nearest(low), int(threads[addresses.argmin()]))
        arena = heap.arenas[number - 1]
        base = number << ALLOCATION_BITS
        if high - base + size > arena.limit:
            stop = _outside(arena, addresses - base, size, threads)
            raise Stop(stop.kind, stop.message + heap.nearest(high), stop.thread)
        space = "const" if arena.constant else "global"
        return [Part(arena, addresses - base, None, threads, space)]
    parts = []
    numbers = addresses >> ALLOCATION_BITS
    for number in np.unique(numbers):
        where = np.flatnonzero(numbers == number)
        for part in _global(g, addresses[where], size, threads[where]):
            parts.append(replace(part, where=where))
    return parts


def _outside(arena: Arena, offsets: Array, size: int, threads: Array) -> Stop:
    bad = (offsets < 0) | (offsets + size > arena.limit)
    at = int(np.flatnonzero(bad)[0])
    text = (f"{size} bytes at offset {int(offsets[at])} of {arena.title}, which has "
            f"{arena.limit} bytes")  # fmt: skip
    return Stop("out-of-bounds", text, int(threads[at]))


def _flat(arena: Arena, offsets: Array, size: int, threads: Array, space: str) -> Part:
    if int(offsets.min()) < 0 or int(offsets.max()) + size > arena.limit:
        raise _outside(arena, offsets, size, threads)
    return Part(arena, offsets, None, threads, space)


def _strided(
    arena: Arena, bases: Array, offsets: Array, size: int, threads: Array, space: str
) -> Part:
    if int(offsets.min()) < 0 or int(offsets.max()) + size > arena.limit:
        raise _outside(arena, offsets, size, threads)
    return Part(arena, offsets + bases[threads], None, threads, space)


def _shared(batch: Batch, addresses: Array, size: int, threads: Array) -> Part:
    high = int(addresses.max())
    if high < 1 << RANK_BITS:
        return _strided(batch.shared, batch.shared_base, addresses, size, threads, "shared")
    ranks, offsets = addresses >> RANK_BITS, addresses & ((1 << RANK_BITS) - 1)
    if int(ranks.max()) > prod(batch.machine.cluster):  # no `mapa` made it
        wrapped = (addresses + (1 << 31)) % (1 << 32) - (1 << 31)
        raise _outside(batch.shared, wrapped, size, threads)
    if int(offsets.max()) + size > batch.shared.limit:
        raise _outside(batch.shared, offsets, size, threads)
    blocks = peer_blocks(batch, threads, ranks - 1)
    blocks = np.where(ranks == 0, batch.block_of[threads], blocks)
    running: Array = np.logical_or.reduce(batch.alive.reshape(batch.blocks, -1), axis=1)
    ended = ~running[blocks]
    if ended.any():
        raise Stop("race", "shared memory of a block that has ended", int(threads[ended][0]))
    _check_started(batch, threads, blocks)
    index = offsets + blocks * batch.shared.stride
    return Part(batch.shared, index, None, threads, "shared")


def _check_started(batch: Batch, threads: Array, blocks: Array) -> None:
    """Raises: Stop where threads use shared memory of blocks that need not have started yet.

    A block has started where the barrier of its cluster opened, even a relaxed one, or where the
    thread comes behind something that it did (CUDA C++ programming guide, "Distributed shared
    memory").
    """
    met, races = batch.state.get("cluster_barrier"), batch.machine.races
    if races is None or met is not None and met.opened[met.of[threads]].all():
        return
    clocks = races.clocks(batch)
    for thread, block in zip(threads.tolist(), blocks.tolist(), strict=True):
        known = clocks.foreign.get(thread >> 5, {}).keys() | clocks.of_thread(thread).keys()
        number = batch.first + block
        if block != batch.block_of[thread] and known.isdisjoint((number, number + LANES)):
            raise Stop("race", "shared memory of another block is used with nothing before that "
                       "shows that the block has started", thread)  # fmt: skip


def shared_byte(batch: Batch, address: int, size: int, thread: int) -> int:
    """Where the shared memory of one access of a thread begins, in that of the batch."""
    rank, offset = divmod(address, 1 << RANK_BITS)
    peers: dict[tuple[int, int], int] = batch.state.setdefault("peers", {})
    if not address % size and rank >= 0 and offset <= batch.shared.limit - size:
        own = thread // batch.stride
        block = peers.get((own, rank), -1) if rank else own
        if block == own or block >= 0 and _is_running(batch, block):
            if block != own:
                _check_started(batch, np.array([thread]), np.array([block]))
            return offset + block * batch.shared.stride
    one, who = np.array([address], np.int64), np.array([thread])
    check_aligned(one, size, who)
    index = int(_shared(batch, one, size, who).index[0])
    peers[thread // batch.stride, rank] = index // batch.shared.stride
    return index


def _is_running(batch: Batch, block: int) -> bool:
    return bool(batch.alive[block * batch.stride : (block + 1) * batch.stride].any())


def peer_blocks(batch: Batch, threads: Array, ranks: Array) -> Array:
    """The block within the batch that has a rank in the cluster of each thread.

    Raises: Stop where the cluster has no such rank.
    """
    cx, cy, cz = batch.machine.cluster
    gx, gy, _ = batch.machine.grid
    bad = (ranks < -1) | (ranks >= cx * cy * cz)
    if bad.any():
        at = int(np.flatnonzero(bad)[0])
        raise Stop("out-of-bounds", f"the cluster has no block of rank {int(ranks[at])}",
                   int(threads[at]))  # fmt: skip
    block = batch.first + batch.block_of[threads]
    own = cluster_rank(batch, block)

    def linear(rank: Array) -> Array:
        found: Array = (rank % cx) + gx * (rank // cx % cy) + gx * gy * (rank // (cx * cy))
        return found

    moved: Array = block - linear(own) + linear(ranks) - batch.first
    return moved


def _call_params(g: Group, addresses: Array, size: int, threads: Array) -> list[Part]:
    inside = addresses ^ CALL_PARAM
    number = int(inside[0]) >> 32
    if not 0 <= number < len(g.frame.params):
        raise Stop("out-of-bounds", f"no parameter at {int(addresses[0]):#x}", int(threads[0]))
    arena = g.frame.params[number]
    offsets = inside - (number << 32)
    if int(offsets.min()) < 0 or int(offsets.max()) + size > arena.limit:
        raise _outside(arena, offsets, size, threads)
    return [Part(arena, offsets + threads * arena.stride, None, threads, "param")]


def load(
    g: Group, space: str, addresses: Array, dtype: np.dtype[Any], many: int, *,
    order: str = "", narrow: bool = False, repacks: Callable[[Part], bool] = lambda part: False,
    read_only: bool = False, unread: Callable[[Part, Stop], None] | None = None,
) -> list[Array]:  # fmt: skip
    """Elements from memory: `many` of them one after the other, for each thread.

    `read_only` says that the launch may not have written them, `repacks` whether the program only
    puts those that nothing wrote into words in memory: in local memory they may be read for that.
    `unread` is told of elements of shared memory that nothing wrote, which are read then.
    """
    item = dtype.itemsize
    threads = g.threads()
    machine = g.batch.machine
    size = item * many
    parts = places(g, space, addresses, size, threads)
    values: list[Array] = []
    for part in parts:
        arena, index, where, who, kind = part.unpacked
        count(g, kind, "read", index, size, who)
        if machine.races is not None and kind in ("global", "shared"):
            machine.races.read(g.batch, arena, index, size, who, not order, narrow)
            if order == "acquire":
                machine.races.acquire(g.batch, arena, index, who, narrow)
            elif order:
                machine.races.observe(g.batch, arena, index, who, narrow)
            if order == "volatile" and kind == "shared":
                machine.races.in_step(g.batch, arena, index, size, who)
            if read_only:
                machine.races.check_unchanged(arena, index, size, who)
        if arena.held is not None:
            arena.check_free(index, size, who)
        if arena.valid is not None:
            try:
                check_written(arena, index, size, who, item)
            except Stop as stop:
                if kind == "shared" and unread is not None:
                    unread(part, stop)
                elif kind != "local" or not repacks(part):
                    raise
        at = index // item
        view = arena.view(dtype)
        found = [view[at + j] if j else view[at] for j in range(many)]
        if where is None:
            return found
        if not values:
            values = [np.empty(g.n, dtype) for _ in range(many)]
        for whole, some in zip(values, found, strict=True):
            whole[where] = some
    return values


def check_written(
    arena: Arena, index: Array, size: int, threads: Array, item: int | None = None
) -> None:
    """Raises: Stop where nothing wrote an element of `item` bytes.

    One that was written in part passes: compilers copy structs with their gaps.
    """
    each = next(n for n in (8, 4, 2, 1) if size % n == 0)
    if all(arena.unwritten(index + offset, each) is None for offset in range(0, size, each)):
        return
    each = min(item or each, 8)
    for offset in range(0, size, each):
        missing = arena.untouched(index + offset, each)
        if missing is not None:
            at = int(np.flatnonzero(missing)[0])
            raise Stop("uninitialised", f"nothing wrote {arena.place(int(index[at]) + offset)}",
                       int(threads[at]))  # fmt: skip


def store(
    g: Group, space: str, addresses: Array, values: list[Array], *, order: str = "",
    narrow: bool = False,
) -> None:  # fmt: skip
    """Elements to memory, one after the other for each thread."""
    item = values[0].dtype.itemsize
    size = item * len(values)
    machine = g.batch.machine
    machine.progress += 1
    if order == "release" and machine.races is not None:
        machine.races.release(g.batch, g.threads(), narrow)
    for part in places(g, space, addresses, size, g.threads()):
        arena, index, where, who, kind = part.unpacked
        count(g, kind, "written", index, size, who)
        if arena.constant or kind == "param" and arena is machine.params:
            raise Stop("out-of-bounds", f"{arena.name} cannot be written", int(who[0]))
        if arena.held is not None:
            arena.check_free(index, size, who)
        mine = values if where is None else [_picked(v, where) for v in values]
        if machine.races is not None and kind in ("global", "shared"):
            machine.races.write(g.batch, arena, index, size, who, not order, mine, narrow)
            if order == "volatile" and kind == "shared":
                machine.races.stored_together(g.batch, who)
        for j, value in enumerate(mine):
            arena.store(index + j * item if j else index, value)
    if order and g.batch.ready:
        wrote(g, addresses)


def _picked(values: Any, where: Array) -> Any:
    return values[where] if getattr(values, "ndim", 0) else values


def count(g: Group, space: str, what: str, index: Array, size: int, threads: Array) -> None:
    machine = g.batch.machine
    key = (space, what)
    machine.traffic[key] = machine.traffic.get(key, 0) + len(index) * size
    if space == "shared":
        machine.conflicts += bank_conflicts(index, size, threads, g.batch.stride)


def bank_conflicts(index: Array, size: int, threads: Array, stride: int) -> int:
    """How many more cycles than needed an access to shared memory takes.

    32 banks of 4 bytes; lanes that want different words of a bank wait for each other. An access
    of 8 or 16 bytes is done for half or a quarter of a warp at a time. Blocks, of `stride` threads
    each, mostly want what the first of them wants.
    """
    per = 32 if size <= 4 else 128 // size
    words = index >> 2
    n = len(index)
    firsts = threads[::per]
    whole = n % per == 0 and bool(
        ((threads[per - 1 :: per] - firsts == per - 1) & (firsts % per == 0)).all()
    )
    if not whole:
        return _conflicts(words, threads // per, max(size // 4, 1))
    rows = words.reshape(-1, per)
    relative = rows - rows[:, :1]
    for period in (1, stride // per):
        first = relative[:period]
        if period > 1 and len(rows) < 4 * period or len(rows) % period:
            continue
        if (relative.reshape(-1, *first.shape) == first).all():
            each = sum(_of_one(row.tobytes(), max(size // 4, 1)) for row in first)
            return each * (len(rows) // period)
    return _conflicts(words, np.arange(n) // per, max(size // 4, 1))


@lru_cache(1 << 12)
def _of_one(words: bytes, each: int) -> int:
    """Extra cycles of one part, by the words it wants."""
    found = np.frombuffer(words, np.int64)
    return _conflicts(found, np.zeros(len(found), np.int64), each)


def _conflicts(words: Array, part: Array, each: int) -> int:
    """Extra cycles: for each part the most different words of one bank, less one."""
    part = part - int(part.min())
    all_words = (words[:, None] + np.arange(each)).ravel()
    parts = np.repeat(part, each)
    low = int(all_words.min())
    span = int(all_words.max()) - low + 1
    which = distinct(parts * span + (all_words - low))
    bank = (which % span + low) % 32 + 32 * (which // span)
    degree = np.bincount(bank, minlength=32 * (int(parts.max()) + 1)).reshape(-1, 32).max(axis=1)
    return int(np.maximum(degree - 1, 0).sum())
