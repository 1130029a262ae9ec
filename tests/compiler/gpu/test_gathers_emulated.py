"""Gathers on a GPU: what they read, and what they note of positions out of range."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from .gpu_run import Emulated, check_legal, compiled, launches

TEXT = """
pipeline single(x: f32[N], i: i64[M]) -> f32[M]:
    x[i] + 1.0

pipeline rows(x: f16[N, 72], i: i64[M]) -> f16[M, 72]:
    x[i]

pipeline wide(x: f32[N, D], i: i64[M], j: i64[M]) -> f32[M, D]:
    x[i] * x[j]

pipeline element(x: f32[N], i: i64) -> f32:
    x[i] + 1.0
"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_gathers(arch: str, tmp_path: Path, rng: np.random.Generator) -> None:
    plan = compiled(tmp_path / "p.pipe", TEXT, (arch,))
    check_legal(plan)
    assert not any(x.report.get("spill bytes") for x in launches(plan))
    single, rows, wide, element = (Emulated(plan, arch, n) for n in range(4))
    for n, m, d in (
        (5, 2100, 33), (700, 2048, 260), (1, 3, 1030), (9, 0, 4), (30, 70, 0), (40, 301, 1),
        (7, 33, 12),
    ):  # fmt: skip
        dims = {"N": n, "M": m, "D": d}
        i, j = (rng.integers(-n, n, m) for _ in range(2))
        for bad in (False, True) if m else (False,):
            at, value = int(rng.integers(max(m, 1))), int(rng.choice([n, -n - 1, 2**40]))
            if bad:
                i[at] = value
            ok = np.arange(m) != (at if bad else -1)
            x = rng.standard_normal(n).astype(np.float32)
            (found,) = single({"x": x, "i": i}, dims)
            np.testing.assert_array_equal(found[ok], x[i[ok]] + np.float32(1))
            assert list(single.status) == ([1, value] if bad else [0, 0])
            if m:
                (found,) = element({"x": x, "i": i[at]}, dims)
                assert bad or found == x[i[at]] + np.float32(1)
                assert list(element.status) == ([1, value] if bad else [0, 0])
            x = rng.standard_normal((n, 72)).astype(np.float16)
            (found,) = rows({"x": x, "i": i}, dims)
            np.testing.assert_array_equal(found[ok], x[i[ok]])
            assert list(rows.status) == ([1, value] if bad else [0, 0])
            x = rng.standard_normal((n, d)).astype(np.float32)
            (found,) = wide({"x": x, "i": i, "j": j}, dims)
            np.testing.assert_array_equal(found[ok], x[i[ok]] * x[j[ok]])
            assert list(wide.status) == ([1, value] if bad and d else [0, 0])


def test_loads_of_rows_wait_for_no_branch(tmp_path: Path) -> None:
    """A position is tested once for a lane, after all that is read there."""
    plan = compiled(tmp_path / "p.pipe", TEXT, ("sm_90a",))
    body = plan.ptx["sm_90a"].split(".entry rows_")[1].split(".entry")[0]
    loads = [m.start() for m in re.finditer(r"ld\.global\.nc\.v4", body)]
    notes = [m.start() for m in re.finditer(r"atom\.global\.cas", body)]
    assert loads and len(notes) == 1 and max(loads) < notes[0]


def test_where_a_row_lies_is_read_once(tmp_path: Path) -> None:
    """For all vectors of it that a lane has, which registers then have room for."""
    source = TEXT.split("pipeline wide")[1].split("pipeline")[0]
    plan = compiled(tmp_path / "p.pipe", f"pipeline wide{source}", ("sm_90a",))
    for kernel in re.split(r"\.entry ", plan.ptx["sm_90a"])[1:]:
        versions = 1 + kernel.count("$long") // 2
        assert 2 <= len(re.findall(r"ld\.global\S*\.b64", kernel)) <= 2 * versions


SUMS = """
pipeline bags(w: f32[N, D], i: i64[B, T]) -> f32[B, D]:
    sum(w[i], axis=1)

pipeline experts(w: f32[N, K, D], i: i64[B], x: f32[B, K]) -> f32[B, D]:
    y[b, d] = sum[k] x[b, k] * w[i[b], k, d]
"""


def test_sums_of_a_tables_rows_are_by_columns(tmp_path: Path, rng: np.random.Generator) -> None:
    """Lanes read adjacent elements of a row, not one of each."""
    plan = compiled(tmp_path / "p.pipe", SUMS, ("sm_90a",))
    check_legal(plan)
    assert not any(x.report.get("spill bytes") for x in launches(plan))
    for pipeline in plan.pipelines:
        whole = [x for g in pipeline.gpu for x in g.launches if "part" not in x.label]
        assert all("(D + 31) // 32" in x.grid[0] for x in whole), [x.grid for x in whole]
    bags, experts = (Emulated(plan, "sm_90a", n) for n in range(2))
    for n, b, t, d in ((7, 3, 70, 33), (2, 1, 0, 8), (2, 1, 8200, 9)):
        dims = {"N": n, "B": b, "T": t, "K": t, "D": d}
        i, at = rng.integers(-n, n, (b, t)), rng.integers(-n, n, b)
        table = rng.standard_normal((n, t, d)).astype(np.float32)
        x, w = rng.standard_normal((b, t)).astype(np.float32), table[:, 0] if t else table.sum(1)
        (found,) = bags({"w": w, "i": i}, dims)
        # each addition is off by half a unit of a sum that is well below 64
        np.testing.assert_allclose(found, w.astype("f8")[i].sum(1), rtol=0, atol=t * 2**-18)
        (found,) = experts({"w": table, "i": at, "x": x}, dims)
        wanted = np.einsum("bk,bkd->bd", x.astype("f8"), table[at].astype("f8"))
        np.testing.assert_allclose(found, wanted, rtol=0, atol=t * 2**-18)
        if t:
            i[-1, -1] = at[-1] = n
            bags({"w": w, "i": i}, dims)
            experts({"w": table, "i": at, "x": x}, dims)
            assert list(bags.status) == list(experts.status) == [1, n]
