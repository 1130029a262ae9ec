"""16-bit operands that several products or kernels take: each product reads them as they are."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from .gpu_run import Emulated, check_legal, compiled, launches

BF16 = ml_dtypes.bfloat16
SHAPES = {"x": (40, 64), "y": (24, 64), "w": (64, 64), "u": (64, 64)}
CASES = {
    "both operands of one product": ("x @ transpose(x)", "40, 40", lambda a: a["x"] @ a["x"].T),
    "left of one, right of another": (
        "(x @ w) + (x @ u) @ (w @ u)", "40, 64",
        lambda a: a["x"] @ a["w"] + rounded(a["x"] @ a["u"]) @ rounded(a["w"] @ a["u"]),
    ),
    "computed, right of two": (
        "v = abs(w) * 0.5\n    concat([x @ v, y @ v], axis=0)", "64, 64",
        lambda a: np.concatenate([a["x"], a["y"]]) @ rounded(abs(a["w"]) / 2),
    ),
    "a product's result, right of two": (
        "v = w @ u\n    concat([x @ v, y @ v], axis=0)", "64, 64",
        lambda a: np.concatenate([a["x"], a["y"]]) @ rounded(a["w"] @ a["u"]),
    ),
    "computed, left of two and read in f32": (
        "v = abs(x) * 0.5\n    bf16(sum(f32(v), axis=1, keepdims=True)) + v @ w + v @ transpose(u)",
        "40, 64",
        lambda a: (abs(a["x"]) / 2).sum(1, keepdims=True)
        + rounded(abs(a["x"]) / 2) @ a["w"] + rounded(abs(a["x"]) / 2) @ a["u"].T,
    ),
}  # fmt: skip


def rounded(a: np.ndarray) -> np.ndarray:
    return a.astype(np.float32).astype(BF16).astype(np.float64)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("case", CASES)
def test_every_product_takes_halves(
    case: str, arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    body, shape, meaning = CASES[case]
    given = ", ".join(f"{n}: bf16[{a}, {b}]" for n, (a, b) in SHAPES.items() if f"{n}" in body)
    plan = compiled(
        tmp_path / "p.pipe", f"pipeline p({given}) -> bf16[{shape}]:\n    {body}\n", (arch,)
    )
    check_legal(plan)
    products = [x for x in launches(plan) if "mma" in _text(plan.ptx[arch], x.kernel)]
    assert products and all(x.report["arithmetic"] == "half" for x in products)
    assert not any(x.report["spill bytes"] for x in launches(plan))
    arrays = {n: rng.standard_normal(s).astype(BF16) for n, s in SHAPES.items()}
    (found,) = Emulated(plan, arch)(arrays, {})
    exact = meaning({n: a.astype(np.float64) for n, a in arrays.items()})
    # at most four roundings to bf16, of parts of the result and of what is then multiplied
    size = meaning({n: abs(a.astype(np.float64)) for n, a in arrays.items()})
    assert np.all(abs(found.astype(np.float64) - exact) <= 4 * 2.0**-8 * size)


def _text(module: str, kernel: str) -> str:
    """The entry of a kernel."""
    return module.split(f".entry {kernel}(", 1)[1].split(".visible", 1)[0]
