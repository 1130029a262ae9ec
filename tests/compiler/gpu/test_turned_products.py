"""Products whose left operand lies the other way: read so where 16 bytes of it are adjacent and
aligned, else copied in its own 16 bits first."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from .gpu_run import Emulated, between, check_legal, compiled, launches

DTYPES = {
    "f32": (np.dtype(np.float32), 2.0**-24),
    "f16": (np.dtype(np.float16), 2.0**-11),
    "bf16": (np.dtype(ml_dtypes.bfloat16), 2.0**-8),
}


def agree(found: Any, x: Any, w: Any, dtype: str, more: Any = 0.0) -> None:
    """Equal to x @ w + more but for a rounding in f32 of each of its terms and of some sums, and
    two of the result."""
    x, w = x.astype(np.float64), w.astype(np.float64)
    wanted, sizes = x @ w + more, abs(x) @ abs(w) + abs(more)
    unit = DTYPES[dtype][1]
    lost = (x.shape[-1] + 8) * 2.0**-24 * sizes + 2 * unit * (abs(wanted) + abs(more)) + 2.0**-24
    assert (abs(found.astype(np.float64) - wanted) <= lost).all()


@pytest.mark.parametrize(
    ("dtype", "arch", "straight", "batch", "rows"),
    [
        ("f32", "sm_80", True, True, 72),
        ("f32", "sm_90a", True, False, 136),
        ("f32", "sm_90a", False, True, 40),
        ("bf16", "sm_80", True, False, 136),
        ("f16", "sm_80", False, True, 264),
        ("bf16", "sm_90a", True, False, 264),
        ("f16", "sm_90a", False, True, 40),
    ],
)
def test_it_is_read_where_it_lies(
    dtype: str, arch: str, straight: bool, batch: bool, rows: int, tmp_path: Path,
    rng: np.random.Generator,
) -> None:  # fmt: skip
    axes, lead, outer = ("[0, 2, 1]", "B, ", (2,)) if batch else ("[1, 0]", "", ())
    right, shape = ("w", "K, 104") if straight else (f"transpose(w, {axes})", "104, K")
    text = f"""pipeline p(x: {dtype}[{lead}K, {rows}], w: {dtype}[{lead}{shape}])
where K in 0..=4096, K % {1 if straight else 8} == 0{", B in 1..=8" if batch else ""}:
    transpose(x, {axes}) @ {right}
"""
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    (gpu,) = plan.pipelines[0].gpu
    assert not between(gpu)
    assert not any(x.report["spill bytes"] for x in launches(plan))
    assert ("wgmma" if arch == "sm_90a" else "mma.sync") in plan.ptx[arch]
    for depth in (77 if straight else 200, *(() if dtype == "f32" else (8,))):
        x, w = (rng.standard_normal((*outer, depth, n)) for n in (rows, 104))
        x, w = x.astype(DTYPES[dtype][0]), w.astype(DTYPES[dtype][0])
        given = w if straight else np.ascontiguousarray(w.swapaxes(-1, -2))
        (found,) = Emulated(plan, arch)({"x": x, "w": given}, {"K": depth, "B": 2})
        agree(found, x.swapaxes(-1, -2), w, dtype)


@pytest.mark.parametrize(("dtype", "arch"), [("f32", "sm_80"), ("bf16", "sm_90a")])
def test_what_another_kernel_makes_is_stored_as_it_lies(
    dtype: str, arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    text = f"""pipeline made(x: {dtype}[K, 72], y: {dtype}[K, 48], z: {dtype}[72, 40])
where K in 1..=4096:
    h = abs(x)
    transpose(h, [1, 0]) @ y, h @ z

pipeline product(x: {dtype}[K, 64], w: {dtype}[64, 72], y: {dtype}[K, 48])
where K in 1..=4096:
    transpose(x @ w, [1, 0]) @ y
"""
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    drawn = {n: rng.standard_normal(s).astype(DTYPES[dtype][0]) for n, s in
             {"x": (90, 72), "y": (90, 48), "z": (72, 40), "w": (64, 72)}.items()}  # fmt: skip
    for number, pipeline in enumerate(plan.pipelines):
        (gpu,) = pipeline.gpu
        assert between(gpu) == [("K", "72")]
        given = drawn if number == 0 else {**drawn, "x": drawn["x"][:, :64].copy()}
        found = Emulated(plan, arch, number)(given, {"K": 90})
        x, y = given["x"], drawn["y"]
        if number == 0:
            agree(found[0], abs(x).T, y, dtype)
            agree(found[1], abs(x), drawn["z"], dtype)
            continue
        h = (x.astype(np.float64) @ drawn["w"].astype(np.float64)).T
        lost = 180 * DTYPES[dtype][1] * (abs(h) @ abs(y.astype(np.float64)))
        assert (abs(found[0].astype(np.float64) - h @ y.astype(np.float64)) <= lost).all()


@pytest.mark.parametrize(
    ("dtype", "straight", "arch", "batch"),
    [
        ("f16", True, "sm_80", ()),
        ("bf16", False, "sm_90a", (2,)),
        ("f16", True, "sm_90a", ()),
    ],
)
def test_it_is_copied_as_it_is_stored(
    dtype: str,
    straight: bool,
    arch: str,
    batch: tuple[int, ...],
    tmp_path: Path,
    rng: np.random.Generator,
) -> None:
    axes, lead = ("[0, 2, 1]", "2, ") if batch else ("[1, 0]", "")
    right = "w" if straight else f"transpose(w, {axes})"
    matrix = (72, 104) if straight else (104, 72)
    types = f"x: {dtype}[{lead}72, M], w: {dtype}[{lead}{matrix[0]}, {matrix[1]}]"
    text = f"""pipeline p({types}, b: {dtype}[104]) -> {dtype}[{lead}M, 104]
where M in 1..=4096:
    transpose(x, {axes}) @ {right} + b
"""
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    first, *products = launches(plan)
    buffers = plan.pipelines[0].gpu[0].buffers
    assert {buffers[n].dtype for n in first.buffers} == {dtype}
    if arch == "sm_90a":
        assert any("wgmma" in plan.ptx[arch].split(f"{x.kernel}(")[1] for x in products)
    stored = DTYPES[dtype][0]
    for rows in (1, 131):
        shapes = {"x": (*batch, 72, rows), "w": (*batch, *matrix), "b": (104,)}
        given = {n: rng.standard_normal(s).astype(stored) for n, s in shapes.items()}
        (found,) = Emulated(plan, arch)(given, {"M": rows})
        w = given["w"] if straight else given["w"].swapaxes(-1, -2)
        agree(found, given["x"].swapaxes(-1, -2), w, dtype, given["b"].astype(np.float64))


@pytest.mark.parametrize(("dtype", "arch"), [("bf16", "sm_80"), ("f16", "sm_90a")])
def test_a_batch_may_share_the_right_operand(
    dtype: str, arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Rows of all matrices of the batch are rows of one product, of 16 bits too."""
    text = f"""pipeline p(x: {dtype}[3, 72, M], w: {dtype}[72, 104]) -> {dtype}[3, M, 104]
where M in 1..=4096:
    y[b, m, n] = sum[k] x[b, k, m] * w[k, n]
    y
"""
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    buffers = plan.pipelines[0].gpu[0].buffers
    assert {buffers[n].dtype for n in launches(plan)[0].buffers} == {dtype}
    assert "tf32" not in plan.ptx[arch]
    stored = DTYPES[dtype][0]
    for rows in (1, 67):
        x = rng.standard_normal((3, 72, rows)).astype(stored)
        w = rng.standard_normal((72, 104)).astype(stored)
        (found,) = Emulated(plan, arch)({"x": x, "w": w}, {"M": rows})
        agree(found, x.swapaxes(1, 2), w, dtype)
