"""CUDA C++ that orders threads by flags, locks and barriers, compiled by nvcc."""

import numpy as np
import pytest

from .fixtures import fault, launch


def test_named_barriers(rng: np.random.Generator) -> None:
    x = rng.integers(0, 100, (5, 32)).astype(np.int32)
    y = np.zeros_like(x)
    launch("sync", "named_barriers", np.int32(5), x, y, grid=1, block=64)
    assert np.array_equal(y, 3 * x[:, ::-1])


@pytest.mark.parametrize("variant, kind", [("WRONG_COUNT", "barrier"), ("MISSING_SYNC", "race")])
def test_named_barriers_with_a_bug(variant: str, kind: str) -> None:
    x, y = np.ones((2, 32), np.int32), np.zeros((2, 32), np.int32)
    fault(kind, f"sync.{variant}", "named_barriers", np.int32(2), x, y, grid=1, block=64)


def test_scan_with_look_back(rng: np.random.Generator) -> None:
    n = 5 * 64 - 9
    x = rng.integers(-1000, 1000, n).astype(np.int32)
    y, ticket, state = np.zeros_like(x), np.zeros(1, np.uint32), np.zeros(5, np.uint64)
    launch("sync", "lookback_scan", np.int32(n), x, y, ticket, state, grid=5, block=64)
    assert np.array_equal(y, np.cumsum(x))


def test_flag_that_nobody_sets() -> None:
    x, y = np.ones(128, np.int32), np.zeros(128, np.int32)
    args = (np.int32(128), x, y, np.zeros(1, np.uint32), np.zeros(2, np.uint64))
    fault("deadlock", "sync.NEVER_SET", "lookback_scan", *args, grid=2, block=64)


def test_message_between_blocks() -> None:
    data, flag, out = np.zeros(32, np.int32), np.zeros(1, np.uint32), np.zeros(96, np.int32)
    launch("sync", "message", data, flag, out, grid=3, block=32)
    assert np.array_equal(out[32:], [7 * t + b for b in (1, 2) for t in range(32)])
    args = (np.zeros(32, np.int32), np.zeros(1, np.uint32), out)
    fault("race", "sync.RELAXED", "message", *args, grid=3, block=32)


def test_sum_by_the_last_block(rng: np.random.Generator) -> None:
    x = rng.integers(0, 1000, 4 * 32).astype(np.int32)
    args = (x, np.zeros(4, np.int32), np.zeros(1, np.uint32), np.zeros(1, np.int32))
    launch("sync", "last_block_sum", *args, grid=4, block=32)
    assert args[3][0] == x.sum()


def test_spin_lock() -> None:
    lock, value = np.zeros(1, np.int32), np.ones(1, np.int32)
    launch("sync", "spin_lock", lock, value, grid=3, block=64)
    expected = 1
    for _ in range(6):
        expected = expected * 3 % 1001 + 1
    assert value[0] == expected and lock[0] == 0


def test_lock_taken_by_every_lane() -> None:
    lock, value = np.zeros(1, np.int32), np.zeros(1, np.int32)
    launch("sync", "spin_lock_lanes", lock, value, grid=1, block=32)
    assert value[0] == 32


def test_grid_barrier(rng: np.random.Generator) -> None:
    x = rng.integers(0, 100, 96).astype(np.int32)
    expected = x.copy()
    for step in (1, 2, 3):
        expected = np.roll(expected, -37) + step
    launch("sync", "grid_barrier", np.int32(96), x, np.zeros(1, np.uint32), grid=3, block=32)
    assert np.array_equal(x, expected)


def test_barriers_of_the_library(rng: np.random.Generator) -> None:
    x = rng.integers(0, 100, (4, 64)).astype(np.int32)
    y = np.zeros_like(x)
    launch("sync", "block_barriers", np.int32(4), x, y, grid=1, block=128)
    assert np.array_equal(y, x[:, ::-1] + np.arange(4)[:, None])
