"""The command line: what goes to stdout and stderr, and the exit codes."""

import errno
import json
import os
import subprocess
import sys
import threading
import zipfile
from pathlib import Path
from typing import Any

import click
import ml_dtypes
import numpy as np
import pytest

from stagefuse import cli, cli_exit

from .runtime import handmade_gpu

ROOT = Path(__file__).resolve().parent.parent
GOOD = '''"""Rows to probabilities."""
import nn

pipeline classify(x: f32[B, N]) -> (p: f32[B, N], label: i64[B])
where N >= 1:
    p = nn.softmax(x)
    p, argmax(p, axis=1)
'''
WRONG = "pipeline p(x: f32[B, 3], y: f32[B, 4]) -> f32[B, 3]:\n    x + y\n"


class Shell:
    """Runs commands in this process and keeps what they print."""

    def __init__(self, capsys: pytest.CaptureFixture[str]) -> None:
        self.capsys = capsys

    def __call__(self, *arguments: Any) -> tuple[int, str, str]:
        texts = [str(a) for a in arguments]
        code = cli_exit.guarded(lambda: cli.run_command(texts), texts)
        printed = self.capsys.readouterr()
        return code, printed.out, printed.err


@pytest.fixture
def shell(capsys: pytest.CaptureFixture[str]) -> Shell:
    return Shell(capsys)


@pytest.fixture
def good(tmp_path: Path) -> Path:
    path = tmp_path / "good.pipe"
    path.write_text(GOOD)
    return path


@pytest.fixture
def wrong(tmp_path: Path) -> Path:
    path = tmp_path / "wrong.pipe"
    path.write_text(WRONG)
    return path


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


def test_compile_of_a_wrong_program_writes_nothing(shell: Shell, wrong: Path) -> None:
    assert shell("compile", wrong)[0] == 1
    assert not wrong.with_suffix(".fused").exists()


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


def test_run_refuses_a_wrong_input(shell: Shell, good: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    code, out, err = shell("run", good, "--input", tmp_path / "x.npy")
    assert (code, out) == (1, "")
    assert "f32" in err and "float64" in err


def test_run_of_a_damaged_plan(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "bad.fused").write_bytes(b"PK\x03\x04" + bytes(100))
    assert shell("run", tmp_path / "bad.fused")[0] == 1


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


@pytest.mark.parametrize(
    "arguments",
    [
        ["frobnicate"],
        ["compile"],
        ["check", "no-such-file.pipe"],
        ["run", "GOOD", "--input", "x="],
        ["run", "GOOD", "--input", "x=no-such-file.npy"],
        ["bench", "GOOD"],
        ["bench", "GOOD", "--size", "Q=3"],
        ["check", "GOOD", "--weights", "w"],
        ["compile", "GOOD", "-o", "GOOD"],
        ["bench", "GOOD", "--size", "B=\u00b2", "--size", "N=1"],
        ["run", "GOOD", "--input", "x=GOOD"],
    ],
    ids=" ".join,
)
def test_wrong_usage_is_2(shell: Shell, good: Path, arguments: list[str]) -> None:
    source = good.read_text()
    code, out, err = shell(*[a.replace("GOOD", str(good)) for a in arguments])
    assert (code, out) == (2, "")
    assert err and good.read_text() == source


def test_a_plan_is_no_source(shell: Shell, good: Path, tmp_path: Path) -> None:
    plan = tmp_path / "plan.fused"
    assert shell("compile", good, "-o", plan)[0] == 0
    for command in ("compile", "check"):
        code, _, err = shell(command, plan)
        assert code == 2 and "is compiled already" in err


def test_inputs_beyond_all_memory(shell: Shell, good: Path) -> None:
    for size in (10**12, 10**21):
        code, _, err = shell("bench", good, "--size", f"B={size}", "--size", "N=100")
        assert code == 3 and f"B = {size}" in err


def test_what_is_no_file_is_written_into_and_links_stay(
    shell: Shell, good: Path, tmp_path: Path
) -> None:
    pipe = tmp_path / "plan"
    os.mkfifo(pipe)
    link = tmp_path / "link.fused"
    link.symlink_to(tmp_path / "there.fused")
    assert shell("compile", good, "-o", link)[0] == 0
    found = []
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    assert shell("compile", good, "-o", pipe)[0] == 0
    reader.join()
    assert link.is_symlink() and pipe.is_fifo()
    assert found == [(tmp_path / "there.fused").read_bytes()]


def test_streams_that_are_closed_and_names_beyond_utf8(good: Path) -> None:
    odd = os.fsencode(good.parent) + b"/\xff.pipe"
    with open(odd, "wb") as file:
        file.write(good.read_bytes())
    run = [sys.executable, "-m", "stagefuse"]
    made = subprocess.run([*run, "compile", odd], capture_output=True, check=False)
    assert (made.returncode, made.stderr) == (0, b"") and b"udcff.fused" in made.stdout
    closed = ["sh", "-c", '"$@" >&-', "sh", *run, "check", str(good)]
    assert subprocess.run(closed, capture_output=True, check=False).returncode == 0


def test_a_target_that_is_not_there_is_3(shell: Shell, good: Path) -> None:
    code, out, err = shell("compile", good, "--target", "h300")
    assert (code, out) == (3, "")
    assert "h300" in err and "h200" in err and "help" in err


def test_missing_weights_are_a_diagnostic(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "p.pipe"
    path.write_text('weights w = "none.npz"\npipeline p(x: f32[2]) -> f32[2]:\n    x + w.b\n')
    code, _, err = shell("check", path)
    assert code == 1
    assert "none.npz" in err and "--weights w=PATH" in err


def test_weights_from_the_command_line(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "p.pipe"
    path.write_text('weights w = "none.npz"\npipeline p(x: f32[2]) -> f32[2]:\n    x + w.b\n')
    np.savez(tmp_path / "there.npz", b=np.array([1, 2], np.float32))
    np.save(tmp_path / "x.npy", np.array([10, 20], np.float32))
    code, out, _ = shell(
        "run", path, "--weights", f"w={tmp_path / 'there.npz'}", "--input", tmp_path / "x.npy"
    )
    assert code == 0 and "11" in out and "22" in out


def test_our_own_fault_is_70_with_a_reproducer(
    shell: Shell, good: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from stagefuse.compiler import driver

    def broken(*_: Any, **__: Any) -> None:
        raise AssertionError("an invariant")

    monkeypatch.setattr(driver, "compile_file", broken)
    code, out, err = shell("compile", good)
    assert (code, out) == (70, "")
    report = Path(err.strip().rsplit(" ", 1)[1])
    text = report.read_text()
    report.unlink()
    assert "an invariant" in text and "pipeline classify" in text


def test_doctor(shell: Shell) -> None:
    code, out, _ = shell("doctor", "--json")
    found = json.loads(out)
    assert code == (0 if found["ok"] else 3)
    names = {f["name"] for f in found["findings"]}
    assert {"Python", "processor", "llvmlite", "ptxas", "driver", "devices"} <= names


def test_doctor_does_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    from stagefuse import doctor
    from stagefuse.runtime.cuda import calls
    from stagefuse.runtime.errors import DeviceError

    def no_driver() -> None:
        raise DeviceError("no NVIDIA driver: libcuda\n  = help: install it")

    monkeypatch.setattr(calls, "driver_version", no_driver)
    findings = doctor.gpu_findings()
    driver = next(f for f in findings if f.name == "driver")
    assert driver.optional and not driver.works and doctor.sound(findings)
    assert findings[-1].found == "cpu, emulator (of GPU code)"


def test_doctor_names_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    from stagefuse import doctor
    from stagefuse.runtime.cuda import calls, found

    gpus = [found.Gpu(0, "NVIDIA L20", 8, 9, 48 << 30), found.Gpu(1, "Tesla T4", 7, 5, 16 << 30)]
    monkeypatch.setattr(calls, "driver_version", lambda: (13, 1))
    monkeypatch.setattr(found, "gpus", lambda: gpus)
    findings = {f.name: f for f in doctor.gpu_findings()}
    assert "runs code for sm_89" in findings["cuda:0"].found and findings["cuda:0"].works
    assert "older than any" in findings["cuda:1"].found and not findings["cuda:1"].works
    assert findings["driver"].found == "for CUDA 13.1"


def test_code_for_several_gpus_in_one_file(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "p.pipe"
    path.write_text("pipeline p(x: f32[N]) -> f32[N]:\n    x * 2.0 + 1.0\n")
    code, out, _ = shell("compile", path, "--target", "cpu,a100,h200,h100", "--json")
    assert code == 0
    assert json.loads(out)["pipelines"][0]["gpu"] == {"sm_80": 1, "sm_90a": 1}
    with zipfile.ZipFile(path.with_suffix(".fused")) as archive:
        assert {"gpu.json", "kernels/sm_80.ptx", "kernels/sm_90a.ptx"} <= set(archive.namelist())
    code, out, _ = shell("explain", path.with_suffix(".fused"))
    assert code == 0 and "on sm_80" in out and "on sm_90a" in out and "occupancy" in out
    assert "us h100/h200/h20" in out and "with N = 4096" in out
    code, out, _ = shell("explain", path.with_suffix(".fused"), "--size", "N=100000000")
    assert code == 0 and "on a100 with N = 100000000" in out and "memory" in out
    code, out, _ = shell("explain", path.with_suffix(".fused"), "--ir", "ptx", "--json")
    assert code == 0 and list(json.loads(out)["ptx"]) == ["sm_80", "sm_90a"]
    code, out, _ = shell("explain", path, "--ir", "ptx")
    assert code == 0 and ".target sm_90a" in out and ".entry p_" in out
    assert shell("explain", path, "--ir", "ptx", "--target", "cpu,l20")[1].count(".target") == 1
    code, out, _ = shell("explain", path, "--target", "l40", "--json")
    assert [r["level"] for r in json.loads(out)["pipelines"]] == ["sm_89"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "1,2,3,4"], "one to three"),
        (["--kernel", "q"], "--kernel is one of add, scale, take"),
        (["--kernel", "add", "--arg", "none.npy"], "no file"),
        (["--kernel", "add", "--arg", "u8:300"], "--arg takes"),
        (["--kernel", "add", "--arg", "zeros:f31[2]"], "--arg takes"),
    ],
    ids=str,
)
def test_emulate_of_ptx_refuses(
    shell: Shell, tmp_path: Path, arguments: list[str], message: str
) -> None:
    path = tmp_path / "k.ptx"
    path.write_text(handmade_gpu.ptx("sm_80"))
    code, out, err = shell("emulate", path, *arguments)
    assert (code, out) == (2, "") and message in err


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

def test_emulate_of_a_plan(shell: Shell, good: Path, tmp_path: Path) -> None:
    sizes = ("--size", "B=3", "--size", "N=7")
    shell("compile", good, "--target", "cpu,a100,h200")
    plan = good.with_suffix(".fused")
    code, out, err = shell("emulate", plan, *sizes)
    assert code == 0 and "p: f32[3, 7]" in out and "label: i64[3]" in out
    assert "instructions" in err and "bytes read in global" in err
    code, out, _ = shell("emulate", plan, *sizes, "--arch", "sm_80", "--json")
    emulated = json.loads(out)["results"]
    x = tmp_path / "x.npy"
    np.save(x, np.linspace(-1, 1, 21, dtype=np.float32).reshape(3, 7))
    for device in ("emulator:sm_90a", "cpu"):
        code, out, _ = shell("run", plan, "--input", x, "--device", device, "--json")
        assert code == 0
        for ours, theirs in zip(json.loads(out)["results"], emulated, strict=True):
            np.testing.assert_allclose(ours["values"], theirs["values"], rtol=1e-5)
    code, out, err = shell("emulate", plan, *sizes, "--arch", "sm_89")
    assert code == 3 and "for sm_89" in err and "holds sm_80, sm_90a" in err
    code, out, err = shell("emulate", good, *sizes)  # a source: code for the newest arch
    assert code == 0 and "p: f32[3, 7]" in out


def test_emulate_of_ptx(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "k.ptx"
    path.write_text(handmade_gpu.ptx("sm_80"))
    w = tmp_path / "w.npy"
    np.save(w, np.array([1, 2, 3], np.float32))
    kernel = ("emulate", path, "--kernel", "add", "--grid", "1", "--block", "8")
    arguments = ("--arg", "zeros:f32[6]", "--arg", w, "--arg", "new:f32[6]", "--arg", "s64:6")
    code, out, err = shell(*kernel, *arguments, "--arg", "zeros:i64[2]", "-o", tmp_path)
    assert code == 0 and "ld.global.f32" in err
    np.testing.assert_array_equal(np.load(tmp_path / "arg2.npy"), [1, 2, 3, 1, 2, 3])
    wrong = (*arguments[:6], "--arg", "s64:7", "--arg", "zeros:i64[2]")
    code, out, err = shell(*kernel, *wrong)
    assert code == 1 and "out-of-bounds" in err and "ld.global.f32" in err
    code, out, err = shell("emulate", path, "--kernel", "add", "--arg", "zeros:f32[6]")
    assert code == 1 and "parameters" in err
    (tmp_path / "loop.ptx").write_text(LOOP)
    loop = ("emulate", tmp_path / "loop.ptx", "--arg", "zeros:s32[1]")
    code, out, err = shell(*loop, "--time-limit", "0.2")
    assert code == 1 and "k has not ended: 32 at line" in err
    code, out, err = shell("emulate", path, "--kernel", "add", "--arg", "zeros:f33[6]")
    assert code == 2 and "there is no type 'f33'" in err


LOOP = """.version 8.0
.target sm_80
.address_size 64
.visible .entry k(.param .u64 p)
{
    .reg .b32 %r<1>;
    .reg .pred %p<1>;
    mov.u32 %r0, 0;
L:  add.u32 %r0, %r0, 1;
    setp.ne.u32 %p0, %r0, 0;
    @%p0 bra L;
    ret;
}
"""


def test_every_option_is_explained() -> None:
    for name, command in cli.commands.commands.items():
        assert command.help, name
        options = [p for p in command.params if isinstance(p, click.Option)]
        missing = [p.name for p in options if not p.help]
        assert not missing, f"{name}: {missing}"


def test_a_pipeline_that_is_not_there_is_wrong_usage(shell: Shell, good: Path) -> None:
    code, _, err = shell("compile", good, "--pipeline", "other")
    assert code == 2 and "there is classify" in err


def test_a_library_has_nothing_to_compile(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "lib.pipe"
    path.write_text("fn f(x: f32[N]):\n    x\n")
    for command in ("compile", "run"):
        code, _, err = shell(command, path)
        assert code == 1 and err == f"error: {path} holds no pipeline\n"


def test_an_empty_plan_is_a_damaged_one(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "m.fused"
    path.write_bytes(b"")
    code, _, err = shell("run", path)
    assert code == 1 and "the file is empty" in err


def test_a_full_disk_and_a_missing_folder_are_named(
    shell: Shell, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "none" / "m.fused"
    code, _, err = shell("compile", good, "-o", target)
    assert code == 1 and err == f"error: {target}: No such file or directory\n"

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("stagefuse.compiler.plan_file._write_members", full)
    target = tmp_path / "m.fused"
    code, _, err = shell("compile", good, "-o", target)
    assert code == 3 and str(target) in err and list(tmp_path.glob(".*")) == []


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
    code, _, err = shell("export", good, "--opset", 3)
    assert code == 2 and "17 to" in err
    code, _, err = shell("export", good, "--pipeline", "other")
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
