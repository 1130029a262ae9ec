"""Products of few tiles and a great depth on Hopper, which blocks divide among them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stagefuse.compiler.gpu.deep_parts import clocks
from stagefuse.dsl.dtypes import DTYPES

from .gpu_run import Emulated, check_legal, compiled, launches

UNITS = {"bf16": 2.0**-8, "f16": 2.0**-11, "f8e4m3": 2.0**-24, "i8": 0.0}
DEPTH, COLUMNS = 2048, 72


@pytest.mark.parametrize(
    ("kind", "transposed", "rows"),
    [("bf16", False, 20), ("f16", True, 130), ("bf16", True, None), ("f8e4m3", True, 5),
     ("i8", True, 40)],
)  # fmt: skip
def test_parts_of_the_depth(
    kind: str, transposed: bool, rows: int | None, tmp_path: Path, rng: np.random.Generator
) -> None:
    to = {"i8": "i32", "f8e4m3": "f32"}.get(kind, kind)
    matrix = (COLUMNS, DEPTH) if transposed else (DEPTH, COLUMNS)
    right = f"{to}(transpose(w, [1, 0]))" if transposed else f"{to}(w)"
    text = (
        f"pipeline p(x: {kind}[{rows or 'M'}, {DEPTH}], w: {kind}[{matrix[0]}, {matrix[1]}])"
        f" -> {to}[{rows or 'M'}, {COLUMNS}]:\n    {to}(x) @ {right}\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    check_legal(plan)
    parts = [x for x in launches(plan) if "_parts_by_" in x.kernel]
    assert len(parts) == (1 if rows else 2)
    assert all(x.maps and not x.report.get("spill bytes") for x in parts)
    dtype = DTYPES[kind].numpy
    run = Emulated(plan)
    for count in (rows,) if rows else (7, 128, 129, 260):
        if kind == "i8":
            x, w = (rng.integers(-128, 128, s).astype(np.int8) for s in ((count, DEPTH), matrix))
        else:
            x, w = (rng.standard_normal(s).astype(dtype) for s in ((count, DEPTH), matrix))
        (found,) = run({"x": x, "w": w}, {} if rows else {"M": count})
        a, b = x.astype(np.float64), w.astype(np.float64)
        b = b.T if transposed else b
        wanted, total = a @ b, abs(a) @ abs(b)
        # as many roundings of sums in f32 as the depth has elements, and one of the result
        lost = (0 if kind == "i8" else DEPTH * 2.0**-24) * total + UNITS[kind] * abs(wanted)
        assert (abs(found.astype(np.float64) - wanted) <= lost + 2.0**-24 * (kind != "i8")).all()


def test_what_is_split(tmp_path: Path) -> None:
    """The depth of few tiles; not that of enough, nor a short one."""

    def parts(rows: int, columns: int, depth: int) -> bool:
        text = (
            f"pipeline p(x: bf16[{rows}, {depth}], w: bf16[{columns}, {depth}])"
            f" -> bf16[{rows}, {columns}]:\n    x @ transpose(w, [1, 0])\n"
        )
        plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
        return any("_parts_by_" in x.kernel for x in launches(plan))

    assert parts(64, 4096, 14336) and parts(256, 256, 16384)
    assert not parts(2048, 2048, 2048) and not parts(256, 1024, 256)
    assert clocks(64, 4096, 224, 64, 2) < clocks(64, 4096, 224, 64, 1)
