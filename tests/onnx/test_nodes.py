"""The standard's node tests: a sample anew each run, and one test of every record.

`python -m benchmarks.onnx_score` runs them all; docs/onnx-score.md lists those that do not pass.
"""

from __future__ import annotations

import numpy as np
import pytest

from benchmarks import onnx_score
from stagefuse.onnx.record import records

SAMPLE = 60
KNOWN = {
    # 16-bit floats keep f32 precision inside a kernel, where the test rounds after each op
    f"test_attention_4d_{name}{end}"
    for end in ("", "_expanded")
    for name in ("causal_fp16", "gqa_with_past_and_present_fp16")
} | {
    # the expected values hold the rounding of another algorithm where they should be 0
    "test_dft_inverse", "test_dft_inverse_opset19",
}  # fmt: skip


@pytest.fixture(scope="module")
def cases() -> list[object]:
    return onnx_score.cases("")


def test_a_sample_passes_or_is_refused_in_words(cases: list[object]) -> None:
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    chosen = np.random.default_rng(seed).choice(len(cases), SAMPLE, replace=False)
    found = [onnx_score.outcome(cases[k], "CPU", False) for k in sorted(chosen)]
    bad = [o for o in found if o.status in ("wrong", "failed") and o.test not in KNOWN]
    assert not bad, f"seed {seed}: {bad}"


def test_attention_under_windows_and_masks(cases: list[object]) -> None:
    """Products whose rows are heads in one and a batch in the other; and some others anew."""
    named = {c.name: c for c in cases if "attention" in c.name and c.name not in KNOWN}
    chosen = [name for name in named if "window" in name and "expanded" not in name]
    chosen = [name for name in chosen if "mask" in name or "3d" in name or "bidirectional" in name]
    assert len(chosen) >= 7
    seed = int(np.random.SeedSequence().generate_state(1)[0])
    others = sorted(named.keys() - set(chosen))
    chosen += list(np.random.default_rng(seed).choice(others, 8, replace=False))
    found = [onnx_score.outcome(named[name], "CPU", False) for name in chosen]
    assert all(o.status == "passed" for o in found), f"seed {seed}: {found}"


def test_every_record_imports_its_tests_or_says_why(cases: list[object]) -> None:
    by_op: dict[str, list[object]] = {}
    for case in cases:
        by_op.setdefault(onnx_score.op_of(case), []).append(case)
    untested = sorted({op for op in records() if "::" not in op} - set(by_op))
    # the second is tested in test_versions.py; the last is of ONNX Runtime, in the standard's
    # domain: test_contrib.py
    assert untested == ["GlobalLpPool", "MaxRoiPool", "SimplifiedLayerNormalization"]
    for op in sorted(set(records()) & set(by_op)):
        found = [onnx_score.outcome(case, "CPU", True) for case in by_op[op][:8]]
        bad = [o for o in found if o.status == "failed"]
        assert not bad, bad
        assert any(o.status == "passed" for o in found), found
