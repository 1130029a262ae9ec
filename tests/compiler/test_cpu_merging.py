"""Loops over adjacent axes become one, and no others do."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler.cpu.bodies import walk
from stagefuse.compiler.cpu.merging import merged
from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.kernel_ir import Fold, For, Kernel
from stagefuse.compiler.kernel_text import parse_kernel
from stagefuse.runtime.cpu_pipeline import CpuPipeline

from .cpu_run import LEVELS, Compiled

KERNEL = """stagefuse kernel 1
kernel centred for test
buffer x : in f32[B, H, W]
buffer w : in f32[W]
buffer z : out f32[B, H, W]
dims B H W
parallel b in B
fold total = sum over (f in H, g in W) : f32 of x.f32[b, f, g]
for m in 0..H
  for n in 0..W vector
    store z[b, m, n] = sub.f32(x.f32[b, m, n], $total.f32)
"""
EDITS = {
    "as they lie": (),
    "part of a row": (("g in W", "g in W - 1"), ("0..W vector", "0..W - 1 vector")),
    "columns of weights": (("of x.f32[b, f, g]", "of mul.f32(x.f32[b, f, g], w.f32[g])"),
                           ("$total.f32)", "w.f32[n])")),
    "the number of a row": (
        ("of x.f32[b, f, g]", "of mul.f32(x.f32[b, f, g], cast.f32(index(f)))"),
        ("$total.f32)", "cast.f32(index(m)))"),
    ),
    "from behind": (("x.f32[b, f, g]", "x.f32[b, H - 1 - f, g]"),
                    ("sub.f32(x.f32[b, m, n]", "sub.f32(x.f32[b, H - 1 - m, n]")),
}  # fmt: skip


def kernel(name: str) -> Kernel:
    text = KERNEL
    for old, new in EDITS[name]:
        assert old in text
        text = text.replace(old, new, 1)
    return parse_kernel(text)


def loops(made: Kernel) -> int:
    statements = list(walk(made.body))
    folds = sum(len(s.loops) for s in statements if isinstance(s, Fold))
    return folds + sum(isinstance(s, For) for s in statements)


@pytest.mark.parametrize("name", EDITS)
def test_loops_are_merged_where_all_that_they_touch_is_adjacent(name: str) -> None:
    assert loops(merged(kernel(name))) == (2 if name == "as they lie" else 4)


def test_what_is_stored_may_be_read_where_it_is_stored() -> None:
    text, old = KERNEL.replace("buffer z : out", "buffer z : inout"), "sub.f32(x.f32[b, m, n]"
    for place, count in (("m, n", 2), ("m, 0", 3), ("0, n", 3)):
        made = parse_kernel(text.replace(old, f"sub.f32(z.f32[b, {place}]"))
        assert loops(merged(made)) == count


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize("name", EDITS)
def test_what_merged_loops_compute(name: str, level: str, rng: np.random.Generator) -> None:
    compiled = Compiled([kernel(name)], level)
    for size in ((2, 1, 1), (3, 7, 5), (1, 13, 17), (2, 56, 56), (1, 3, 200), (2, 33, 1)):
        x = rng.integers(-9, 9, size).astype(np.float32)  # sums and products of these are exact
        w = rng.integers(-9, 9, size[2]).astype(np.float32)
        z = np.zeros_like(x)
        dims = dict(zip("BHW", size, strict=True))
        assert compiled("centred", [x, w, z], dims)[0] == 0
        rows = np.arange(size[1], dtype=np.float32)[:, None]
        total = x.sum((1, 2), keepdims=True)
        want = {
            "as they lie": x - total, "columns of weights": x - w, "the number of a row": x - rows,
            "part of a row": x - x[:, :, :-1].sum((1, 2), keepdims=True),
            "from behind": x[:, ::-1] - total,
        }[name]  # fmt: skip
        if name == "part of a row":
            want[:, :, -1] = 0
        np.testing.assert_array_equal(z, want)


@pytest.mark.parametrize("level", LEVELS)
def test_a_norm_over_images(level: str, rng: np.random.Generator, tmp_path: Path) -> None:
    (tmp_path / "p.pipe").write_text("""
pipeline p(x: f32[B, C, H, W], w: f32[C]) -> f32[B, C, H, W]:
    centred = x - mean(x, axis=(2, 3), keepdims=True)
    centred * rsqrt(mean(centred * centred, axis=(2, 3), keepdims=True) + 1e-3) * w[:, None, None]
""")
    pipe = CpuPipeline(compile_file(tmp_path / "p.pipe", levels=(level,)), threads=2)
    for size in ((0, 3, 5, 5), (1, 1, 1, 1), (2, 3, 7, 11), (3, 5, 56, 56), (1, 2, 1, 131)):
        x, w = rng.standard_normal(size, np.float32), rng.standard_normal(size[1], np.float32)
        wide, count = x.astype(float), size[2] * size[3]
        centred = wide - wide.mean((2, 3), keepdims=True)
        scale = 1 / np.sqrt((centred**2).mean((2, 3), keepdims=True) + 1e-3)
        want = centred * scale * w[:, None, None]
        # a mean of n is off by at most n ulp of the mean magnitude; the rest is a few operations
        most = abs(wide).max((2, 3), keepdims=True, initial=0.0)
        ulp = 2.0**-24
        off = (count + 2) * ulp * most
        off = 3 * off + (count + 12) * ulp * abs(centred)
        bound = off * scale * abs(w[:, None, None])
        assert np.all(abs(pipe(x=x, w=w) - want) <= bound)


@pytest.mark.parametrize("level", LEVELS)
def test_rows_of_a_channel_are_one_stretch(
    level: str, rng: np.random.Generator, tmp_path: Path
) -> None:
    """Blocks of 64 rows, or of planes of rows, with one vector loop in each."""
    (tmp_path / "p.pipe").write_text("""
pipeline p(x: f32[B, C, D, H, W], w: f32[C], r: f32[H]) -> (f32[B, C, D, H, W], f32[B, C, D, H, W]):
    (x * w[:, None, None, None], x + r[:, None])
""")
    plan = compile_file(tmp_path / "p.pipe", levels=(level,))
    pipe = CpuPipeline(plan, threads=2)
    for size in (
        (0, 3, 5, 5, 2), (1, 1, 1, 1, 1), (2, 3, 4, 7, 11), (1, 2, 65, 3, 5), (1, 1, 200, 1, 2)
    ):  # fmt: skip
        x, w = rng.standard_normal(size, np.float32), rng.standard_normal(size[1], np.float32)
        r = rng.standard_normal(size[3], np.float32)
        scaled, moved = pipe(x=x, w=w, r=r)
        np.testing.assert_array_equal(scaled, x * w[:, None, None, None])
        np.testing.assert_array_equal(moved, x + r[:, None])


def test_a_block_of_rows_is_one_loop() -> None:
    made = parse_kernel("""stagefuse kernel 1
kernel scaled for test
buffer x : in f32[B, H, W]
buffer z : out f32[B, H, W]
dims B H W
parallel b in B
parallel ms in (H + 63) // 64
for m in 64*ms..min(64*ms + 64, H)
  for n in 0..W vector
    store z[b, m, n] = neg.f32(x.f32[b, m, n])
""")
    (loop,) = merged(made).body
    assert isinstance(loop, For) and not isinstance(loop.body[0], For)
    found = [e.evaluate({"ms": 1, "H": 70, "W": 10}) for e in (loop.lo, loop.hi)]
    assert found == [640, 700]


def test_extents_of_nothing() -> None:
    pipe = sf.compile("pipeline p(x: f32[B, H, W]) -> f32[B]:\n    sum(x, axis=(1, 2))\n")
    for size in ((3, 0, 4), (3, 4, 0), (0, 2, 2)):
        np.testing.assert_array_equal(pipe(x=np.ones(size, np.float32)), np.zeros(size[0]))


STRETCH = """stagefuse kernel 1
kernel part for test
buffer x : in f32[9, 7]
buffer w : in f32[7]
buffer z : out f32[9, 7]
dims
parallel p in 4
for s in (16*p) // 7..(min(16, -16*p + 63) + 16*p + 6) // 7
  for c in max(0, 16*p - 7*s)..min(7, min(16, -16*p + 63) + 16*p - 7*s) vector
    store z[s, c] = neg.f32(x.f32[s, c])
"""


@pytest.mark.parametrize("pitch", ["as they lie", "columns of weights", "a gap", "fewer rows"])
def test_a_stretch_over_several_rows_is_one_loop(pitch: str) -> None:
    """From element 16 p on, whichever rows they are in; not where a row is left out."""
    edits = {
        "as they lie": ("", ""), "columns of weights": ("x.f32[s, c]", "w.f32[c]"),
        "a gap": ("min(7, min", "min(6, min"), "fewer rows": ("+ 6) // 7", "- 1) // 7"),
    }  # fmt: skip
    (loop,) = merged(parse_kernel(STRETCH.replace(*edits[pitch]))).body
    assert isinstance(loop, For) and isinstance(loop.body[0], For) == (pitch != "as they lie")
    if pitch == "as they lie":
        for p in range(4):
            ends = [e.evaluate({"p": p}) for e in (loop.lo, loop.hi)]
            assert ends == [16 * p, min(16 * p + 16, 63)]
