"""Unsigned integers of every width keep their order and wrap, in kernels of every kind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.dsl.dtypes import DTYPES

SOURCE = """pipeline p(x: DTYPE[B, T], ids: i64[B]) -> (
    DTYPE[B], DTYPE[T], i64[B], i64[T], DTYPE[B, T], DTYPE[B, 3], i64[B, 3],
    DTYPE[B, T], DTYPE[B, T], DTYPE[B, T], f32[B, T])
where B in 1..=64, T in 3..=64:
    a, b = topk(x, 3)
    added = scatter_add(x, ids, x)
    greatest = scatter_max(x, ids, x)
    (max(x, axis=1), min(x, axis=0), argmax(x, axis=1), argmin(x, axis=0), sort(x), a, b,
        added, greatest, x[ids] * x, f32(x))
"""


def expected(x: Any, ids: Any) -> list[Any]:
    order = np.argsort(~x, axis=1, kind="stable")[:, :3]
    added, greatest = x.copy(), x.copy()
    np.add.at(added, ids, x)
    np.maximum.at(greatest, ids, x)
    return [
        x.max(1), x.min(0), x.argmax(1), x.argmin(0), np.sort(x, 1),
        np.take_along_axis(x, order, 1), order, added, greatest, x[ids] * x, x.astype(np.float32),
    ]  # fmt: skip


@pytest.mark.parametrize("device", ["cpu", "emulator"])
@pytest.mark.parametrize("name", ["u8", "u16", "u32", "u64"])
def test_unsigned_integers(
    name: str, device: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "p.pipe"
    path.write_text(SOURCE.replace("DTYPE", name))
    pipe = sf.compile(path, device=device)
    kind = DTYPES[name].numpy
    for rows, columns in ((1, 3), (5, 7), (13, 33)):
        x = rng.integers(0, np.iinfo(kind).max, (rows, columns), kind, endpoint=True)
        ids = rng.integers(0, rows, rows)
        for got, want in zip(pipe(x=x, ids=ids), expected(x, ids), strict=True):
            np.testing.assert_array_equal(got, want)
