"""Less usual ways to use mbarriers, tensor maps and clusters: CUDA C++ for sm_90."""

import numpy as np
import pytest

from stagefuse.runtime import emulator

from .fixtures import fault, launch


def test_tensor_map_by_pointer(rng: np.random.Generator) -> None:
    x = rng.uniform(-1, 1, (8, 32)).astype(np.float32)
    out = np.zeros(256, np.float32)
    map_ = emulator.TensorMap(x, box=(8, 32))
    launch("hopper_more", "map_by_pointer", map_, out, grid=1, block=256)
    assert np.array_equal(out, x.reshape(-1))


def test_states_of_a_barrier(rng: np.random.Generator) -> None:
    x = rng.integers(0, 100, (4, 64)).astype(np.int32)
    y = np.zeros_like(x)
    launch("hopper_more", "states", np.int32(4), x, y, grid=1, block=64)
    assert np.array_equal(y, x[:, ::-1])


def test_copies_that_arrive_on_a_barrier(rng: np.random.Generator) -> None:
    x = rng.uniform(-1, 1, (5, 32, 4)).astype(np.float32)
    y = np.zeros_like(x)
    launch("hopper_more", "copies_on_a_barrier", np.int32(5), x, y, grid=1, block=64)
    assert np.array_equal(y, x[:, ::-1])


def test_cluster_along_y(rng: np.random.Generator) -> None:
    x = rng.uniform(-1, 1, (4, 3, 32)).astype(np.float32)
    y = np.zeros_like(x)
    launch("hopper_more", "cluster_along_y", x, y, grid=(3, 4, 1), block=32)
    assert np.array_equal(y, x[[1, 0, 3, 2]])


def test_sums_in_a_neighbours_memory() -> None:
    y = np.zeros(2, np.int32)
    launch("hopper_more", "remote_sums", y, grid=2, block=32)
    lanes = np.arange(32).sum()
    assert y.tolist() == [lanes + 32, lanes]
    fault("race", "hopper_more.MISSING_SYNC", "remote_sums", y, grid=2, block=32)


def test_array_that_is_part_of_another(rng: np.random.Generator) -> None:
    whole = rng.uniform(-1, 1, (8, 48)).astype(np.float32)
    out = np.zeros(256, np.float32)
    map_ = emulator.TensorMap(whole[:, 8:40], box=(8, 32))
    launch("hopper_more", "map_by_pointer", map_, out, grid=1, block=256)
    assert np.array_equal(out.reshape(8, 32), whole[:, 8:40])


def test_too_small_a_cluster() -> None:
    with pytest.raises(ValueError, match="clusters"):
        launch("hopper_more", "remote_sums", np.zeros(3, np.int32), grid=3, block=32)
