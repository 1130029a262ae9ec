"""Elements that take many operations are computed one after the other by a lane, and kernels hold
few reductions: ptxas takes a time that grows with the square of what is written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from .gpu_run import Emulated, check_legal, compiled, launches


@pytest.mark.parametrize(("shape", "stores"), [("[N]", 1), ("[N, 8]", 4)])
def test_few_heavy_elements_are_written_out(
    shape: str, stores: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Adjacent ones of a vector are, not several vectors."""
    text = f"""pipeline p(x: f32{shape}) -> f32{shape}:
    for i in 0..15:
        x = sqrt(abs(x - f32(i)))
    x
"""
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80",))
    check_legal(plan)
    (launch,) = launches(plan)
    assert launch.report["spill bytes"] == 0
    assert plan.ptx["sm_80"].count("sqrt.rn.f32") == 15 * stores
    for rows in (0, 1, 300, 2049):
        x = rng.normal(0, 30, (rows, 8)[: shape.count(",") + 1]).astype(np.float32)
        wanted = x
        for i in range(15):
            wanted = np.sqrt(abs(wanted - np.float32(i)))
        np.testing.assert_array_equal(Emulated(plan, "sm_80")({"x": x}, {"N": rows})[0], wanted)


def test_positions_that_are_read_one_at_the_other(tmp_path: Path, rng: np.random.Generator) -> None:
    text = """pipeline p(table: i64[V], i: i64[N]) -> i64[N]:
    for n in 0..20:
        i = table[i]
    i
"""
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80",))
    check_legal(plan)
    assert 0 < plan.ptx["sm_80"].count("ld.global.nc.b64") <= 5 * 21  # four at once, then the rest
    table = rng.integers(-40, 40, 40)
    for count in (1, 300):
        start = wanted = rng.integers(-40, 40, count)
        for _ in range(20):
            wanted = table[wanted]
        given, sizes = {"table": table, "i": start}, {"V": 40, "N": count}
        np.testing.assert_array_equal(Emulated(plan, "sm_80")(given, sizes)[0], wanted)


def test_many_reductions_are_several_kernels(tmp_path: Path, rng: np.random.Generator) -> None:
    sums = " + ".join(f"(max(x * {n}.0 - {n * n}.0, axis=1) + {n}.0)" for n in range(30))
    plan = compiled(tmp_path / "p.pipe", f"pipeline p(x: f32[B, D]):\n    {sums}\n", ("sm_80",))
    check_legal(plan)
    assert len(launches(plan)) > 2
    assert all(launch.report["spill bytes"] == 0 for launch in launches(plan))
    x = rng.integers(-20, 20, (3, 70)).astype(np.float32)
    wanted = sum((x * n - n * n).max(axis=1) + n for n in range(30))
    np.testing.assert_array_equal(Emulated(plan, "sm_80")({"x": x}, {"B": 3, "D": 70})[0], wanted)


def test_a_reduction_of_heavy_elements_is_not_written_out(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """A lane has one vector of a row under way, or one element where rows are no whole vectors."""
    body = " + ".join(f"sqrt(abs(x - {n}.0))" for n in range(40))
    text = f"pipeline p(x: f32[B, D]) -> f32[B]:\n    sum({body}, axis=1)\n"
    plan = compiled(tmp_path / "p.pipe", text, ("sm_80",))
    check_legal(plan)
    assert 0 < plan.ptx["sm_80"].count("sqrt.rn.f32") <= (4 + 1) * 40
    x = rng.normal(0, 30, (5, 41)).astype(np.float32)
    wanted = sum(np.sqrt(abs(x.astype(np.float64) - n)) for n in range(40)).sum(axis=1)
    (found,) = Emulated(plan, "sm_80")({"x": x}, {"B": 5, "D": 41})
    np.testing.assert_allclose(found, wanted, rtol=1e-5)
