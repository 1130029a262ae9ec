"""Products of what indices choose: matrices for each of a batch, and rows of the left operand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from .gpu_run import ARCHES, Emulated, check_legal, compiled, launches

UNITS = {"f32": (np.dtype(np.float32), 2.0**-22), "f16": (np.dtype(np.float16), 2.0**-10),
         "bf16": (np.dtype(ml_dtypes.bfloat16), 2.0**-7), "f64": (np.dtype(np.float64), 2.0**-50),
         "i8": (np.dtype(np.int8), 0.0)}  # fmt: skip
"""What results are stored in, and a bound on the error of one beside the sum of magnitudes: a
rounding to its dtype, sums in f32 of up to 200 terms below it."""


def drawn(rng: np.random.Generator, shape: tuple[int, ...], dtype: str) -> Any:
    if dtype == "i8":
        return rng.integers(-128, 128, shape).astype(np.int8)
    return rng.standard_normal(shape).astype(UNITS[dtype][0])


def agree(found: Any, left: Any, right: Any, dtype: str) -> None:
    wide = np.int64 if dtype == "i8" else np.float64
    a, b = np.asarray(left).astype(wide), np.asarray(right).astype(wide)
    bound = UNITS[dtype][1] * (np.abs(a) @ np.abs(b))
    error = np.abs(np.asarray(found).astype(wide) - a @ b)
    assert (error <= bound).all(), f"{(error - bound).max()} beyond the bound"


MATRICES = {
    "rows along columns": ("w: T[6, K, N]", "w[e]", False),
    "along the depth": ("w: T[6, N, K]", "transpose(w[e], [0, 2, 1])", True),
}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("dtype", "form", "depth", "columns"),
    [
        ("bf16", "rows along columns", 72, 136), ("f16", "along the depth", 136, 40),
        ("f32", "rows along columns", 68, 36), ("f32", "along the depth", 35, 33),
        ("f32", "rows along columns", 33, 50), ("i8", "along the depth", 48, 40),
        ("bf16", "rows along columns", 77, 51), ("f64", "rows along columns", 21, 17),
    ],
)  # fmt: skip
def test_matrices_chosen_for_a_batch(
    dtype: str, form: str, depth: int, columns: int, arch: str, tmp_path: Path,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    weights, chosen, turned = MATRICES[form]
    result = "i32" if dtype == "i8" else dtype
    text = f"""pipeline p(x: T[B, M, K], e: i32[B], {weights}) -> R[B, M, N]
where B in 1..=64, M in 0..=4096:
    x @ {chosen}
"""
    text = text.replace("T[", f"{dtype}[").replace("R[", f"{result}[")
    text = text.replace("K", str(depth)).replace("N]", f"{columns}]").replace(" N,", f" {columns},")
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    lies = depth % 8 == 0 and columns % 8 == 0 or dtype in ("f32", "f64")
    assert not lies or all("matmul" in x.report["fused"] for x in launches(plan))
    run = Emulated(plan, arch)
    for batch, rows in ((3, 1), (5, 131)):
        x = drawn(rng, (batch, rows, depth), dtype)
        w = drawn(rng, (6, columns, depth) if turned else (6, depth, columns), dtype)
        e = rng.integers(-6, 6, batch).astype(np.int32)
        (found,) = run({"x": x, "w": w, "e": e}, {"B": batch, "M": rows})
        agree(found, x, w[e].swapaxes(1, 2) if turned else w[e], dtype)
        assert not run.status.any()
    e[0] = -7
    run({"x": x, "w": w, "e": e}, {"B": batch, "M": rows})
    assert run.status.tolist() == [1, -7]


ROWS = {
    "one list": ("i: i64[M]", "x[i]", (None,)),
    "a table of them": ("i: i64[2, M]", "x[i]", (2, None)),
    "one list for each of a batch": ("i: i64[3, M]", "y[i]", (3, None)),
}


@pytest.mark.parametrize("arch", ARCHES)
@pytest.mark.parametrize(
    ("dtype", "form", "depth", "columns"),
    [
        ("bf16", "one list", 72, 136), ("f16", "a table of them", 136, 40),
        ("f32", "one list", 68, 36), ("f32", "a table of them", 35, 33),
        ("bf16", "one list", 77, 51), ("f64", "one list", 21, 17), ("i8", "one list", 48, 40),
    ],
)  # fmt: skip
def test_rows_chosen_by_indices(
    dtype: str, form: str, depth: int, columns: int, arch: str, tmp_path: Path,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    index, chosen, shape = ROWS[form]
    result = "i32" if dtype == "i8" else dtype
    given = f"{dtype}[{columns}, {depth}]" if dtype == "i8" else f"{dtype}[{depth}, {columns}]"
    right = "transpose(w, [1, 0])" if dtype == "i8" else "w"
    lead = "M" if len(shape) == 1 else "2, M"
    text = f"""pipeline p(x: {dtype}[R, {depth}], {index}, w: {given})
    -> {result}[{lead}, {columns}]
where R in 1..=4096, M in 0..=4096:
    {chosen} @ {right}
"""
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    run = Emulated(plan, arch)
    for rows, count in ((5, 9), (200, 131)):
        x, w = drawn(rng, (rows, depth), dtype), drawn(rng, (depth, columns), dtype)
        i = rng.integers(-rows, rows, [count if n is None else n for n in shape])
        stored = np.ascontiguousarray(w.T) if dtype == "i8" else w
        (found,) = run({"x": x, "w": stored, "i": i}, {"R": rows, "M": count})
        agree(found, x[i], w, dtype)
        assert not run.status.any()
    i[..., -1] = rows
    run({"x": x, "w": stored, "i": i}, {"R": rows, "M": count})
    assert run.status.tolist() == [1, rows]
    run({"x": x, "w": stored, "i": i[..., :0]}, {"R": rows, "M": 0})


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_rows_of_a_batch_and_what_follows(
    arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Rows that each of a batch chooses from its own table, an index that is computed, and the
    gathered rows again as a residual."""
    text = """pipeline p(x: bf16[3, R, 64], i: i64[3, M], w: bf16[3, 64, 64]) -> bf16[3, M, 64]
where R in 4..=4096, M in 1..=4096:
    g[b, m, k] = x[b, maximum(i[b, m] - 1, 0), k]
    bf16(maximum(f32(g @ w), 0.0)) + g
"""
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    run = Emulated(plan, arch)
    for count in (7, 70):
        x, w = drawn(rng, (3, 9, 64), "bf16"), drawn(rng, (3, 64, 64), "bf16")
        i = rng.integers(0, 9, (3, count))
        (found,) = run({"x": x, "w": w, "i": i}, {"R": 9, "M": count})
        g = np.take_along_axis(x, np.maximum(i - 1, 0)[:, :, None], 1).astype(float)
        sums = np.abs(g) @ np.abs(w.astype(float))
        wanted = np.maximum(g @ w.astype(float), 0) + g
        assert (np.abs(found.astype(float) - wanted) <= 2.0**-7 * (sums + np.abs(g))).all()


@pytest.mark.parametrize("dtype", ["bf16", "f32"])
def test_what_is_one_kernel_on_which_arch(dtype: str, tmp_path: Path) -> None:
    """Rows are gathered by the product, but on Hopper by a kernel before where tensor copies bring
    operands; matrices are read where they lie everywhere. Nothing is spilled."""
    text = f"""pipeline rows(x: {dtype}[512, 256], i: i64[M], w: {dtype}[256, 512])
    -> {dtype}[M, 512]
where M in 1..=4096:
    x[i] @ w

pipeline experts(x: {dtype}[64, 128, 256], e: i64[64], w: {dtype}[8, 256, 512])
    -> {dtype}[64, 128, 512]:
    x @ w[e]
"""
    plan = compiled(tmp_path / "p.pipe", text)
    for pipeline, gathers in zip(plan.pipelines, (True, False), strict=True):
        for gpu in pipeline.gpu:
            alone = [x for x in gpu.launches if "matmul" not in x.report["fused"]]
            assert len(alone) == (1 if gathers and gpu.arch == "sm_90a" else 0)
            for launch in gpu.launches:
                assert launch.report.get("spill bytes", 0) == 0
