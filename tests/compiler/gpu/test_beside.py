"""Kernels that read the same are one, where none of them needs what another makes."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from .gpu_run import Emulated, check_legal, compiled, launches

Arrays = tuple[np.ndarray, ...]
HEAD = "pipeline p(x: f32[B, 96], y: f32[B, 96]):\n"


def _softmax(x: np.ndarray, y: np.ndarray) -> Arrays:
    e = np.exp(x - x.max(1, keepdims=True))
    return e / e.sum(1, keepdims=True), np.log(np.exp(x).sum(1)), x.argmax(1)


def _normed(x: np.ndarray, y: np.ndarray) -> Arrays:
    c = x / np.sqrt((x * x).mean(1, keepdims=True) + 1e-5)
    return c * 2, c + 3


def _centred(x: np.ndarray, more: float) -> np.ndarray:
    d = x - x.mean()
    return np.asarray(d / np.sqrt((d * d).mean() + more))


CASES: dict[str, tuple[str, int, Callable[[np.ndarray, np.ndarray], Arrays]]] = {
    "elements": ("    exp(x), x + y, y * 2.0", 1, lambda x, y: (np.exp(x), x + y, y * 2)),
    "elements of a row": (
        "    x * y[0], x + 1.0, y[:, :1] + x", 1, lambda x, y: (x * y[0], x + 1, y[:, :1] + x)
    ),
    "rows and what they come to": (
        """    m = max(x, axis=1)
    e = exp(x - m[:, None])
    s = sum(e, axis=1)
    e / s[:, None], m + log(s), argmax(x, axis=1)""", 1, _softmax,
    ),
    "two of one norm": (
        """    c = x * rsqrt(mean(x * x, axis=1, keepdims=True) + 1e-5)
    c * 2.0, c + 3.0""", 1, _normed,
    ),
    "elements and a reduction": (
        "    x * 2.0, max(x, axis=1), sum(x, axis=0)", 2,
        lambda x, y: (x * 2, x.max(1), x.sum(0)),
    ),
    "one that another needs by way of a third": (
        """    a = x * 2.0
    b = sum(a, axis=0)
    a, x + b""", 2, lambda x, y: (x * 2, x + (x * 2).sum(0)),
    ),
    "rows of fewer axes": (
        """    a = x[0] * 2.0
    d = a - mean(a, axis=0, keepdims=True)
    d * rsqrt(mean(d * d, axis=0, keepdims=True) + 0.5), a, x[0] @ a""", 2,
        lambda x, y: (_centred(2 * x[0], 0.5), 2 * x[0], 2 * (x[0] @ x[0])),
    ),
    "a single element": (
        "    x[0, 0] * 2.0, max(x, axis=1), sum(x)", 3,
        lambda x, y: (2 * x[0, 0], x.max(1), x.sum()),
    ),
    "another order of elements": (
        "    x + 1.0, transpose(x, [1, 0]) * 2.0", 2, lambda x, y: (x + 1, x.T * 2)
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_what_is_read_twice_is_read_by_one_kernel(
    case: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    body, count, reference = CASES[case]
    plan = compiled(tmp_path / "p.pipe", HEAD + body + "\n", ("sm_80",))
    check_legal(plan)
    buffers = plan.pipelines[0].gpu[0].buffers
    results = {n for n, buffer in enumerate(buffers) if buffer.role == "result"}
    writers = {frozenset(launch.writes) & results for launch in launches(plan)}
    assert len(writers - {frozenset()}) == count
    x, y = rng.normal(size=(2, 7, 96)).astype(np.float32)
    wanted = reference(x.astype(np.float64), y.astype(np.float64))
    for found, expected in zip(Emulated(plan, "sm_80")({"x": x, "y": y}, {"B": 7}), wanted,
                               strict=True):  # fmt: skip
        near = 96 * 2.0**-23 * max(1.0, np.abs(expected).max())  # as many roundings as elements
        np.testing.assert_allclose(found, expected, rtol=0, atol=near)
