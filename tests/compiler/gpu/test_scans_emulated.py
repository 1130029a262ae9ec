"""Scans of rows and columns, in one go and split into stretches, equal running sums."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagefuse.dsl.dims_text import parse

from .gpu_run import Emulated, check_legal, compiled

TEXT = """
pipeline line(x: {t}[N]) -> {t}[N]:
    cumsum(x, axis=0)

pipeline rows(x: {t}[B, N]) -> {t}[B, N]:
    cumsum(x * x, axis=1)

pipeline columns(x: {t}[N, B]) -> {t}[N, B]:
    cumsum(x, axis=0)

pipeline whole(x: {t}[B, 16640]) -> {t}[B, 16640]:
    cumsum(x, axis=1)
"""


def _data(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Any:
    if dtype == "f32":
        return rng.standard_normal(shape).astype(np.float32)
    return rng.integers(-9, 9, shape).astype({"i64": np.int64, "f64": np.float64}[dtype])


@pytest.mark.parametrize("dtype, arch", [("f32", "sm_80"), ("i64", "sm_89"), ("f64", "sm_90a")])
def test_scans(dtype: str, arch: str, tmp_path: Path, rng: np.random.Generator) -> None:
    plan = compiled(tmp_path / "p.pipe", TEXT.format(t=dtype), (arch,))
    check_legal(plan)
    line, rows, columns, whole = (Emulated(plan, arch, n) for n in range(4))

    def check(pipeline: Emulated, axis: int, *shape: int, square: bool = False) -> None:
        x = _data(rng, shape, dtype)
        names = ("N",) if len(shape) == 1 else ("B", "N") if axis else ("N", "B")
        (found,) = pipeline({"x": x}, dict(zip(names, shape, strict=True)))
        exact = np.cumsum(x.astype(float) ** (2 if square else 1), axis=axis)
        size = np.cumsum(np.abs(x.astype(float)), axis=axis).max(initial=1.0)
        np.testing.assert_allclose(found, exact, rtol=1e-6, atol=1e-6 * size)

    for n in (0, 1, 31, 1025, 16383, 16384, 20011):
        check(line, 0, n)
    for b, n in ((3, 1), (2, 33), (5, 1024), (3, 1027), (1, 17001), (3, 16388), (0, 5), (4, 0)):
        check(rows, 1, b, n, square=True)
    for n, b in ((1, 3), (255, 2), (256, 3), (1031, 5), (300, 1), (0, 3)):
        check(columns, 0, n, b)
    check(whole, 1, 2, 16640)


def test_several_loads_of_a_column_are_under_way(tmp_path: Path) -> None:
    plan = compiled(tmp_path / "p.pipe", TEXT.format(t="f32"), ("sm_90a",))
    columns = plan.pipelines[2].gpu[0].launches
    for launch in columns if plan.cubins else ():
        assert launch.report["bytes ahead"] >= 32 and launch.report["spill bytes"] == 0


def test_a_scan_of_a_long_row_is_split(tmp_path: Path) -> None:
    plan = compiled(tmp_path / "p.pipe", TEXT.format(t="f32"), ("sm_90a",))

    def runs(pipeline: int, **sizes: int) -> list[str]:
        launches = plan.pipelines[pipeline].gpu[0].launches
        return [x.label for x in launches if parse(x.grid[0]).evaluate(sizes)]

    split = ["cumsum parts", "cumsum stretches"]
    assert runs(0, N=1 << 20) == [f"line.{x}" for x in split] and len(runs(0, N=16000)) == 1
    assert runs(1, B=4, N=1 << 20) == [f"rows.{x}" for x in split]
    assert runs(1, B=4, N=100) == ["rows.cumsum to 1024"]
    ahead = {x.label: x.report.get("bytes ahead") for x in plan.pipelines[0].gpu[0].launches}
    assert ahead["line.cumsum parts"] in (None, 64)  # in vectors; None without ptxas
    assert len(runs(1, B=1 << 12, N=1 << 20)) == 1 and len(runs(1, B=4, N=2000)) == 1
    assert runs(2, N=8192, B=300) == [f"columns.{x}" for x in split]
    assert len(runs(2, N=8192, B=1 << 20)) == 1
