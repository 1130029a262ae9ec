"""Calls on a GPU that is a fake: arguments, order and lifetimes, all but times."""

from __future__ import annotations

import gc
import random
import threading
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import stagefuse as sf
from benchmarks.gpu.plans import plan_of
from benchmarks.workloads import FAMILIES
from stagefuse.runtime.cuda import driver
from stagefuse.runtime.device_pipeline import DevicePipeline
from stagefuse.runtime.devices import open_plan

from . import handmade, handmade_gpu
from .cuda_run import batch, check, opened, read
from .fake_cuda import FakeCuda
from .fake_order import Fault
from .fake_tensor import FakeTensor


@pytest.fixture()
def affine(cuda: FakeCuda) -> Iterator[DevicePipeline]:
    with opened("affine") as pipeline:
        yield pipeline


@pytest.fixture()
def lookup(cuda: FakeCuda) -> Iterator[DevicePipeline]:
    with opened("lookup") as pipeline:
        yield pipeline


@pytest.mark.parametrize("shape", [(1, 3), (2, 3), (3, 30), (64, 9), (0, 3), (5, 0), (7, 66)])
def test_sizes(affine: DevicePipeline, shape: tuple[int, int]) -> None:
    for _ in range(2):
        x = batch(shape)
        check(affine(x=x), x)
        check(affine(x=x[::-1]), x[::-1])


def test_one_graph_a_bucket_one_launch_a_call(affine: DevicePipeline, cuda: FakeCuda) -> None:
    for _ in range(5):
        affine(x=batch((2, 6)))
    assert (cuda.counts["graph"], cuda.counts["replay"]) == (1, 5)
    assert "update" not in cuda.counts
    affine(x=batch((3, 6)))
    assert cuda.counts["graph"] == 2
    (*_, graph), _ = cuda.graphs, None
    assert [n.after for n in graph.nodes] == [(), (0,), (0,)]


def test_a_buffer_that_another_stands_for(cuda: FakeCuda) -> None:
    """Kernels wait for the one that writes what they read, wherever that is."""
    one = replace(handmade.affine(), gpu=(handmade_gpu.aliased("sm_90a"),))
    with open_plan(handmade_gpu.plan(one), None, "cuda:0") as pipeline:
        for rows in (1, 2, 4, 1):  # by which each product is exact
            x = batch((rows, 6))
            check(pipeline(x=x), x)
            check(pipeline(x=cuda.tensor(x)), x)
        assert sorted(len(g.nodes) for g in cuda.graphs) == [3, 4, 4]
        batches = [batch((1 + i % 2, 6)) for i in range(6)]
        for result, x in zip(pipeline.map({"x": b} for b in batches), batches, strict=True):
            check(result, x)


def test_weights_are_uploaded_once(affine: DevicePipeline, cuda: FakeCuda) -> None:
    before = cuda.counts["copy_in"]
    affine(x=batch((2, 6)))
    affine(x=batch((2, 6)))
    assert (before, cuda.counts["copy_in"]) == (1, 3)


def test_missing_edges_would_be_found(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    from stagefuse.runtime import device_prepared

    monkeypatch.setattr(device_prepared, "order", lambda launches: [()] * len(launches))
    with opened("affine") as pipeline, pytest.raises(Fault, match="nothing orders after"):
        pipeline(x=batch((2, 6)))
    cuda.faults.clear()


def test_arrays_on_the_gpu_stay_there(affine: DevicePipeline, cuda: FakeCuda) -> None:
    copies = cuda.counts["copy_in"]
    for shape in ((2, 6), (2, 6), (4, 3)):
        x = batch(shape)
        tensor = cuda.tensor(x, cuda.foreign_stream())
        result = affine(x=tensor)
        check(result, x)
        assert result.y.shape == shape and result.y.__dlpack_device__() == (2, 0)
        again = affine(x=result.y)
        check(again, read(result.y))
        tensor.release()
    assert cuda.counts["copy_in"] == copies
    assert cuda.counts["graph"] == 2


def test_tensors_between_16_bytes_are_moved(affine: DevicePipeline, cuda: FakeCuda) -> None:
    x = batch((2, 6))
    padded = np.concatenate([np.zeros(3, np.float32), x.reshape(-1)])
    whole = cuda.tensor(padded, cuda.foreign_stream())
    tensor = FakeTensor(cuda, whole.address + 12, x.shape, x.dtype, whole.stream)
    check(affine(x=tensor), x)
    assert cuda.counts["copy"] == 1


def test_array_interface(affine: DevicePipeline, cuda: FakeCuda) -> None:
    tensor = cuda.tensor(batch((2, 6)))
    interface = affine(x=tensor).y.__cuda_array_interface__
    assert interface["shape"] == (2, 6) and interface["typestr"] == "<f4"
    assert interface["strides"] is None and interface["version"] == 3


def test_results_outlive_the_pipeline(cuda: FakeCuda) -> None:
    x = batch((2, 6))
    tensor = cuda.tensor(x)
    pipeline = opened("affine")
    result = pipeline(x=tensor)
    pipeline.close()
    check(result, x)
    assert cuda.leaks() == {"blocks": 2, "contexts": 1}
    assert cuda.stack() == []
    exported = result.y.__dlpack__(stream=-1)
    del result
    gc.collect()
    assert cuda.leaks() == {"blocks": 1, "contexts": 1}
    del exported


def test_what_nobody_closes_goes_with_the_last_reference(cuda: FakeCuda) -> None:
    pipeline = opened("affine")
    x = batch((2, 6))
    check(pipeline.submit(x=x).result(), x)
    results = pipeline.map({"x": x} for _ in range(5))
    check(next(results), x)
    del pipeline, results
    gc.collect()
    assert cuda.leaks() == {}


def test_out_on_the_gpu(affine: DevicePipeline, lookup: DevicePipeline, cuda: FakeCuda) -> None:
    x = batch((2, 6))
    tensor, y, z = cuda.tensor(x), cuda.tensor(x), cuda.tensor(x)
    assert affine(x=tensor, out=(y, z)) == (y, z)
    check((y.numpy(), z.numpy()), x)
    affine(x=x, out=(y, np.zeros_like(x)))  # one there, one here
    with pytest.raises(sf.InputError, match="share memory"):
        affine(x=tensor, out=(y, y))
    with pytest.raises(sf.InputError, match="out= is f"):
        affine(x=tensor, out=(y, cuda.tensor(x[:1])))
    table, ids = batch((6,)), np.arange(6)[::-1].copy()
    at, which = cuda.tensor(table), cuda.tensor(ids)
    assert lookup(table=at, ids=which, out=at) is at  # over an input
    np.testing.assert_array_equal(at.numpy(), table[ids])


def test_arrays_that_can_not_be_taken(affine: DevicePipeline, cuda: FakeCuda) -> None:
    tensor = cuda.tensor(batch((6, 3)))
    tensor.shape, tensor.strides = (3, 6), (1, 3)
    with pytest.raises(sf.InputError, match="dense"):
        affine(x=tensor)
    tensor.shape, tensor.strides = (6, 3), (3, 1)
    affine(x=tensor)
    tensor.dtype = np.dtype(np.int32)
    with pytest.raises(sf.InputError, match="dtype i32"):
        affine(x=tensor)
    tensor.dtype = np.dtype(np.float32)
    with opened("affine") as other:
        other.driver.number = 1  # type: ignore[attr-defined]
        with pytest.raises(sf.InputError, match="memory of cuda:0, but"):
            other(x=tensor)
        other.driver.number = 0  # type: ignore[attr-defined]


def test_a_stream_of_the_caller(affine: DevicePipeline, cuda: FakeCuda) -> None:
    number = cuda.foreign_stream()
    stream = SimpleNamespace(__cuda_stream__=lambda: (0, number))
    x = batch((2, 6))
    waits = cuda.counts.get("finish", 0)
    tensor = cuda.tensor(x, number)
    result = affine.on(stream)(x=tensor)
    assert cuda.counts.get("finish", 0) == waits  # under way, not waited for
    chained = affine.on(stream)(x=result.y)
    y, _ = handmade_gpu.expected(x)
    np.testing.assert_array_equal(read(chained.y, number), handmade_gpu.expected(y)[0])
    check(result, x)  # on another stream than the one that made it
    host = affine.on(SimpleNamespace(cuda_stream=number))(x=x)
    check(host, x)
    with pytest.raises(sf.InputError, match="is not a stream"):
        affine.on("stream")
    with pytest.raises(sf.InputError, match="version 7"):
        affine.on(SimpleNamespace(__cuda_stream__=(7, number)))


def test_dropped_results_are_not_freed_under_way(affine: DevicePipeline, cuda: FakeCuda) -> None:
    number = cuda.foreign_stream()
    for _ in range(12):  # more than there are free spaces
        tensor = cuda.tensor(batch((2, 6)), number)
        affine.on(number)(x=tensor)


def test_index_out_of_range(lookup: DevicePipeline, cuda: FakeCuda) -> None:
    table = batch((5,))
    for bad in (5, -1):
        with pytest.raises(sf.IndexOutOfRange, match=f"it is {bad}, the axis has size 5"):
            lookup(table=table, ids=np.array([1, bad]))
        ids = np.array([4, 0])
        np.testing.assert_array_equal(lookup(table=table, ids=ids), table[ids])
    assert cuda.counts["graph"] == 1  # the error did not cost the graph
    at, which = cuda.tensor(table), cuda.tensor(np.array([5]))
    with pytest.raises(sf.IndexOutOfRange):
        lookup.on(cuda.foreign_stream())(table=at, ids=which)


def test_an_index_out_of_range_that_is_told_later(lookup: DevicePipeline, cuda: FakeCuda) -> None:
    """By the next call that finds it, or by `check`; not by calls of others."""
    stream = cuda.foreign_stream()
    on = lookup.on(stream, defer_errors=True)
    table, good, bad = batch((5,)), np.array([4, 0]), np.array([1, 7])
    at, right, wrong = (cuda.tensor(x) for x in (table, good, bad))
    on(table=at, ids=wrong)
    on(table=at, ids=right)  # the GPU has not come to the first
    with pytest.raises(sf.IndexOutOfRange, match="it is 7, the axis has size 5"):
        on.check()
    on.check()
    result = on(table=at, ids=right)
    np.testing.assert_array_equal(read(result, stream), table[good])
    on(table=at, ids=wrong)
    cuda.finish_all()
    with pytest.raises(sf.IndexOutOfRange, match="it is 7"):
        on(table=at, ids=right)
    on(table=at, ids=wrong)
    on.let_go()
    np.testing.assert_array_equal(lookup(table=table, ids=good), table[good])
    longer = cuda.tensor(np.array([1, 9, 0]))
    on(table=at, ids=right)
    on(table=at, ids=longer)
    with pytest.raises(sf.IndexOutOfRange, match=r"it is 9\n"):  # of which size is not said
        on.check()
    on(table=at, ids=longer)
    with pytest.raises(sf.IndexOutOfRange, match=r"it is 9\n"):
        on(table=batch((4,)), ids=good)  # waits, since its arrays are the host's


@pytest.mark.parametrize("depth", [1, 2, 3, 5])
def test_map(affine: DevicePipeline, cuda: FakeCuda, depth: int) -> None:
    batches = [batch((1 + i % 3, 3 * (1 + i % 4))) for i in range(11)]
    found = list(affine.map(({"x": x} for x in batches), depth=depth))
    for result, x in zip(found, batches, strict=True):
        check(result, x)
    assert cuda.counts["pin"] >= depth


def test_map_takes_inputs_at_once(affine: DevicePipeline) -> None:
    """A batch's arrays may change as soon as the next is asked for."""
    x, kept = np.empty((2, 6), np.float32), []

    def batches() -> Iterator[dict[str, Any]]:
        for _ in range(6):
            x[:] = batch((2, 6))
            kept.append(x.copy())
            yield {"x": x}

    for result, wanted in zip(affine.map(batches(), depth=3), kept, strict=False):
        check(result, wanted)


def test_map_of_arrays_on_the_gpu(affine: DevicePipeline, cuda: FakeCuda) -> None:
    arrays_ = [batch((2, 6)) for _ in range(4)]
    tensors = [cuda.tensor(x) for x in arrays_]
    for result, x in zip(affine.map({"x": t} for t in tensors), arrays_, strict=True):
        check(result, x)


def test_map_left_early(affine: DevicePipeline) -> None:
    results = affine.map({"x": batch((2, 6))} for _ in range(9))
    next(results)
    affine.close()
    with pytest.raises(sf.InputError, match="closed"):
        next(results)


def test_map_reports_errors(lookup: DevicePipeline) -> None:
    table = batch((5,))
    results = lookup.map({"table": table, "ids": np.array([i])} for i in (0, 5, 1, 2))
    assert next(results) == table[:1]
    with pytest.raises(sf.IndexOutOfRange):
        next(results)
    results.close()  # type: ignore[attr-defined]
    assert lookup(table=table, ids=np.array([3])) == table[3:4]


def test_threads_share_a_pipeline(affine: DevicePipeline) -> None:
    failures: list[BaseException] = []

    def work() -> None:
        try:
            for _ in range(10):
                x = batch((int(np.random.default_rng().integers(1, 9)), 6))
                check(affine(x=x), x)
            check(affine.submit(x=x).result(), x)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


def test_threads_that_end_leave_no_events(affine: DevicePipeline, cuda: FakeCuda) -> None:
    """By which they ordered streams."""
    driver: Any = affine.driver
    first, then = cuda.foreign_stream(), cuda.foreign_stream()

    def order() -> None:
        with driver.active():
            driver.order(first, then)

    before = len(cuda.events)
    for _ in range(3):
        thread = threading.Thread(target=order)
        thread.start()
        thread.join()
    assert len(cuda.events) == before + 1


def test_memory_of_dropped_results_is_used_again(affine: DevicePipeline, cuda: FakeCuda) -> None:
    tensor = cuda.tensor(batch((2, 6)))
    affine(x=tensor)
    count = cuda.counts["allocate"]
    for _ in range(5):
        x = batch((2, 6))
        tensor = cuda.tensor(x)
        check(affine(x=tensor), x)
    assert cuda.counts["allocate"] == count


def test_memory_is_used_again_behind_its_readers(affine: DevicePipeline, cuda: FakeCuda) -> None:
    """The fake would see a write that is not ordered behind the reader's stream."""
    number = cuda.foreign_stream()
    for _ in range(6):
        x = batch((2, 6))
        result = affine.on(number)(x=cuda.tensor(x, number))
        other = cuda.foreign_stream()
        exported = result.y.__dlpack__(stream=other)
        block, begin = cuda._at(exported.address, 48)
        cuda._enqueue(other, lambda: None, [(block, begin, begin + 48, "read")])
        del result, exported
        gc.collect()


def test_memory_whose_address_is_known_is_freed(affine: DevicePipeline, cuda: FakeCuda) -> None:
    tensor = cuda.tensor(batch((2, 6)))
    for _ in range(3):
        result = affine(x=tensor)
        assert result.y.__cuda_array_interface__ and result.z.__cuda_array_interface__
    assert cuda.counts["free"] >= 4


def test_any_order_of_uses(
    affine: DevicePipeline,
    lookup: DevicePipeline,
    cuda: FakeCuda,
    chance: random.Random,
    rng: np.random.Generator,
) -> None:
    """Calls with arrays here and there, on streams, chained, dropped: all right, nothing raced."""
    streams = [cuda.foreign_stream() for _ in range(2)]
    kept: list[tuple[Any, np.ndarray[Any, Any]]] = []  # results with their inputs

    def there(x: np.ndarray[Any, Any]) -> FakeTensor:
        return cuda.tensor(x, chance.choice([None, *streams]))

    for _ in range(60):
        x = rng.standard_normal((chance.randrange(1, 4), 3 * chance.randrange(1, 3)), np.float32)
        use = chance.randrange(7)
        if use == 0:
            check(affine(x=x), x)
        elif use == 1:
            kept.append((affine(x=there(x)), x))
        elif use == 2:
            on = affine.on(chance.choice(streams))
            first = on(x=there(x))
            y, _ = handmade_gpu.expected(x)
            kept += [(first, x), (on(x=first.y), y)]
        elif use == 3:
            outs = (there(x), np.empty_like(x))
            chance.choice([affine, affine.on(streams[0])])(x=there(x), out=outs)
            check((outs[0].numpy(streams[0]), outs[1]), x)
        elif use == 4:
            count = chance.randrange(5)
            for found in affine.map(({"x": b} for b in [x] * count), depth=2):
                check(found, x)
        elif use == 5:
            bad = chance.random() < 0.3
            table, ids = x[0], np.array([0, 7 if bad else -1 % x.shape[1]])
            if bad:
                with pytest.raises(sf.IndexOutOfRange):
                    lookup(table=there(table), ids=ids)
            else:
                np.testing.assert_array_equal(read(lookup(table=there(table), ids=ids)), table[ids])
        elif kept:
            check(*kept.pop(chance.randrange(len(kept))))
    for result, x in kept:
        check(result, x)


# Compiled pipelines


@pytest.mark.parametrize("name", ["W4", "W6", "W7"])
def test_edges_and_memory_of_compiled_pipelines(cuda: FakeCuda, name: str) -> None:
    """Every launch waits for what it needs, and memory is used again only behind its readers."""
    family, seed = FAMILIES[name], random.randrange(1 << 31)
    print(f"seed {seed}")
    workload = family.workload(seed, family.tiny)
    plan = replace(plan_of(workload, "sm_90a"), cubins={})
    with open_plan(plan, None, "cuda:0") as pipeline:
        for given in (workload.inputs, {k: cuda.tensor(v) for k, v in workload.inputs.items()}):
            found = pipeline(**given)
            results = list(found) if isinstance(found, tuple) else [found]
            results = [r if isinstance(r, np.ndarray) else read(r) for r in results]
            assert workload.error(results, workload.reference()) <= family.tolerance
        batches = [workload.inputs] * 4
        for found in pipeline.map(batches, depth=3):
            results = list(found) if isinstance(found, tuple) else [found]
            assert workload.error(results, workload.reference()) <= family.tolerance


# That the fake sees what it is there to see


def test_missing_waits_are_seen(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("affine") as pipeline:
        monkeypatch.setattr(driver.CudaDriver, "wait", lambda *_: None)
        with pytest.raises(Fault, match="nothing orders after"):
            list(pipeline.map({"x": batch((2, 6))} for _ in range(4)))
    cuda.faults.clear()


def test_missing_arguments_are_seen(affine: DevicePipeline, cuda: FakeCuda) -> None:
    launches = affine._preparer.gpu.launches
    short = (replace(launches[0], dims=()), *launches[1:])
    affine._preparer.gpu = replace(affine._preparer.gpu, launches=short)
    with pytest.raises(Fault, match="add takes"):
        affine(x=batch((2, 6)))
    cuda.faults.clear()


def test_results_read_too_early_are_seen(cuda: FakeCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened("affine") as pipeline:
        x = batch((2, 6))
        check(pipeline(x=x), x)
        with monkeypatch.context() as patch:
            patch.setattr(driver.CudaDriver, "finish", lambda *_: None)
            result = pipeline(x=x)
            assert not np.array_equal(result.y, handmade_gpu.expected(x)[0])
        cuda._finish(pipeline._spaces[0].stream and cuda.streams[pipeline._spaces[0].stream])
        check(result, x)
