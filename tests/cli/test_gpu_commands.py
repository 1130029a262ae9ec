"""What the command line says of GPUs, and the emulator run from it."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest

from stagefuse.compiler.driver import compile_file

from ..runtime import handmade_gpu
from .shell import Shell

BOUNDS = {"start", "memory", "loads", "instructions", "arithmetic"}


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


def test_explain_says_where_a_kernel_is_in_the_source_and_what_bounds_it(
    shell: Shell, tmp_path: Path
) -> None:
    """In whole also where the output is no terminal, and of what the sizes launch only."""
    path = tmp_path / "p.pipe"
    path.write_text(
        "import nn\n\npipeline project(x: f32[B, 64], w: f32[64, 384]) -> f32[B, 384]\n"
        "where B in 1..=65536:\n    y = x @ w\n    nn.softmax(y * 2.0)\n"
    )
    shell("compile", path, "--target", "cpu,h100,a100")
    code, out, err = shell("explain", path.with_suffix(".fused"), "--size", "B=8")
    assert (code, err) == (0, "") and "…" not in out
    on_cpu, *on_gpus = out.split("project(x:")[1:]
    assert "on x86-64-v3/v4 with B = 8" in on_cpu and "MFLOP" in on_cpu
    for found, devices in zip(on_gpus, ("a100", "h100/h200/h20"), strict=True):
        table, reasons = found.split("\n\n", 1)
        titles, *rows = (line.split() for line in table.splitlines()[2:])
        assert {"lines", "MB", "MFLOP", "regs", "shared", "occupancy", devices} <= set(titles)
        assert table.splitlines()[2].endswith("bound by")
        kernels = [row for row in rows if row[0].startswith("project_")]
        assert any(row[1] == "6" for row in kernels)
        assert all({*row[-1].split("/")} <= BOUNDS for row in kernels)
        for other in table.partition("at other sizes: ")[2].split(", "):
            assert other not in [row[0] for row in kernels] and other in reasons
        assert ", line 5\n" in reasons and "because" in reasons


def test_explain_cuts_nothing_off_on_a_narrow_terminal(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of a recurrence too, whose kernels run as often as it has steps."""
    from stagefuse import tables
    from stagefuse.runtime.report import Report

    path = tmp_path / "p.pipe"
    path.write_text(
        "pipeline p(x: f32[T, B, 128], r: f32[128, 128], h0: f32[B, 128]) -> f32[B, 128]\n"
        "where T in 1..=64, B in 1..=8:\n"
        "    scan t in 0..T with h = h0:\n        h = tanh(x[t] + h @ r)\n    h\n"
    )
    (pipeline,) = compile_file(path, targets=["cpu", "h200"]).pipelines
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    monkeypatch.setenv("COLUMNS", "40")
    sizes = {"T": 9, "B": 2}
    for report in (Report.of_plan(pipeline, "v3"), Report.of_gpu(pipeline, pipeline.gpu[0], sizes)):
        tables.show(report, sizes)
        out = capsys.readouterr().out
        assert "…" not in out and "MFLOP" in out
        for row in tables.rows(report, sizes):
            assert row.symbol in out and all(cell in out for cell in row.gpu)
    assert "bound by" in out and "with T = 9, B = 2" in out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--grid", "1,2,3,4"], "one to three"),
        (["--size", "N=3"], "--size is for .pipe and .fused files"),
        (["--kernel", "q"], "--kernel is one of add, scale, take"),
        (["--kernel", "add", "--arg", "none.npy"], "no file"),
        (["--kernel", "add", "--arg", "text.npy"], "'text.npy' is no .npy file"),
        (["--kernel", "add", "--arg", "u8:300"], "--arg takes"),
        (["--kernel", "add", "--arg", "zeros:f31[2]"], "--arg takes"),
    ],
    ids=str,
)
def test_emulate_of_ptx_refuses(
    shell: Shell, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str],
    message: str,
) -> None:  # fmt: skip
    path = tmp_path / "k.ptx"
    path.write_text(handmade_gpu.ptx("sm_80"))
    (tmp_path / "text.npy").write_text("no array")
    monkeypatch.chdir(tmp_path)
    code, out, err = shell("emulate", path, *arguments)
    assert (code, out) == (2, "") and message in err


def test_emulate_of_what_keeps_states_and_of_no_text(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "p.pipe"
    lines = ["pipeline p(x: f32[N]):", "state k: f32[S] = 2.0", "k = k + sum(x)", "k"]
    path.write_text("\n    ".join(lines) + "\n")
    np.save(tmp_path / "x.npy", np.ones(3, np.float32))
    code, out, err = shell("emulate", path, "--size", "S=2", "--input", tmp_path / "x.npy")
    assert code == 0 and "[5. 5.]" in out, err
    code, out, err = shell("emulate", path, "--kernel", "k")
    assert (code, out) == (2, "") and "--kernel is for .ptx files" in err
    (tmp_path / "k.ptx").write_bytes(b"\xff\xfe")
    code, out, err = shell("emulate", tmp_path / "k.ptx")
    assert (code, out) == (1, "") and "k.ptx is no PTX" in err


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
