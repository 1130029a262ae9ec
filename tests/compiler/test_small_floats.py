"""Floats of 8 and 16 bits: infinities of the former, signs of the latter."""

import math
import re
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler import driver
from stagefuse.compiler.cpu.build import improved
from stagefuse.compiler.cpu.emit import module_text
from stagefuse.compiler.plan import LEVELS
from stagefuse.runtime.cpu_pipeline import CpuPipeline
from stagefuse.runtime.native import NativeObject

from . import cpu_run
from .ir_cases import kernels_of, of_text

INFINITE = np.array([1.0, np.inf, -np.inf, np.nan], ml_dtypes.float8_e5m2)


def run(tmp_path: Path, dtype: str, body: str, x: Any) -> Any:
    path = tmp_path / "p.pipe"
    path.write_text(f"pipeline p(x: {dtype}[N]):\n    {body}\n")
    return sf.compile(path)(x=x)


@pytest.mark.parametrize(
    ("body", "want"),
    [
        ("x", [1, np.inf, -np.inf, np.nan]),
        ("x[::-1]", [np.nan, -np.inf, np.inf, 1]),
        ("-x", [-1, -np.inf, np.inf, np.nan]),
        ("sort(x)", [-np.inf, 1, np.inf, np.nan]),
        ("x[iota(2)]", [1, np.inf]),
        ("max(reshape(x, [-1, 1]), axis=1)", [1, np.inf, -np.inf, np.nan]),
        ("max(x[:0])", -np.inf),
        ("min(x[:0])", np.inf),
        ("mean(reshape(x, [-1, 1]), axis=1)", [1, np.inf, -np.inf, np.nan]),
        ("mean(x[:2])", np.inf),
        ("var(x[:2])", np.nan),
        ("log10(x[:2])", [0, np.inf]),
        ("log10(x[:2] * 0.0)", [-np.inf, np.nan]),
        ("f8e5m2(f32(x))", [1, 57344, -57344, np.nan]),
    ],
)
def test_moving_an_infinity_of_f8e5m2_keeps_it(tmp_path: Path, body: str, want: Any) -> None:
    found = np.asarray(run(tmp_path, "f8e5m2", body, INFINITE))
    assert found.dtype == ml_dtypes.float8_e5m2
    np.testing.assert_array_equal(found.astype(np.float32), np.array(want, np.float32))


@pytest.mark.parametrize(("dtype", "largest"), [("f8e4m3", 448), ("f8e5m2", 57344)])
@pytest.mark.parametrize("source", ["f64", "f32", "f16", "bf16"])
def test_conversion_to_f8_saturates(tmp_path: Path, source: str, dtype: str, largest: int) -> None:
    kinds = {"f64": np.float64, "f32": np.float32, "f16": np.float16, "bf16": ml_dtypes.bfloat16}
    x = np.array([np.inf, -np.inf, np.nan, 65504.0, -1.0], kinds[source])
    found = run(tmp_path, source, f"{dtype}(x)", x).astype(np.float32)
    want = np.array([largest, -largest, np.nan, largest, -1], np.float32)
    np.testing.assert_array_equal(found, want)


def test_signs_of_numbers_that_were_f64_within_a_kernel(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """LLVM would take such a sign through a conversion from f64 to f16, for which there is no
    instruction, so that the code did not load."""
    path = tmp_path / "p.pipe"
    pairs = [(f, g) for f in ("erf", "tanh") for g in ("sin", "cos", "tan", "log1p")]
    lines = ", ".join(f"{f}({g}(x))" for f, g in pairs)
    path.write_text(f"pipeline p(x: f16[N]):\n    {lines}, x % cos(x), x // cos(x)\n")
    plan = driver.compile_file(path, levels=LEVELS)
    for code in plan.objects.values():
        NativeObject(code).close()
    x = rng.uniform(-0.9, 9, 77).astype(np.float16)
    meanings = {"erf": np.vectorize(math.erf), "tanh": np.tanh}
    found = sf.compile(path)(x=x)
    for (f, g), got in zip(pairs, found, strict=False):
        want = meanings[f](getattr(np, g)(x.astype(np.float64)))
        # the result is rounded, and perhaps what goes in; both functions' slopes are below 1.13,
        # and f32 adds some units of 2^-24
        np.testing.assert_allclose(got.astype(np.float64), want, rtol=0, atol=2.15 * 2.0**-11)


@pytest.mark.parametrize("level", cpu_run.LEVELS)
def test_f16_to_whole_numbers_in_vectors(
    tmp_path: Path, level: str, rng: np.random.Generator
) -> None:
    names = ["floor", "ceil", "round", "trunc"]
    path = tmp_path / "p.pipe"
    path.write_text(f"pipeline p(x: f16[N]):\n    {', '.join(f'{n}(x)' for n in names)}\n")
    kernels = list(kernels_of(of_text(path.read_text()).passed()))
    text = str(improved(module_text(kernels, level), level))
    assert re.search(r"<\d+ x float> @llvm.floor", text) and "@llvm.floor.f16" not in text
    plan = driver.compile_file(path, levels=(level,))
    special = [-0.0, 0.5, -0.5, 2.5, np.inf, -np.inf, 65504]
    x = np.concatenate([special, rng.standard_normal(90) * 9]).astype(np.float16)
    for name, got in zip(names, CpuPipeline(plan)(x=x), strict=True):
        want = getattr(np, {"round": "rint"}.get(name, name))(x)
        np.testing.assert_array_equal(got.view(np.uint16), want.view(np.uint16))
