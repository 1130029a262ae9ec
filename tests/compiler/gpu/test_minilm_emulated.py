"""The whole of MiniLM on a small batch: its PTX in the emulator against its CPU code."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler.driver import compile_file

from .gpu_run import Emulated, launches

SOURCE = Path(__file__).resolve().parents[3] / "examples" / "minilm.pipe"
WEIGHTS = SOURCE.with_name("minilm.safetensors")


@pytest.mark.slow
@pytest.mark.skipif(not WEIGHTS.exists(), reason="make run puts the weights there")
def test_minilm_in_the_emulator_equals_its_cpu_code(rng: np.random.Generator) -> None:
    plan = compile_file(SOURCE, targets=["h200", "l20", "a100"])
    assert all(x.report["spill bytes"] == 0 for x in launches(plan))
    inputs = {
        "ids": rng.integers(0, 30522, (2, 9)),
        "mask": np.array([[1] * 9, [1] * 5 + [0] * 4], np.int64),
    }
    (found,) = Emulated(plan)(inputs, {"B": 2, "T": 9})
    expected = sf.compile(str(SOURCE), target="cpu")(**inputs)
    np.testing.assert_allclose(found, expected, rtol=0, atol=2e-6)
