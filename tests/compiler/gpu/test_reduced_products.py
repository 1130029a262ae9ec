"""Products of which only reductions of rows are wanted: no kernel stores them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stagefuse.compiler.gpu import drafts

from .gpu_run import ARCHES, Emulated, check_legal, compiled, launches

WIDE = {"i32": np.int32, "f32": np.float32, "f64": np.float64}
UNITS = {"i32": 0.0, "f32": 2.0**-24, "f64": 2.0**-53, "bf16": 2.0**-8, "f16": 2.0**-11}
DTYPES: dict[str, Any] = {
    "f32": np.float32, "f64": np.float64, "bf16": ml_dtypes.bfloat16, "f16": np.float16,
    "i8": np.int8,
}  # fmt: skip


@pytest.fixture()
def few_elements(monkeypatch: pytest.MonkeyPatch) -> None:
    """So few that small products are reduced in tiles."""
    monkeypatch.setattr(drafts, "FEW_REDUCED", 4)
    monkeypatch.setattr(drafts, "MANY_REDUCED", 500)


def drawn(rng: np.random.Generator, dtype: str, *shape: int) -> Any:
    if dtype == "i8":
        return rng.integers(-128, 128, shape).astype(np.int8)
    return rng.standard_normal(shape).astype(DTYPES[dtype])


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("dtype", "depth", "columns"),
    [("f32", 64, 300), ("f32", 35, 51), ("bf16", 72, 264), ("f16", 136, 40), ("i8", 48, 136),
     ("f64", 21, 33)],
)  # fmt: skip
def test_rows_are_reduced_in_their_tiles(
    dtype: str, depth: int, columns: int, arch: str, tmp_path: Path, rng: np.random.Generator,
    few_elements: None,
) -> None:  # fmt: skip
    wide = {"i8": "i32", "bf16": "f32", "f16": "f32"}.get(dtype, dtype)
    whole = "i64" if dtype == "i8" else wide
    product = f"{wide}(x @ transpose(w, [1, 0]))"
    results = {
        "sum": (f"{whole}[M]", f"sum({product} * b, axis=-1)"),
        "max": (f"{wide}[M, 1]", f"max({product} + b, axis=-1, keepdims=True) + b[0]"),
        "argmin": ("i64[M]", f"argmin({product} - b, axis=-1)"),
    }
    for kind, (result, value) in results.items():
        inputs = f"x: {dtype}[M, {depth}], w: {dtype}[{columns}, {depth}], b: {wide}[{columns}]"
        text = f"pipeline p({inputs}) -> {result}\nwhere M in 0..=4096:\n    {value}\n"
        plan = compiled(tmp_path / "p.pipe", text, (arch,))
        check_legal(plan)
        assert any("reduced" in x.kernel for x in launches(plan))
        run = Emulated(plan, arch)
        for rows in (0, 3, 150):
            x, w = drawn(rng, dtype, rows, depth), drawn(rng, dtype, columns, depth)
            b = drawn(rng, "i8" if dtype == "i8" else "f64", columns).astype(WIDE[wide])
            (found,) = run({"x": x, "w": w, "b": b}, {"M": rows})
            left, right, c = (np.asarray(v).astype(np.float64) for v in (x, w, b))
            y = left @ right.T
            # sums of `depth` terms in f32 or f64, a rounding to 16 bits, and one of what follows
            sizes = np.abs(left) @ np.abs(right.T) + np.abs(c)
            lost = UNITS[wide] * (depth + 8) * sizes + UNITS.get(dtype, 0) * np.abs(y)
            agree(kind, found, y, c, lost, UNITS[wide])


def agree(kind: str, found: Any, y: Any, b: Any, lost: Any, unit: float) -> None:
    """What was found is a reduction of `y`, whose elements may be off by `lost`."""
    if kind == "sum":
        bound = (lost * np.abs(b)).sum(axis=1) + unit * (len(b) + 1) * np.abs(y * b).sum(axis=1)
        assert (np.abs(found - (y * b).sum(axis=1)) <= bound).all()
    elif kind == "max":
        wanted = (y + b).max(axis=1, keepdims=True) + b[0]
        assert (np.abs(found - wanted) <= 2 * lost.max(axis=1, keepdims=True)).all()
    else:
        chosen = (y - b)[np.arange(len(y)), found]
        assert (chosen - (y - b).min(axis=1) <= 2 * lost.max(axis=1)).all()


def test_the_first_of_equal_extremes_and_nan_win(
    tmp_path: Path, rng: np.random.Generator, few_elements: None
) -> None:
    """Of equal ones in several tiles the first; a NaN counts as the extreme."""
    text = """pipeline p(x: f32[M, 4], w: f32[4, 300]) -> i64[M]
where M in 1..=4096:
    argmax(x @ w, axis=-1)
"""
    run = Emulated(compiled(tmp_path / "p.pipe", text, ("sm_90a",)))
    x = rng.integers(1, 4, (40, 4)).astype(np.float32)
    w = rng.integers(-2, 3, (4, 300)).astype(np.float32)
    (found,) = run({"x": x, "w": w}, {"M": 40})
    assert found.tolist() == np.argmax(x @ w, axis=1).tolist()
    w[2, 251], w[1, 290] = np.nan, np.inf
    (found,) = run({"x": x, "w": w}, {"M": 40})
    assert (found == 251).all()


def test_where_it_is_done(tmp_path: Path) -> None:
    """Deep products in 16 bits on Hopper, those whose elements others want, and those of few rows
    are stored."""
    text = """pipeline shallow(x: bf16[16384, 256], w: bf16[256, 4096]) -> f32[16384]:
    max(f32(x @ w), axis=-1)

pipeline deep(x: bf16[16384, 1024], w: bf16[1024, 4096]) -> f32[16384]:
    max(f32(x @ w), axis=-1)

pipeline wanted(x: bf16[16384, 256], w: bf16[256, 4096]) -> (f32[16384], bf16[16384, 4096]):
    y = x @ w
    (max(f32(y), axis=-1), y)

pipeline few(x: bf16[64, 256], w: bf16[256, 65536]) -> f32[64]:
    max(f32(x @ w), axis=-1)
"""
    plan = compiled(tmp_path / "p.pipe", text)
    done = {
        (p.name, gpu.arch)
        for p in plan.pipelines
        for gpu in p.gpu
        if any("reduced" in x.kernel for x in gpu.launches)
    }
    assert done == {*(("shallow", a) for a in ARCHES), ("deep", "sm_80"), ("deep", "sm_89")}
    for launch in launches(plan):
        assert launch.report.get("spill bytes", 0) == 0
