"""The benchmark's workloads at small sizes: their PTX in the emulator is what the formula says."""

from __future__ import annotations

import secrets
from pathlib import Path

import numpy as np
import pytest

from benchmarks.workloads import FAMILIES
from stagefuse.compiler.driver import compile_file

from .gpu_run import Emulated, launches


@pytest.mark.slow
@pytest.mark.parametrize("name", FAMILIES)
def test_workload_is_its_formula(name: str, tmp_path: Path) -> None:
    family, seed = FAMILIES[name], secrets.randbits(31)
    workload = family.workload(seed, family.tiny)
    path, weights = tmp_path / f"{family.pipe}.pipe", tmp_path / "w.npz"
    path.write_text(workload.source())
    np.savez(weights, **workload.weights)
    plan = compile_file(
        path, targets=["a100"], weights={"w": weights} if workload.weights else None
    )
    assert all(x.report["spill bytes"] == 0 for x in launches(plan)), name
    emulated = Emulated(plan, "sm_80")
    dims: dict[str, int] = {}
    for argument in emulated.pipeline.inputs:
        shape = workload.inputs[str(argument.name)].shape
        for text, size in zip(argument.shape, shape, strict=True):
            if text.isidentifier():
                dims[text] = size
    found = [np.asarray(r) for r in emulated(workload.inputs, dims)]
    error = workload.error(found, workload.reference())
    assert error <= family.tolerance, f"seed {seed}"
