"""Kernels made of CUB's parts: a sort of each tile, and a scan with decoupled look-back."""

import numpy as np
import pytest

from .fixtures import Array, fault, launch

TILE = 256
THREADS = 64


@pytest.fixture
def values(rng: np.random.Generator) -> Array:
    """A number that fills no whole number of tiles."""
    return rng.integers(-(2**31), 2**31, 5 * TILE - 43, dtype=np.int64).astype(np.int32)


def test_sorted_tiles(values: Array) -> None:
    n, y = len(values), np.zeros_like(values)
    arguments = ("sort_tiles", np.int32(n), values, y)
    launch("cub", *arguments, grid=-(-n // TILE), block=THREADS)
    for first in range(0, n, TILE):
        assert (y[first : first + TILE] == np.sort(values[first : first + TILE])).all()
    fault("race", "cub.MISSING_SYNC", *arguments, grid=-(-n // TILE), block=THREADS)


@pytest.mark.parametrize("tiles", [1, 5])
def test_scan_of_many_tiles(values: Array, tiles: int) -> None:
    x = values[: tiles * TILE - 43]
    y, room = np.zeros_like(x), np.zeros(8 * (tiles + 32) + 256, np.uint8)
    size = np.uint64(room.nbytes)
    launch("cub", "start_scan", np.int32(tiles), room, size, grid=1, block=THREADS)
    arguments = ("scan_tiles", np.int32(len(x)), x, y, room, size)
    launch("cub", *arguments, grid=tiles, block=THREADS)
    assert (y == np.cumsum(x, dtype=np.int32)).all()
    launch("cub", "start_scan", np.int32(tiles), room, size, grid=1, block=THREADS)
    fault("race", "cub.MISSING_SYNC", *arguments, grid=tiles, block=THREADS)
