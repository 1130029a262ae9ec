"""Scatters by ranges combine every element with its updates in their order, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from .gpu_run import Emulated, check_legal, compiled, launches

TEXT = """
pipeline line(x: f32[N], i: i64[M], u: f32[M]) -> f32[N]
where M in 0..=500:
    scatter_add(x, i, u)

pipeline rows(x: f32[N, D], i: i64[M], u: f32[M, D]) -> f32[N, D]
where M in 0..=500:
    scatter_add(x, i, u * 0.5, axis=0)

pipeline columns(x: i32[D, N], i: i64[M], u: i32[D, M]) -> i32[D, N]
where M in 0..=500:
    scatter_max(x, i, u, axis=1)

pipeline planes(x: f32[B, N, D], i: i64[M], u: f32[B, M, D]) -> f32[B, N, D]
where M in 0..=500:
    scatter_set(x, i, u, axis=1)
"""


def _added(x: Any, i: Any, u: Any, axis: int, combine: Any) -> Any:
    y = np.moveaxis(x.copy(), axis, 0)
    for n, update in zip(i, np.moveaxis(u, axis, 0), strict=True):
        y[n] = combine(y[n], update)
    return np.moveaxis(y, 0, axis)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_scatters(arch: str, tmp_path: Path, rng: np.random.Generator) -> None:
    plan = compiled(tmp_path / "p.pipe", TEXT, (arch,))
    check_legal(plan)
    line, rows, columns, planes = (Emulated(plan, arch, n) for n in range(4))

    def data(*shape: int) -> Any:
        return rng.standard_normal(shape).astype(np.float32)

    for n, m in ((1, 40), (5, 300), (90, 130), (3000, 1), (40, 0)):
        i = rng.integers(-n, n, m)
        dims = {"N": n, "M": m}
        x, u = data(n), data(m)
        (found,) = line({"x": x, "i": i, "u": u}, dims)
        np.testing.assert_array_equal(found, _added(x, i, u, 0, np.add))
        for d in (37, 132):
            x, u = data(n, d), data(m, d)
            (found,) = rows({"x": x, "i": i, "u": u}, {**dims, "D": d})
            half = np.float32(0.5)
            np.testing.assert_array_equal(found, _added(x, i, u * half, 0, np.add))
        a, b = (rng.integers(-99, 99, s).astype(np.int32) for s in ((6, n), (6, m)))
        (found,) = columns({"x": a, "i": i, "u": b}, {**dims, "D": 6})
        np.testing.assert_array_equal(found, _added(a, i, b, 1, np.maximum))
        x, u = data(2, n, 9), data(2, m, 9)
        (found,) = planes({"x": x, "i": i, "u": u}, {**dims, "B": 2, "D": 9})
        np.testing.assert_array_equal(found, _added(x, i, u, 1, lambda _, v: v))


def test_a_position_out_of_range_is_reported(tmp_path: Path, rng: np.random.Generator) -> None:
    emulated = Emulated(compiled(tmp_path / "p.pipe", TEXT, ("sm_90a",)))
    i = rng.integers(0, 50, 200)
    i[70] = 50
    x, u = np.zeros(50, np.float32), np.ones(200, np.float32)
    emulated({"x": x, "i": i, "u": u}, {"N": 50, "M": 200})
    assert emulated.status[0] and emulated.status[1] == 50


MANY = """
pipeline line(x: f32[N], i: i64[4103], u: f32[4103]) -> f32[N]:
    scatter_add(x, i, u)

pipeline rows(x: f16[N, 3], i: i64[4103], u: f16[4103, 3]) -> f16[N, 3]:
    scatter_add(x, i, u * 0.5, axis=0)

pipeline largest(x: i32[2, N], i: i64[4103], u: i32[2, 4103]) -> i32[2, N]:
    scatter_max(x, i, u, axis=1)

pipeline last(x: i64[N], i: i64[4103], u: i64[4103]) -> i64[N]:
    scatter_set(x, i, u)

pipeline columns(x: f64[2, N], i: i64[4103], u: f64[2, 4103]) -> f64[2, N]:
    scatter_add(x, i, u, axis=1)
"""


def _runs(size: int, lengths: list[int], count: int, rng: np.random.Generator) -> Any:
    """Positions, of which some occur so many times, in any order."""
    taken = rng.choice(size, len(lengths), replace=False)
    found = np.concatenate([np.repeat(taken, lengths), rng.integers(0, size, count)])[:count]
    return rng.permutation(found).astype(np.int64)


@pytest.mark.parametrize("arch, size", [("sm_80", 70001), ("sm_89", 31), ("sm_90a", 300)])
def test_many_updates_are_sorted(
    arch: str, size: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    """By one digit, two or three, of the positions; updates keep their order, in runs of any
    length. Integers, and what is set, only where elements are few."""
    plan = compiled(tmp_path / "p.pipe", MANY, (arch,))
    check_legal(plan)
    assert not any(x.report.get("spill bytes") for x in launches(plan))
    line, rows, largest, last, columns = (Emulated(plan, arch, n) for n in range(5))
    m, dims = 4103, {"N": size}
    lengths = [31, 32, 33, 1, 63, 64, 65, 127, 128, 129, 161, 1000]
    random, in_runs = rng.integers(-size, size, m), _runs(size, lengths, m, rng)
    for i in (random, in_runs, np.full(m, int(rng.integers(size)))):
        x, u = (rng.standard_normal(n).astype(np.float32) for n in (size, m))
        (found,) = line({"x": x, "i": i, "u": u}, dims)
        np.testing.assert_array_equal(found, _added(x, i, u, 0, np.add))
    for i in (random, in_runs) if size < 70000 else ():
        x, u = (rng.integers(-99, 99, (2, n)).astype(np.int32) for n in (size, m))
        (found,) = largest({"x": x, "i": i, "u": u}, dims)
        np.testing.assert_array_equal(found, _added(x, i, u, 1, np.maximum))
        x, u = (rng.integers(-99, 99, n) for n in (size, m))
        (found,) = last({"x": x, "i": i, "u": u}, dims)
        np.testing.assert_array_equal(found, _added(x, i, u, 0, lambda _, v: v))
        if size < 300:
            continue
        x, u = (rng.standard_normal((n, 3)).astype(np.float16) for n in (size, m))
        (found,) = rows({"x": x, "i": i, "u": u}, dims)
        np.testing.assert_array_equal(found, _added(x, i, u * np.float16(0.5), 0, np.add))
        x, u = (rng.standard_normal((2, n)) for n in (size, m))
        (found,) = columns({"x": x, "i": i, "u": u}, dims)
        np.testing.assert_array_equal(found, _added(x, i, u, 1, np.add))
    i = random
    i[m // 2] = size
    line({"x": np.zeros(size, np.float32), "i": i, "u": np.ones(m, np.float32)}, dims)
    assert line.status[0] and line.status[1] == size


def test_many_updates_of_nothing_are_reported(tmp_path: Path) -> None:
    emulated = Emulated(compiled(tmp_path / "p.pipe", MANY, ("sm_90a",)))
    empty, i, u = np.zeros(0, np.float32), np.zeros(4103, np.int64), np.ones(4103, np.float32)
    (found,) = emulated({"x": empty, "i": i, "u": u}, {"N": 0})
    assert found.shape == (0,) and emulated.status[0]


ANY_ORDER = """
pipeline counted(i: i64[M]) -> i64[300]
where M in 0..=9000:
    scatter_add(zeros([300], i64), i, ones([M], i64))

pipeline added(x: i32[2, N, 3], i: i64[M], u: i32[2, M, 3]) -> i32[2, N, 3]
where M in 0..=500:
    scatter_add(x, i, u, axis=1)

pipeline greatest(x: i64[N], i: i64[M], u: i64[M]) -> i64[N]
where M in 0..=500:
    scatter_max(x, i, u * 2)

pipeline kept(x: KEPT[N, D], i: i64[M], u: KEPT[M, D]) -> KEPT[N, D]
where M in 0..=500:
    scatter_set(x, i, u)
"""


@pytest.mark.parametrize(
    "arch, dtype", [("sm_80", "bool"), ("sm_80", "u8"), ("sm_89", "f16"), ("sm_90a", "f64")]
)
def test_updates_in_any_order(
    arch: str, dtype: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Integers are added and compared, and the last update found, by atomic operations."""
    plan = compiled(tmp_path / "p.pipe", ANY_ORDER.replace("KEPT", dtype), (arch,))
    check_legal(plan)
    assert plan.ptx[arch].count("red.global.") >= 4
    counted, added, greatest, kept = (Emulated(plan, arch, n) for n in range(4))
    i = rng.integers(-300, 300, 8999)
    (found,) = counted({"i": i}, {"M": len(i)})
    np.testing.assert_array_equal(found, np.bincount(i % 300, minlength=300))
    for n, m, d in ((1, 300, 2), (7, 500, 1), (300, 0, 3), (1000, 333, 8), (40, 90, 37)):
        i, dims = rng.integers(-n, n, m), {"N": n, "M": m}
        x, u = (rng.integers(-(2**31), 2**31, (2, s, 3)).astype(np.int32) for s in (n, m))
        (found,) = added({"x": x, "i": i, "u": u}, dims)
        np.testing.assert_array_equal(found, _added(x, i, u, 1, np.add))
        x, u = (rng.integers(-(2**60), 2**60, s) for s in (n, m))
        (found,) = greatest({"x": x, "i": i, "u": u}, dims)
        np.testing.assert_array_equal(found, _added(x, i, u * 2, 0, np.maximum))
        kind = {"bool": np.bool_, "u8": np.uint8, "f16": np.float16, "f64": np.float64}[dtype]
        x, u = ((rng.standard_normal((s, d)) * 3).astype(np.int8).astype(kind) for s in (n, m))
        (found,) = kept({"x": x, "i": i, "u": u}, {**dims, "D": d})
        np.testing.assert_array_equal(found, _added(x, i, u, 0, lambda _, v: v))
    empty, i, u = np.zeros(0, np.int64), np.zeros(5, np.int64), np.ones(5, np.int64)
    (found,) = greatest({"x": empty, "i": i, "u": u}, {"N": 0, "M": 5})
    assert found.shape == (0,) and greatest.status[0]


BROAD = """
pipeline p(x: f32[N, D], i: i64[M], u: f32[M, D]) -> f32[N, D]
where M in 4097..=5000:
    scatter_add(x, i, u)
"""


def test_runs_of_rows_of_unknown_width(tmp_path: Path, rng: np.random.Generator) -> None:
    """By lanes and, of long runs, by warps where rows are short, and else by warps alone."""
    plan = compiled(tmp_path / "p.pipe", BROAD, ("sm_90a",))
    check_legal(plan)
    assert not any(x.report.get("spill bytes") for x in launches(plan))
    run, m = Emulated(plan), 4099
    i = _runs(50, [32, 33, 40, 200, 1000], m, rng)
    for width in (1, 5, 35):
        x, u = (rng.standard_normal((n, width)).astype(np.float32) for n in (50, m))
        (found,) = run({"x": x, "i": i, "u": u}, {"N": 50, "M": m, "D": width})
        np.testing.assert_array_equal(found, _added(x, i, u, 0, np.add))


ROWS = """
pipeline planes(x: bf16[2, N, 40], i: i64[4097], u: bf16[2, 4097, 40]) -> bf16[2, N, 40]:
    scatter_add(x, i, u, axis=1)

pipeline squares(x: f32[N, 6, 7], i: i64[4097], u: f32[4097, 6, 7]) -> f32[N, 6, 7]:
    scatter_add(x, i, u, axis=0)
"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_updates_of_rows(arch: str, tmp_path: Path, rng: np.random.Generator) -> None:
    """A warp goes through all updates of its columns of a row, in runs of any length; of elements
    that are many beside each other, but in short rows, lanes have one each."""
    plan = compiled(tmp_path / "p.pipe", ROWS, (arch,))
    check_legal(plan)
    assert not any(x.report.get("spill bytes") for x in launches(plan))
    lengths = [1, 31, 32, 33, 63, 64, 65, 97]
    for n, dtype, axis, own in ((0, ml_dtypes.bfloat16, 1, (2, 40)), (1, np.float32, 0, (6, 7))):
        run, i = Emulated(plan, arch, n), _runs(60, lengths, 4097, rng)
        shapes = ((*own[:axis], count, *own[axis:]) for count in (60, 4097))
        x, u = (rng.standard_normal(shape).astype(dtype) for shape in shapes)
        (found,) = run({"x": x, "i": i, "u": u}, {"N": 60})
        np.testing.assert_array_equal(found, _added(x, i, u, axis, np.add))
