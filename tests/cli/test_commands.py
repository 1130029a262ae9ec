"""The commands of the command line: what goes to stdout and stderr."""

import json
import subprocess
import sys
from pathlib import Path

import click
import ml_dtypes
import numpy as np
import pytest

from stagefuse import cli

from .shell import ROOT, Shell


def test_check_says_ok_on_stdout(shell: Shell, good: Path) -> None:
    code, out, err = shell("check", good)
    assert (code, err) == (0, "")
    assert out == f"{good}: classify: ok\n"


def test_check_shows_a_diagnostic_on_stderr(shell: Shell, wrong: Path) -> None:
    code, out, err = shell("check", wrong)
    assert (code, out) == (1, "")
    assert err.startswith("error[E")
    assert f"{wrong}:2:" in err
    assert "f32[B, 3]" in err and "f32[B, 4]" in err


def test_check_as_json(shell: Shell, good: Path, wrong: Path) -> None:
    code, out, _ = shell("check", good, "--json")
    assert (code, json.loads(out)["pipelines"]) == (0, ["classify"])
    code, out, err = shell("check", wrong, "--json")
    found = json.loads(out)
    assert (code, err, found["ok"]) == (1, "", False)
    assert found["diagnostics"][0]["line"] == 2


def test_compile_writes_the_same_bytes_twice(shell: Shell, good: Path, tmp_path: Path) -> None:
    code, out, _ = shell("compile", good)
    assert code == 0 and "classify: " in out
    first = good.with_suffix(".fused").read_bytes()
    code, out, _ = shell("compile", good, "-o", tmp_path / "again.fused", "--json")
    found = json.loads(out)
    assert (code, found["ok"], found["bytes"]) == (0, True, len(first))
    assert (tmp_path / "again.fused").read_bytes() == first


@pytest.mark.parametrize("from_plan", [False, True], ids=["source", "plan"])
def test_run_reads_and_writes_npy(
    shell: Shell, good: Path, tmp_path: Path, from_plan: bool
) -> None:
    if from_plan:
        shell("compile", good)
        good = good.with_suffix(".fused")
    x = np.array([[0.0, 1.0, 0.0], [2.0, 0.0, 0.0]], np.float32)
    np.save(tmp_path / "x.npy", x)
    code, out, err = shell("run", good, "--input", tmp_path / "x.npy", "-o", tmp_path / "out")
    assert (code, err) == (0, "")
    assert "p: f32[2, 3]" in out
    p = np.load(tmp_path / "out" / "p.npy")
    np.testing.assert_allclose(p, np.exp(x) / np.exp(x).sum(1, keepdims=True), rtol=1e-6)
    assert np.load(tmp_path / "out" / "label.npy").tolist() == [1, 0]


def test_run_as_json_gives_values(shell: Shell, good: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((1, 2), np.float32))
    code, out, _ = shell("run", good, "--input", f"x={tmp_path / 'a.npy'}", "--json")
    results = json.loads(out)["results"]
    assert code == 0
    assert [r["name"] for r in results] == ["p", "label"]
    assert results[0]["values"] == [[0.5, 0.5]]


def test_explain_shows_kernels_and_reasons(shell: Shell, good: Path) -> None:
    code, out, _ = shell("explain", good, "--size", "B=8", "--size", "N=100")
    assert code == 0
    assert "classify(x: f32[B, N])" in out
    assert "fused because" in out
    code, out, _ = shell("explain", good, "--json")
    assert code == 0 and json.loads(out)["pipelines"][0]["kernels"]


def test_bench_times_calls(shell: Shell, good: Path) -> None:
    code, out, _ = shell("bench", good, "--size", "B=2", "--size", "N=3", "--calls", 3, "--json")
    found = json.loads(out)
    assert code == 0 and found["calls"] == 3
    assert 0 < found["min_s"] <= found["median_s"] <= found["max_s"]


def test_weights_from_the_command_line(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "p.pipe"
    path.write_text('weights w = "none.npz"\npipeline p(x: f32[2]) -> f32[2]:\n    x + w.b\n')
    np.savez(tmp_path / "there.npz", b=np.array([1, 2], np.float32))
    np.save(tmp_path / "x.npy", np.array([10, 20], np.float32))
    code, out, _ = shell(
        "run", path, "--weights", f"w={tmp_path / 'there.npz'}", "--input", tmp_path / "x.npy"
    )
    assert code == 0 and "11" in out and "22" in out


def test_it_is_a_module_and_help_is_quick() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "stagefuse", "--help"], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0
    for name in ("compile", "check", "run", "explain", "bench", "doctor"):
        assert name in done.stdout


def test_fmt_writes_the_one_layout(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "p.pipe"
    path.write_bytes(b"pipeline p( x:f32[N] ):\r\n  x+1.0  # kept\r\n")
    code, out, _ = shell("fmt", "--check", path)
    assert (code, out) == (1, f"{path}: would change\n") and b"\r" in path.read_bytes()
    code, out, _ = shell("fmt", "--diff", path)
    assert code == 0 and "+pipeline p(x: f32[N]):" in out and b"\r" in path.read_bytes()
    code, out, _ = shell("fmt", path)
    assert (code, out) == (0, f"{path}: formatted\n")
    assert path.read_bytes() == b"pipeline p(x: f32[N]):\n    x + 1.0  # kept\n"
    code, out, _ = shell("fmt", "--check", "--json", path)
    assert code == 0 and json.loads(out) == {
        "ok": True, "files": [{"file": str(path), "changed": False}]
    }  # fmt: skip
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("bad", [b"pipeline p(:\n", b"# caf\xe9\npipeline p(x: f32):\n    x\n"])
def test_fmt_leaves_what_it_cannot_read(shell: Shell, tmp_path: Path, bad: bytes) -> None:
    path = tmp_path / "p.pipe"
    path.write_bytes(bad)
    code, out, err = shell("fmt", path)
    assert code == 1 and not out and "error[" in err and path.read_bytes() == bad
    code, out, _ = shell("check", "--json", path)
    assert code == 1 and json.loads(out)["diagnostics"][0]["line"] == 1


def test_every_option_is_explained() -> None:
    for name, command in cli.commands.commands.items():
        assert command.help, name
        options = [p for p in command.params if isinstance(p, click.Option)]
        missing = [p.name for p in options if not p.help]
        assert not missing, f"{name}: {missing}"


def test_small_floats_come_from_npy_files_and_json_has_no_nan(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "p.pipe"
    path.write_text("pipeline p(x: bf16[N]):\n    x, f32(x) / 0.0\n")
    np.save(tmp_path / "x.npy", np.array([1, 0], ml_dtypes.bfloat16))
    code, out, _ = shell("run", path, "--input", tmp_path / "x.npy", "--json")
    found = [r["values"] for r in json.loads(out)["results"]]
    assert code == 0 and found == [[1.0, 0.0], ["inf", "nan"]]


def test_export_writes_a_model(shell: Shell, good: Path, tmp_path: Path) -> None:
    code, out, err = shell("export", good)
    assert (code, out, err) == (0, f"{tmp_path / 'good.onnx'}\n", "")
    code, out, _ = shell("export", good, "-o", tmp_path / "m.onnx", "--opset", 19, "--json")
    assert code == 0 and json.loads(out)["files"] == [str(tmp_path / "m.onnx")]
    code, _, err = shell("export", good, "-o", tmp_path / "m.onnx", "--opset", 3)
    assert code == 2 and "17 to" in err
    code, _, err = shell("export", good, "-o", tmp_path / "m.onnx", "--pipeline", "other")
    assert code == 2 and "there is classify" in err


def test_export_names_what_has_no_onnx_form(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "bits.pipe"
    path.write_text("pipeline p(x: i64[N], y: i64[N]) -> i64[N]:\n    x & y\n")
    code, out, err = shell("export", path, "--opset", 17)
    assert (code, out) == (1, "")
    assert "error[E0301]" in err and "bits.pipe:2:5" in err and "--opset 18" in err
    assert not (tmp_path / "bits.onnx").exists()
    code, out, _ = shell("export", path, "--opset", 17, "--json")
    assert code == 1 and json.loads(out)["diagnostics"][0]["code"] == "E0301"
