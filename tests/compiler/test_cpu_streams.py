"""Loops that write past the caches give what plain loops give, wherever their results lie."""

from __future__ import annotations

import numpy as np
import pytest

from stagefuse.compiler.cpu import streams
from stagefuse.compiler.cpu.emit import module_text
from stagefuse.compiler.kernel_ir import Buffer, For, Index, Kernel, Load, Op, Store
from stagefuse.dsl.dims import const, sym
from stagefuse.dsl.dtypes import DTYPES, F32, F64, DType

from .cpu_run import LEVELS, Compiled

M, N = sym("M"), sym("N")
AT = (Index(sym("m")), Index(sym("n")))


def rows(name: str, dtype: DType, extent: object = N) -> Kernel:
    """sum[m, n] = x + y and product[m, n] = x * y, a row at a time."""
    x, y = Load("x", AT, dtype), Load("y", AT, dtype)
    kind = dtype.compute
    body = tuple(Store(out, AT, Op(fn, (x, y), kind)) for out, fn in (("s", "add"), ("p", "mul")))
    buffers = tuple(Buffer(b, dtype, (M, N), "in") for b in ("x", "y"))
    results = tuple(Buffer(b, dtype, (M, N), "out") for b in ("s", "p"))
    loop = For("n", const(0), N, body, vector=True)
    return Kernel(name, (*buffers, *results), ("M", "N"), (("m", M),), (loop,))


def lines_from(count: int, dtype: np.dtype, skip: int) -> np.ndarray:
    """Memory for `count` elements that begins `skip` elements after a line of 64 bytes."""
    raw = np.full((count + skip) * dtype.itemsize + 64, 0xAA, np.uint8)
    start = -raw.ctypes.data % 64 + skip * dtype.itemsize
    return raw[start : start + count * dtype.itemsize].view(dtype)


@pytest.fixture(scope="module", params=LEVELS)
def compiled(request: pytest.FixtureRequest) -> Compiled:
    before = streams.LARGE_BYTES, streams.LONG
    streams.LARGE_BYTES, streams.LONG = 1, 1
    try:
        kinds = [F32, F64, DTYPES["bf16"], DTYPES["i8"], DTYPES["bool"]][:4]
        return Compiled([rows(f"rows.{t}", t) for t in kinds], request.param)
    finally:
        streams.LARGE_BYTES, streams.LONG = before


@pytest.mark.parametrize("level", LEVELS)
def test_the_tile_is_stored_past_the_caches(level: str) -> None:
    text = module_text([rows("k", F32)], level)
    assert text.count("!nontemporal") >= 8
    assert text.count("call void @llvm.prefetch.p0(") == 8  # four lines of each input


@pytest.mark.parametrize("skip", [0, 1, 8])
@pytest.mark.parametrize("shape", [(1, 64), (3, 64), (2, 65), (5, 1000), (4, 63), (2, 128), (3, 0)])
@pytest.mark.parametrize("kind", ["f32", "f64", "bf16", "i8"])
def test_streamed_rows(
    compiled: Compiled, kind: str, shape: tuple[int, int], skip: int, rng: np.random.Generator
) -> None:
    dtype = np.dtype(DTYPES[kind].numpy)
    count = shape[0] * shape[1]
    x, y = (rng.integers(-9, 9, count).astype(dtype) for _ in range(2))
    s, p = lines_from(count, dtype, skip), lines_from(count, dtype, 0)
    compiled(f"rows.{kind}", [x, y, s, p], {"M": shape[0], "N": shape[1]}, threads=2, grain=1)
    assert np.array_equal(s, x + y) and np.array_equal(p, x * y)
