"""Small shapes of the benchmarks' workloads as GPU code: compiled, run in the emulator, right."""

from __future__ import annotations

import random
from dataclasses import asdict

import pytest

from benchmarks.gpu.__main__ import _PARTS, PARTS, table
from benchmarks.gpu.compare import bits, compared, ulps
from benchmarks.gpu.kernels import described
from benchmarks.gpu.plans import plan_of
from benchmarks.workloads import FAMILIES
from stagefuse.compiler.plan import GPU_ARCHES
from stagefuse.runtime.devices import open_plan

# The others take half a minute each; `python -m benchmarks.gpu` runs all.
QUICK = ("W1", "W2a", "W2b", "W3a", "W3b", "W4", "W5a", "W5b", "W5d", "W6", "W7")


@pytest.mark.parametrize("name", QUICK)
def test_workload(name: str, chance: random.Random) -> None:
    family, seed = FAMILIES[name], random.randrange(1 << 31)
    arch = chance.choice(GPU_ARCHES)
    print(f"seed {seed}, {arch}")
    workload = family.workload(seed, family.tiny)
    with open_plan(plan_of(workload, arch), None, "emulator") as pipe:
        found = pipe(**workload.inputs)
    results = list(found) if isinstance(found, tuple) else [found]
    assert workload.error(results, workload.reference()) <= family.tolerance


def test_distances_of_floats() -> None:
    import numpy as np

    one = np.array([1, -0.0, 0.0, 3e38, -1], np.float32)
    other = np.nextafter(one, np.float32(np.inf), dtype=np.float32)
    assert ulps(one, one) == 0 and ulps(one, other) == 1
    assert ulps(np.array([-0.0], np.float32), np.array([0.0], np.float32)) == 0
    assert ulps(np.array([3]), np.array([-2])) == 5
    assert bits(one).dtype == np.uint32


def test_comparison_of_the_emulator_with_itself() -> None:
    rows = list(compared([FAMILIES["W2a"]], 5, "emulator", "sm_89"))
    assert [(r.workload, r.different, r.ulps, r.good) for r in rows] == [("W2a", 0, 0, True)]
    assert rows[0].elements == 5 * 37
    (missing,) = compared([FAMILIES["W2a"]], 5, "cuda:0", "sm_89")
    assert "DeviceError" in missing.failure and not missing.good


def test_the_table_of_a_report() -> None:
    timed = {"gpu": [2e-6, 3e-6, 4e-6], "call": [1e-5], "error": 0.0, "prepare": 1.0, "failure": ""}
    failed = {**timed, "gpu": [], "call": [], "failure": "RuntimeError: no"}
    engines = {"stagefuse": timed, "torch": timed, "torch max-autotune": failed}
    report = {
        "gpu": "a GPU", "arch": "sm_80", "seed": 1, "environment": {"python": "3.11"},
        "tests": {"good": True, "output": "...\n10 passed"},
        "compare": [asdict(r) for r in compared([FAMILIES["W1"]], 1, "emulator", "sm_80")],
        "sanitize": {"good": True, "skipped": "there is no compute-sanitizer"},
        "measure": {"copy_bandwidth": 1e12, "good": True, "workloads": {
            "W1": {"title": "t", "sizes": {}, "bytes": 1_500_000, "engines": engines}}},
        "kernels": {"device": "a100", "good": True, "workloads": {"W1": [
            {"kernel": "main_add_0", "launches": 2, "measured": 3.0, "predicted": 2.0,
             "bound": "memory", "bytes": 1, "flops": 1}]}},
    }  # fmt: skip
    text = table(report)
    assert "| W1 t | 3.0 (10) | 3.0 (10) | RuntimeError: no | 50 % |" in text
    assert "Tests: 10 passed" in text and "there is no compute-sanitizer" in text
    assert "| W1 | 165 | 0 | 0 |" in text
    assert "| W1 | main_add_0 | 2 | 3.0 | 2.0 | memory | 1.5 |" in text


def test_a_gpu_is_described_by_its_name() -> None:
    names = {"NVIDIA H200": "h200", "NVIDIA H20": "h20", "NVIDIA H100 80GB HBM3": "h100"}
    assert {name: described(name, "sm_90a").name for name in names} == names
    assert described("NVIDIA L40S", "sm_89").name == "l40"
    assert described("another", "sm_89").name == "l20"  # the first
    assert set(PARTS) == set(_PARTS)
