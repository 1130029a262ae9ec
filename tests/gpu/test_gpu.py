"""Pipelines on a real GPU: nothing of this runs without one."""

from __future__ import annotations

import random
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16 as BF16

import stagefuse as sf
from benchmarks.gpu.plans import plan_of
from benchmarks.workloads import FAMILIES
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.runtime.cuda import found
from stagefuse.runtime.device_pipeline import DevicePipeline
from stagefuse.runtime.devices import open_plan
from tests.runtime import handmade_gpu

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not found.has_driver(), reason="needs an NVIDIA GPU"),
]


def opened(name: str) -> DevicePipeline:
    arch = found.arch_of(0)
    plan = handmade_gpu.plan(objects={}, cubins={})
    assert arch in plan.ptx
    pipeline = open_plan(plan, name, "cuda:0")
    assert isinstance(pipeline, DevicePipeline)
    return pipeline


@pytest.fixture()
def affine() -> Iterator[DevicePipeline]:
    with opened("affine") as pipeline:
        yield pipeline


def batch(shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    return np.random.default_rng().standard_normal(shape, np.float32)


def check(found: Any, x: np.ndarray[Any, Any]) -> None:
    for ours, expected in zip(found, handmade_gpu.expected(x), strict=True):
        np.testing.assert_array_equal(ours, expected)


@pytest.mark.parametrize("shape", [(1, 3), (3, 30), (64, 9), (0, 3), (7, 66)])
def test_arrays_of_this_machine(affine: DevicePipeline, shape: tuple[int, int]) -> None:
    for _ in range(3):
        x = batch(shape)
        check(affine(x=x), x)


def test_map_and_submit(affine: DevicePipeline) -> None:
    batches = [batch((1 + i % 5, 3 * (1 + i % 7))) for i in range(40)]
    for result, x in zip(affine.map({"x": x} for x in batches), batches, strict=True):
        check(result, x)
    check(affine.submit(x=batches[0]).result(), batches[0])


@pytest.mark.parametrize("name", ["bf16", "f16", "f64", "i8", "i64", "u8", "f8e4m3", "f8e5m2"])
def test_tensors_of_every_dtype_come_back_as_tensors(name: str) -> None:
    torch = pytest.importorskip("torch")
    array = DTYPES[name].array
    source = f"pipeline p(x: {name}[N]) -> {name}[N]:\n    flip(x, axis=0)\n"
    with sf.compile(source, device="cuda:0") as pipe:
        x = torch.arange(1, 8, device="cuda").to(getattr(torch, array))
        y = pipe(x=x)
    assert isinstance(y, torch.Tensor) and y.dtype == x.dtype and y.is_cuda
    assert y.cpu().double().tolist() == x.cpu().double().tolist()[::-1]


def test_tensors_of_torch_stay_on_the_gpu(affine: DevicePipeline) -> None:
    torch = pytest.importorskip("torch")
    x = batch((8, 12))
    on = torch.from_numpy(x).cuda()
    result = affine(x=on)
    assert result.y.device == on.device
    check([t.cpu().numpy() for t in result], x)
    out = (torch.empty_like(on), torch.empty_like(on))
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        affine.on(stream)(x=on * 2, out=out)
        check([t.cpu().numpy() for t in out], x * 2)
    with pytest.raises(sf.InputError, match="dense"):
        affine(x=torch.from_numpy(batch((12, 8))).cuda().T)


def test_tensors_again_and_again(
    affine: DevicePipeline, chance: random.Random, rng: np.random.Generator
) -> None:
    """Calls with tensors that come and go, on PyTorch's streams and beside them, waited for at the
    end."""
    torch = pytest.importorskip("torch")
    streams = [torch.cuda.default_stream(), torch.cuda.Stream()]
    calls = [affine, *map(affine.on, streams)]
    kept = []
    for _ in range(200):
        x = rng.standard_normal(chance.choice([(2, 6), (2, 6), (64, 30), (0, 3)]), np.float32)
        with torch.cuda.stream(chance.choice(streams)):
            given = torch.from_numpy(x).cuda()
            outs = (torch.empty_like(given), torch.empty_like(given))
            call = chance.choice(calls)
            for _ in range(chance.randrange(1, 4)):
                found = call(x=given, out=outs) if chance.random() < 0.5 else call(x=given)
        kept.append((found, x))
        if chance.random() < 0.5:  # results that nobody looks at
            del kept[chance.randrange(len(kept))]
    torch.cuda.synchronize()
    for found, x in kept:
        check([t.cpu().numpy() for t in found], x)


def test_a_session_of_tensors() -> None:
    torch = pytest.importorskip("torch")
    text = (
        "pipeline p(x: f32[D]) -> f32[D] where D in 1..=900:\n"
        "    state total: f32[D] = 0.0\n    total = total + x\n    total\n"
    )
    with sf.compile(text, device="cuda:0") as pipe:
        sessions = [pipe.session(D=700) for _ in range(2)]
        sums = [np.zeros(700, np.float32) for _ in sessions]
        for number in (0, 0, 0, 1, 0, 1, 1, 1, 0):
            x = batch((700,))
            sums[number] += x
            found = sessions[number](x=torch.from_numpy(x).cuda())
            np.testing.assert_array_equal(found.cpu().numpy(), sums[number])


def test_index_out_of_range() -> None:
    with opened("lookup") as lookup:
        table = batch((5,))
        for bad in (5, -1):
            with pytest.raises(sf.IndexOutOfRange, match=f"it is {bad}, the axis has size 5"):
                lookup(table=table, ids=np.array([1, bad]))
            assert lookup(table=table, ids=np.array([4]))[0] == table[4]


def test_out_of_memory_leaves_it_usable(affine: DevicePipeline) -> None:
    x = batch((2, 6))
    memory = found.gpu(0).memory
    with affine.driver.active(), pytest.raises(sf.OutOfMemory):
        affine.driver.allocate(2 * memory, "a test")
    check(affine(x=x), x)


def test_a_compiled_pipeline() -> None:
    text = "pipeline p(x: f32[B, N]) -> f32[B, N]:\n    x * 2.0 + sum(x, axis=1, keepdims=True)\n"
    with sf.compile(text, device="cuda:0") as pipe:
        x = np.arange(35, dtype=np.float32).reshape(5, 7)
        np.testing.assert_array_equal(pipe(x=x), x * 2 + x.sum(1, keepdims=True))


@pytest.mark.parametrize("depth", [128, 136])  # whole lines of the cache, and not
def test_products_of_16_bits(depth: int) -> None:
    text = (
        f"pipeline p(x: bf16[N, {depth}], w: bf16[{depth}, 328], v: bf16[328, {depth}],"
        " b: bf16[328]) -> (bf16[N, 328], f32[N, 328])\nwhere N in 0..=4096:\n"
        "    maximum(x @ w + b, bf16(0.0)), f32(x @ transpose(v, [1, 0])) * 0.5\n"
    )
    rng = np.random.default_rng()
    w, v, b = (
        rng.standard_normal(shape).astype(BF16) for shape in ((depth, 328), (328, depth), (328,))
    )
    with sf.compile(text, device="cuda:0") as pipe:
        for rows in (1, 129, 600, 0):
            x = rng.standard_normal((rows, depth)).astype(BF16)
            y, z = pipe(x=x, w=w, v=v, b=b)
            wide = [a.astype(float) for a in (x, w, v, b)]
            plain = np.maximum(wide[0] @ wide[1] + wide[3], 0)
            np.testing.assert_allclose(y.astype(float), plain, rtol=2**-7, atol=2**-3)
            np.testing.assert_allclose(z, wide[0] @ wide[2].T / 2, rtol=2**-8, atol=1e-3)


@pytest.mark.parametrize("name", ["W2a", "W4", "W5a", "W7"])
def test_workloads(name: str) -> None:
    family, seed = FAMILIES[name], random.randrange(1 << 31)
    print(f"seed {seed}")
    workload = family.workload(seed, family.tiny)
    reference = workload.reference()
    with open_plan(plan_of(workload, found.arch_of(0)), None, "cuda:0") as pipe:
        for results in (pipe(**workload.inputs), *pipe.map([workload.inputs] * 3)):
            listed = list(results) if isinstance(results, tuple) else [results]
            assert workload.error(listed, reference) <= family.tolerance


def test_threads_and_pipelines_at_once(affine: DevicePipeline) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(20):
                x = batch((4, 6))
                check(affine(x=x), x)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
