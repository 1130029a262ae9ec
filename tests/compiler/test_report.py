"""What `explain` says of kernels: bytes, operations, lines, and a reason for each operation."""

from __future__ import annotations

from typing import Any

import pytest

from stagefuse.compiler.plan import StepPlan
from stagefuse.dsl.dims_text import parse

from ..fuzz.programs import compiled

SOURCE = """import nn
pipeline p(
    x: f32[B, 64], w: f32[64, 32], b: f32[32], ids: i64[T], table: f32[100, 32],
) -> (f32[B, 32], f32[T, 32], f32[B, 32], f32[B, 8], f32[B, 16]):
    h = nn.relu(x @ w + b)
    e = table[ids] * 2.0
    s = sort(h, axis=1)
    c = cumsum(x[:, :8], axis=1)
    h, e, s, c, x[:, ::4] + 1.0
"""
B, T = 5, 7


@pytest.fixture(scope="module")
def steps() -> dict[str, StepPlan]:
    plan = compiled(SOURCE, ["cpu"], ["v3"])
    return {s.label.rpartition(".")[2]: s for s in plan.pipelines[0].steps}


@pytest.mark.parametrize(
    ("label", "elements", "flops", "lines"),
    [
        ("maximum", B * 64 + 64 * 32 + 32 + B * 32, 2 * B * 64 * 32 + 2 * B * 32, [5]),
        ("mul", 2 * T + 2 * T * 32, T * 32, [6]),  # positions are two words; T rows of the table
        ("sort", 4 * B * 32, 0, [7]),  # with the positions, which it sorts too
        ("cumsum", 2 * B * 8, B * 8, [8]),
        ("add", 2 * B * 16, B * 16, [9]),
    ],
)
def test_bytes_operations_and_lines(
    steps: dict[str, StepPlan], label: str, elements: int, flops: int, lines: list[int]
) -> None:
    said: dict[str, Any] = steps[label].report
    sizes = {"B": B, "T": T}
    assert parse(said["bytes"]).evaluate(sizes) == 4 * elements
    assert parse(said["flops"]).evaluate(sizes) == flops
    assert said["lines"] == lines


def test_a_reason_for_each_operation(steps: dict[str, StepPlan]) -> None:
    for step in steps.values():
        reasons = [reason["node"] for reason in step.report["reasons"]]
        missing = [name for name in step.report["fused"] if name not in reasons]
        assert missing in ([], ["gather"]), step.label  # which is computed wherever it is read
