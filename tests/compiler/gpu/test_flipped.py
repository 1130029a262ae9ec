"""Products and attention of what is flipped: no tensor map goes back, on any target."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import stagefuse as sf

PRODUCT = "pipeline main(x: {0}[B, M, K], y: {0}[B, K, N]) -> f32[B, M, N]\nwhere {1}:\n    {2}\n"
RANGES = "B in 1..=8, M in 1..=512, K in 1..=512, N in 1..=512, K % 8 == 0, N % 8 == 0"
ATTENTION = """
import nn

pipeline main(q: f16[2, 2, 128, 64], k: f16[2, 2, 128, 64], v: f16[2, 2, 128, 64]):
    nn.attend(q, flip(k, axis=2), flip(v, axis=1))
"""


def emulated(source: str, arch: str) -> Any:
    target = {"sm_80": "a100", "sm_90a": "h200"}[arch]
    return sf.compile(source, target=target, device=f"emulator:{arch}")


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
@pytest.mark.parametrize("dtype", ["f16", "f32"])
@pytest.mark.parametrize("side", ["x", "y"])
@pytest.mark.parametrize("axis", [0, 1])
def test_products(rng: np.random.Generator, axis: int, side: str, dtype: str, arch: str) -> None:
    """Operands are exact in their dtype; each product and addition rounds once, in f32."""
    x, y = (f"flip({n}, axis={axis})" if n == side else n for n in "xy")
    text = f"{x} @ {y}" if dtype == "f32" else f"f32({x}) @ f32({y})"
    kind = {"f16": np.float16, "f32": np.float32}[dtype]
    with emulated(PRODUCT.format(dtype, RANGES, text), arch) as pipe:
        for b, m, k, n in ((1, 3, 8, 16), (2, 130, 72, 96)):
            given = {
                "x": rng.standard_normal((b, m, k)).astype(kind),
                "y": rng.standard_normal((b, k, n)).astype(kind),
            }
            wide = {name: v.astype(float) for name, v in given.items()}
            wide[side] = np.flip(wide[side], axis)
            scale = np.abs(wide["x"]) @ np.abs(wide["y"])
            gap = np.abs(np.asarray(pipe(**given)) - wide["x"] @ wide["y"])
            assert np.all(gap <= (2 * k + 4) * 2.0**-24 * scale)


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a"])
def test_attention(rng: np.random.Generator, arch: str) -> None:
    """Weights are of a sum of 1 and rounded to f16, as the result is; scores are sums in f32."""
    q, k, v = (rng.standard_normal((2, 2, 128, 64)).astype(np.float16) for _ in range(3))
    with emulated(ATTENTION, arch) as pipe:
        found = np.asarray(pipe(q=q, k=k, v=v)).astype(float)
    keys, values = np.flip(k, 2).astype(float), np.flip(v, 1).astype(float)
    scores = q.astype(float) @ keys.transpose(0, 1, 3, 2) / 8
    weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
    weights /= weights.sum(axis=-1, keepdims=True)
    bound = 3 * 2.0**-11 * (weights @ np.abs(values)) + 2.0**-13
    assert np.all(np.abs(found - weights @ values) <= bound)
