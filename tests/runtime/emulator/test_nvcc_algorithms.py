"""CUDA C++ whose data decides where it goes, compiled by nvcc, against plain Python."""

import numpy as np
import pytest

from stagefuse.runtime import emulator

from .fixtures import Array, fault, launch


def token(literals: bytes, copied: int) -> tuple[bytes, bytes]:
    """A token up to its literals, and what follows the distance."""

    def rest(n: int) -> bytes:
        return b"" if n < 15 else bytes([255] * ((n - 15) // 255) + [(n - 15) % 255])

    size, more = len(literals), copied - 4 if copied else 0
    head = bytes([min(size, 15) << 4 | min(more, 15)])
    return head + rest(size) + literals, rest(more)


def compressed(rng: np.random.Generator) -> tuple[bytes, bytes]:
    """A stream of random tokens, and what it stands for."""
    stream, plain = b"", bytearray()
    for size, copied in zip(rng.integers(1, 40, 9), [*rng.integers(4, 300, 8), 0], strict=True):
        first, second = token(rng.bytes(int(size)), int(copied))
        plain += first[len(first) - int(size) :]
        stream += first
        if copied:
            distance = int(rng.integers(1, len(plain) + 1))
            stream += distance.to_bytes(2, "little") + second
            for _ in range(int(copied)):
                plain.append(plain[-distance])
    return stream, bytes(plain)


def starts(parts: list[bytes]) -> Array:
    return np.cumsum([0, *map(len, parts)]).astype(np.int32)


def test_decompression(rng: np.random.Generator) -> None:
    streams, plains = zip(*(compressed(rng) for _ in range(5)), strict=True)
    data = np.frombuffer(b"".join(streams), np.uint8).copy()
    out = emulator.uninitialised(sum(map(len, plains)), np.uint8)
    args = (data, starts(list(streams)), starts(list(plains)), out, np.int32(5))
    launch("algorithms", "decompress", *args, grid=3, block=64)
    assert bytes(out) == b"".join(plains)
    fault("race", "algorithms.MISSING_SYNC", "decompress", *args, grid=3, block=64)


def test_sets_that_are_joined(rng: np.random.Generator) -> None:
    n, count = 300, 250
    edges, parent = rng.integers(0, n, (count, 2)).astype(np.int32), np.arange(n, dtype=np.int32)
    launch("algorithms", "join", edges, np.int32(count), parent, grid=3, block=96)
    smallest = np.arange(n)
    for _ in range(n):
        np.minimum.at(smallest, edges[:, 0], smallest[edges[:, 1]])
        np.minimum.at(smallest, edges[:, 1], smallest[edges[:, 0]])
    for _ in range(n):
        parent = parent[parent]
    assert (parent == smallest).all()
    again = np.arange(n, dtype=np.int32)
    args = (edges, np.int32(count), again)
    fault("race", "algorithms.PLAIN_LOADS", "join", *args, grid=3, block=96)


@pytest.mark.parametrize("words, rows", [(1, 3), (3, 30)])
def test_game_of_life(words: int, rows: int, rng: np.random.Generator) -> None:
    def cells(x: Array) -> Array:
        return np.unpackbits(x.view(np.uint8), axis=1, bitorder="little").astype(np.int64)

    x = rng.integers(0, 2**32, (rows, words), dtype=np.uint32)
    y = emulator.uninitialised((rows, words), np.uint32)
    launch("algorithms", "life", x, y, *np.int32([words, rows]), grid=1, block=96)
    own = cells(x)
    around = sum(np.roll(own, (i, j), (0, 1)) for i in (-1, 0, 1) for j in (-1, 0, 1)) - own
    assert (cells(np.asarray(y)) == ((around == 3) | (around == 2) & (own == 1))).all()
