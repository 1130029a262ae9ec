"""A plan file whose arrays are written before there is a plan."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from stagefuse.compiler import driver, plan_file
from stagefuse.compiler.errors import PlanError
from stagefuse.compiler.plan_writing import Writing

from ..runtime import handmade

SOURCE = """\
weights w = "w.npz"
pipeline scaled(x: f32[N, 8]) -> f32[N, 8]:
    x * w.scale
pipeline projected(x: f32[N, 8]) -> f32[N, 4]:
    x @ w.matrix + w.bias
"""


@pytest.mark.parametrize("targets", [("cpu",), ("a100",), ("h200", "cpu")])
def test_a_file_written_meanwhile_is_the_same(tmp_path: Path, targets: tuple[str, ...]) -> None:
    rng = np.random.default_rng()
    arrays = {
        name: rng.standard_normal(shape, np.float32)
        for name, shape in (("scale", 8), ("matrix", (8, 4)), ("bias", 4), ("unused", 3))
    }
    np.savez(tmp_path / "w.npz", **arrays)
    source = tmp_path / "p.pipe"
    source.write_text(SOURCE)
    early = Writing(tmp_path / "early.fused")
    plan = driver.compile_file(source, targets=targets, levels=("v3",), write=early)
    plan_file.write(plan, tmp_path / "late.fused")
    assert early.arrays.keys() == plan.arrays.keys()  # so that it was not written again
    assert (tmp_path / "early.fused").read_bytes() == (tmp_path / "late.fused").read_bytes()


def test_a_plan_with_other_arrays_than_expected_is_written_whole(tmp_path: Path) -> None:
    plan, path = handmade.plan(), tmp_path / "model.fused"
    writing = Writing(path)
    writing.start({**plan.arrays, "more": np.zeros(3, np.float32)})
    writing.finish(plan)
    assert plan_file.read(path).arrays.keys() == plan.arrays.keys()
    assert list(tmp_path.iterdir()) == [path]


def test_what_is_given_up_leaves_no_file(tmp_path: Path) -> None:
    writing = Writing(tmp_path / "model.fused")
    writing.stop()
    writing.start(handmade.plan().arrays)
    writing.stop()
    assert list(tmp_path.iterdir()) == []


def test_what_cannot_be_written_is_said_at_the_end(tmp_path: Path) -> None:
    plan = handmade.plan()
    writing = Writing(tmp_path / "missing" / "model.fused")
    writing.start(plan.arrays)
    with pytest.raises(OSError, match="missing"):
        writing.finish(plan)
    bad = Writing(tmp_path / "model.fused")
    bad.start({name: np.zeros(3, np.complex64) for name in plan.arrays})
    with pytest.raises(PlanError, match="complex64"):
        bad.finish(plan)
    assert list(tmp_path.iterdir()) == []
