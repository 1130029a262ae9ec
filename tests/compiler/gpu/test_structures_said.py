"""What a launch's report says of how it computes products and attention."""

from pathlib import Path

import pytest

from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.plan import GpuLaunchPlan

from .gpu_run import compiled

PRODUCT = "pipeline p(x: {t}[M, 512], w: {t}[512, {n}]) -> {t}[M, {n}] where M in {m}:\n    x @ w\n"
ATTENTION = """import nn

pipeline p(q: bf16[1, 2, T, 128], k: bf16[1, 2, T, 128], v: bf16[1, 2, T, 128])
    -> bf16[1, 2, T, 128]
where T in 1..=4096:
    nn.attend(q, k, v)
"""
STEPS = """pipeline p(x: f32[T, B, 128], r: f32[128, 128], h0: f32[B, 128]) -> f32[B, 128]
where T in 1..=64, B in 1..=8:
    scan t in 0..T with h = h0:
        h = tanh(x[t] + h @ r)
    h
"""


def structures(tmp_path: Path, text: str, arch: str) -> list[str]:
    (gpu,) = compiled(tmp_path / "p.pipe", text, (arch,)).pipelines[0].gpu
    return [_structure(launch) for launch in gpu.launches]


def _structure(launch: GpuLaunchPlan) -> str:
    return str(launch.report.get("structure", ""))


@pytest.mark.parametrize(
    ("arch", "dtype", "sizes", "words"),
    [
        ("sm_80", "bf16", (4096, "4096..=8192"), ("mma.sync of bf16", "tiles of 128 x 128")),
        ("sm_90a", "f16", (4096, "4096..=8192"), ("wgmma of f16", "tiles of 128 x 256", "stay")),
        ("sm_80", "f32", (256, "512..=1024"), ("mma.sync of f32 as three products of tf32",)),
        ("sm_90a", "f32", (256, "512..=1024"), ("wgmma of f32 as three", "4 stages by tensor")),
    ],
)
def test_of_products(
    tmp_path: Path, arch: str, dtype: str, sizes: tuple[int, str], words: tuple[str, ...]
) -> None:
    text = PRODUCT.format(t=dtype, n=sizes[0], m=sizes[1])
    found = structures(tmp_path, text, arch)
    assert any(all(word in said for word in words) for said in found), found


@pytest.mark.parametrize(
    ("arch", "words"),
    [("sm_80", "mma.sync of bf16, 64 queries"), ("sm_90a", "wgmma of bf16, 128 queries")],
)
def test_of_attention(tmp_path: Path, arch: str, words: str) -> None:
    assert any(words in said for said in structures(tmp_path, ATTENTION, arch))


def test_of_recurrences(tmp_path: Path) -> None:
    (said, *_) = [s for s in structures(tmp_path, STEPS, "sm_80") if "all steps" in s]
    assert "blocks wait for each other" in said and "stays in registers" in said


def test_of_the_cpu(tmp_path: Path) -> None:
    text = PRODUCT.format(t="f32", n=256, m="512..=1024")
    (tmp_path / "p.pipe").write_text(text)
    steps = compile_file(tmp_path / "p.pipe").pipelines[0].steps
    assert any(str(s.report.get("structure", "")).startswith("tiles of ") for s in steps)


def test_kernels_without_products_say_nothing(tmp_path: Path) -> None:
    text = "pipeline p(x: f32[N, 64]) -> f32[N]:\n    sum(exp(x), axis=1)\n"
    assert structures(tmp_path, text, "sm_80") == [""]
