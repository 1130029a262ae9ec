"""Copies of columns of pixels, against the patches that a convolution reads."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from stagefuse.runtime import emulator

from .kernels import HEAD, Array

KERNEL = (
    HEAD
    + """
.visible .entry load(.param .align 64 .b8 map[128], .param .u64 out, .param .b32 c, .param .b32 w,
    .param .b32 h, .param .b32 d, .param .b32 n, .param .b32 mw, .param .b32 mh, .param .b32 md)
{
    .reg .pred %p<2>;
    .reg .b16 %h<3>;
    .reg .b32 %r<8>;
    .reg .b64 %d<4>;
    .shared .align 128 .b8 box[4096];
    .shared .align 8 .b64 full;
    mov.u32 %r0, %tid.x;
    setp.ne.u32 %p0, %r0, 0;
    ld.param.b32 %r1, [c]; ld.param.b32 %r2, [w]; ld.param.b32 %r3, [h]; ld.param.b32 %r4, [d];
    ld.param.b32 %r5, [n];
    ld.param.b16 %h0, [mw]; ld.param.b16 %h1, [mh]; ld.param.b16 %h2, [md];
    mov.u64 %d0, map;
    cvta.param.u64 %d0, %d0;
    @%p0 bra WAIT;
    mbarrier.init.shared::cta.b64 [full], 1;
    mbarrier.arrive.expect_tx.shared::cta.b64 _, [full], BYTES;
    COPY
WAIT:
    bar.sync 0;
AGAIN:
    mbarrier.try_wait.parity.shared::cta.b64 %p1, [full], 0;
    @!%p1 bra AGAIN;
    ld.param.u64 %d3, [out];
    mul.wide.u32 %d1, %r0, 4;
    mov.u64 %d2, box;
MORE:
    add.s64 %d0, %d2, %d1;
    ld.shared.b32 %r6, [%d0];
    add.s64 %d0, %d3, %d1;
    st.global.b32 [%d0], %r6;
    add.s64 %d1, %d1, 128;
    setp.lt.s64 %p1, %d1, BYTES;
    @%p1 bra MORE;
    ret;
}
"""
)
COPY = """cp.async.bulk.tensor.RANKd.shared::cluster.global.im2col.mbarrier::complete_tx::bytes
        [box], [%d0, {AT}], [full], {MOVES};"""


def load(map_: emulator.Im2colMap, start: list[int], moves: list[int]) -> Array:
    rank, size = map_.array.ndim, map_.channels * map_.pixels * map_.array.itemsize
    registers = ["%r1", "%r2", "%r3", "%r4"][: rank - 1] + ["%r5"]
    copy = COPY.replace("RANK", str(rank)).replace("AT", ", ".join(registers))
    copy = copy.replace("MOVES", ", ".join(f"%h{i}" for i in range(rank - 2)))
    out = np.zeros((map_.pixels, map_.channels), map_.array.dtype)
    inner = [*start[: rank - 1], 0, 0][:4]
    args = [map_, out, *np.int32([*inner, start[-1], *[*moves, 0, 0][:3]])]
    text = KERNEL.replace("COPY", copy).replace("BYTES", str(size))
    emulator.load(text).launch("load", grid=1, block=32, args=args)
    return out


def expected(
    x: Array, lower: list[int], upper: list[int], strides: list[int], start: list[int],
    moves: list[int], channels: int, pixels: int,
) -> Array:  # fmt: skip
    """Axes outermost first, but for `start` and `moves`, which instructions give in reverse."""
    sides = [range(low, n + u, s) for n, low, u, s in zip(x.shape[1:-1], lower, upper, strides,
                                                          strict=True)]  # fmt: skip
    walk = list(itertools.product(range(x.shape[0] + 1), *sides))
    first = walk.index((start[-1], *start[-2:0:-1]))
    found = np.zeros((pixels, channels), x.dtype)
    for row, (image, *pixel) in zip(found, walk[first : first + pixels], strict=False):
        at = [p + m for p, m in zip(pixel, moves[::-1], strict=True)]
        inside = all(0 <= p < n for p, n in zip(at, x.shape[1:-1], strict=True))
        if inside and image < x.shape[0]:
            row[:] = x[(image, *at)][start[0] : start[0] + channels]
    return found


@pytest.mark.parametrize(
    ("shape", "lower", "upper", "strides", "start", "moves"),
    [
        ((2, 9, 8), [-1], [-1], [1], [0, -1, 0], [2]),
        ((2, 7, 9, 8), [-1, -1], [-1, -1], [1, 1], [4, 2, -1, 0], [1, 2]),
        ((3, 7, 9, 8), [-1, -2], [0, 0], [2, 3], [0, 1, 1, 1], [0, 1]),
        ((2, 3, 4, 5, 8), [0, -1, -1], [-1, 0, -1], [1, 2, 1], [0, 0, -1, 1, 0], [1, 1, 1]),
    ],
)
def test_columns_of_pixels(
    shape: tuple[int, ...], lower: list[int], upper: list[int], strides: list[int],
    start: list[int], moves: list[int], rng: np.random.Generator,
) -> None:  # fmt: skip
    x = rng.integers(1, 99, shape).astype(np.float32)
    steps = (1, *strides, 1)
    map_ = emulator.Im2colMap(x, tuple(lower), tuple(upper), 4, 40, element_strides=steps)
    want = expected(x, lower, upper, strides, start, moves, 4, 40)
    assert want.any() and np.array_equal(load(map_, start, moves), want)


def test_maps_that_are_refused() -> None:
    x = np.zeros((2, 7, 9, 8), np.float32)
    wrong: list[tuple[dict[str, Any], str]] = [
        ({"lower": (0,)}, "2 axes"), ({"channels": 3}, "multiple of 16"),
        ({"pixels": 1025}, "1025 pixels"), ({"upper": (-7, 0)}, "is empty"),
        ({"lower": (0, -129)}, "not in -128..128"), ({"swizzle": 32, "channels": 16}, "longer"),
    ]  # fmt: skip
    fine: dict[str, Any] = {"lower": (0, 0), "upper": (0, 0), "channels": 4, "pixels": 8}
    for change, rule in wrong:
        with pytest.raises(ValueError, match=rule):
            emulator.Im2colMap(x, **(fine | change))
    with pytest.raises(ValueError, match="2 dimensions"):
        emulator.Im2colMap(x[0, 0], **fine)


def test_a_map_for_tiles_is_none_for_columns() -> None:
    x = np.zeros((2, 7, 8), np.float32)
    map_ = emulator.Im2colMap(x, (0,), (0,), 4, 8)
    with pytest.raises(emulator.Fault, match="a copy of im2col with a map for tiles"):
        out = np.zeros((8, 4), np.float32)
        copy = COPY.replace("RANK", "3").replace("AT", "%r1, %r2, %r5").replace("MOVES", "%h0")
        text = KERNEL.replace("COPY", copy).replace("BYTES", "128")
        tiles = emulator.TensorMap(x, box=(1, 8, 4))
        args = [tiles, out, *np.int32([0] * 8)]
        emulator.load(text).launch("load", grid=1, block=32, args=args)
    assert not load(map_, [0, 0, 0], [0]).any()
