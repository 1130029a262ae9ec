"""What the command line refuses: exit codes, and what stderr says."""

import errno
import json
import os
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from .shell import Shell


def test_compile_of_a_wrong_program_writes_nothing(shell: Shell, wrong: Path) -> None:
    assert shell("compile", wrong)[0] == 1
    assert not wrong.with_suffix(".fused").exists()


def test_run_refuses_a_wrong_input(shell: Shell, good: Path, tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.zeros((2, 3)))
    code, out, err = shell("run", good, "--input", tmp_path / "x.npy")
    assert (code, out) == (1, "")
    assert "f32" in err and "float64" in err


def test_run_of_a_damaged_plan(shell: Shell, tmp_path: Path) -> None:
    (tmp_path / "bad.fused").write_bytes(b"PK\x03\x04" + bytes(100))
    assert shell("run", tmp_path / "bad.fused")[0] == 1


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
        ["bench", "GOOD", "--size", "B=" + 5000 * "1", "--size", "N=1"],
        ["import", "GOOD", "--size", "B=\u00b2..9"],
        ["import", "GOOD", "--fix", "x=" + 30 * "9"],
    ],
    ids=lambda arguments: " ".join(arguments)[:60],
)
def test_wrong_usage_is_2(shell: Shell, good: Path, arguments: list[str]) -> None:
    source = good.read_text()
    code, out, err = shell(*[a.replace("GOOD", str(good)) for a in arguments])
    assert (code, out) == (2, "")
    assert err and good.read_text() == source


def test_wrong_usage_as_json(shell: Shell, good: Path) -> None:
    for arguments in (["check", "none.pipe"], ["bench", good], ["explain", good, "--size", "Q=3"]):
        code, out, err = shell(*arguments, "--json")
        found = json.loads(out)
        assert (code, err) == (2, "")
        assert not found["ok"] and found["error"] == "UsageError" and found["message"]


def test_json_that_stdout_does_not_take(good: Path) -> None:
    run = [sys.executable, "-m", "stagefuse", "check", str(good), "--json"]
    with open("/dev/full", "w") as full:
        done = subprocess.run(run, stdout=full, stderr=subprocess.PIPE, check=False)
    assert done.returncode == 3 and b"No space left" in done.stderr
    assert b"Traceback" not in done.stderr


def test_a_source_without_end_and_an_output_without_name(shell: Shell, good: Path) -> None:
    code, out, err = shell("check", "/dev/zero")
    assert (code, out) == (1, "") and "/dev/zero: File too large" in err
    code, out, err = shell("compile", good, "-o", "")
    assert (code, out) == (1, "") and "error: .: Is a directory" in err


def test_sizes_are_those_of_the_pipelines_that_have_them(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "two.pipe"
    path.write_text("pipeline p(x: f32[A, B]):\n    x + 1.0\npipeline q(x: f32[B]):\n    x * 2.0\n")
    code, out, err = shell("explain", path, "--size", "A=3", "--size", "B=1000", "--size", "C=1")
    assert (code, out) == (2, "") and "no dimension is called 'C'; there is A, B" in err
    code, out, err = shell("explain", path, "--size", "A=3")
    assert (code, out) == (2, "") and "give --size B=..." in err
    code, out, err = shell("explain", path, "--size", "A=3", "--size", "B=1000")
    lines = [line for line in out.splitlines() if line.startswith("k_") and "  1  " in line]
    rows = [line.split()[-2:] for line in lines]
    assert (code, err) == (0, "") and rows == [["0.02", "0.003"], ["0.008", "0.001"]]


def test_explain_takes_the_sizes_of_a_call(shell: Shell, good: Path) -> None:
    code, out, err = shell("explain", good, "--size", "B=2", "--size", "N=0")
    assert (code, out) == (1, "")
    assert "N is 0 by --size, but classify takes N >= 1" in err


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
    code, out, err = shell("compile", good, "--json")
    found = json.loads(out)
    Path(found["report"]).unlink()
    assert (code, found["error"], found["message"]) == (70, "InternalError", "an invariant")
    assert "internal error" in err


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

    monkeypatch.setattr("stagefuse.compiler.plan_file._write_member", full)
    target = tmp_path / "m.fused"
    code, _, err = shell("compile", good, "-o", target)
    assert code == 3 and str(target) in err and list(tmp_path.glob(".*")) == []


@pytest.mark.parametrize("command", ["check", "compile", "fmt", "explain"])
def test_a_source_that_cannot_be_read(shell: Shell, command: str) -> None:
    """Linux gives no byte at address 0 of a process: an error of input, without a name."""
    code, out, err = shell(command, "/proc/self/mem")
    assert code in (1, 3) and out == "" and err.startswith("error: ")


def test_a_result_that_finds_no_room_is_named(
    shell: Shell, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    np.save(tmp_path / "x.npy", np.ones((2, 3), np.float32))
    monkeypatch.setattr(np, "save", full)
    folder = tmp_path / "out"
    code, out, err = shell("run", good, "--input", f"x={tmp_path / 'x.npy'}", "-o", folder)
    assert (code, out) == (3, "") and f"{folder}/" in err
    assert list(folder.iterdir()) == []


def test_a_file_that_says_it_is_larger_than_memory(
    shell: Shell, good: Path, tmp_path: Path
) -> None:
    """Its header says 4 EiB; 4 bytes follow."""
    path = tmp_path / "x.npy"
    with open(path, "wb") as file:
        header = {"descr": "<f4", "fortran_order": False, "shape": (1 << 60,)}
        np.lib.format.write_array_header_1_0(file, header)
        file.write(bytes(4))
    code, out, err = shell("run", good, "--input", path)
    assert (code, out) == (2, "") and "cannot be read" in err


@pytest.mark.parametrize("header", ["{'shape': (", "(" * 99, "{'descr': '<f4', 'shape': (True,)}"])
def test_a_file_whose_header_is_none(
    shell: Shell, good: Path, tmp_path: Path, header: str
) -> None:
    path = tmp_path / "x.npy"
    path.write_bytes(b"\x93NUMPY\1\0" + len(header).to_bytes(2, "little") + header.encode())
    code, out, err = shell("run", good, "--input", path)
    assert (code, out) == (2, "") and "cannot be read" in err
    code, out, err = shell("import", tmp_path / "m.onnx", "--fix", f"x={path}")
    assert (code, out) == (2, "")


def test_one_of_several_pipelines_is_chosen_by_an_option(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "two.pipe"
    one = "(x: f32[N]) -> f32[N]:\n    x * 2.0\n"
    path.write_text(f"pipeline a{one}\npipeline b{one}")
    np.save(tmp_path / "x.npy", np.zeros(3, np.float32))
    code, out, err = shell("run", path, "--input", tmp_path / "x.npy")
    assert (code, out) == (1, "") and "`--pipeline a`" in err


@pytest.mark.parametrize("name", ["w.npz", "lib.pipe", "w.safetensors", "model.ONNX"])
def test_an_output_that_is_called_like_what_a_source_reads_is_refused(
    shell: Shell, good: Path, tmp_path: Path, name: str
) -> None:
    """It would take the place of weights, modules and models."""
    other = tmp_path / name
    other.write_bytes(b"mine")
    for command in ("compile", "export", "import"):
        if (command, other.suffix.lower()) in (("export", ".onnx"), ("import", ".pipe")):
            continue
        code, out, err = shell(command, good, "-o", other)
        assert (code, out) == (2, "") and "is no name of a" in err
    assert other.read_bytes() == b"mine"


def test_a_model_is_not_replaced_by_the_export_of_what_was_imported_from_it(
    shell: Shell, good: Path
) -> None:
    model = good.with_suffix(".onnx")
    model.write_bytes(b"mine")
    code, out, err = shell("export", good)
    assert (code, out) == (2, "") and f"give -o {model} to replace it" in err
    assert model.read_bytes() == b"mine"
    assert shell("export", good, "-o", model)[0] == 0 and model.read_bytes() != b"mine"
