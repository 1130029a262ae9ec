"""CUDA C++ whose threads work together in warps and blocks, compiled by nvcc, against NumPy."""

import numpy as np
import pytest

from .fixtures import Array, close, fault, launch, product_error


def sums(x: Array) -> Array:
    """The error of summing all of `x` in f32."""
    return product_error(x.reshape(1, -1), np.ones((x.size, 1), np.float32))[0, 0]


@pytest.fixture
def values(rng: np.random.Generator) -> Array:
    return rng.uniform(-1, 1, 700).astype(np.float32)


def test_block_sum(values: Array) -> None:
    out = np.zeros(1, np.float32)
    launch("reduce", "block_sum", np.int32(700), values, out, grid=2, block=256)
    close(out, values.astype(np.float64).sum(keepdims=True), sums(values))


@pytest.mark.parametrize(
    "variant, kind",
    [
        ("MISSING_SYNC", "race"),
        ("UNINITIALISED", "uninitialised"),
        ("DIVERGENT_BARRIER", "barrier"),
    ],
)
def test_block_sum_with_a_bug(variant: str, kind: str, values: Array) -> None:
    out = np.zeros(1, np.float32)
    args = (np.int32(700), values, out)
    fault(kind, f"reduce.{variant}", "block_sum", *args, grid=1, block=256)


def test_scan(rng: np.random.Generator) -> None:
    x = rng.integers(-100, 100, 250).astype(np.int32)
    y = np.zeros_like(x)
    launch("reduce", "inclusive_scan", np.int32(250), x, y, grid=1, block=256)
    assert np.array_equal(y, np.cumsum(x))


def test_softmax(rng: np.random.Generator) -> None:
    x = rng.uniform(-5, 5, (3, 150)).astype(np.float32)
    y = np.zeros_like(x)
    launch("reduce", "softmax", np.int32(150), x, y, grid=3, block=96)
    e = np.exp(x.astype(np.float64) - x.max(1, keepdims=True))
    # exp of up to -10: its argument carries 10 ulp, twice, and the sum of 150 terms as many as that
    close(y, e / e.sum(1, keepdims=True), 200 * 2.0**-23)


def test_layer_norm(rng: np.random.Generator) -> None:
    x, gain, bias = (rng.uniform(-2, 2, s).astype(np.float32) for s in ((2, 130), 130, 130))
    y = np.zeros_like(x)
    args = (np.int32(130), np.float32(1e-5), x, gain, bias, y)
    launch("reduce", "layer_norm", *args, grid=2, block=64, shared_bytes=130 * 4)
    d = x.astype(np.float64) - x.mean(1, keepdims=True, dtype=np.float64)
    expected = d / np.sqrt((d * d).mean(1, keepdims=True) + 1e-5) * gain + bias
    # sums of 130 terms below 4, scaled by about 1 (the deviation of a uniform on -2..2) and 2
    close(y, expected, 2 * 130 * 4 * 2.0**-24)


def test_histogram(rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, 500).astype(np.uint8)
    out = np.zeros(10, np.uint32)
    args = (np.int32(500), np.int32(10), x, out)
    launch("reduce", "histogram", *args, grid=2, block=64, shared_bytes=40)
    assert np.array_equal(out, np.bincount(x % 10, minlength=10))


def test_atomics(rng: np.random.Generator) -> None:
    x = rng.integers(1, 1000, 200).astype(np.int32)
    i32 = np.array([0, 2**31 - 1, 0, 0, -1, 0, 0, 0], np.int32)
    u64, f32, f64 = np.zeros(2, np.uint64), np.zeros(2, np.float32), np.zeros(1)
    launch("reduce", "atomics", np.int32(200), x, i32, u64, f32, f64, grid=4, block=64)
    reduced = [np.bitwise_or.reduce(x), np.bitwise_and.reduce(x), np.bitwise_xor.reduce(x)]
    # increments wrap after 9, decrements of 0 give 9: 200 of either come back to 0
    assert [int(v) for v in i32] == [x.sum(), x.min(), x.max(), *reduced, 0, 0]
    assert [int(v) for v in u64] == [x.sum(), int(x.max()) * 977]
    assert [float(v) for v in (*f32, *f64)] == [x.sum(), x.max(), x.sum()]


def votes_reference(v: Array) -> Array:
    lane = np.arange(32)
    out = np.zeros((32, 12), np.int64)
    out[:, 0] = sum((int(x) & 1) << i for i, x in enumerate(v))
    out[:, 1] = np.any(v > 90)
    out[:, 2] = np.all(v >= 0)
    out[:, 3] = [sum(int(x & 7 == y & 7) << i for i, x in enumerate(v)) for y in v]
    same = np.all(v >> 8 == v[0] >> 8)
    out[:, 4] = 2**32 - 1 if same else 0
    out[:, 5] = same
    out[:, 6], out[:, 7], out[:, 8] = v.sum(), v.max(), np.bitwise_xor.reduce(v)
    out[:, 9] = v[lane & ~7 | (lane ^ 5) & 7]
    out[:, 10] = v[np.where(lane % 16 + 3 < 16, lane + 3, lane)]
    odd = v[v & 1 == 1]
    out[v & 1 == 1, 11] = odd.sum() + len(odd)
    return out % 2**32


@pytest.mark.parametrize("high", [256, 600])
def test_votes(high: int, rng: np.random.Generator) -> None:
    x = rng.integers(0, high, 64).astype(np.int32)
    y = np.zeros((64, 12), np.uint32)
    launch("reduce", "votes", x, y, grid=1, block=64)
    assert np.array_equal(y[:32], votes_reference(x[:32]))
    assert np.array_equal(y[32:], votes_reference(x[32:]))


def test_votes_of_a_block(rng: np.random.Generator) -> None:
    x = rng.integers(0, 110, 96).astype(np.int32)
    y = np.zeros((96, 3), np.int32)
    launch("reduce", "block_votes", x, y, grid=1, block=96)
    assert np.array_equal(y[:, 0], np.full(96, (x & 1).sum()))
    assert np.all((y[:, 1] != 0) == np.all(x < 100)) and np.all((y[:, 2] != 0) == np.any(x == 42))


def test_tiles_of_a_warp(rng: np.random.Generator) -> None:
    x = rng.integers(0, 100, 64).astype(np.int32)
    y = np.zeros((64, 4), np.int32)
    launch("reduce", "tiles", x, y, grid=1, block=64)
    expected = np.zeros((64, 4), np.int64)
    for i in range(64):
        quarter, warp = x[i & ~7 : (i & ~7) + 8], x[i & ~31 : (i & ~31) + 32]
        odd = [j for j in range(32) if warp[j] & 1]
        extra = 1000 * len(odd) + odd.index(i & 31) if x[i] & 1 else 0
        expected[i] = (
            quarter.sum() + extra,
            warp.max(),
            -1 if i % 8 == 0 else x[i - 1],
            np.any(quarter > 50) + 2 * (i // 8 % 4),
        )
    assert np.array_equal(y, expected)


def test_transpose(rng: np.random.Generator) -> None:
    x = rng.uniform(-1, 1, (40, 50)).astype(np.float32)
    y = np.zeros((50, 40), np.float32)
    args = (np.int32(40), np.int32(50), x, y)
    launch("tile", "transpose", *args, grid=(2, 2, 1), block=(32, 8, 1))
    assert np.array_equal(y, x.T)
    sizes = {"grid": (2, 2, 1), "block": (32, 8, 1)}
    fault("race", "tile.MISSING_SYNC", "transpose", *args, **sizes)


def test_matmul(rng: np.random.Generator) -> None:
    m, n, k = (int(v) for v in rng.integers(1, 40, 3))
    a, b = (rng.uniform(-1, 1, s).astype(np.float32) for s in ((m, k), (k, n)))
    c = np.zeros((m, n), np.float32)
    args = (*np.int32([m, n, k]), a, b, c)
    launch("tile", "matmul", *args, grid=((n + 15) // 16, (m + 15) // 16, 1), block=(16, 16, 1))
    close(c, a.astype(np.float64) @ b, product_error(a, b))


def test_matmul_reads_past_a_row(rng: np.random.Generator) -> None:
    a, b, c = (rng.uniform(-1, 1, s).astype(np.float32) for s in ((16, 8), (8, 16), (16, 16)))
    args = (*np.int32([16, 16, 8]), a, b, c)
    fault("out-of-bounds", "tile.OFF_BY_ONE", "matmul", *args, grid=1, block=(16, 16, 1))


def test_async_copies(rng: np.random.Generator) -> None:
    x = rng.integers(-50, 50, 128 * 5).astype(np.float32)
    y = np.zeros_like(x)
    args = (np.int32(x.size), x, y)
    launch("tile", "stencil_async", *args, grid=1, block=128)
    padded = np.concatenate([[0], x, [0]])
    assert np.array_equal(y, padded[:-2] + x + padded[2:])
    with pytest.raises(Exception) as caught:
        launch("tile.EARLY_READ", "stencil_async", *args, grid=1, block=128)
    assert caught.value.kind in ("race", "uninitialised")  # type: ignore[attr-defined]


def test_tiles_vote_each_for_themselves() -> None:
    """Four quarters of a warp vote in one instruction, each with its own mask."""
    x = np.zeros(32, np.int32)
    x[:8] = 60
    y = np.zeros((32, 4), np.int32)
    launch("reduce", "tiles", x, y, grid=1, block=32)
    assert (y[:, 3] & 1).tolist() == [1] * 8 + [0] * 24


@pytest.mark.left_open  # what stands in the gaps
def test_structures_with_gaps(rng: np.random.Generator) -> None:
    x = rng.uniform(-1, 1, 32).astype(np.float32)
    y = np.zeros(32, np.dtype({"names": "abc", "formats": "i1 f4 i2".split(), "offsets": [0, 4, 8],
                               "itemsize": 12}))  # fmt: skip
    launch("reduce", "reverse_structs", x, y.view(np.uint8), grid=1, block=32)
    assert np.array_equal(y["b"], x[::-1]) and np.array_equal(y["a"], np.arange(31, -1, -1))


def test_tiles_of_two_warps(rng: np.random.Generator) -> None:
    x = rng.integers(-100, 100, 128).astype(np.int32)
    y = np.zeros_like(x)
    launch("reduce", "large_tiles", x, y, grid=1, block=128)
    assert np.array_equal(y, np.repeat(x.reshape(2, 64).sum(1), 64))
