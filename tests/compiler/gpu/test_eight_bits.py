"""Elements of 8 bits, all of them, as floats on GPUs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from .gpu_run import Emulated, check_legal, compiled

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


WHOLES = """pipeline p(x: f32[N]) -> (i8[N], i8[N], i8[N], i8[N], i32[N], i32[N], i16[N])
where N % 8 == 0:
    q = i8(round(x))
    q, i8(floor(x)), i8(ceil(x)), i8(trunc(x)), i32(q), i32(floor(x)), i16(round(x))
"""


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_what_is_rounded_and_made_an_integer(
    arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """One conversion rounds, and four bytes are clamped and stored as a word; ties, NaN, infinity
    and what does not fit as in NumPy."""
    plan = compiled(tmp_path / "p.pipe", WHOLES, (arch,))
    check_legal(plan)
    assert "cvt.pack.sat.s8.s32.b32" in plan.ptx[arch]
    x = (90 * rng.standard_normal(1024)).astype(np.float32)
    odd = [np.nan, np.inf, -np.inf, 3e9, -3e9, -0.0, 0.5, 1.5, -0.5, -2.5, 127.5, -128.5, 128, -129]
    x[: len(odd)] = odd
    found = Emulated(plan, arch)({"x": x}, {"N": x.size})
    y = np.nan_to_num(x.astype(np.float64), nan=0, posinf=1e30, neginf=-1e30)
    whole = (np.rint, np.floor, np.ceil, np.trunc, np.rint, np.floor, np.rint)
    for own, function in zip(found, whole, strict=True):
        wanted = np.clip(function(y), *_ends(own.dtype))
        if function is np.rint and own.dtype == np.int32:
            wanted = np.clip(wanted, -128, 127)
        np.testing.assert_array_equal(own, wanted.astype(own.dtype))


def _ends(dtype: np.dtype[Any]) -> tuple[int, int]:
    info = np.iinfo(dtype)
    return int(info.min), int(info.max)
