"""Products of few tiles and a great depth, which blocks divide among them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.gpu.matmul.deep_split import clocks
from stagefuse.dsl.dims_text import parse
from stagefuse.dsl.dtypes import DTYPES

from .gpu_run import Emulated, check_legal, compiled, launches

UNITS = {"f32": 2.0**-24, "bf16": 2.0**-8, "f16": 2.0**-11, "f8e4m3": 2.0**-24, "i8": 0.0}
DEPTH, COLUMNS = 2048, 72


@pytest.mark.parametrize(
    ("kind", "transposed", "rows"),
    [("bf16", False, 20), ("f16", True, 130), ("bf16", True, None), ("f8e4m3", True, 5),
     ("i8", True, 40)],
)  # fmt: skip
def test_parts_of_the_depth(
    kind: str, transposed: bool, rows: int | None, tmp_path: Path, rng: np.random.Generator
) -> None:
    to = {"i8": "i32", "f8e4m3": "f32"}.get(kind, kind)
    matrix = (COLUMNS, DEPTH) if transposed else (DEPTH, COLUMNS)
    right = f"{to}(transpose(w, [1, 0]))" if transposed else f"{to}(w)"
    text = (
        f"pipeline p(x: {kind}[{rows or 'M'}, {DEPTH}], w: {kind}[{matrix[0]}, {matrix[1]}])"
        f" -> {to}[{rows or 'M'}, {COLUMNS}]:\n    {to}(x) @ {right}\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    check_legal(plan)
    parts = [x for x in launches(plan) if "_parts_by_" in x.kernel]
    assert len(parts) == (1 if rows else 3)  # up to 256, 512 and 1024 rows
    assert all(x.maps and not x.report.get("spill bytes") for x in parts)
    dtype = DTYPES[kind].numpy
    run = Emulated(plan)
    for count in (rows,) if rows else (7, 129, 260):
        if kind == "i8":
            x, w = (rng.integers(-128, 128, s).astype(np.int8) for s in ((count, DEPTH), matrix))
        else:
            x, w = (rng.standard_normal(s).astype(dtype) for s in ((count, DEPTH), matrix))
        (found,) = run({"x": x, "w": w}, {} if rows else {"M": count})
        a, b = x.astype(np.float64), w.astype(np.float64)
        b = b.T if transposed else b
        wanted, total = a @ b, abs(a) @ abs(b)
        # as many roundings of sums in f32 as the depth has elements, and one of the result
        lost = (0 if kind == "i8" else DEPTH * 2.0**-24) * total + UNITS[kind] * abs(wanted)
        assert (abs(found.astype(np.float64) - wanted) <= lost + 2.0**-24 * (kind != "i8")).all()


@pytest.mark.parametrize(("kind", "arch"), [("f32", "sm_80"), ("bf16", "sm_80"), ("f16", "sm_90a")])
def test_a_depth_that_is_not_known(
    kind: str, arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    text = f"""pipeline p(x: {kind}[K, 72], w: {kind}[K, 40], b: {kind}[40]) -> {kind}[72, 40]
where K in 0..=65536:
    maximum(transpose(x, [1, 0]) @ w + b, {kind}(0))
"""
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    parts = [x for x in launches(plan) if "_parts" in x.kernel]
    assert len(parts) == 1 and not any(x.report["spill bytes"] for x in launches(plan))
    run = Emulated(plan, arch)
    for depth in (0, 77, 4099):
        dims = {"K": depth}
        assert (parse(parts[0].grid[0]).evaluate(dims) > 0) == (depth > 4000)
        x, w, b = (rng.standard_normal(s).astype(DTYPES[kind].numpy)
                   for s in ((depth, 72), (depth, 40), (40,)))  # fmt: skip
        (found,) = run({"x": x, "w": w, "b": b}, dims)
        agree(found, x.T, w, kind, b.astype(np.float64))


@pytest.mark.parametrize(
    ("kind", "arch", "batch"), [("f32", "sm_80", 3), ("i8", "sm_90a", 3), ("f16", "sm_90a", None)]
)
def test_products_of_a_batch(
    kind: str, arch: str, batch: int | None, tmp_path: Path, rng: np.random.Generator
) -> None:
    to, lead = "i32" if kind == "i8" else kind, batch or "B"
    text = (
        f"pipeline p(x: {kind}[{lead}, 40, 2064], w: {kind}[{lead}, 56, 2064])"
        f" -> {to}[{lead}, 40, 56]{'' if batch else chr(10) + 'where B in 1..=64'}:\n"
        f"    {to}(x) @ {to}(transpose(w, [0, 2, 1]))\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    parts = [x for x in launches(plan) if "_parts" in x.kernel]
    assert len(parts) == 1 and not any(x.report["spill bytes"] for x in launches(plan))
    x, w = (rng.integers(-128, 128, (2 if batch is None else batch, n, 2064)) for n in (40, 56))
    if kind != "i8":
        x, w = (rng.standard_normal(t.shape) for t in (x, w))
    x, w = (t.astype(DTYPES[kind].numpy) for t in (x, w))
    (found,) = Emulated(plan, arch)({"x": x, "w": w}, {} if batch else {"B": 2})
    agree(found, x, w.swapaxes(1, 2), kind, 0.0, clipped=False)


def agree(found: Any, x: Any, w: Any, kind: str, bias: Any, clipped: bool = True) -> None:
    """Equal to x @ w + bias, no less than 0 if `clipped`, but for a rounding in f32 of each sum and
    two of the result."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    wanted, total = x @ w + bias, abs(x) @ abs(w) + abs(bias)
    lost = x.shape[-1] * 2.0**-24 * total + 2 * UNITS[kind] * (abs(wanted) + abs(bias)) + 2.0**-24
    off = abs(found.astype(np.float64) - (np.maximum(wanted, 0) if clipped else wanted))
    assert (off <= (0 if kind == "i8" else lost)).all()


def test_what_is_split(tmp_path: Path) -> None:
    """The depth of few tiles; not that of enough, nor a short one."""

    def parts(rows: int, columns: int, depth: int) -> bool:
        text = (
            f"pipeline p(x: bf16[{rows}, {depth}], w: bf16[{columns}, {depth}])"
            f" -> bf16[{rows}, {columns}]:\n    x @ transpose(w, [1, 0])\n"
        )
        plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
        return any("_parts_by_" in x.kernel for x in launches(plan))

    assert parts(64, 4096, 14336) and parts(256, 256, 16384)
    assert not parts(2048, 2048, 2048) and not parts(256, 1024, 256)
    assert clocks(64, 4096, 224, 64, 2) < clocks(64, 4096, 224, 64, 1)


def test_stretches_are_for_few_tiles_and_a_great_depth(tmp_path: Path) -> None:
    text = (
        "pipeline p(x: f32[B, M, K], w: f32[B, K, 64]) -> f32[B, M, 64]\n"
        "where M in 1..=4096, K in 0..=65536, B in 1..=64:\n    x @ w\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80",))
    (parts,) = (x for x in launches(plan) if "parts" in x.kernel)
    blocks = parse(parts.grid[0])
    assert blocks.evaluate({"M": 64, "K": 16384, "B": 1}) >= 8
    assert blocks.evaluate({"M": 64, "K": 128, "B": 1}) == 0
    assert blocks.evaluate({"M": 4096, "K": 16384, "B": 64}) == 0
