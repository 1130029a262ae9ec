"""Each workload's pipeline compiles, and is what its formula says in float64, at a small size."""

from __future__ import annotations

import secrets

import pytest

from benchmarks.engines import ENGINES
from benchmarks.workloads import FAMILIES
from stagefuse.runtime.native import detect_level


@pytest.mark.parametrize("name", FAMILIES)
def test_workload_is_its_formula(name: str) -> None:
    family, seed = FAMILIES[name], secrets.randbits(31)
    workload = family.workload(seed, family.tiny)
    engine = ENGINES["stagefuse"].load()(1, detect_level() or "v3")
    bound = engine.bind(workload)
    error = workload.error(bound.arrays(bound.run()), workload.reference())
    assert error <= family.tolerance, f"seed {seed}"


@pytest.mark.parametrize("name", FAMILIES)
def test_formula_in_float32_is_near(name: str) -> None:
    family, seed = FAMILIES[name], secrets.randbits(31)
    workload = family.workload(seed, family.tiny)
    bound = ENGINES["numpy"].load()(1, "v3").bind(workload)
    error = workload.error(bound.arrays(bound.run()), workload.reference())
    assert error <= family.tolerance, f"seed {seed}"
