"""What nvcc and CUDA's headers write by themselves: wide integers, heap, stack, packed values."""

import ml_dtypes
import numpy as np

from .fixtures import Array, fault, launch


def test_division_of_128_bits(rng: np.random.Generator) -> None:
    x = rng.integers(0, 2**64, (32, 3), np.uint64) >> rng.integers(0, 63, (32, 3), np.uint64)
    x[:, 2] = np.maximum(x[:, 2], 1)
    y = np.zeros((32, 2), np.uint64)
    launch("library", "divide_128", x, y, grid=1, block=32)
    for (low, high, by), found in zip(x.tolist(), y.tolist(), strict=True):
        assert found[0] | found[1] << 64 == (low | high << 64) // by


def test_memory_of_malloc() -> None:
    y = np.zeros(40, np.int32)
    launch("library", "heap", y, grid=1, block=40)
    assert y.tolist() == [sum((n - 1 - i) * (i + 1) for i in range(n)) for n in range(1, 41)]
    fault("out-of-bounds", "library.OFF_BY_ONE", "heap", y, grid=1, block=40)
    fault("out-of-bounds", "library.USE_AFTER_FREE", "heap", y, grid=1, block=40)


def test_memory_on_the_stack() -> None:
    def stacked(n: int, by: int) -> int:
        inner = stacked(n - 2, by + 1) if n > 3 else 0
        return inner + sum(i * 7 % n * by for i in range(n))

    y = np.zeros(32, np.int32)
    launch("library", "stack", y, np.int32(9), grid=1, block=32)
    assert y.tolist() == [stacked(9 + i % 5, i) - stacked(9, 1) for i in range(32)]
    fault("out-of-bounds", "library", "stack", y, np.int32(900), grid=1, block=32)


def halves(x: Array) -> Array:
    return x.view(np.int16).astype(np.int64).reshape(-1, 2)


def test_packed_values(rng: np.random.Generator) -> None:
    x, z = (rng.integers(0, 2**32, 32, np.uint64).astype(np.uint32) for _ in range(2))
    z[:8] = x[:8]
    y = np.zeros((7, 32), np.uint32)
    launch("library", "packed", x, z, y, grid=1, block=32)
    a, b = halves(x), halves(z)
    total = (a + b).astype(np.int16)
    assert (halves(y[0]) == np.maximum(np.maximum(total, [5, 0]), 0)).all()
    both = np.maximum(x.view(np.int32), z.view(np.int32))
    assert (y[1].view(np.int32) == np.maximum(both, 0)).all()
    assert (halves(y[2]) == np.maximum(np.minimum(a, b), 0)).all()
    with np.errstate(invalid="ignore"):
        greater = x.view(np.float16) > z.view(np.float16)
        wide = [v.view(ml_dtypes.bfloat16).astype(np.float32) for v in (x, z)]
        below, most = wide[0] <= wide[1], np.maximum(*wide)
    assert (y[3].view(np.int16) == np.where(greater, -1, 0)).all()
    assert (y[4].view(np.float16) == greater).all()
    assert (y[5].view(np.int16) == np.where(below, -1, 0)).all()
    found = y[6].view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.array_equal(found, most, equal_nan=True)


def test_atomics_of_vectors(rng: np.random.Generator) -> None:
    x = rng.integers(-9, 9, (64, 4)).astype(np.float32)
    total = np.zeros((2, 4), np.float32)
    launch("library", "add_vectors", total, x, grid=1, block=64)
    assert (total == [x[::2].sum(0), x[1::2].sum(0)]).all()
