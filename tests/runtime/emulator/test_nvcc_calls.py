"""CUDA C++ with functions, local arrays, constants and output, compiled by nvcc."""

import numpy as np
import pytest

from stagefuse.runtime import emulator

from .fixtures import close, launch, module


def test_recursion() -> None:
    x = np.arange(32, dtype=np.int32) % 9
    y = np.zeros_like(x)
    launch("calls", "recursion", x, y, grid=1, block=32)
    assert y.tolist() == [[0, 1, 1, 2, 3, 5, 8, 13, 21][v] for v in x]


def test_structures_passed_and_returned(rng: np.random.Generator) -> None:
    x = rng.uniform(-1, 1, (32, 4)).astype(np.float32)
    by = rng.integers(0, 4, 32).astype(np.int32)
    y = np.zeros_like(x)
    launch("calls", "structs", x, by, y, grid=1, block=32)
    assert np.array_equal(y, [np.roll(v, -b) for v, b in zip(x, by, strict=True)])


def test_pointers_to_functions(rng: np.random.Generator) -> None:
    which, x = rng.integers(0, 3, 64).astype(np.int32), rng.integers(-9, 9, 64).astype(np.int32)
    y = np.zeros_like(x)
    launch("calls", "indirect", which, x, y, grid=1, block=64)
    assert np.array_equal(y, np.choose(which, [2 * x, x * x, -x]))


def test_virtual_functions(rng: np.random.Generator) -> None:
    x = rng.integers(-9, 9, 32).astype(np.float32)
    y = np.zeros_like(x)
    launch("calls", "virtuals", x, y, grid=1, block=32)
    assert np.array_equal(y, np.where(np.arange(32) % 3, x * x, 3 * (x + 1) ** 2))


def test_local_array(rng: np.random.Generator) -> None:
    x = rng.integers(-100, 100, (32, 8)).astype(np.int32)
    y = np.zeros_like(x)
    launch("calls", "local_sort", x, y, grid=1, block=32)
    assert np.array_equal(y, np.sort(x, axis=1))


def test_past_a_local_array() -> None:
    x, y = np.full((32, 8), 7, np.int32), np.zeros((32, 8), np.int32)
    # behind the array other locals of the thread may lie, which nothing wrote
    with pytest.raises(emulator.Fault) as caught:
        launch("calls.OFF_BY_ONE", "local_sort", x, y, grid=1, block=32)
    assert caught.value.kind in ("out-of-bounds", "uninitialised"), str(caught.value)


def test_constants_and_globals(rng: np.random.Generator) -> None:
    x = rng.uniform(-1, 1, 100).astype(np.float32)
    y = np.zeros_like(x)
    names = module("calls").globals
    names["offsets"][...] = np.array([10, 20, 30, 40], np.int32).view(names["offsets"].dtype)
    before = int(names["counter"].view(np.int32)[0])
    launch("calls", "filter", np.int32(100), x, y, grid=2, block=64)
    taps = np.float32([0.1, 0.2, 0.4, 0.2, 0.1]).astype(np.float64)
    expected = np.convolve(x.astype(np.float64), taps, "same") + (np.arange(100) % 4 + 1) * 10
    close(y, expected, 8 * 2.0**-24 * 42)
    assert int(module("calls").globals["counter"].view(np.int32)[0]) == before + 100


def test_printing() -> None:
    x = np.arange(32, dtype=np.float32) / 4
    record = launch("calls", "print", x, grid=1, block=32)
    assert "".join(record.printed) == "row 0: 0.000000\nrow 1: 0.250000\n"


def test_assertion_that_fails() -> None:
    with pytest.raises(Exception, match="x\\[threadIdx.x\\] >= 0.f"):
        launch("calls", "print", np.full(32, -1, np.float32), grid=1, block=32)


def test_branch_table(rng: np.random.Generator) -> None:
    code = rng.integers(0, 256, 16).astype(np.uint8)
    x = rng.integers(0, 1000, 32).astype(np.int32)
    y = np.zeros_like(x)
    launch("calls", "interpret", code, x, y, grid=1, block=32)
    for t in range(32):
        v = int(x[t])
        for i in range(6):
            o = i + 3
            choices = (
                *(v + o, v - o, v * o, abs(v) // o * (1 if v >= 0 else -1)),
                *(abs(v) % (o + 100) * (1 if v >= 0 else -1), v & ~o, v | o, v ^ o),
            )
            v = (choices[code[(t + i) & 15] & 7] + 2**31) % 2**32 - 2**31
        assert y[t] == v
