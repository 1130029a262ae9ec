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


def steps_of_a_grid(rng: np.random.Generator, steps: int) -> tuple[list[np.ndarray], np.ndarray]:
    """Two arrays between which steps alternate, and what is in them in the end."""
    a = rng.standard_normal(200).astype(np.float32)
    b, before, after = np.full_like(a, np.nan), a, a
    for _ in range(steps):
        half, quarter = np.float32(0.5), np.float32(0.25)  # products by these are exact
        before, after = after, half * np.roll(after, -1) + quarter * np.roll(after, 7)
    return [a, b], np.stack([before, after] if steps % 2 else [after, before])


@pytest.mark.parametrize("steps", [1, 4])
@pytest.mark.parametrize("kernel", ["by_groups", "by_counter"])
def test_steps_of_a_grid(
    kernel: str, steps: int, rng: np.random.Generator, is_emulated: bool
) -> None:
    if kernel == "by_groups" and not is_emulated:
        pytest.skip("a GPU wants such a kernel launched as a cooperative one")
    arrays, wanted = steps_of_a_grid(rng, steps)
    arrived = [np.zeros(1, np.uint32)] if kernel == "by_counter" else []
    launch("grid", kernel, np.int32(200), np.int32(steps), *arrays, *arrived, grid=7, block=32)
    assert np.array_equal(arrays, wanted)


def test_a_grid_that_does_not_acquire(rng: np.random.Generator) -> None:
    arrays, _ = steps_of_a_grid(rng, 2)
    args = (np.int32(200), np.int32(2), *arrays, np.zeros(1, np.uint32))
    fault("race", "grid.RELAXED", "by_counter", *args, grid=7, block=32)
