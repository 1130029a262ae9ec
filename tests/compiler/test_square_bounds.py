"""Programs in which one size has several roles: every bound of theirs is proved."""

from __future__ import annotations

import pytest

import stagefuse as sf

PROGRAMS = {
    "square product": "x: f32[M, M]) -> f32[M, M]:\n    x @ x\n",
    "short square product": "x: f32[M, M]) -> f32[M, M]\nwhere M in 0..=600:\n    x @ x\n",
    "squares in a row": "x: f32[M, M]) -> f32[M*M]:\n"
    "    reshape(x, [M*M]) - reshape(transpose(x), [M*M])\n",
    "outer and inner": "x: f32[3, M, M], y: f32[M, 3]) -> f32[M, M, 3, 3]:\n"
    "    z[a, b, c, d] = sum[k] x[c, a, k] * y[k, d] + x[0, a, b]\n",
    "batches of squares": "x: f32[M, K, M], y: f32[M, M]) -> (f32[M, K, M], f32[K, M, M]):\n"
    "    x @ y, transpose(x, [1, 0, 2]) @ transpose(y)\n",
    "halves of halves": "x: f32[2, N], y: f32[1, (N + 3) // 4]) -> f32[3, (N + 3) // 4]:\n"
    "    concat([x[:, ::2][:, ::2] + y, y], axis=0)\n",
    "products after a softmax": "q: f32[2, 3, M, 8], k: f32[2, 3, K, 8]) -> f32[2, 3, M, 8]\n"
    "where M in 0..=600, K in 0..=600:\n"
    "    s = q @ transpose(k, [0, 1, 3, 2])\n    e = exp(s - max(s, axis=3, keepdims=True))\n"
    "    (e / sum(e, axis=3, keepdims=True)) @ k\n",
}  # fmt: skip


@pytest.mark.parametrize("target", ["cpu", "h100"])
@pytest.mark.parametrize("name", PROGRAMS)
def test_bounds_of_squares_are_proved(name: str, target: str) -> None:
    """Compiling raises where a bound stays open."""
    device = "cpu" if target == "cpu" else "emulator"
    sf.compile(f"pipeline p({PROGRAMS[name]}", target=target, device=device).close()
