"""Conversions that a program writes between the products of attention round there too."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from stagefuse.compiler.plan import Plan

from .gpu_run import Emulated, compiled, launches

ARCHES = ("sm_80", "sm_90a")
DTYPES = {
    "f8e4m3": np.dtype(ml_dtypes.float8_e4m3fn),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "f16": np.dtype(np.float16),
}


def plan_of(path: Path, stored: str, body: str) -> Plan:
    q, k = f"{stored}[M, 32]", f"{stored}[N, 32]"
    text = f"""import nn

pipeline p(q: {q}, k: {k}, v: {k}) -> {q}
where M in 1..=100, N in 1..=100:
    scores = (q @ transpose(k)) * 0.0625
    {body}
"""
    return compiled(path / "p.pipe", text, ARCHES)


@pytest.mark.parametrize("narrow", ["f8e4m3", "bf16"])
def test_scores(narrow: str, tmp_path: Path, rng: np.random.Generator) -> None:
    plan = plan_of(tmp_path, "f32", f"nn.softmax(f32({narrow}(scores))) @ v")
    assert len(launches(plan)) == len(ARCHES)
    for arch in ARCHES:
        q = rng.integers(-9, 10, (5, 32)).astype(np.float32)  # scores are exact in f32
        k = rng.integers(-9, 10, (37, 32)).astype(np.float32)
        v = rng.standard_normal((37, 32)).astype(np.float32)
        (found,) = Emulated(plan, arch)({"q": q, "k": k, "v": v}, {"M": 5, "N": 37})
        scores = (q @ k.T / 16).astype(DTYPES[narrow]).astype(np.float64)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        lost = (37 + 32) * 2.0**-22 * (weights @ abs(v))
        assert (abs(found - weights @ v) <= lost).all()


@pytest.mark.parametrize("stored, narrow", [("f32", "f8e4m3"), ("f32", "f16"), ("f16", "f16")])
def test_weights(stored: str, narrow: str, tmp_path: Path) -> None:
    body = f"{stored}({narrow}(nn.softmax(f32(scores)))) @ v"
    plan = plan_of(tmp_path, stored, body)
    dtype = np.dtype(np.float32) if stored == "f32" else DTYPES[stored]
    third = float(DTYPES[narrow].type(1 / 3))
    for arch in ARCHES:
        v = np.ones((3, 32), dtype)
        inputs = {"q": np.zeros((2, 32), dtype), "k": v, "v": v}
        (found,) = Emulated(plan, arch)(inputs, {"M": 2, "N": 3})
        lost = 2.0**-22 if stored == "f32" else 2.0**-10  # in f16 the result is rounded too
        assert (abs(found.astype(np.float64) - 3 * third) <= lost).all()
