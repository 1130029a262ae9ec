"""Small shapes of the benchmarks' workloads as GPU code: compiled, run in the emulator, right."""

from __future__ import annotations

import random

import pytest

from benchmarks.gpu.compare import bits, ulps
from benchmarks.gpu.plans import plan_of
from benchmarks.workloads import FAMILIES
from stagefuse.compiler.plan import GPU_ARCHES
from stagefuse.runtime.devices import open_plan

# The others take half a minute each; `python -m benchmarks.gpu` runs all.
QUICK = ("W1", "W2a", "W2b", "W3a", "W3b", "W4", "W5a", "W5b", "W5d", "W6", "W7")


@pytest.mark.parametrize("name", QUICK)
def test_workload(name: str) -> None:
    family, seed = FAMILIES[name], random.randrange(1 << 31)
    arch = random.choice(GPU_ARCHES)
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
