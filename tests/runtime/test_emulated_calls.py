"""Calls of a pipeline through the device runtime, in the emulator."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler import plan_file
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.runtime import emulator
from stagefuse.runtime.device_pipeline import DevicePipeline
from stagefuse.runtime.devices import open_plan
from stagefuse.runtime.pipeline import example_inputs

from . import handmade_gpu


@pytest.fixture()
def affine() -> Iterator[DevicePipeline]:
    with opened("affine") as pipeline:
        yield pipeline


@pytest.fixture()
def lookup() -> Iterator[DevicePipeline]:
    with opened("lookup") as pipeline:
        yield pipeline


def opened(name: str, device: str = "emulator") -> DevicePipeline:
    pipeline = open_plan(handmade_gpu.plan(), name, device)
    assert isinstance(pipeline, DevicePipeline)
    return pipeline


def batch(shape: tuple[int, int]) -> np.ndarray[Any, Any]:
    return np.random.default_rng().standard_normal(shape, np.float32)


def check(found: Any, x: np.ndarray[Any, Any]) -> None:
    y, z = handmade_gpu.expected(x)
    np.testing.assert_array_equal(found.y, y)
    np.testing.assert_array_equal(found.z, z)


@pytest.mark.parametrize("shape", [(1, 3), (2, 3), (3, 30), (64, 9), (0, 3), (5, 0), (7, 66)])
def test_sizes(affine: DevicePipeline, shape: tuple[int, int]) -> None:
    x = batch(shape)
    check(affine(x=x), x)
    check(affine(x=x[::-1]), x[::-1])


@pytest.mark.parametrize("device", ["emulator:sm_80", "emulator:sm_89", "emulator:sm_90a"])
def test_every_arch(device: str) -> None:
    with opened("affine", device) as pipeline:
        x = batch((2, 6))
        check(pipeline(x=x), x)
        assert pipeline.device == device and device.endswith(pipeline.report().level)


def test_wrong_inputs_leave_it_usable(affine: DevicePipeline) -> None:
    x = batch((2, 6))
    with pytest.raises(sf.InputError, match="no input is called `y`"):
        affine(y=x)
    with pytest.raises(sf.InputError, match="dtype f64"):
        affine(x=x.astype(np.float64))
    with pytest.raises(sf.InputError, match="B in 0..=64"):
        affine(x=batch((65, 3)))
    with pytest.raises(sf.InputError, match="by name"):
        affine(x)
    with pytest.raises(sf.InputError, match="no streams"):
        affine.on(0)
    check(affine(x=x), x)


def test_index_out_of_range_names_the_line(lookup: DevicePipeline) -> None:
    table = batch((1, 5))[0]
    for bad in (5, -1, 1 << 40):
        with pytest.raises(sf.IndexOutOfRange, match=f"it is {bad}, the axis has size 5") as caught:
            lookup(table=table, ids=np.array([1, bad, 0]))
        assert (caught.value.file, caught.value.line, caught.value.value) == ("t.pipe", 7, bad)
        ids = np.array([4, 0, 2, 2])
        np.testing.assert_array_equal(lookup(table=table, ids=ids), table[ids])


def test_out(affine: DevicePipeline, lookup: DevicePipeline) -> None:
    x = batch((4, 6))
    out = affine(x=x)
    out.y[:] = out.z[:] = np.nan
    assert affine(x=x, out=out) is out
    check(out, x)
    with pytest.raises(sf.InputError, match="share memory"):
        affine(x=x, out=(out.y, out.y))
    table, ids = batch((1, 8))[0], np.arange(8)[::-1].copy()
    wanted = table[ids]
    np.testing.assert_array_equal(lookup(table=table, ids=ids, out=table), wanted)
    strided = np.zeros(16, np.float32)[::2]
    np.testing.assert_array_equal(lookup(table=table, ids=ids, out=strided), table[ids])
    with pytest.raises(sf.InputError, match="read-only"):
        wanted.flags.writeable = False
        lookup(table=table, ids=ids, out=wanted)


def test_results_do_not_alias(affine: DevicePipeline) -> None:
    x = batch((2, 6))
    first = affine(x=x)
    check(affine(x=x + 1), x + 1)
    check(first, x)


def test_threads_share_a_pipeline(affine: DevicePipeline) -> None:
    failures: list[Exception] = []

    def work() -> None:
        try:
            for _ in range(30):
                x = batch((int(np.random.default_rng().integers(1, 9)), 6))
                check(affine(x=x), x)
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_map(affine: DevicePipeline, depth: int) -> None:
    batches = [batch((1 + i % 3, 3 * (1 + i % 4))) for i in range(11)]
    found = list(affine.map(({"x": x} for x in batches), depth=depth))
    assert len(found) == len(batches)
    for result, x in zip(found, batches, strict=True):
        check(result, x)


def test_map_takes_no_more_than_depth_ahead(affine: DevicePipeline) -> None:
    taken = 0

    def source() -> Iterator[dict[str, Any]]:
        nonlocal taken
        for _ in range(6):
            taken += 1
            yield {"x": batch((1, 3))}

    results = affine.map(source(), depth=2)
    next(results)
    assert taken == 2
    affine.close()
    with pytest.raises(sf.InputError, match="closed"):
        next(results)


def test_map_reports_errors(lookup: DevicePipeline) -> None:
    table = batch((1, 5))[0]
    batches = [{"table": table, "ids": np.array([i])} for i in (0, 4, 5, 1)]
    results = lookup.map(batches)
    assert next(results) == table[:1] and next(results) == table[4:]
    with pytest.raises(sf.IndexOutOfRange):
        next(results)
    with pytest.raises(sf.InputError, match="map takes dicts"):
        list(lookup.map([table]))  # type: ignore[list-item]
    with pytest.raises(sf.InputError, match="depth is 0"):
        lookup.map(batches, depth=0)


def test_submit_and_close(affine: DevicePipeline) -> None:
    x = batch((2, 6))
    future = affine.submit(x=x)
    check(future.result(), x)
    affine.close()
    affine.close()
    for call in (affine, affine.submit, lambda x: list(affine.map([{"x": x}]))):
        with pytest.raises(sf.InputError, match="closed"):
            call(x=x)


def test_profile_and_report(affine: DevicePipeline, tmp_path: Path) -> None:
    path = affine.profile(tmp_path / "trace.json", calls=2, x=batch((2, 3)))
    names = [e["name"] for e in json.loads(path.read_text())["traceEvents"] if e["ph"] == "X"]
    assert names == ["call 0", "affine.add", "affine.scale", "affine.scale"] + [
        "call 1", "affine.add", "affine.scale", "affine.scale"
    ]  # fmt: skip
    text = str(affine.report())
    assert "sm_90a, 3 kernels" in text and "blocks: (3*B*T + 63) // 64, of 64 threads" in text


def test_a_plan_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "model.fused"
    plan_file.write(handmade_gpu.plan(), path)
    with sf.load(path, device="emulator", pipeline="affine") as pipeline:
        x = batch((2, 6))
        check(pipeline(x=x), x)


def test_faults_come_through(tmp_path: Path) -> None:
    """A kernel that reads beyond its buffer, and one that reads what no kernel wrote."""
    plan = handmade_gpu.plan()
    first, *rest = plan.pipelines[0].gpu[2].launches
    for launch, kind in (
        (replace(first, dims=("3*B*T + 1",)), "out-of-bounds"),
        (replace(first, buffers=(2, 1, 3), writes=(3,)), "uninitialised"),
    ):
        gpu = replace(plan.pipelines[0].gpu[2], launches=(launch, *rest))
        with open_plan(handmade_gpu.plan(replace(plan.pipelines[0], gpu=(gpu,))), None,
                       "emulator") as pipe:  # fmt: skip
            with pytest.raises(emulator.Fault) as caught:
                pipe(x=batch((2, 6)))
            assert caught.value.kind == kind and caught.value.kernel == "add"


@pytest.mark.parametrize("name", ["softmax", "distances", "preprocess"])
@pytest.mark.parametrize("target", ["a100", "h100"])
def test_examples_as_on_the_cpu(name: str, target: str) -> None:
    """The same source on the CPU and as GPU code, with made-up inputs of small sizes."""
    path = Path(__file__).resolve().parents[2] / "examples" / f"{name}.pipe"
    with sf.compile(path, target=f"cpu,{target}", device="cpu") as cpu:
        sizes = {d.name: max(3, int(d.low)) for d in cpu._plan.dims}
        inputs = example_inputs(cpu._plan, sizes)
        expected = cpu(**inputs)
    with sf.compile(path, target=target, device="emulator") as pipe:
        found = pipe(**inputs)
    pairs = zip(found, expected, strict=True) if isinstance(found, tuple) else [(found, expected)]
    for one, other in pairs:
        # both are f32 sums of at most some thousand terms, in orders of their own
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", DTYPES)
def test_every_dtype_goes_in_and_out(name: str) -> None:
    dtype = DTYPES[name]
    expression = "x and s" if dtype.is_bool else "x + s"
    text = f"pipeline p(x: {name}[N], s: {name}[]) -> {name}[N]:\n    {expression}\n"
    inputs = {
        "x": np.random.default_rng().integers(0, 3, 7).astype(dtype.numpy),
        "s": np.array(1, np.float32).astype(dtype.numpy),
    }
    with sf.compile(text, device="cpu") as pipe:
        expected = pipe(**inputs)
    with sf.compile(text, device="emulator") as pipe:
        for found in (pipe(**inputs), *pipe.map([inputs, inputs])):
            assert found.dtype == expected.dtype
            np.testing.assert_array_equal(found.view(np.uint8), expected.view(np.uint8))


def test_the_report_of_compiled_code() -> None:
    text = "pipeline p(x: f32[N]) -> f32[N]:\n    x * 2.0\n"
    with sf.compile(text, device="emulator:sm_80") as pipe:
        report = str(pipe.report())
    assert "sm_80, 1 kernel" in report and "  registers: " in report
    assert "us on a100 (bound by start) with N = 4096" in report
