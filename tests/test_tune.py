"""Schedules by measurement: the lock file, what compiles by it, and the command that writes it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import stagefuse as sf
from stagefuse import tune as tuning
from stagefuse.cli import commands, run_command
from stagefuse.compiler import driver, plan_file, tuned
from stagefuse.compiler.errors import PlanError
from stagefuse.compiler.schedule import TRIALS

SOURCE = """
pipeline main(x: f32[M, 700], w: f32[700, 130], b: f32[130]) -> (y: f32[M, 130], total: f32[130]):
    y = maximum(x @ w + b, 0.0)
    y, sum(y * 0.25, axis=0)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.pipe"
    path.write_text(SOURCE)
    return path


def inputs(rng: np.random.Generator, rows: int = 37) -> dict[str, Any]:
    shapes = {"x": (rows, 700), "w": (700, 130), "b": (130,)}
    return {name: rng.standard_normal(shape, np.float32) for name, shape in shapes.items()}


def check(found: Any, given: dict[str, Any]) -> None:
    """Against float64: sums of 700 and of `rows` products in f32, of any order (Higham, 3.1)."""
    x, w, b = (given[n].astype(np.float64) for n in "xwb")
    y = np.maximum(x @ w + b, 0)
    error = 704 * 2.0**-24 * (np.abs(x) @ np.abs(w) + np.abs(b))
    assert np.all(np.abs(found.y - y) <= error)
    sums = (y * 0.25).sum(axis=0)
    assert np.all(np.abs(found.total - sums) <= (len(x) + 2) * 2.0**-24 * sums + error.sum(axis=0))


@pytest.mark.parametrize(
    "field, value", [(f, v) for f, values in TRIALS["cpu"].items() for v in values]
)
def test_every_trial_computes_the_same(
    field: str, value: int, source: Path, rng: np.random.Generator
) -> None:
    plan = driver.compile_file(source, levels=())
    kernels = {step.symbol: {field: value} for step in plan.pipelines[0].steps}
    tuned.write(tuned.Tuned({"cpu": kernels}), tuned.path_of(source))
    with sf.compile(source, device="cpu") as pipe:
        for rows in (1, 37, 130):
            given = inputs(rng, rows)
            check(pipe(**given), given)


def test_a_lock_file_is_read_and_shown(source: Path, tmp_path: Path) -> None:
    plain = driver.compile_file(source, levels=())
    symbol = next(s.symbol for s in plain.pipelines[0].steps if "matmul" in s.report["fused"])
    tuned.write(tuned.Tuned({"cpu": {symbol: {"packed_tiles": 2}}}), tuned.path_of(source))
    changed = driver.compile_file(source, levels=())
    notes = [s.report.get("tuned") for s in changed.pipelines[0].steps]
    assert {"packed_tiles": 2} in notes
    for name in "ab":
        plan_file.write(driver.compile_file(source), tmp_path / name)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    shown = CliRunner().invoke(commands, ["explain", str(source)])
    assert "tuned: packed_tiles = 2" in shown.output


def test_entries_for_other_kernels_change_nothing(source: Path) -> None:
    before = driver.compile_file(source)
    tuned.write(tuned.Tuned({"cpu": {"k_other": {"chunk": 8}}}), tuned.path_of(source))
    assert driver.compile_file(source).objects == before.objects


@pytest.mark.parametrize(
    "text",
    [
        "", "[]", "{", '{"format": 2}', '{"format": 1}', '{"format": 1, "targets": []}',
        '{"format": 1, "targets": {"cpu": []}}', '{"format": 1, "targets": {"cpu": {"k": 3}}}',
        '{"format": 1, "targets": {"cpu": {"k": {"row_tile": 3}}}}',
        '{"format": 1, "targets": {"cpu": {"k": {"speed": 3}}}}',
        '{"format": 1, "targets": {"cpu": {"k": {"chunk": 0}}}}',
        '{"format": 1, "targets": {"cpu": {"k": {"chunk": true}}}}',
        '{"format": 1, "targets": {"cpu": {"k": {"chunk": 1e9}}}}', "[" * 100_000,
    ],
)  # fmt: skip
def test_a_lock_file_that_is_none(text: str, source: Path) -> None:
    tuned.path_of(source).write_text(text)
    with pytest.raises(PlanError, match="does not hold choices of schedules"):
        driver.compile_file(source)


@pytest.fixture
def few_trials(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(tuning, "TRIALS", {"cpu": {"step_flops": (4096,), "columns": (64,)}})
    yield


def test_a_kernel_keeps_what_gains_most(
    few_trials: None, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With times that are made up: the product gains by one change, nothing by the other."""
    times = iter([0.8, 0.99])

    def ratios(rules: Any, trial: Any, given: Any, names: Any) -> dict[str, float]:
        ratio = next(times)
        return {symbol: ratio for symbol, _ in names}

    monkeypatch.setattr(tuning, "_ratios", ratios)
    monkeypatch.setattr(tuning, "_call_ratio", lambda *pipes: 0.9)
    run_command(["compile", str(source), "--tune", "--size", "M=64"])
    kept = tuned.read(tuned.path_of(source)).targets["cpu"]
    assert kept and all(changes == {"step_flops": 4096} for changes in kept.values())


@pytest.mark.parametrize("whole", [1.0, 1.2])
def test_nothing_is_kept_where_calls_are_not_faster(
    whole: float, few_trials: None, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tuning, "_ratios", lambda r, t, i, names: dict.fromkeys(dict(names), 0.5))
    monkeypatch.setattr(tuning, "_call_ratio", lambda *pipes: whole)
    run_command(["compile", str(source), "--tune", "--size", "M=64"])
    assert tuned.read(tuned.path_of(source)).targets == {}


def test_tuning_measures(few_trials: None, source: Path, rng: np.random.Generator) -> None:
    found = CliRunner().invoke(commands, ["compile", str(source), "--tune", "--size", "M=64"])
    assert found.exit_code == 0, found.output
    lock = json.loads(tuned.path_of(source).read_text())
    assert lock["measured"]["sizes"] == {"M": 64} and lock["measured"]["threads"] >= 1
    with sf.load(source.with_suffix(".fused"), device="cpu") as pipe:
        given = inputs(rng)
        check(pipe(**given), given)


def test_what_can_not_be_tuned(source: Path, tmp_path: Path) -> None:
    run = CliRunner().invoke
    assert "is for --tune" in run(commands, ["compile", str(source), "--size", "M=3"]).output
    run(commands, ["compile", str(source)])
    plan = str(source.with_suffix(".fused"))
    assert "`compile` takes a source" in run(commands, ["compile", plan, "--tune"]).output
    states = tmp_path / "states.pipe"
    states.write_text(
        "pipeline p(x: f32[N]) -> f32[N]:\n    state s: f32[N] = 0.0\n    s[...] = s + x\n    s\n"
    )
    found = run(commands, ["compile", str(states), "--tune", "--size", "N=3"])
    assert "keep no states" in found.output, found.output
