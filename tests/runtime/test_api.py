"""The package's front: light imports, `load`, refused devices and targets, exceptions."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler import plan_file
from stagefuse.compiler.plan import Plan
from stagefuse.runtime import devices
from stagefuse.runtime.cuda import found

from . import handmade, handmade_gpu


def test_import_is_light() -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import stagefuse; stagefuse.InputError\n"
        "assert time.perf_counter() - t < 0.5\n"
        "assert not {'numpy', 'lark', 'networkx', 'llvmlite'} & set(sys.modules)\n"
        "assert 'compile' in dir(stagefuse)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_loading_imports_no_compiler(tmp_path: Path) -> None:
    path = tmp_path / "m.fused"
    plan_file.write(handmade.plan(), path)
    code = (
        f"import sys, stagefuse; stagefuse.load({str(path)!r}, pipeline='affine')\n"
        "assert not {'lark', 'networkx', 'llvmlite', 'click', 'rich'} & set(sys.modules)\n"
        "ours = {m for m in sys.modules if m.startswith('stagefuse.compiler.')}\n"
        "plan = {'plan', 'plan_file', 'plan_check', 'plan_json', 'errors'}\n"
        "assert ours == {'stagefuse.compiler.' + m for m in plan}, ours"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_load(tmp_path: Path) -> None:
    path = tmp_path / "m.fused"
    plan_file.write(handmade.plan(), path)
    with sf.load(path, device="cpu", threads=1, pipeline="lookup", verify=True) as pipeline:
        assert pipeline.threads == 1
        found = pipeline(table=np.ones(3, np.float32), ids=np.array([2]))
        np.testing.assert_array_equal(found, [1])
    with pytest.raises(sf.InputError, match="several pipelines"):
        sf.load(str(path))
    with pytest.raises(FileNotFoundError):
        sf.load(tmp_path / "none.fused")
    (source := tmp_path / "m.pipe").write_text("pipeline p(x: f32[N]):\n    x\n")
    with pytest.raises(sf.PlanError, match="is a source, not a plan\n.*stagefuse.compile"):
        sf.load(source)


@pytest.mark.parametrize(
    "device",
    ["tpu", "cuda:x", "emulator:", "emulator:sm_75", "emulator:cpu", "cpu:0", "", "cuda:\u00b2"],
)
def test_names_that_no_device_has(device: str) -> None:
    with pytest.raises(sf.DeviceError, match=f"no device is called {device!r}"):
        sf.load("never-opened.fused", device=device)
    with pytest.raises(sf.DeviceError, match="(?s)no target is called 'h300'.*there is cpu, a100"):
        sf.compile("never-opened.pipe", target="cpu,h300")


def test_targets() -> None:
    given: Any = ["cpu"]
    with pytest.raises(TypeError, match='a text such as "h200,cpu", not a list'):
        sf.compile("never-opened.pipe", target=given)
    assert devices.check_target(" h200, cpu,h100,l40,sm_89") == ("sm_90a", "cpu", "sm_89")
    assert devices.check_target(None) == devices.check_target("") == ("cpu",)
    assert devices.targets_for(None, "emulator") == ("sm_90a",)
    assert devices.targets_for(None, "emulator:sm_80") == ("sm_80",)
    assert devices.targets_for("a100", "emulator") == ("sm_80",)
    assert devices.check_device("gpu:1") == devices.check_device("cuda:1") == "cuda:1"
    assert devices.check_device("cuda") == "cuda:0"


def test_a_device_needs_code_of_its_own(tmp_path: Path) -> None:
    path = tmp_path / "model.fused"
    plan_file.write(handmade.plan(), path)
    with pytest.raises(sf.DeviceError, match="(?s)the plan holds none.*compile it again"):
        sf.load(path, device="emulator", pipeline="affine")
    plan_file.write(handmade_gpu.plan(), path)
    with pytest.raises(sf.InputError, match="threads= is for the CPU"):
        sf.load(path, device="emulator", pipeline="affine", threads=2)


def test_exceptions_are_the_usual_kinds_too() -> None:
    kinds = [
        (sf.InputError, ValueError),
        (sf.IndexOutOfRange, IndexError),
        (sf.PlanError, ValueError),
        (sf.DeviceError, RuntimeError),
        (sf.OutOfMemory, MemoryError),
        (sf.InternalError, RuntimeError),
    ]
    assert all(issubclass(ours, usual) for ours, usual in kinds)
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        sf.nothing  # noqa: B018


def test_compile_hands_over_to_the_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[str, dict[str, Any]]] = []

    def compile_file(path: Path, **options: Any) -> Plan:
        seen.append((Path(path).read_text(), options))
        return handmade.plan()

    import stagefuse.compiler

    driver = SimpleNamespace(compile_file=compile_file)
    monkeypatch.setattr(stagefuse.compiler, "driver", driver, raising=False)
    path = tmp_path / "a.pipe"
    path.write_text("one")
    with sf.compile(path, pipeline="affine", weights={"w": "w.npz"}, threads=1) as pipeline:
        assert (pipeline.name, pipeline.threads) == ("affine", 1)
    text, options = seen[0]
    assert text == "one" and len(options.pop("levels")) == 1  # this machine's
    assert options == {"targets": ("cpu",), "weights": {"w": "w.npz"}, "pipeline": "affine"}


def test_a_plan_that_breaks_its_rules_is_an_internal_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import stagefuse.compiler

    driver = SimpleNamespace(compile_file=lambda *_, **__: handmade.plan(arrays={}))
    monkeypatch.setattr(stagefuse.compiler, "driver", driver, raising=False)
    with pytest.raises(sf.InternalError, match="the array 'w'"):
        sf.compile(tmp_path / "a.pipe")


TEXT = """
pipeline pick(table: f32[N, D], ids: i64[K]) -> (rows: f32[K, D], total: f32[D])
where K in 1..=1000:
    rows = table[ids]
    (rows, sum(rows * 2.0, axis=0))
"""


def test_text_to_results(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    table = rng.standard_normal((7, 5)).astype(np.float32)
    ids = np.array([6, 0, -1, 3])
    with sf.compile(TEXT) as pipeline:
        for take in (ids, np.arange(7), np.tile(ids, 200)):
            found = pipeline(table=table, ids=take)
            np.testing.assert_array_equal(found.rows, table[take])
            np.testing.assert_allclose(found.total, 2 * table[take].sum(0), rtol=1e-4, atol=1e-4)
        with pytest.raises(sf.IndexOutOfRange) as caught:
            pipeline(table=table, ids=np.array([0, 7]))
        assert (caught.value.line, caught.value.value) == (4, 7)
        with pytest.raises(sf.IndexOutOfRange, match="-8"):
            pipeline(table=table, ids=np.array([0, -8]))
        with pytest.raises(sf.InputError, match="K is 0"):
            pipeline(table=table, ids=ids[:0])


def test_compiled_file_is_the_same_by_file(tmp_path: Path) -> None:
    from stagefuse.compiler import driver

    source = tmp_path / "pick.pipe"
    source.write_text(TEXT)
    first, second = tmp_path / "1.fused", tmp_path / "2.fused"
    for path in (first, second):
        plan_file.write(driver.compile_file(source), path)
    assert first.read_bytes() == second.read_bytes()
    table, ids = np.eye(4, dtype=np.float32), np.array([2, 1])
    with sf.load(first) as loaded, sf.compile(source) as compiled:
        a, b = loaded(table=table, ids=ids), compiled(table=table, ids=ids)
        np.testing.assert_array_equal(a.rows, b.rows)


def test_compile_refuses_wrong_programs_and_names(tmp_path: Path) -> None:
    with pytest.raises(sf.CompileError) as caught:
        sf.compile("pipeline p(x: f32[N]) -> f32[N]:\n    x + y\n")
    assert "`y`" in str(caught.value) and caught.value.diagnostics
    with pytest.raises(sf.InputError, match="no pipeline called 'q'"):
        sf.compile(TEXT, pipeline="q")
    with pytest.raises(FileNotFoundError):
        sf.compile(tmp_path / "none.pipe")


@pytest.mark.skipif(found.has_driver(), reason="this machine has a driver")
def test_a_gpu_that_is_not_there(tmp_path: Path) -> None:
    path = tmp_path / "model.fused"
    plan_file.write(handmade_gpu.plan(), path)
    with pytest.raises(sf.DeviceError, match='(?s)help: .*(device="emulator"|stagefuse\\[gpu\\])'):
        sf.load(path, device="cuda:0", pipeline="affine")
    with sf.load(path, pipeline="affine") as pipeline:
        assert pipeline.device == "cpu"
        with pytest.raises(sf.InputError, match="cpu has no streams"):
            pipeline.on(0)
    plan_file.write(handmade_gpu.plan(objects={}), path)
    with pytest.raises(sf.DeviceError, match="no CPU code"):
        sf.load(path, pipeline="affine")


@pytest.mark.parametrize("read", [sf.load, sf.compile])
def test_what_is_no_path_is_refused(read: Callable[[Any], Any]) -> None:
    for given in (3, True, None, 1.5):  # a number would be an open file, closed afterwards
        with pytest.raises(TypeError):
            read(given)
    with pytest.raises(sf.InputError, match="null byte"):
        read("a\0b")
    with pytest.raises(OSError):
        read("")
