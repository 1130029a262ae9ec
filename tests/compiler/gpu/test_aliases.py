"""Operands that are stored again in rows of whole 16 bytes are read where they lie at sizes at
which their rows are that already."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from stagefuse.compiler.plan import GpuPlan
from stagefuse.dsl.dims_text import parse
from stagefuse.runtime.aliases import in_place, stand_ins

from .gpu_run import Emulated, check_legal, compiled

UNIT = {"f16": 2.0**-11, "bf16": 2.0**-8}
STORED = {"f16": np.dtype(np.float16), "bf16": np.dtype(ml_dtypes.bfloat16)}
FORMS = {
    "rows": ("x: T[M, K], w: T[N, K]", "x @ transpose(w, [1, 0])", "mk,nk->mn", 2),
    "rows of two axes": (
        "x: T[B, M, K], w: T[N, K]", "x @ transpose(w, [1, 0])", "bmk,nk->bmn", 2),
    "a batch": ("x: T[B, M, K], w: T[B, N, K]", "x @ transpose(w, [0, 2, 1])", "bmk,bnk->bmn", 2),
    "one of them": ("x: T[M, K], w: T[K, N]", "x @ w", "mk,kn->mn", 1),
    "with itself": ("x: T[M, K]", "x @ transpose(x, [1, 0])", "mk,nk->mn", 1),
}  # fmt: skip
"""Inputs, the product, the same for einsum, and how many operands may lie as they are."""


def running(gpu: GpuPlan, sizes: dict[str, int]) -> int:
    """How many kernels run."""
    def size(text: str) -> int:
        return parse(text).evaluate(sizes)

    launches = in_place(gpu, stand_ins(gpu, size))
    return sum(all(size(n) > 0 for n in launch.grid) for launch in launches)


@pytest.mark.parametrize(
    ("form", "dtype", "arch"),
    [(f, ("f16", "bf16")[n % 2], a) for n, f in enumerate(FORMS) for a in ("sm_80", "sm_90a")],
)
def test_rows_that_are_whole_are_read_where_they_lie(
    form: str, dtype: str, arch: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    inputs, product, sums, operands = FORMS[form]
    result = ", ".join(sums.split(">")[1].upper()) if operands == 2 or "w:" in inputs else "M, M"
    text = (
        f"pipeline p({inputs.replace('T[', f'{dtype}[')}) -> {dtype}[{result}]:\n    {product}\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, (arch,))
    check_legal(plan)
    (gpu,) = plan.pipelines[0].gpu
    assert len(gpu.aliases) == operands
    count = {}
    for depth in (40, 43, 8, 1):
        sizes = {"B": 2, "M": 35, "N": 21, "K": depth}
        given: dict[str, Any] = {}
        for part in inputs.split("], "):
            name, extents = part.rstrip("]").split(": T[")
            shape = [sizes[e] for e in extents.split(", ")]
            given[name] = rng.standard_normal(shape).astype(STORED[dtype])
        sizes = {d.name: sizes[d.name] for d in plan.pipelines[0].dims}
        (found,) = Emulated(plan, arch)(given, sizes)
        x, w = (given[n].astype(float) for n in ("x", "w" if "w" in given else "x"))
        wanted, total = np.einsum(sums, x, w), np.einsum(sums, abs(x), abs(w))
        # roundings of sums in f32, one of the result to 16 bits
        lost = (depth + 3) * 2.0**-24 * total + UNIT[dtype] * abs(wanted) + 2.0**-24
        assert (abs(found.astype(float) - wanted) <= lost).all()
        count[depth] = running(gpu, sizes)
    assert count[43] == count[40] + operands and count[1] == count[8] + operands


def test_what_is_read_in_place_lives_as_long_as_what_it_stands_for(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """Between two products by the running sums there are values of their size."""
    plan = compiled(tmp_path / "p.pipe", """
pipeline p(x: f16[M, K], w: f16[K, K], v: f16[K, K]) -> (f16[M, K], f16[M, K]):
    s = cumsum(x, axis=0)
    y = sort(s @ transpose(w, [1, 0]), axis=1)
    (y, sort(s @ transpose(v, [1, 0]) + y, axis=1))
""", ("sm_90a",))  # fmt: skip
    (gpu,) = plan.pipelines[0].gpu
    assert sum(gpu.buffers[a.of].role == "arena" for a in gpu.aliases) == 1
    for depth in (24, 25):
        x = rng.integers(-1, 2, (9, depth)).astype(np.float16)
        w, v = rng.integers(-1, 2, (2, depth, depth)).astype(np.float16)
        first, second = Emulated(plan)({"x": x, "w": w, "v": v}, {"M": 9, "K": depth})
        s = np.cumsum(x, axis=0)  # of at most 9, products of at most 225: all exact in f16
        y = np.sort(s @ w.T, axis=1)
        assert (first == y).all() and (second == np.sort(s @ v.T + y, axis=1)).all()


def test_what_is_overwritten_stands_for_nothing(
    tmp_path: Path, rng: np.random.Generator
) -> None:
    """A state, and a value that is updated in its place while its rows are still read."""
    plan = compiled(tmp_path / "p.pipe", """
pipeline states(x: f16[M, K], row: f16[K]) -> f16[M, N]:
    state kept: f16[N, K] = 0.0
    kept[0] = row
    x @ transpose(kept, [1, 0])

pipeline values(x: f16[M, K], w: f16[K, K], row: f16[K]) -> (f16[M, K], f16[M, K]):
    s = cumsum(x, axis=0)
    y = s @ transpose(w, [1, 0])
    s[0] = row
    (y, sort(s, axis=1))
""", ("sm_90a",))  # fmt: skip
    for pipeline in plan.pipelines:
        (gpu,) = pipeline.gpu
        assert {gpu.buffers[a.of].role for a in gpu.aliases} == {"input"}
    x, w = (rng.integers(-1, 2, (rows, 24)).astype(np.float16) for rows in (9, 24))
    y, updated = Emulated(plan, pipeline=1)(
        {"x": x, "w": w, "row": w[0]}, {"M": 9, "K": 24}
    )
    s = np.cumsum(x, axis=0)
    assert (y == s @ w.T).all()
    s[0] = w[0]
    assert (updated == np.sort(s, axis=1)).all()


@pytest.mark.parametrize("result", ["s", "sort(s, axis=1)"])
def test_a_view_that_is_updated_is_what_it_is_of_no_more(
    result: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Where its rows are whole ones it would be updated in the memory of those."""
    plan = compiled(tmp_path / "p.pipe", f"""
pipeline p(x: f16[M, K], row: f16[L]) -> f16[M, L] where L <= K, M >= 1:
    s = x[:, :L]
    s[0] = row
    {result}
""", ("sm_90a",))  # fmt: skip
    assert not plan.pipelines[0].gpu[0].aliases
    for wide, own in ((9, 7), (8, 8)):
        x, row = (rng.standard_normal(shape).astype(np.float16) for shape in ((3, wide), own))
        (found,) = Emulated(plan)({"x": x, "row": row}, {"M": 3, "K": wide, "L": own})
        wanted = np.concatenate([row[None], x[1:, :own]])
        assert (found == (wanted if result == "s" else np.sort(wanted, axis=1))).all()
