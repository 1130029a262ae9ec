"""`runtime.cuda` through the real cuda.bindings and cuda.core, on a driver that is a stub in C.

This says that the driver is called with the structures and in the order that it takes; what a GPU
does with it, it can't say.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
STUB = Path(__file__).with_name("stub_libcuda.c")
COMPILER = shutil.which("cc") or shutil.which("gcc")

pytestmark = [
    pytest.mark.skipif(COMPILER is None, reason="needs a C compiler"),
    pytest.mark.skipif(
        find_spec("cuda") is None or find_spec("cuda.core") is None, reason="needs cuda-core"
    ),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("stub")
    assert COMPILER is not None
    options = ["-O1", "-shared", "-fPIC", "-fvisibility=hidden"]
    subprocess.run(
        [COMPILER, *options, "-o", made / "libcuda.so.1", STUB, "-ldl"], check=True, timeout=100
    )
    return made


def run(folder: Path, case: str) -> tuple[str, list[str]]:
    log = folder / f"{case}.log"
    environment = os.environ | {"LD_LIBRARY_PATH": str(folder), "STUB_CUDA_LOG": str(log)}
    done = subprocess.run(
        [sys.executable, "-m", "tests.runtime.stub_script", case],
        cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout.strip(), log.read_text().splitlines() if log.exists() else []


def test_calls_and_map(folder: Path) -> None:
    said, log = run(folder, "calls_and_map")
    assert said == "held 0"
    assert log[:3] == [
        "add grid 2 block 64 shared 0 cluster 1 after 0",
        "scale grid 2 block 64 shared 0 cluster 1 after 1",
        "scale grid 2 block 64 shared 0 cluster 1 after 1",
    ]


def test_arrays_of_other_libraries(folder: Path) -> None:
    said, _ = run(folder, "arrays_of_others")
    assert said == "held 0"


def test_clusters_and_shared_memory(folder: Path) -> None:
    said, log = run(folder, "launches")
    assert said == "held 0"
    assert log[0] == "add grid 2 block 64 shared 100000 cluster 2 after 0"


def test_errors(folder: Path) -> None:
    said, _ = run(folder, "errors")
    assert said == "held 2"  # the library and the context that the case itself left open


def test_hidden_gpus(folder: Path) -> None:
    said, _ = run(folder, "hidden")
    assert said == "held 0"


def test_the_tests_for_a_gpu(folder: Path) -> None:
    said, _ = run(folder, "own_tests")
    assert " passed" in said and "failed" not in said


def test_what_make_gpu_compares(folder: Path) -> None:
    said, log = run(folder, "comparison")
    for row in ("| W2a | 185 | 0 | 0 |", "| W4 | 1536 | 0 | 0 |", "| W6 | 96 | 0 | 0 |"):
        assert row in said
    assert len(log) >= 3


def test_tensor_maps(folder: Path) -> None:
    said, log = run(folder, "tensor_maps")
    assert said == "held 0"
    assert len(log) == 3 + (1 + 2 + 1) + 6  # one moves rows of 71 elements
    assert sum("block 384" in line for line in log) == len(log) - 1


def test_maps_of_pixels(folder: Path) -> None:
    said, log = run(folder, "pixel_maps")
    assert said == "held 0"
    assert any("block 384" in line for line in log)
