"""Bytes at positions from data: gathered as words, the channels of a pixel together."""

from __future__ import annotations

import ctypes
import mmap
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.kernel_ir import For
from stagefuse.runtime.cpu_pipeline import CpuPipeline
from stagefuse.runtime.errors import IndexOutOfRange

from .cpu_run import LEVELS
from .ir_cases import lowered

Array = np.ndarray[Any, Any]
DTYPES = {"u8": np.uint8, "i8": np.int8, "bool": np.bool_}


def between_pages(values: Array) -> tuple[mmap.mmap, Array]:
    """A copy that ends where memory does, so that a byte more is a fault."""
    page = mmap.PAGESIZE
    room = -(-max(values.nbytes, 1) // page) * page
    area = mmap.mmap(-1, room + page)
    held = np.frombuffer(area, np.uint8)
    end = ctypes.c_void_p(held.ctypes.data + room)
    assert ctypes.CDLL(None).mprotect(end, ctypes.c_size_t(page), 0) == 0
    copy = held[room - values.nbytes : room].view(values.dtype).reshape(values.shape)
    copy[...] = values
    return area, copy


def pixels(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Array:
    return rng.integers(0, 2 if dtype == "bool" else 256, shape).astype(DTYPES[dtype])


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 5])
@pytest.mark.parametrize("first", [True, False])
def test_gathered_pixels(
    level: str, channels: int, first: bool, rng: np.random.Generator, tmp_path: Path
) -> None:
    dtype = str(rng.choice(list(DTYPES)))
    order = "c, i, j" if first else "i, j, c"
    (tmp_path / "p.pipe").write_text(f"""
pipeline p(x: {dtype}[B, H, W, {channels}], r: i64[I], q: i64[J]):
    rows = clamp(r, 0, H - 1)
    y[b, {order}] = f32(x[b, rows[i], clamp(q[j], 0, W - 1), c]) + 0.5
    y
""")
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=2)
    for high, wide in ((1, 1), (1, 2), *map(tuple, rng.integers(1, 40, (2, 2)))):
        for b in (0, 1, 3):
            area, x = between_pages(pixels(rng, (b, high, wide, channels), dtype))
            r, q = (rng.integers(-3, n + 3, m) for n, m in ((high, 7), (wide, 83)))
            q[0] = wide - 1
            found = pipe(x=x, r=r, q=q)
            want = x[:, np.clip(r, 0, high - 1)][:, :, np.clip(q, 0, wide - 1)] + np.float32(0.5)
            want = want.transpose(0, 3, 1, 2) if first else want
            np.testing.assert_array_equal(found, want.astype(np.float32))
            del found, x
            assert area


@pytest.mark.parametrize("level", LEVELS)
def test_positions_that_are_not_inside_are_told(
    level: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    (tmp_path / "p.pipe").write_text("""
pipeline p(x: u8[H, W, 3], q: i64[J]):
    y[c, i, j] = f32(x[i, q[j], c])
    y
""")
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=1)
    x, q = pixels(rng, (3, 9, 3), "u8"), rng.integers(-9, 9, 50)
    np.testing.assert_array_equal(pipe(x=x, q=q), x[:, q].transpose(2, 0, 1))
    q[int(rng.integers(50))] = 9
    with pytest.raises(IndexOutOfRange):
        pipe(x=x, q=q)


@pytest.mark.parametrize("order", ["c, i, j", "i, j, c"])
def test_channels_share_their_positions(order: str) -> None:
    (kernel,) = lowered(f"""
pipeline p(x: u8[B, H, W, 3], q: i64[J]):
    y[b, {order}] = f32(x[b, i, clamp(q[j], 0, W - 1), c])
    y
""")
    ((loop,),) = [kernel.body]
    assert isinstance(loop, For) and len(loop.body) == 3
