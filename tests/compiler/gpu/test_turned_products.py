"""Products whose left operand lies the other way: copied in its own 16 bits, then multiplied so."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from .gpu_run import Emulated, check_legal, compiled, launches

DTYPES = {"f16": (np.dtype(np.float16), 2.0**-11), "bf16": (np.dtype(ml_dtypes.bfloat16), 2.0**-8)}


@pytest.mark.parametrize(
    ("dtype", "straight", "arch"),
    [("f16", True, "sm_80"), ("bf16", False, "sm_90a"), ("f16", True, "sm_90a")],
)
@pytest.mark.parametrize("batch", [(), (2,)])
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
    stored, unit = DTYPES[dtype]
    for rows in (1, 131):
        shapes = {"x": (*batch, 72, rows), "w": (*batch, *matrix), "b": (104,)}
        given = {n: rng.standard_normal(s).astype(stored) for n, s in shapes.items()}
        (found,) = Emulated(plan, arch)(given, {"M": rows})
        x, w, b = (given[n].astype(np.float64) for n in "xwb")
        x, w = x.swapaxes(-1, -2), w if straight else w.swapaxes(-1, -2)
        wanted, sizes = x @ w + b, abs(x) @ abs(w) + abs(b)
        # 80 roundings of sums in f32; the product and the result are rounded to 16 bits
        lost = 80 * 2.0**-24 * sizes + 2 * unit * (abs(wanted) + abs(b)) + 2.0**-24
        assert (abs(found.astype(np.float64) - wanted) <= lost).all()


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
    stored, unit = DTYPES[dtype]
    for rows in (1, 67):
        x = rng.standard_normal((3, 72, rows)).astype(stored)
        w = rng.standard_normal((72, 104)).astype(stored)
        (found,) = Emulated(plan, arch)({"x": x, "w": w}, {"M": rows})
        left, right = x.astype(np.float64).swapaxes(1, 2), w.astype(np.float64)
        wanted = left @ right
        # 80 roundings of sums in f32; the product and the result are rounded to 16 bits
        lost = 80 * 2.0**-24 * (abs(left) @ abs(right)) + 2 * unit * abs(wanted) + 2.0**-24
        assert (abs(found.astype(np.float64) - wanted) <= lost).all()
