"""Bulk and tensor copies, mbarriers and clusters: CUDA C++ for sm_90, against NumPy."""

import ml_dtypes
import numpy as np
import pytest

from stagefuse.runtime import emulator

from .fixtures import Array, close, fault, launch


def test_bulk_copies_through_two_buffers(rng: np.random.Generator) -> None:
    x = rng.uniform(-1, 1, 256 * 5).astype(np.float32)
    y = np.zeros_like(x)
    record = launch("tma", "bulk_double", np.int32(x.size), x, y, grid=1, block=64)
    assert np.array_equal(y, 2 * x)
    assert record.bytes["global", "read"] == record.bytes["global", "written"] == x.nbytes
    # each byte comes in, is read and written by a thread, and goes out
    assert record.bytes["shared", "read"] == record.bytes["shared", "written"] == 2 * x.nbytes


@pytest.mark.parametrize(
    "variant, kinds",
    [
        ("MISSING_FENCE", ("race",)),
        ("WRONG_BYTES", ("deadlock",)),
        ("WRONG_COUNT", ("deadlock",)),
        ("EARLY_READ", ("race", "uninitialised")),
        ("EARLY_WRITE", ("race",)),
        ("MISALIGNED", ("misaligned",)),
        ("PENDING", ("race",)),
        ("EARLY_USE", ("race", "uninitialised")),
    ],
)
def test_bulk_copies_with_a_bug(variant: str, kinds: tuple[str, ...]) -> None:
    x, y = np.ones(256 * 4 + 4, np.float32), np.zeros(256 * 4, np.float32)
    with pytest.raises(emulator.Fault) as caught:
        launch(f"tma.{variant}", "bulk_double", np.int32(256 * 4), x, y, grid=1, block=64)
    assert caught.value.kind in kinds, str(caught.value)


def swizzled(box: Array, swizzle: int) -> Array:
    """The bytes of a box as a tensor copy lays them out in shared memory that is 1024-aligned.

    Rows of `swizzle` bytes; the 16-byte chunk index is xored with address bits 7 and up (CUDA
    driver API, tensor map swizzles).
    """
    flat = np.ascontiguousarray(box).view(np.uint8).reshape(-1)
    if not swizzle:
        return flat
    at = np.arange(flat.size)
    out = np.empty_like(flat)
    out[at ^ (at >> 3 & {32: 0x10, 64: 0x30, 128: 0x70}[swizzle])] = flat
    return out


def box_of(x: Array, box: tuple[int, ...], start: tuple[int, ...], fill: float = 0) -> Array:
    """The box at `start` (outermost first), `fill` where it leaves the array."""
    index = np.meshgrid(*(np.arange(b) + s for b, s in zip(box, start, strict=True)), indexing="ij")
    inside = np.all([(i >= 0) & (i < n) for i, n in zip(index, x.shape, strict=True)], axis=0)
    taken = x[tuple(np.clip(i, 0, n - 1) for i, n in zip(index, x.shape, strict=True))]
    return np.where(inside, taken, np.array(fill, x.dtype)).astype(x.dtype)


BOXES = [
    (np.float32, (100,), (64,), (20,), 0),
    (np.float32, (100,), (64,), (-8,), 0),
    (np.float32, (20, 40), (8, 32), (3, 16), 0),
    (np.float32, (20, 40), (8, 32), (3, 16), 128),
    (np.float32, (20, 40), (16, 32), (-2, 24), 128),
    (ml_dtypes.bfloat16, (40, 64), (16, 32), (30, 8), 64),
    (ml_dtypes.bfloat16, (40, 64), (16, 16), (0, 56), 32),
    (np.uint8, (40, 64), (8, 48), (3, 32), 0),
    (np.int32, (5, 9, 12), (2, 4, 8), (4, -1, 8), 0),
    (np.float16, (5, 9, 64), (2, 8, 64), (1, 3, 0), 128),
    (np.float32, (3, 4, 5, 8), (2, 2, 2, 4), (1, 1, 4, 4), 0),
]


@pytest.mark.parametrize("dtype, shape, box, start, swizzle", BOXES)
def test_boxes(
    dtype: type,
    shape: tuple[int, ...],
    box: tuple[int, ...],
    start: tuple[int, ...],
    swizzle: int,
    rng: np.random.Generator,
) -> None:
    x = rng.uniform(0, 100, shape).astype(dtype)
    expected = swizzled(box_of(x, box, start), swizzle)
    out = np.zeros(expected.size // 4, np.uint32)
    coordinates = [np.int32(c) for c in reversed(start)]
    coordinates += [np.int32(0)] * (max(3, len(shape)) - len(shape))
    map_ = emulator.TensorMap(x, box=box, swizzle=swizzle)
    args = (map_, np.int32(expected.size), *coordinates, out)
    kernel = f"load_box_{len(shape)}d"
    launch("tma", kernel, *args, grid=1, block=32, shared_bytes=expected.size)
    assert np.array_equal(out.view(np.uint8), expected)


@pytest.mark.parametrize("start", [3, -1, 33])
def test_rows_begin_at_multiples_of_16_bytes(start: int) -> None:
    """As an H200 has it, for which this is an illegal instruction."""
    x, out = np.ones((4, 16), np.float32), np.zeros(128, np.uint32)
    map_ = emulator.TensorMap(x, box=(8, 16))
    args = (map_, np.int32(512), *np.int32([start, 2, 0]), out)
    fault("misaligned", "tma", "load_box_2d", *args, grid=1, block=32, shared_bytes=512)


def test_fill_with_nan() -> None:
    x = np.ones((4, 16), np.float32)
    out = np.zeros(128, np.uint32)
    map_ = emulator.TensorMap(x, box=(8, 16), fill="nan")
    args = (map_, np.int32(512), *np.int32([0, 2, 0]), out)
    launch("tma", "load_box_2d", *args, grid=1, block=32, shared_bytes=512)
    found = out.view(np.float32).reshape(8, 16)
    assert np.all(found[:2] == 1) and np.all(np.isnan(found[2:]))


def test_tensor_stores_and_sums(rng: np.random.Generator) -> None:
    x = rng.integers(-50, 50, (50, 68)).astype(np.float32)
    y = np.zeros((68, 52), np.float32)
    z = rng.integers(-50, 50, (50, 68)).astype(np.float32)
    before = z.copy()
    maps = [emulator.TensorMap(v, box=(32, 32), swizzle=128) for v in (x, y[:, :50], z)]
    launch("tma", "transpose_tiles", *maps, grid=(3, 2, 1), block=64)
    assert np.array_equal(y[:, :50], x.T) and np.array_equal(z, before + x)
    assert not y[:, 50:].any()
    fault("race", "tma.MISSING_FENCE", "transpose_tiles", *maps, grid=(3, 2, 1), block=64)


def test_bulk_reductions(rng: np.random.Generator) -> None:
    x = rng.integers(-50, 50, (4, 64)).astype(np.float32)
    total, top = np.zeros(64, np.float32), np.zeros(64, np.uint32)
    launch("tma", "bulk_reduce", x, total, top, grid=4, block=64)
    assert np.array_equal(total, x.sum(0))
    assert np.array_equal(top.view(np.float32), np.abs(x).max(0))
    fault("race", "tma.MISSING_FENCE", "bulk_reduce", x, total, top, grid=4, block=64)


def test_histogram_over_a_cluster(rng: np.random.Generator) -> None:
    x = rng.integers(0, 64, 500).astype(np.int32)
    out = np.zeros(32, np.int32)
    args = (np.int32(500), np.int32(32), x, out)
    launch("cluster", "cluster_histogram", *args, grid=4, block=64, cluster=2, shared_bytes=64)
    assert np.array_equal(out, np.bincount(x % 32, minlength=32))
    sizes = {"grid": 4, "block": 64, "cluster": 2, "shared_bytes": 64}
    fault("race", "cluster.MISSING_SYNC", "cluster_histogram", *args, **sizes)


def test_shared_memory_of_a_neighbour(rng: np.random.Generator) -> None:
    x = rng.uniform(-1, 1, (4, 128)).astype(np.float32)
    y = np.zeros_like(x)
    launch("cluster", "neighbour", x, y, grid=4, block=128)
    rank = np.arange(4) & 1
    assert np.array_equal(y, x[[1, 0, 3, 2], ::-1] + rank[:, None].astype(np.float32))


@pytest.mark.parametrize("variant", ["MISSING_SYNC", "EARLY_EXIT"])
def test_shared_memory_of_a_neighbour_with_a_bug(variant: str) -> None:
    x = np.ones((4, 128), np.float32)
    with pytest.raises(emulator.Fault) as caught:
        launch(f"cluster.{variant}", "neighbour", x, x.copy(), grid=4, block=128)
    assert caught.value.kind in ("race", "uninitialised"), str(caught.value)


def test_token_round_a_cluster() -> None:
    out = np.zeros(1, np.int32)
    launch("cluster", "ring", np.int32(3), out, grid=4, block=32)
    token = 100
    for turn in range(12):
        token = token * 2 + turn % 4
        token = token % 100003 if turn < 11 else token
    assert out[0] == token
    fault("deadlock", "cluster.WRONG_COUNT", "ring", np.int32(3), out, grid=4, block=32)


def test_stores_that_complete_on_a_neighbours_barrier(rng: np.random.Generator) -> None:
    x = rng.integers(0, 1000, (4, 64)).astype(np.int32)
    y = np.zeros_like(x)
    launch("cluster", "push", x, y, grid=4, block=32)
    assert np.array_equal(y, x[[1, 0, 3, 2]])


def test_multicast(rng: np.random.Generator) -> None:
    x = rng.uniform(-1, 1, (16, 32)).astype(np.float32)
    out = np.zeros((2, 512), np.float32)
    map_ = emulator.TensorMap(x, box=(8, 32))
    launch("cluster", "multicast", map_, out, grid=2, block=64)
    close(out, np.stack([x.reshape(-1)] * 2).astype(np.float64), 0.0)
    with pytest.raises(emulator.Fault) as caught:
        launch("cluster.MISSING_SYNC", "multicast", map_, out, grid=2, block=64)
    assert caught.value.kind in ("race", "uninitialised"), str(caught.value)
