"""Reductions whose memory runs along what is kept: they accumulate columns side by side."""

from __future__ import annotations

import numpy as np
import pytest

import stagefuse
from stagefuse.compiler.kernel_ir import Alloc

from .ir_cases import kernels_of, of_text

MATRICES = "pipeline main(x: f32[M, N], y: f32[N, M]):\n"
HEADS = "pipeline main(p: f32[1, 3, 1, N], v: f32[1, 3, N, 40], k: f32[1, 3, N, 40]):\n"
CASES = {
    "down": (MATRICES, "sum(x, axis=0)", True),
    "down, kept": (MATRICES, "sum(x, axis=0, keepdims=True)", True),
    "across a transpose": (MATRICES, "max(transpose(x, [1, 0]), axis=1)", True),
    "along": (MATRICES, "sum(x, axis=1)", False),
    "along, transposed": (MATRICES, "sum(transpose(x, [1, 0]), axis=0)", False),
    "both ways": (MATRICES, "sum(x + transpose(y, [1, 0]), axis=0)", False),
    "weights by rows": (HEADS, "p @ v", True),
    "rows by keys": (HEADS, "v[:, :, :1] @ transpose(k, [0, 1, 3, 2])", False),
}


@pytest.mark.parametrize("name", CASES)
def test_columns_are_chosen_by_memory(name: str) -> None:
    head, body, wanted = CASES[name]
    (kernel,) = kernels_of(of_text(f"{head}    {body}\n").passed())
    assert any(isinstance(s, Alloc) and s.name.startswith("columns") for s in kernel.body) == wanted


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case[0] is MATRICES])
def test_results(name: str, rng: np.random.Generator) -> None:
    pipe = stagefuse.compile(f"{MATRICES}    {CASES[name][1]}\n", device="cpu")
    for m, n in ((1, 1), (2, 7), (33, 257), (300, 1)):
        x, y = rng.normal(0, 1, (m, n)).astype("f4"), rng.normal(0, 1, (n, m)).astype("f4")
        wide = {"x": x.astype("f8"), "y": y.astype("f8"), "sum": np.sum, "max": np.max}
        wanted = eval(CASES[name][1], wide | {"transpose": np.transpose})
        # each addition is off by half a unit of a sum that is well below 64
        np.testing.assert_allclose(pipe(x=x, y=y), wanted, rtol=0, atol=(m + n) * 2**-19)


def test_products_of_one_row(rng: np.random.Generator) -> None:
    pipe = stagefuse.compile(f"{HEADS}    p @ v\n", device="cpu")
    for n in (0, 1, 5, 130):
        p = rng.normal(0, 1, (1, 3, 1, n)).astype("f4")
        v, k = (rng.normal(0, 1, (1, 3, n, 40)).astype("f4") for _ in range(2))
        wanted = p.astype("f8") @ v
        np.testing.assert_allclose(pipe(p=p, v=v, k=k), wanted, rtol=0, atol=n * 2**-19)
