"""Memory of results: used again once nothing refers to it, and never before."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from stagefuse.runtime.memory import ALIGNMENT, KEYS, ResultPool, pointer_to

SHAPE, F32 = (50, 100), np.dtype(np.float32)


def made(pool: ResultPool) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = pool.array(SHAPE, F32, 20_000)
    assert found.shape == SHAPE and found.dtype == F32 and found.flags.c_contiguous
    assert found.flags.writeable and pointer_to(found) % ALIGNMENT == 0
    return found


def kept_by(pool: ResultPool) -> list[int]:
    """The sizes of a pool's blocks in bytes."""
    both = [*pool._older.values(), *pool._younger.values()]
    return [block.whole.nbytes for blocks in both for block in blocks]


KEEPERS: dict[str, Callable[[Any], Any]] = {
    "itself": lambda a: a,
    "a view of a view": lambda a: a[1:].view(np.int32).T[3],
    "a buffer": memoryview,
    "what owns the elements": lambda a: a.base,
    "ctypes": lambda a: a.ctypes,
}


@pytest.mark.parametrize("keeper", KEEPERS)
def test_memory_is_used_again_when_nothing_refers_to_it(keeper: str) -> None:
    pool = ResultPool()
    first = made(pool)
    place = pointer_to(first)
    kept = KEEPERS[keeper](first)
    del first
    others = [made(pool) for _ in range(5)]
    assert len({place, *map(pointer_to, others)}) == 6
    del kept
    assert place in [pointer_to(a) for a in (made(pool), *[made(pool) for _ in range(3)])]


def test_no_more_is_kept_than_the_limit() -> None:
    pool = ResultPool(limit=50_000)
    many = [made(pool) for _ in range(4)]  # of which the last two are not kept
    assert len(set(map(pointer_to, many))) == 4
    many.clear()
    other = pool.array((10_000,), F32, 40_000)  # in place of one of them
    assert pool._bytes <= 50_000 and kept_by(pool) == [40_000], other.shape
    pool.clear()
    del other
    assert made(pool) is not None and not kept_by(pool)


def test_blocks_of_shapes_not_asked_for_lately_are_let_go() -> None:
    pool = ResultPool()
    place, used = pointer_to(made(pool)), pool.array((7, 9), F32, 252)
    used[:] = 3
    memory = weakref.ref(pool.array((11,), F32, 44).base)
    for extent in range(100, 100 + 3 * KEYS):
        assert pool.array((extent,), F32, 4 * extent).shape == (extent,)
        if extent % (KEYS // 2) == 0:  # this one is asked for again and again
            assert pointer_to(made(pool)) == place
    assert memory() is None and (used == 3).all()
    kept = kept_by(pool)
    assert KEYS <= len(kept) <= 2 * KEYS and sum(kept) == pool._bytes and 252 not in kept
    others = [pool.array((7, 9), F32, 252) for _ in range(5)]
    assert pointer_to(used) not in map(pointer_to, others)


@pytest.mark.parametrize("shapes", [0, 3 * KEYS])
def test_threads_share_no_memory(shapes: int) -> None:
    pool = ResultPool()

    def work(number: int) -> bool:
        same = True
        for turn in range(300):
            for extent in range(turn % 7 * shapes // 7, (turn % 7 + 1) * shapes // 7):
                pool.array((extent,), F32, 4 * extent)
            a, b = made(pool), made(pool)
            a[:], b[:] = number, -number
            same = same and bool((a == number).all() and (b == -number).all())
        return same

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(1, 5)))
    assert sum(kept_by(pool)) == pool._bytes
