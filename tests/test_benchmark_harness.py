"""The harness: two engines are measured side by side, one that is wrong or absent is named."""

from __future__ import annotations

import dataclasses
import math
import secrets
from pathlib import Path

import numpy as np
import pytest

from benchmarks import engines, fusion, table
from benchmarks.bench import shapes
from benchmarks.harness import Measured, Row, Settings, measure, processes
from benchmarks.worker import Job, Session
from benchmarks.workloads import FAMILIES, chosen

PAIR = ("stagefuse", "numpy")


def settings(**changes: object) -> Settings:
    made = Settings(PAIR, 1, "v3", 2, 0.001, 1, secrets.randbits(31), timeout=60)
    return dataclasses.replace(made, **changes)  # type: ignore[arg-type]


def test_engines_are_measured_side_by_side() -> None:
    family = FAMILIES["W5a"]
    with processes(settings()) as running:
        assert [process.engine for process in running] == list(PAIR)
        row = measure(family, family.tiny, running, settings())
    for measured in row.engines.values():
        assert not measured.failure and measured.error <= family.tolerance
        assert len(measured.times) == 2 and 0 < measured.least <= min(measured.times)
    assert row.best == "numpy" and row.ratio("numpy") == 1
    assert row.ratio("stagefuse") > 0
    assert row.name in table.line(row, PAIR)


def test_a_wrong_result_is_no_small_error() -> None:
    family = FAMILIES["W2a"]
    workload = family.workload(1, family.tiny)
    reference = workload.reference()
    assert workload.error(reference, reference) == 0
    assert workload.error([reference[0] + 1], reference) > family.tolerance
    spoilt = reference[0].copy()
    spoilt[0, 0] = np.nan
    assert workload.error([spoilt], reference) == math.inf
    with pytest.raises(ValueError, match="result 0 is"):
        workload.error([reference[0][:1]], reference)


def test_a_session_refuses_a_wrong_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    family = FAMILIES["W2a"]
    for number, result in enumerate(family.workload(1, family.tiny).reference()):
        np.save(tmp_path / f"{number}.npy", result * 1.01)
    job = Job("W2a", family.tiny, 1, str(tmp_path))
    with pytest.raises(ValueError, match="wrong: off by"):
        Session("numpy", 1, "v3").load(job)


def test_failures_and_absence_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    row = Row("W2a", "t", {}, {"stagefuse": Measured(failure="why"), "numpy": Measured(times=[1])})
    assert table.failures(row) == ["W2a: stagefuse: why"]
    assert "**failed**" in table.line(row, PAIR)
    monkeypatch.setitem(engines.ENGINES, "numpy", engines.Entry("engines:NumPy", "no_such_package"))
    assert any("absent: numpy" in line for line in table.heading(settings()))
    with processes(settings()) as running:
        assert [process.engine for process in running] == ["stagefuse"]


def test_ratios_are_taken_within_rounds() -> None:
    times = {"stagefuse": [1.0, 20.0, 3.0], "numpy": [2.0, 40.0, 3.0], "jax": [9.0, 90.0, 9.0]}
    measured = {name: Measured(times=each, least=min(each)) for name, each in times.items()}
    row = Row("W1", "t", {}, measured)
    assert row.best == "numpy"
    assert row.ratio("stagefuse") == 0.5 and row.least_ratio("stagefuse") == 0.5
    assert row.ratio("jax") == 3


def test_workloads_and_shapes_are_chosen() -> None:
    assert [f.name for f in chosen("W1,W5a,W8")] == ["W1", "W5a", "W8a", "W8b"]
    with pytest.raises(SystemExit, match="no workload is called 'W99'"):
        chosen("W1,W99")
    family = FAMILIES["W5b"]
    assert shapes(family, "table") == [family.sizes]
    assert shapes(family, "M=3,N=5") == [{"M": 3, "K": 1024, "N": 5}]
    with pytest.raises(SystemExit, match="has the sizes M, K, N"):
        shapes(family, "Q=3")


def test_forms_of_fusion_can_be_left_out() -> None:
    """That changes the code of a workload that has one, and not its results."""
    for form in fusion.FORMS.values():
        with fusion.without(form):
            pass
    for name, family in (("elements", "W1"), ("sums", "W2b"), ("chained", "W7")):
        workload = FAMILIES[family].workload(1, FAMILIES[family].tiny)
        _, code = fusion.compiled(workload, "v3")
        apart, other = fusion.compiled(workload, "v3", fusion.FORMS[name])
        assert code != other
        assert workload.error(apart.arrays(apart.run()), workload.reference()) < 1e-3
