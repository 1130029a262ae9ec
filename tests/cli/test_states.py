"""States on the command line: from call to call through files, and what is wrong with those."""

from __future__ import annotations

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from .shell import Shell

SOURCE = """\
pipeline total(x: f32[N]) -> (sums: f32[N], calls: i64)
where N in 1..=9, S in 1..=99:
    state sums: f32[N] = 0.0
    state recent: f32[S, 2] = 0.0
    state calls: i64 = 0
    sums = sums + x
    recent[calls, 0] = x[0]
    calls = calls + 1
    sums, calls
"""


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "total.pipe"
    path.write_text(SOURCE)
    np.save(tmp_path / "x.npy", np.arange(3, dtype=np.float32))
    return path


def test_states_go_from_call_to_call(shell: Shell, source: Path, tmp_path: Path) -> None:
    kept, x = tmp_path / "kept.npz", tmp_path / "x.npy"
    sizes = ("--size", "S=2", "--size", "N=3")
    code, out, err = shell("run", source, "--input", x, *sizes, "--state-out", kept, "--json")
    assert (code, err) == (0, "")
    assert json.loads(out)["results"][0]["values"] == [0, 1, 2]
    code, out, _ = shell("run", source, "--input", x, "--state-in", kept, "--state-out", kept)
    assert code == 0 and "[0. 2. 4.]" in out
    with np.load(kept) as arrays:
        assert arrays["recent"].shape == (2, 2) and arrays["calls"] == 2
    code, _, err = shell("run", source, "--input", x, "--state-in", kept, "--state-out", kept)
    assert code == 1 and "this index is out of range: it is 2, the axis has size 2" in err
    with np.load(kept) as arrays:
        assert arrays["calls"] == 2


def test_a_compiled_pipeline_keeps_states_too(shell: Shell, source: Path, tmp_path: Path) -> None:
    fused, x = tmp_path / "total.fused", tmp_path / "x.npy"
    assert shell("compile", source, "-o", fused)[0] == 0
    assert shell("run", fused, "--input", x, "--size", "S=9", "--size", "N=3")[0] == 0
    code, out, _ = shell("explain", fused, "--size", "N=3", "--size", "S=90")
    assert code == 0 and "state (sums: f32[N], recent: f32[S, 2], calls: i64)" in out
    code, out, _ = shell("bench", fused, "--calls", 3, "--size", "N=3", "--size", "S=1")
    assert code == 0 and "3 calls" in out  # S = 1: each call begins anew


def test_what_is_wrong(shell: Shell, source: Path, tmp_path: Path) -> None:
    x, other = tmp_path / "x.npy", tmp_path / "other.npz"
    call = ("run", source, "--input", x)
    code, _, err = shell(*call)
    assert code == 2 and "give --size N=... and --size S=..." in err
    code, _, err = shell(*call, "--size", "S=0", "--size", "N=3")
    assert code == 1 and "S is 0, but total takes S in 1..=99" in err
    code, _, err = shell(*call, "--size", "T=0", "--size", "S=1", "--size", "N=3")
    assert code == 1 and "no size of a session is called `T`" in err
    code, _, err = shell(*call, "--state-in", x)
    assert code == 2 and "--state-in" in err and "is no .npz file" in err
    other.write_bytes(b"PK\x03\x04nothing")
    code, _, err = shell(*call, "--state-in", other)
    assert code == 2 and "is no .npz file" in err
    np.savez(other, sums=np.zeros(3, np.float32), recent=np.zeros((4, 2), np.float32))
    code, _, err = shell(*call, "--state-in", other)
    assert code == 1 and "the snapshot lacks `calls`" in err
    np.savez(other, sums=np.zeros(3), recent=np.zeros((4, 2), np.float32), calls=np.int64(0))
    code, _, err = shell(*call, "--state-in", other)
    assert code == 1 and "the state `sums` is f32[3], and the snapshot has f64[3]" in err
    code, _, err = shell(*call, "--state-in", tmp_path / "missing.npz")
    assert code == 2 and "does not exist" in err


def test_a_pipeline_without_states(shell: Shell, tmp_path: Path) -> None:
    path = tmp_path / "p.pipe"
    path.write_text("pipeline p(x: f32[3]) -> f32[3]:\n    x * 2.0\n")
    np.save(tmp_path / "x.npy", np.arange(3, dtype=np.float32))
    out = tmp_path / "kept.npz"
    code, _, err = shell("run", path, "--input", tmp_path / "x.npy", "--state-out", out)
    assert code == 2 and "--state-out is for pipelines that keep states" in err


def test_a_full_disk_leaves_the_states_of_before(
    shell: Shell, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, x = tmp_path / "kept.npz", tmp_path / "x.npy"
    first = ("run", source, "--input", x, "--size", "S=2", "--size", "N=3", "--state-out", kept)
    assert shell(*first)[0] == 0
    before = kept.read_bytes()

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(np.lib.format, "write_array", full)
    again = ("run", source, "--input", x, "--state-in", kept, "--state-out", kept)
    code, out, err = shell(*again)
    assert (code, out) == (3, "") and str(kept) in err
    assert kept.read_bytes() == before and list(tmp_path.glob(".*")) == []


def test_states_may_have_any_names(shell: Shell, tmp_path: Path) -> None:
    source, kept = tmp_path / "names.pipe", tmp_path / "kept.npz"
    source.write_text(
        "pipeline f() -> i64:\n    state file: i64 = 3\n    file = file + 1\n    file\n"
    )
    assert shell("run", source, "--state-out", kept)[0] == 0
    code, out, _ = shell("run", source, "--state-in", kept, "--json")
    assert code == 0 and json.loads(out)["results"][0]["values"] == 5
