"""Elements of 8 bits, all of them, as floats on GPUs."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from .gpu_run import Emulated, compiled

STORED = {
    "f8e4m3": ml_dtypes.float8_e4m3fn,
    "f8e5m2": ml_dtypes.float8_e5m2,
    "i8": np.int8,
    "u8": np.uint8,
}
FLOATS = {"f32": np.float32, "bf16": ml_dtypes.bfloat16, "f16": np.float16}


@pytest.mark.parametrize("stored", STORED)
def test_all_of_them_are_the_floats_that_numpy_makes(stored: str, tmp_path: Path) -> None:
    results = ", ".join(f"{t}[N]" for t in FLOATS)
    text = f"pipeline p(x: {stored}[N]) -> ({results}, {stored}[N])\nwhere N in 1..=9999:\n"
    values = ", ".join(f"{t}(x)" for t in FLOATS)
    plan = compiled(tmp_path / "p.pipe", f"{text}    ({values}, {stored}(f32(x)))\n", ("sm_90a",))
    run = Emulated(plan)
    for count in (256, 251):  # in vectors, and one by one
        x = np.arange(256, dtype=np.uint8)[::-1][:count].copy().view(STORED[stored])
        *found, back = run({"x": x}, {"N": count})
        for a, dtype in zip(found, FLOATS.values(), strict=True):
            wanted = x.astype(np.float32).astype(dtype).astype(np.float32)
            np.testing.assert_array_equal(a.astype(np.float32), wanted)
            signs = (np.signbit(n.astype(np.float32))[~np.isnan(wanted)] for n in (a, wanted))
            np.testing.assert_array_equal(*signs)
        whole = np.isfinite(x.astype(np.float32))  # an infinity saturates
        np.testing.assert_array_equal(back[whole].view(np.uint8), x[whole].view(np.uint8))
