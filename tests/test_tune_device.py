"""Structures by measurement on a GPU: a fake one, whose clock goes as the test says."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

import stagefuse as sf
from stagefuse import tune_device
from stagefuse.cli import commands, run_command
from stagefuse.compiler import driver, plan_file, tuned
from stagefuse.compiler.errors import PlanError
from stagefuse.compiler.gpu import structures
from stagefuse.runtime import device_timing
from stagefuse.runtime.cuda import found
from stagefuse.runtime.device_pipeline import DevicePipeline
from stagefuse.runtime.errors import DeviceError

from .runtime.cuda_run import installed
from .runtime.fake_cuda import FakeCuda

SOURCE = """
pipeline main(x: f16[M, 192], w: f16[192, 40]) -> f16[M, 40]:
    maximum(x @ w, 0.0)
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "model.pipe"
    path.write_text(SOURCE)
    return path


@pytest.fixture
def gpu(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    """A fake H200, which loads PTX, and few trials."""
    compiled = driver.compile_program
    monkeypatch.setattr(
        driver, "compile_program", lambda *a, **k: replace(compiled(*a, **k), cubins={})
    )
    monkeypatch.setattr(found, "has_driver", lambda: True)
    monkeypatch.setattr(device_timing, "CACHE", 64)
    monkeypatch.setattr(tune_device, "ROUNDS", 1)
    monkeypatch.setattr(tune_device, "MOST_TRIALS", 2)
    monkeypatch.setattr(structures, "TILES", 1)
    return installed(monkeypatch)


def inputs(rng: np.random.Generator, rows: int) -> dict[str, Any]:
    return {
        "x": rng.standard_normal((rows, 192)).astype(np.float16),
        "w": rng.standard_normal((192, 40)).astype(np.float16),
    }


def check(y: Any, given: dict[str, Any]) -> None:
    """Against float64: a sum of 192 products in f32, rounded to f16 (Higham, 3.1)."""
    x, w = (given[n].astype(np.float64) for n in "xw")
    error = 193 * 2.0**-24 * (np.abs(x) @ np.abs(w))
    wanted = np.maximum(x @ w, 0)
    assert np.all(np.abs(y - wanted) <= (1 + 2.0**-11) * error + 2.0**-11 * wanted + 2.0**-25)


def tune(source: Path, *more: str) -> Any:
    line = ["compile", str(source), "--tune", "--size", "M=37", "--target", "h200", *more]
    return run_command(line)


def test_the_quickest_is_written_read_and_shown(
    gpu: FakeCuda, source: Path, tmp_path: Path, rng: np.random.Generator
) -> None:
    gpu.cost = lambda kernel, grid: 3.0 if "by_warps" in kernel else 10.0
    tune(source)
    assert gpu.faults == [] and gpu.leaks() == {}
    lock = json.loads(tuned.path_of(source).read_text())
    assert lock["measured"]["device"] == "h200" and lock["measured"]["sizes"] == {"M": 37}
    ((name, changes),) = lock["targets"]["h200"].items()
    assert changes == {"warps": 1} and name.endswith(" M 33..64")
    plan = driver.compile_file(source, targets=["h200"])
    notes = [n.report.get("tuned") for n in plan.pipelines[0].gpu[0].launches]
    assert {"entry": name, "on": "h200", "warps": 1} in notes and None in notes
    for file in "ab":
        plan_file.write(driver.compile_file(source, targets=["h200"]), tmp_path / file)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    shown = CliRunner().invoke(commands, ["explain", str(source), "--target", "h200"]).output
    assert "warps = 1, from the lock file" in shown
    with sf.compile(source, target="h200", device="emulator") as pipe:
        for rows in (33, 65):  # by the lock file, and by the rules
            given = inputs(rng, rows)
            check(pipe(**given), given)


def test_what_is_no_quicker_is_not_kept(
    gpu: FakeCuda, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tune_device, "MOST_TRIALS", 1)
    gpu.cost = lambda kernel, grid: 20.0 if "_by_" in kernel else 10.0  # the rules' are two
    tune(source)
    assert json.loads(tuned.path_of(source).read_text())["targets"] == {}
    assert gpu.faults == [] and gpu.leaks() == {}


def test_a_gpu_that_is_not_here(
    gpu: FakeCuda, source: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeviceError, match="there is no a100 here to measure on"):
        run_command(["compile", str(source), "--tune", "--size", "M=3", "--target", "a100"])
    monkeypatch.setattr(found, "has_driver", lambda: False)
    with pytest.raises(DeviceError, match="there is no h200 here"):
        tune(source)


@pytest.mark.parametrize(
    "name, target",
    [("NVIDIA H200", "h200"), ("NVIDIA H100 80GB HBM3", "h100"), ("NVIDIA L40S", "l40"),
     ("NVIDIA A100-SXM4-80GB", "a100"), ("NVIDIA H20", "h20"), ("Tesla T4", None)],
)  # fmt: skip
def test_names_of_gpus(name: str, target: str | None) -> None:
    assert found.target_of(found.Gpu(0, name, 9, 0, 1)) == target


def form_of(source: Path, arch: str) -> str:
    plan = driver.compile_file(source, targets=[arch])
    return next(str(n.report["form"]) for n in plan.pipelines[0].gpu[0].launches)


@pytest.mark.parametrize(
    "device, arch, changes",
    [("h200", "sm_90a", {"columns": 48, "cluster": 2}), ("h200", "sm_90a", {"parts": 2}),
     ("a100", "sm_80", {"parts": 2}), ("h100", "sm_90a", {"columns": 48, "cluster": 1})],
)  # fmt: skip
def test_structures_compute_the_same(
    device: str, arch: str, changes: dict[str, int], source: Path, rng: np.random.Generator
) -> None:
    entry = f"{form_of(source, arch)} M 2..150"
    tuned.write(tuned.Tuned({device: {entry: changes}}), tuned.path_of(source))
    with sf.compile(source, target=arch, device=f"emulator:{arch}") as pipe:
        assert isinstance(pipe, DevicePipeline)
        reports = [n.report.get("tuned", {}).get("entry") for n in pipe._gpu.launches]
        assert entry in reports
        for rows in (1, 2, 131):
            given = inputs(rng, rows)
            check(pipe(**given), given)


def test_stale_entries_are_notes(source: Path) -> None:
    form = form_of(source, "sm_90a")
    entries = {"p_00": {"warps": 1}, f"{form} M 1..8": {"columns": 7, "cluster": 1}}
    tuned.write(tuned.Tuned({"h200": entries}), tuned.path_of(source))
    run = CliRunner().invoke(commands, ["compile", str(source), "--target", "h200"])
    assert run.exit_code == 0
    assert "p_00 is of a kernel that is no longer there" in run.output
    assert f"{form} M 1..8 is not what its kernel can be" in run.output
    with pytest.warns(UserWarning) as found:
        sf.compile(source, target="h200", device="emulator").close()
    said = [str(w.message) for w in found]
    assert [w.filename for w in found] == [__file__] * len(said) and len(said) == 2
    assert "p_00 is of a kernel that is no longer there" in said[0]


@pytest.mark.parametrize("entry", ["k_00", "p_zz", "p_00 M", "p_00 M 3", "p_00 M 3..x"])
def test_entries_that_are_none(entry: str, source: Path) -> None:
    tuned.path_of(source).write_text(
        json.dumps({"format": 1, "targets": {"h200": {entry: {"warps": 1}}}})
    )
    with pytest.raises(PlanError, match="no form with ranges of sizes"):
        driver.compile_file(source)


def test_sizes_that_are_alike() -> None:
    pairs = [tuned.around(n) for n in (0, 1, 2, 3, 4, 5, 64, 65)]
    assert pairs == [(0, 0), (1, 1), (2, 2), (3, 4), (3, 4), (5, 8), (33, 64), (65, 128)]
