"""Products with results besides their own: the sums themselves and functions of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stagefuse.compiler.driver import compile_file

from .gpu_run import Emulated, check_legal, compiled, launches


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize(("depth", "columns"), [(64, 64), (35, 51)])
def test_the_sums_and_a_function_of_them_are_one_kernel(
    depth: int, columns: int, arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    text = f"""pipeline p(x: f32[M, {depth}], w: f32[{depth}, {columns}], b: f32[{columns}])
    -> (sums: f32[M, {columns}], made: f32[M, {columns}])
where M in 0..=4096:
    y = x @ w
    (y, maximum(y + b, 0.0))
"""
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    assert all("maximum" in x.report["fused"] for x in launches(plan))
    run = Emulated(plan, arch)
    for rows in (0, 3, 200):
        x, w = (
            rng.standard_normal(s).astype(np.float32) for s in ((rows, depth), (depth, columns))
        )
        b = rng.standard_normal(columns).astype(np.float32)
        sums, made = run({"x": x, "w": w, "b": b}, {"M": rows})
        wanted = x.astype(float) @ w.astype(float)
        bound = 2.0**-21 * (np.abs(x.astype(float)) @ np.abs(w.astype(float)) + np.abs(b))
        assert (np.abs(sums - wanted) <= bound).all()
        assert (np.abs(made - np.maximum(wanted + b, 0)) <= bound).all()


def test_a_function_that_needs_other_readers_of_the_sums_stays_apart(tmp_path: Path) -> None:
    """The kernel of a function of the sums cannot make them if it reads what is made of them."""
    source = tmp_path / "p.pipe"
    source.write_text("""pipeline p(x: f32[64, 64], w: f32[64, 320]) -> f32[64, 320]:
    y = x @ w
    s = sum(y * y, axis=-1, keepdims=True)
    y * rsqrt(s + 1.0) + y
""")
    plan = compile_file(source, targets=["cpu", "h200"])
    (gpu,) = plan.pipelines[0].gpu
    assert ["matmul" in x.report["fused"] for x in gpu.launches] == [True, False]
