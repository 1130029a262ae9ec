"""Rows that data choose are asked for a step before they are read, wherever they are."""

from __future__ import annotations

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler.cpu.chosen_rows import SECOND_LEVEL
from stagefuse.compiler.cpu.emit import AS_WRITTEN, module_text
from stagefuse.runtime.errors import IndexOutOfRange

from ..std_meanings import bilinear
from .ir_cases import kernels_of, of_text

LOOKUP = """pipeline main(t: f32[V, {d}], i: i32[N]) -> f32[N, {d}]
where V in {v}, N in 0..=100000:
    {body}
"""
RESIZE = """import image

pipeline main(x: u8[B, H, W, 3]) -> f32[B, 3, 7, 11]
where B in 0..=9, H in 1..=8192, W in 1..=8192:
    image.resize_bilinear(x, 7, 11) |> image.to_chw
"""


def asked(source: str) -> int:
    """Loops that ask for lines."""
    kernels = list(kernels_of(of_text(source).passed()))
    text = module_text(kernels, "v4").split(AS_WRITTEN)[0]
    return text.count(f", i32 0, i32 {SECOND_LEVEL}, i32 1)")


def test_rows_that_data_choose_are_asked_for() -> None:
    assert asked(LOOKUP.format(d=384, v="1..=100000", body="t[i]")) == 1
    assert asked(LOOKUP.format(d=384, v="1..=100000", body="t[i] * 2.0 + t[i // 2]")) == 2
    assert asked(RESIZE) == 2  # the upper and the lower row, whose channels and columns are one


def test_others_are_not() -> None:
    small = LOOKUP.replace("[V", "[600").replace("V in {v}, ", "")  # in the second-level cache
    assert asked(small.format(d=384, body="t[i]")) == 0
    one = "t[0:1, :] * f32(reshape(i, (N, 1)))"
    assert asked(LOOKUP.format(d=384, v="1..=100000", body=one)) == 0


@pytest.mark.parametrize("rows", [0, 1, 2, 1009])
@pytest.mark.parametrize("threads", [1, 2])
def test_lookups(rows: int, threads: int, rng: np.random.Generator) -> None:
    for width in (1, 3, 384, 5003):
        pipe = sf.compile(LOOKUP.format(d=width, v="1..=100000", body="t[i]"), threads=threads)
        for held in (1, 307):
            t = rng.standard_normal((held, width)).astype(np.float32)
            i = rng.integers(-held, held, rows).astype(np.int32)
            assert np.array_equal(pipe(t=t, i=i), t[i])


def test_the_first_position_out_of_range_is_named(rng: np.random.Generator) -> None:
    pipe = sf.compile(LOOKUP.format(d=5, v="1..=100000", body="t[i]"), threads=1)
    t, i = rng.standard_normal((7, 5)).astype(np.float32), np.array([3, 9, 12], np.int32)
    with pytest.raises(IndexOutOfRange, match=r"\b9\b"):
        pipe(t=t, i=i)


@pytest.mark.parametrize("shape", [(0, 5, 5), (1, 1, 1), (2, 2, 3), (3, 97, 101), (1, 1023, 1031)])
def test_resized_images(shape: tuple[int, int, int], rng: np.random.Generator) -> None:
    x = rng.integers(0, 256, (*shape, 3), np.uint8)
    wanted = np.moveaxis(bilinear(x.astype(np.float64), 7, 11), 3, 1)
    found = sf.compile(RESIZE, threads=2)(x=x)
    # a weight has an error of 2 units of a position, which is the image's size at most
    assert np.all(np.abs(found - wanted) <= 255 * 8 * max(shape[1:]) * 2.0**-23)
