"""Products of 8-bit integers on the CPU: exact, whatever the signs, shapes and instructions."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

import stagefuse
from stagefuse.compiler import stages
from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.kernel_ir import Buffer, Kernel, TileProduct
from stagefuse.compiler.plan import UNITS
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym
from stagefuse.dsl.dtypes import I8, I32, U8, DType
from stagefuse.runtime import native
from stagefuse.runtime.cpu_pipeline import CpuPipeline

from .cpu_run import LEVELS, Compiled

pytestmark = pytest.mark.usefixtures("tiles")

Array = np.ndarray
SIGNS = [(I8, I8), (I8, U8), (U8, I8), (U8, U8)]
SIZES = [
    (1, 1, 1), (1, 300, 17), (3, 5, 48), (15, 64, 16), (16, 63, 47), (33, 65, 1), (40, 1025, 31),
    (64, 513, 48), (65, 2049, 3), (5, 0, 4),
]  # fmt: skip
VNNI = UNITS["quads"]


def some(rng: np.random.Generator, dtype: object, *shape: int) -> Array:
    """All values, the extremes often."""
    kind = np.iinfo(np.int8 if dtype == I8 else np.uint8)
    found = rng.integers(kind.min, kind.max + 1, shape)
    ends = rng.choice([kind.min, kind.max], shape)
    return np.where(rng.random(shape) < 0.3, ends, found).astype(kind.dtype)


def product(left: Array, right: Array) -> Array:
    """As i32 has it, which wraps."""
    return (left.astype(np.int64) @ right.astype(np.int64)).astype(np.int32)


def units_of(level: str) -> list[int]:
    """What the code of a level may be run with here."""
    here = native.units()
    return sorted({0, here & VNNI, here}) if level == "v4" else [0]


def kernel(left: object, right: object, rows: str) -> Kernel:
    """A product by a panel of 48 columns: packed, in steps, or where a window's rows lie."""
    m, k, n = sym("M"), sym("K"), sym("N")
    where: dict[str, Expr] = {}
    if rows == "steps":
        where = {"panel_row": const(101), "panel_col": const(1)}
    elif rows == "places":
        where = {"panel_place": floordiv(sym("k"), 2) + mod(sym("k"), const(2)) * 50}
    return Kernel(
        f"{left}.{right}.{rows}",
        (Buffer("a", left, (m, k), "in"), Buffer("p", right, (k * 101 + 150,), "in"),
         Buffer("y", I32, (m + 1, const(48)), "inout")),
        ("K", "M", "N"), (),
        (TileProduct("y", const(0), const(48), "a", const(0), k, const(1), "p", const(1), m, k,
                     1024, 48, rows == "packed", n, **where),),
    )  # fmt: skip


@cache
def compiled(level: str) -> Compiled:
    return Compiled([kernel(*s, rows) for s in SIGNS for rows in ROWS], level)


ROWS = ("packed", "steps", "places")


@pytest.mark.parametrize("rows", ROWS)
@pytest.mark.parametrize("level", LEVELS)
def test_panels_wherever_their_rows_lie(rng: np.random.Generator, level: str, rows: str) -> None:
    code = compiled(level)
    for units in units_of(level):
        code.native.use_units(units)
        for left, right in SIGNS:
            for m, k, n in SIZES:
                n = min(n, 48)
                a, p = some(rng, left, m, k), some(rng, right, k * 101 + 150)
                y = rng.integers(-(2**31), 2**31, (m + 1, 48)).astype(np.int32)
                below = y[m].copy()
                at = np.arange(k)[:, None]
                row = {"packed": at * 48, "steps": at * 101, "places": at // 2 + at % 2 * 50}
                panel = p[1 + row[rows] + np.arange(n)]
                wanted = product(a, panel)
                if rows == "packed":
                    wanted = wanted + y[:m, :n]
                code(f"{left}.{right}.{rows}", [a, p, y], {"K": k, "M": m, "N": n})
                np.testing.assert_array_equal(y[:m, :n], wanted)
                np.testing.assert_array_equal(y[m], below)


PLAIN = """
pipeline plain(a: {0}[M, K], b: {1}[K, N]) -> i32[M, N]:
    i32(a) @ i32(b)

pipeline batch(a: {0}[B, M, 65], b: {1}[B, N, 65]) -> i32[B, M, N]:
    i32(a) @ transpose(i32(b), [0, 2, 1])
"""


@pytest.mark.parametrize(("left", "right"), SIGNS)
def test_products_of_inputs(rng: np.random.Generator, left: object, right: object) -> None:
    source = PLAIN.format(left, right)
    plain = stagefuse.compile(source, pipeline="plain", threads=2)
    for m, k, n in [*SIZES, (300, 130, 500), (530, 70, 53), (7, 600, 1000)]:
        a, b = some(rng, left, m, k), some(rng, right, k, n)
        np.testing.assert_array_equal(plain(a=a, b=b), product(a, b))
    batch = stagefuse.compile(source, pipeline="batch", threads=2)
    for m, n in ((1, 1), (40, 53), (300, 49)):
        a, b = some(rng, left, 3, m, 65), some(rng, right, 3, n, 65)
        np.testing.assert_array_equal(batch(a=a, b=b), product(a, b.transpose(0, 2, 1)))


def test_sums_that_wrap(rng: np.random.Generator) -> None:
    plain = stagefuse.compile(PLAIN.format("u8", "u8"), pipeline="plain")
    a, b = np.full((17, 70_001), 255, np.uint8), np.full((70_001, 20), 254, np.uint8)
    np.testing.assert_array_equal(plain(a=a, b=b), product(a, b))


QUANTISED = """
weights w = "w.npz"

pipeline linear(x: u8[M, {0}], scale: f32[], zero: u8[]) -> f32[M, {1}]:
    codes = f32(i32(w.matrix) - i32(w.zero)) * w.scale
    (f32(i32(x) - i32(zero)) * scale) @ codes
"""


@pytest.mark.parametrize(("depth", "columns"), [(64, 48), (301, 50), (1100, 7)])
def test_what_is_quantised(
    rng: np.random.Generator, tmp_path: Path, depth: int, columns: int
) -> None:
    """The sums are exact: only scales round, a conversion and three factors."""
    stored = {
        "matrix": some(rng, I8, depth, columns),
        "zero": rng.integers(-20, 20, columns).astype(np.int8),
        "scale": rng.uniform(0.001, 0.1, columns).astype(np.float32),
    }
    path = tmp_path / "linear.pipe"
    path.write_text(QUANTISED.format(depth, columns))
    pipe = stagefuse.compile(path, weights={"w": stored})
    scale, zero = np.float32(0.037), np.uint8(131)
    for m in (1, 40, 300):
        x = some(rng, U8, m, depth)
        found = pipe(x=x, scale=scale, zero=zero)
        sums = (x.astype(int) - int(zero)) @ (
            stored["matrix"].astype(int) - stored["zero"].astype(int)
        )
        wanted = sums * float(scale) * stored["scale"].astype(float)
        assert np.all(np.abs(found - wanted) <= 4 * 2.0**-24 * np.abs(wanted))
    ((_, text),) = stages.text_after(path, "kernels", {"w": stored})
    assert "tile_product" in text and ": in u8" in text and ": in f32[301" not in text


@pytest.mark.parametrize(("channels", "size", "made"), [(64, 56, 256), (33, 9, 40), (40, 17, 3)])
def test_convolutions_of_single_places(
    rng: np.random.Generator, channels: int, size: int, made: int
) -> None:
    """Weights by an image, whose places a step copies; threads find their scratch used."""
    source = (
        f"pipeline p(x: u8[B, {channels}, {size}, {size}], w: i8[{made}, {channels}]) ->"
        f" i64[B, {made}, {size}, {size}]:\n"
        "    sum(i32(w)[None, :, :, None, None] * i32(x - u8(3))[:, None], axis=2)\n"
    )
    pipe = stagefuse.compile(source, threads=2)
    for _ in range(3):
        x, w = some(rng, U8, 2, channels, size, size), some(rng, I8, made, channels)
        wanted = np.einsum("oc,bchw->bohw", w.astype(np.int64), (x - np.uint8(3)).astype(np.int64))
        np.testing.assert_array_equal(pipe(x=x, w=w), wanted)


WINDOWS = """
pipeline p(x: {x}[2, {channels}, 17, 19], w: {w}[{made}, {channels}, {high}, 3])
        -> i32[2, {made}, {down}, {across}]:
    codes = pad(i32(x) - i32({zero}), [(0, 0), (0, 0), ({pad}, {pad}), (1, 1)])
    less = i32(w) - {other}
    y[b, o, i, j] = sum[c, m, n] codes[b, c, {step} * i + m, {step} * j + n] * less[o, c, m, n]
    i32(y)
"""


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(
    ("signs", "channels", "made", "high", "step", "zero", "other"),
    [
        ((U8, I8), 5, 20, 3, 1, "u8(131)", 0),
        ((U8, I8), 64, 33, 3, 2, "u8(0)", 0),
        ((I8, I8), 17, 40, 1, 1, "i8(-7)", 0),
        ((U8, U8), 8, 5, 5, 3, "u8(255)", 17),
        ((U8, I8), 6, 7, 3, 1, "i8(-3)", 0),
        ((I8, U8), 6, 300, 3, 2, "u8(200)", 90),
    ],
)
def test_convolutions_are_products_of_their_codes(
    rng: np.random.Generator, tmp_path: Path, level: str, signs: tuple[DType, DType],
    channels: int, made: int, high: int, step: int, zero: str, other: int,
) -> None:  # fmt: skip
    """A window that reaches beyond the image sees the zero there, also one that no code has."""
    pad = high // 2
    down, across = (17 + 2 * pad - high) // step + 1, (19 + 2 - 3) // step + 1
    path = tmp_path / "p.pipe"
    path.write_text(WINDOWS.format(
        x=signs[0], w=signs[1], channels=channels, made=made, high=high, step=step, zero=zero,
        other=other, pad=pad, down=down, across=across,
    ))  # fmt: skip
    plan = compile_file(path, levels=(level,))
    x, w = some(rng, signs[0], 2, channels, 17, 19), some(rng, signs[1], made, channels, high, 3)
    less = x.astype(np.int64) - int(zero[3:-1])
    wide = np.pad(less, [(0, 0), (0, 0), (pad, pad), (1, 1)])
    seen = np.lib.stride_tricks.sliding_window_view(wide, (high, 3), (2, 3))[:, :, ::step, ::step]
    wanted = np.einsum("bcijmn,ocmn->boij", seen, w.astype(np.int64) - other)
    for units in units_of(level):
        pipe = CpuPipeline(plan, threads=1, tiles=bool(units & UNITS["tiles"]))
        np.testing.assert_array_equal(pipe(x=x, w=w), wanted)
    ((_, text),) = stages.text_after(path, "kernels", {})
    assert "tile_product" in text


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("high", "pad", "other"), [(3, (1, 2), 0), (5, (0, 3), 9), (1, (1, 0), 0)])
def test_a_zero_that_is_not_known_around_an_image(
    rng: np.random.Generator, tmp_path: Path, level: str, high: int, pad: tuple[int, int],
    other: int,
) -> None:  # fmt: skip
    """Windows see some of the taps; those of the weights that they see are added up."""
    channels, made = 13, 21
    down, across = 9 + 2 * pad[0] - high + 1, 11 + 2 * pad[1] - 3 + 1
    path = tmp_path / "p.pipe"
    path.write_text(f"""
pipeline p(x: u8[B, {channels}, 9, 11], w: i8[{made}, {channels}, {high}, 3], z: u8)
        -> i32[B, {made}, {down}, {across}]:
    codes = pad(i32(x) - i32(z), [(0, 0), (0, 0), ({pad[0]}, {pad[0]}), ({pad[1]}, {pad[1]})])
    less = i32(w) - {other}
    y[b, o, i, j] = sum[c, m, n] codes[b, c, i + m, j + n] * less[o, c, m, n]
    i32(y)
""")
    pipe = CpuPipeline(compile_file(path, levels=(level,)), threads=1)
    x, w = some(rng, U8, 2, channels, 9, 11), some(rng, I8, made, channels, high, 3)
    for zero in (0, 255, int(rng.integers(1, 255))):
        wide = np.pad(x.astype(np.int64) - zero, [(0, 0), (0, 0), (pad[0],) * 2, (pad[1],) * 2])
        seen = np.lib.stride_tricks.sliding_window_view(wide, (high, 3), (2, 3))
        wanted = np.einsum("bcijmn,ocmn->boij", seen, w.astype(np.int64) - other)
        np.testing.assert_array_equal(pipe(x=x, w=w, z=np.uint8(zero)), wanted)


@pytest.mark.parametrize("level", LEVELS)
@pytest.mark.parametrize(("high", "wide", "exact"), [(3, 3, True), (7, 47, True), (7, 48, False)])
def test_sums_of_single_channels_are_of_floats_that_hold_them(
    rng: np.random.Generator, tmp_path: Path, level: str, high: int, wide: int, exact: bool
) -> None:
    """Each channel by its own window, with the greatest codes; f32 holds sums up to 2^24."""
    path = tmp_path / "p.pipe"
    path.write_text(
        f"pipeline p(x: u8[2, 5, 11, 60], w: i8[5, {high}, {wide}])"
        f" -> i64[2, 5, {12 - high}, {61 - wide}]:\n"
        "    y[b, c, i, j] = sum[m, n] (i32(x[b, c, i + m, j + n]) - 143) * (i32(w[c, m, n]))\n"
        "    y\n"
    )
    x, w = some(rng, U8, 2, 5, 11, 60), some(rng, I8, 5, high, wide)
    x[0, 0], w[0] = 0, -128
    seen = np.lib.stride_tricks.sliding_window_view(x.astype(np.int64) - 143, (high, wide), (2, 3))
    pipe = CpuPipeline(compile_file(path, levels=(level,)), threads=1)
    wanted = np.einsum("bcijmn,cmn->bcij", seen, w.astype(np.int64))
    np.testing.assert_array_equal(pipe(x=x, w=w), wanted)
    ((_, text),) = stages.text_after(path, "kernels", {})
    assert (": f32 of mul.f32" in text) == exact
