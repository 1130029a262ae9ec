"""Errors of a fake GPU, and which code runs on which GPU."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.runtime.cuda import found
from stagefuse.runtime.device_pipeline import DevicePipeline
from stagefuse.runtime.devices import open_plan

from . import handmade, handmade_gpu
from .cuda_run import batch, check, installed, opened
from .fake_cuda import FakeCuda


@pytest.fixture()
def affine(cuda: FakeCuda) -> Iterator[DevicePipeline]:
    with opened("affine") as pipeline:
        yield pipeline


@pytest.mark.parametrize(
    "name", ["stream", "event", "pin", "copy_in", "graph", "replay", "copy_out", "finish"]
)
def test_an_error_belongs_to_its_call(affine: DevicePipeline, cuda: FakeCuda, name: str) -> None:
    cuda.fail[name] = sf.DeviceError(f"{name}: CUDA_ERROR_UNKNOWN")
    x = batch((2, 6))
    with pytest.raises(sf.DeviceError, match=name):
        affine(x=x)
    check(affine(x=x), x)


@pytest.mark.parametrize("name", ["load", "kernel", "allocate", "stream", "copy_in", "finish"])
def test_a_pipeline_that_can_not_be_opened(cuda: FakeCuda, name: str) -> None:
    cuda.fail[name] = sf.DeviceError(f"{name}: CUDA_ERROR_UNKNOWN")
    with pytest.raises(sf.DeviceError, match=name):
        opened("affine")


def test_a_kernel_that_fails(affine: DevicePipeline, cuda: FakeCuda) -> None:
    """It ends the context, so later calls fail too; closing does not."""
    results = affine.map({"x": batch((2, 6))} for _ in range(9))
    next(results)
    cuda.fail_kernel = "scale"
    with pytest.raises(sf.DeviceError, match="illegal memory access"):
        next(results)
    with pytest.raises(sf.DeviceError, match="illegal memory access"):
        affine(x=batch((2, 6)))
    with pytest.raises(sf.DeviceError, match="illegal memory access"):
        affine(x=batch((2, 6)))
    affine.close()
    cuda.broken = None
    for held in (cuda.blocks, cuda.pinned, cuda.streams, cuda.events, cuda.graphs, cuda.libraries):
        held.clear()  # type: ignore[attr-defined]
    cuda.contexts = 0


def test_out_of_memory(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    big = replace(handmade.affine(), checks=(), gpu=(handmade_gpu.affine("sm_90a"),))
    plan = handmade_gpu.plan(big)
    with open_plan(plan, None, "cuda:0") as pipeline:
        x = batch((64, 3))
        check(pipeline(x=x), x)
        with pytest.raises(sf.OutOfMemory, match="intermediates"):
            pipeline(x=np.zeros((64, 3 * 10_000), np.float32))
        check(pipeline(x=x), x)
        tensor = cuda.tensor(x)
        cuda.fail["allocate"] = sf.OutOfMemory("allocating for a result")
        with pytest.raises(sf.OutOfMemory, match="a result"):
            pipeline(x=tensor)
        check(pipeline(x=tensor), x)
    monkeypatch.setattr(cuda, "gpus", (("small", 9, 0, 8),))
    with pytest.raises(sf.OutOfMemory, match="weights"):
        open_plan(plan, None, "cuda:0")


def test_idle_memory_is_given_up_first(cuda: FakeCuda) -> None:
    """Two calls at once leave two spaces; a large one after them takes the memory of both."""
    big = replace(handmade.affine(), checks=(), gpu=(handmade_gpu.affine("sm_90a"),))
    with open_plan(handmade_gpu.plan(big), None, "cuda:0") as opened_:
        pipeline: Any = opened_
        x = batch((64, 3 * 200))
        tensor = cuda.tensor(x)
        streams = [cuda.foreign_stream(), cuda.foreign_stream()]
        results = [pipeline.on(s)(x=tensor) for s in streams]
        assert len(pipeline._spaces) == 2
        for result in results:
            check(result, x)
        del results, result
        cuda.gpus = (("small", 9, 0, cuda.used + 100_000),)
        x = batch((64, 3 * 400))
        check(pipeline(x=x), x)
        assert len(pipeline._spaces) == 1


def test_parameters_that_are_not_the_plans(cuda: FakeCuda) -> None:
    text = handmade_gpu.ptx("sm_90a").replace("    .param .s64 p_count,\n", "", 1)
    plan = handmade_gpu.plan(ptx={"sm_90a": text}, cubins={}, **{
        "pipelines": tuple(replace(p, gpu=p.gpu[2:]) for p in handmade_gpu.plan().pipelines)
    })  # fmt: skip
    with pytest.raises(sf.PlanError, match="add takes parameters of"):
        open_plan(plan, "affine", "cuda:0")


# Which code runs where


@pytest.mark.parametrize(
    ("capability", "arch"),
    [((8, 0), "sm_80"), ((8, 6), "sm_80"), ((8, 9), "sm_89"), ((9, 0), "sm_90a"),
     ((10, 0), "sm_89"), ((12, 0), "sm_89")],
)  # fmt: skip
def test_the_newest_code_that_runs(
    monkeypatch: pytest.MonkeyPatch, capability: tuple[int, int], arch: str
) -> None:
    installed(monkeypatch, ("a GPU", *capability, 1 << 24))
    with opened("affine") as pipeline:
        assert pipeline.driver.arch == arch
        assert pipeline.driver.cubin == (arch == "sm_90a")  # type: ignore[attr-defined]
        x = batch((2, 6))
        check(pipeline(x=x), x)


def test_cubins_are_for_one_major_version(monkeypatch: pytest.MonkeyPatch) -> None:
    cubins = {a: handmade_gpu.cubins(a) for a in ("sm_80", "sm_89")}
    for capability, wanted in (((8, 6), ("sm_80", True)), ((10, 0), ("sm_89", False))):
        installed(monkeypatch, ("a GPU", *capability, 1 << 24))
        with opened("affine", cubins=cubins) as pipeline:
            driver_: Any = pipeline.driver
            assert (driver_.arch, driver_.cubin) == wanted


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    fake = installed(monkeypatch, ("Tesla T4", 7, 5, 1 << 24))
    with pytest.raises(sf.DeviceError, match="(?s)Tesla T4.*7.5.*older than any"):
        opened("affine")
    fake.gpus = (("NVIDIA A100", 8, 0, 1 << 24),)
    only = {"ptx": {"sm_90a": handmade_gpu.ptx("sm_90a")}, "pipelines": tuple(
        replace(p, gpu=p.gpu[2:]) for p in handmade_gpu.plan().pipelines)}  # fmt: skip
    with pytest.raises(sf.DeviceError, match='(?s)A100.*holds sm_90a.*target="a100"'):
        open_plan(handmade_gpu.plan(**only), "affine", "cuda:0")
    with pytest.raises(sf.DeviceError, match="cuda:3 is not there: this machine has 1 GPU"):
        opened("affine", "cuda:3")
    fake.gpus = ()
    with pytest.raises(sf.DeviceError, match="this machine has no GPU"):
        opened("affine")


def test_the_gpu_is_taken_where_there_is_one(
    cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(found, "has_driver", lambda: True)
    with open_plan(handmade_gpu.plan(), "affine") as pipeline:
        assert pipeline.device == "cuda:0"
    with open_plan(handmade.plan(), "affine") as pipeline:
        assert pipeline.device == "cpu"
    with open_plan(handmade_gpu.plan(), "affine", threads=1) as pipeline:
        assert pipeline.device == "cpu"
    cuda.gpus = (("Tesla T4", 7, 5, 1 << 24),)
    with open_plan(handmade_gpu.plan(), "affine") as pipeline:
        assert pipeline.device == "cpu"
