"""Memory of results: used again once nothing refers to it, and never before."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest

from stagefuse.runtime.memory import ALIGNMENT, ResultPool, pointer_to

SHAPE, F32 = (50, 100), np.dtype(np.float32)


def made(pool: ResultPool) -> np.ndarray[Any, Any]:
    found: np.ndarray[Any, Any] = pool.array(SHAPE, F32, 20_000)
    assert found.shape == SHAPE and found.dtype == F32 and found.flags.c_contiguous
    assert found.flags.writeable and pointer_to(found) % ALIGNMENT == 0
    return found


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
    kept = sum(len(blocks) for blocks in pool._blocks.values())
    assert pool._bytes <= 50_000 and kept == 1, other.shape
    pool.clear()
    del other
    assert made(pool) is not None and not pool._blocks


def test_threads_share_no_memory() -> None:
    pool = ResultPool()

    def work(number: int) -> bool:
        same = True
        for _ in range(300):
            a, b = made(pool), made(pool)
            a[:], b[:] = number, -number
            same = same and bool((a == number).all() and (b == -number).all())
        return same

    with ThreadPoolExecutor(4) as threads:
        assert all(threads.map(work, range(1, 5)))
