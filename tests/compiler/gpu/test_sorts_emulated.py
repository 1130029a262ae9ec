"""Sorts by digits, in one block and over many, equal NumPy's stable sorts, positions too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.gpu.sequences import long_sorts
from stagefuse.compiler.interpret import sort
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.runtime import emulator

from .gpu_run import Emulated, check_legal, compiled, launches

LINE = """
pipeline p(x: {t}[N]) -> (v: {t}[N], w: {t}[N], i: i64[N]):
    w, i = topk(x, N)
    (sort(x), w, i)
"""
FIXED = """
pipeline p(x: {t}[{n}]) -> (v: {t}[{n}], w: {t}[{n}], i: i64[{n}]):
    w, i = topk(x, {n})
    (sort(x), w, i)
"""
DTYPE_ARCH = [
    ("f32", "sm_90a"), ("i64", "sm_80"), ("f16", "sm_89"), ("bf16", "sm_80"), ("f64", "sm_89"),
    ("i8", "sm_90a"), ("u16", "sm_80"), ("i32", "sm_89"), ("f8e4m3", "sm_90a"), ("bool", "sm_80"),
    ("f8e5m2", "sm_80"), ("u64", "sm_90a"),
]  # fmt: skip

LONG = ("f32", "f16", "i8", "u64")
"""Dtypes of rows of several tiles."""
MANY_TILES = ("f16", "u64")
"""Those of them whose counts are added up by kernels of their own."""


def data(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Any:
    """Numbers of all sizes, equal ones among them, and what is at the ends of the dtype."""
    kind, of = DTYPES[dtype].numpy, DTYPES[dtype]
    if of.is_bool:
        return rng.random(shape) < 0.5
    if of.is_int:
        found = rng.integers(np.iinfo(kind).min, np.iinfo(kind).max, shape, kind, endpoint=True)
        return np.where(rng.random(shape) < 0.3, rng.integers(0, 4, shape).astype(kind), found)
    sizes = rng.standard_normal(shape) * 2.0 ** rng.integers(-9, 6, shape)
    odd = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0, 1.0], shape)
    return np.where(rng.random(shape) < 0.2, odd, sizes).astype(kind)


def wanted(x: Any) -> list[Any]:
    """Both ways, in f32 if stored in fewer bits: NumPy knows no NaN of the dtypes of others."""
    x = x.astype(np.float32) if x.dtype.itemsize < 4 and x.dtype.kind not in "iub" else x
    return [sort(x, 0, False)[0], *sort(x, 0, True)]


@pytest.mark.parametrize("dtype, arch", DTYPE_ARCH)
def test_lengths_and_dtypes(
    dtype: str, arch: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A row of a block, and one of two tiles of which the last is short: few, or as many are."""
    many = dtype in MANY_TILES
    if many:
        monkeypatch.setattr(long_sorts, "FEW_TILES", 1)
    elif dtype == "i8":  # a turn for each tile
        monkeypatch.setattr(long_sorts, "TOGETHER", 1)
    for n in (613, 4099) if dtype in LONG else (613,):
        plan = compiled(tmp_path / "p.pipe", FIXED.format(t=dtype, n=n), (arch,))
        check_legal(plan)
        assert not any(x.report.get("spill bytes") for x in launches(plan))
        assert len(launches(plan)) == (
            2 if n < 4096 else 2 * (4 if many else 2) * DTYPES[dtype].itemsize
        )
        x = data(rng, dtype, (n,))
        for ours, theirs in zip(Emulated(plan, arch)({"x": x}, {}), wanted(x), strict=True):
            np.testing.assert_array_equal(ours.astype(theirs.dtype), theirs)
            if DTYPES[dtype].is_float:
                zeros = theirs == 0
                signs = np.signbit(ours.astype(theirs.dtype))
                np.testing.assert_array_equal(signs[zeros], np.signbit(theirs[zeros]))


def test_any_length(tmp_path: Path, rng: np.random.Generator) -> None:
    """Sizes choose a network, one block with few or many lanes, or many blocks."""
    plan = compiled(tmp_path / "p.pipe", LINE.format(t="i32"), ("sm_90a",))
    line = Emulated(plan, "sm_90a")
    for n in (0, 1, 7, 256, 257, 1024, 1025, 4096, 4097, 8192):
        x = data(rng, "i32", (n,))
        for ours, theirs in zip(line({"x": x}, {"N": n}), wanted(x), strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_axes(tmp_path: Path, rng: np.random.Generator) -> None:
    """Several long rows along any axis, of a value that the kernel computes, in no range."""
    text = """
pipeline p(x: f16[A, B, C]) -> (f16[A, B, C], f16[A, B, C], f16[A * B * C]):
    (sort(-x, axis=1), sort(x, descending=True), sort(reshape(x, [A * B * C])))
"""
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80",))
    run = Emulated(plan, "sm_80")
    for shape in ((2, 4101, 2), (0, 5000, 2), (3, 1, 4097), (1, 300, 3)):
        x = data(rng, "f16", shape)
        found = run({"x": x}, dict(zip("ABC", shape, strict=True)))
        whole = (sort(-x, 1, False)[0], sort(x, 2, True)[0], sort(x.reshape(-1), 0, False)[0])
        for ours, theirs in zip(found, whole, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_places_beyond_two_to_the_31(tmp_path: Path, rng: np.random.Generator) -> None:
    """The kernel that moves a tile's elements, where 2^31 + 3 others come before them in the row.

    Results are pointed to so far before their memory that it begins at that place.
    """
    plan = compiled(tmp_path / "p.pipe", "pipeline p(x: i8[N]) -> (i8[N], i64[N])\n"
                    "where N in 4097..=4294967295:\n    topk(x, N)\n", ("sm_80",))  # fmt: skip
    (gpu,) = plan.pipelines[0].gpu
    moved = next(x for x in gpu.launches if "_moved" in x.kernel and "counted" not in x.kernel)
    begin, count = 2**31 + 3, 4096
    keys = rng.integers(-128, 128, count).astype(np.int8)
    order = np.arange(count, dtype=np.uint32) + np.uint32(2**31)
    digits = np.zeros(count, np.uint8)  # one digit, with all elements of other tiles before
    before = np.full(257, count, np.uint32)
    running = np.full(256, begin + count, np.uint32)
    starts = np.zeros(256, np.uint32)
    values, places = np.zeros(count, np.int8), np.zeros(count, np.int64)
    pointed = [emulator.Pointer(a, -begin * a.itemsize) for a in (values, places)]
    emulator.load(plan.ptx["sm_80"]).launch(
        moved.kernel, grid=1, block=moved.block, shared_bytes=int(moved.shared_bytes),
        args=[running, before, starts, digits, keys, order, *pointed, np.int64(count),
              np.zeros(2, np.int64)],
    )  # fmt: skip
    assert moved.buffers[-2:] == (1, 2)
    np.testing.assert_array_equal(values, keys)
    np.testing.assert_array_equal(places, order.astype(np.int64))


def test_elements_move_alone_if_nobody_wants_where_they_come_from(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    sizes = {"x": 4100, "y": 500, "z": 100}
    types = ", ".join(f"{name}: f16[{n}]" for name, n in sizes.items())
    results = ", ".join(f"f16[{n}]" for n in sizes.values())
    text = f"pipeline p({types}) -> ({results}):\n    sort(x), sort(y), sort(z)\n"
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80",))
    check_legal(plan)
    (gpu,) = plan.pipelines[0].gpu
    assert {b.dtype for b in gpu.buffers if b.shape == ("4100",)} == {"f16", "u8"}
    inputs = {name: data(rng, "f16", (n,)) for name, n in sizes.items()}
    found = Emulated(plan, "sm_80")(inputs, {})
    for ours, theirs in zip(found, inputs.values(), strict=True):
        np.testing.assert_array_equal(ours.astype(np.float32), wanted(theirs)[0])
