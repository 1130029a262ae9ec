"""Calls: results against NumPy, every wrong argument refused, memory never shared."""

from __future__ import annotations

import gc
import json
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ml_dtypes import bfloat16

from stagefuse.compiler import plan_file
from stagefuse.runtime.cpu_pipeline import CpuPipeline
from stagefuse.runtime.errors import (
    DeviceError,
    IndexOutOfRange,
    InputError,
    OutOfMemory,
    PlanError,
)
from stagefuse.runtime.memory import overlaps_itself, pointer_to

from . import handmade


@pytest.fixture(scope="module")
def affine() -> Iterator[CpuPipeline]:
    with CpuPipeline(handmade.plan(), "affine") as pipeline:
        yield pipeline


@pytest.fixture(scope="module")
def lookup() -> Iterator[CpuPipeline]:
    with CpuPipeline(handmade.plan(), "lookup") as pipeline:
        yield pipeline


def ramp(batch: int, width: int) -> np.ndarray[Any, Any]:
    return np.linspace(-1, 1, batch * width, dtype=np.float32).reshape(batch, width)


def check(pipeline: CpuPipeline, x: np.ndarray[Any, Any]) -> None:
    found = pipeline(x=x)
    y, z = handmade.expected(x)
    np.testing.assert_array_equal(found.y, y)
    np.testing.assert_array_equal(found.z, z)
    assert found._fields == ("y", "z")


@pytest.mark.parametrize("shape", [(1, 3), (4, 9), (3, 300), (0, 3), (5, 0), (0, 0), (1, 3000)])
def test_sizes(affine: CpuPipeline, shape: tuple[int, int]) -> None:
    check(affine, ramp(*shape))


def test_where_the_elements_of_an_array_lie() -> None:
    whole = np.arange(24.0).reshape(4, 6)
    frozen = whole.copy()
    frozen.flags.writeable = False
    for array in (
        whole, whole[1:, 2:], whole.T, frozen, np.empty(0), np.array(1.5), np.zeros(3, bfloat16),
        whole.view(np.recarray),
        np.broadcast_to(whole, (2, 4, 6)), np.frombuffer(b".xyz", "u1")[1:],
    ):  # fmt: skip
        assert pointer_to(array) == array.ctypes.data


def test_large_results_reuse_memory_but_never_live_one() -> None:
    big = replace(handmade.affine(), checks=())
    with CpuPipeline(handmade.plan(big)) as pipeline:
        x = ramp(1, 300_000)
        first = pipeline(x=x)
        address, view = first.y.ctypes.data, first.z[0, :5]
        kept = first.z.ctypes.data
        check(pipeline, x)
        del first
        gc.collect()
        second = pipeline(x=x)
        addresses = {second.y.ctypes.data, second.z.ctypes.data, pipeline(x=x).y.ctypes.data}
        assert address in addresses
        assert kept not in addresses  # `view` still uses it
        np.testing.assert_array_equal(view, handmade.expected(x)[1][0, :5])
        assert second.y.flags.writeable and not second.y.flags.owndata
    second.y[:] = 0  # results outlive the pipeline


@pytest.mark.parametrize(
    "make",
    [
        np.asfortranarray,
        lambda x: np.repeat(x, 2, axis=1)[:, ::2],
        lambda x: x[::-1, ::-1].copy()[::-1, ::-1],
        lambda x: np.frombuffer(b"." + x.tobytes(), np.uint8)[1:].view(np.float32).reshape(x.shape),
        lambda x: np.broadcast_to(x[0], x.shape),
        lambda x: x.view(type("Mine", (np.ndarray,), {})),
    ],
)
def test_any_layout(affine: CpuPipeline, make: Any) -> None:
    check(affine, make(ramp(4, 9)))


def test_read_only_inputs(affine: CpuPipeline) -> None:
    x = ramp(4, 9)
    x.flags.writeable = False
    check(affine, x)


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "input `x` missing: affine takes `x`"),
        ({"y": ramp(1, 3)}, "no input is called `y`"),
        ({"x": ramp(1, 3), "z": 1}, "no input is called `z`"),
        ({"x": ramp(1, 3).astype(np.float64)}, r"dtype f64 \(float64\).*\n.*astype\(np.float32\)"),
        ({"x": ramp(1, 3).astype(">f4")}, "foreign byte order"),
        ({"x": ramp(1, 3)[0]}, r"1 dimension, shape \(3,\).*f32\[B, 3\*T\]\n.*`x\[None\]`"),
        ({"x": ramp(1, 3)[None]}, "3 dimensions"),
        ({"x": ramp(1, 4)}, "dimension 1 of `x` is 4, which `3\\*T` is for no size T"),
        ({"x": ramp(65, 3)}, r"B is 65 by dimension 0 of `x`, but affine takes B in 0..=64"),
        ({"x": ramp(64, 300)}, r"B\*T is at most 1000; here B = 64, T = 100\n  --> a.pipe:3:5"),
        ({"x": [[1.0, 2.0, 3.0]]}, r"is a list.*\n.*np.asarray\(x, np.float32\)"),
        ({"x": 3.0}, r"the number 3.0"),
        ({"x": np.ma.masked_array(ramp(1, 3))}, "masked"),
        ({"x": None}, "NoneType"),
    ],
)
def test_wrong_inputs(affine: CpuPipeline, inputs: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        affine(**inputs)
    check(affine, ramp(2, 6))


def test_positional_arguments_are_refused(affine: CpuPipeline) -> None:
    with pytest.raises(InputError, match=r"call `affine\(x=...\)`"):
        affine(ramp(1, 3))


def test_near_names_are_offered(lookup: CpuPipeline) -> None:
    with pytest.raises(InputError, match="write `table=`"):
        lookup(tabel=ramp(1, 3)[0], ids=np.zeros(1, np.int64))


def test_sizes_that_disagree_name_both() -> None:
    both = replace(
        handmade.lookup(),
        inputs=tuple(replace(i, shape=("N",)) for i in handmade.lookup().inputs),
        results=(replace(handmade.lookup().results[0], shape=("N",)),),
        buffers=tuple(replace(b, shape=("N",)) for b in handmade.lookup().buffers),
        steps=(replace(handmade.lookup().steps[0], count="N"),),
        dims=handmade.lookup().dims[:1],
    )
    with CpuPipeline(handmade.plan(both)) as pipeline:
        message = "dimension 0 of `ids` is 2.*it must be 3; N is 3 by dimension 0 of `table`"
        with pytest.raises(InputError, match=message):
            pipeline(table=ramp(1, 3)[0], ids=np.zeros(2, np.int64))


def test_index_out_of_range_names_the_line(lookup: CpuPipeline) -> None:
    table = ramp(1, 5)[0]
    with pytest.raises(IndexOutOfRange) as caught:
        lookup(table=table, ids=np.array([0, 17, 2]))
    error = caught.value
    assert (error.file, error.line, error.column, error.value) == ("t.pipe", 7, 5, 17)
    assert str(error) == (
        "an id is out of range: it is 17, the axis has size 5\n  --> t.pipe:7:5\n   | table[ids]"
    )
    good = np.array([4, 0])
    np.testing.assert_array_equal(lookup(table=table, ids=good), table[good])


def test_out(affine: CpuPipeline, lookup: CpuPipeline) -> None:
    x = ramp(4, 9)
    y, z = np.empty((4, 9), np.float32), np.empty((4, 9), np.float32)
    found = affine(x=x, out=(y, z))
    assert found[0] is y and found[1] is z
    np.testing.assert_array_equal(y, handmade.expected(x)[0])
    again = affine(x=x)
    again.y[:] = 0
    assert affine(x=x, out=again) is again
    np.testing.assert_array_equal(again.y, y)
    table, ids = x[0], np.array([3, 1])
    one = np.empty(2, np.float32)
    assert lookup(table=table, ids=ids, out=one) is one
    np.testing.assert_array_equal(one, table[ids])


def test_out_of_any_layout_and_over_inputs(lookup: CpuPipeline) -> None:
    table = np.arange(6, dtype=np.float32)
    ids = np.array([5, 4, 3, 2, 1, 0])
    wide = np.zeros(12, np.float32)
    lookup(table=table, ids=ids, out=wide[::2])
    np.testing.assert_array_equal(wide[::2], ids)
    np.testing.assert_array_equal(wide[1::2], 0)
    lookup(table=table, ids=ids, out=table)
    np.testing.assert_array_equal(table, ids)


def test_wrong_out(affine: CpuPipeline, lookup: CpuPipeline) -> None:
    table, ids = ramp(1, 6)[0], np.array([1, 2])
    locked = np.empty(2, np.float32)
    locked.flags.writeable = False
    for out, message in [
        (np.empty(3, np.float32), r"out= is float32\[3\], but the result is float32\[2\]"),
        (np.empty(2, np.float64), r"float64\[2\]"),
        ([1.0, 2.0], "a list, not an array"),
        (locked, "read-only"),
        (np.ma.masked_array(np.empty(2, np.float32), [True, False]), "masked.*\n.*`.data`"),
        ("y", "a str"),
    ]:
        with pytest.raises(InputError, match=message):
            lookup(table=table, ids=ids, out=out)
    together = np.lib.stride_tricks.as_strided(np.zeros(9, np.float32), (2,), (2,))
    with pytest.raises(InputError, match="out= has elements that share memory"):
        lookup(table=table, ids=ids, out=together)
    x = ramp(1, 3)
    for out, message in [
        (x.copy(), "1 arrays, but affine has 2"),
        ((x.copy(),), "1 arrays"),
        ({"y": x.copy()}, "needs the results y, z"),
        (2 * (x.copy(),), "share memory"),
    ]:
        with pytest.raises(InputError, match=message):
            affine(x=x, out=out)


def test_an_array_overlaps_itself_where_two_elements_share_a_byte(
    rng: np.random.Generator,
) -> None:
    memory = np.zeros(400, np.uint8)
    for _ in range(200):
        shape, strides = rng.integers(0, 4, 3), rng.integers(-9, 10, 3)
        array = np.lib.stride_tricks.as_strided(memory[200:].view(np.uint16), shape, strides)
        bytes_of = [k + b for k in (np.indices(shape).reshape(3, -1).T @ strides) for b in (0, 1)]
        assert overlaps_itself(array) == (len(set(bytes_of)) < len(bytes_of)), (shape, strides)


def test_results_do_not_alias(affine: CpuPipeline) -> None:
    x = ramp(4, 9)
    a, b = affine(x=x), affine(x=x)
    for array in (a.y, a.z):
        assert not any(np.shares_memory(array, other) for other in (x, b.y, b.z))


def test_threads_share_a_pipeline(affine: CpuPipeline) -> None:
    inputs = [ramp(b, 3 * t) for b in range(1, 5) for t in range(1, 20)]
    barrier = threading.Barrier(6)

    def work(offset: int) -> None:
        barrier.wait()
        for i in range(300):
            check(affine, inputs[(i * 7 + offset) % len(inputs)])

    with ThreadPoolExecutor(6) as pool:
        for done in [pool.submit(work, i) for i in range(6)]:
            done.result()


def test_submit_and_map(affine: CpuPipeline, lookup: CpuPipeline) -> None:
    inputs = [ramp(2, 3 * t) for t in range(1, 12)]
    for x, found in zip(inputs, affine.map({"x": x} for x in inputs), strict=True):
        np.testing.assert_array_equal(found.y, handmade.expected(x)[0])
    future = affine.submit(x=inputs[0])
    np.testing.assert_array_equal(future.result().z, handmade.expected(inputs[0])[1])
    with pytest.raises(InputError):
        affine.submit(q=1).result()
    wrong: list[Any] = [0, -1, 1.5, "2", None]
    for depth in wrong:
        with pytest.raises(InputError, match=f"depth is {depth!r}"):
            affine.map([], depth=depth)
    with pytest.raises(InputError, match="map takes dicts"):
        list(affine.map([inputs[0]]))  # type: ignore[list-item]
    table = ramp(1, 4)[0]
    mapped = lookup.map([{"table": table, "ids": np.array([i])} for i in (1, 2, 9, 3)], depth=2)
    assert [next(mapped)[0], next(mapped)[0]] == [table[1], table[2]]
    with pytest.raises(IndexOutOfRange):
        next(mapped)


def test_map_takes_no_more_than_depth_ahead(affine: CpuPipeline) -> None:
    taken: list[int] = []

    def batches() -> Iterator[dict[str, Any]]:
        for i in range(10):
            taken.append(i)
            yield {"x": ramp(1, 3)}

    mapped = affine.map(batches(), depth=3)
    assert taken == []
    next(mapped)
    assert len(taken) == 3


def test_signature_and_report(affine: CpuPipeline, lookup: CpuPipeline) -> None:
    assert str(affine.signature) == (
        "affine(x: f32[B, 3*T]) -> (y: f32[B, 3*T], z: f32[B, 3*T]) where B in 0..=64"
    )
    assert str(lookup.signature) == ("lookup(table: f32[N], ids: i64[K]) -> f32[K] where N >= 1")
    assert [k.label for k in affine.report().kernels] == ["affine.add"] + 2 * ["affine.scale"]
    assert "affine.add" in str(affine.report()) and "fused: no" in str(affine.report())


@pytest.mark.parametrize("inputs", [{}, {"x": ramp(4, 9)}])
def test_profile(affine: CpuPipeline, tmp_path: Path, inputs: dict[str, Any]) -> None:
    path = affine.profile(tmp_path / "trace.json", calls=2, **inputs)
    trace = json.loads(path.read_text())
    names = [e["name"] for e in trace["traceEvents"] if e["ph"] == "X"]
    assert names == 2 * [names[0], "affine.add", "affine.scale", "affine.scale"] or len(names) == 8
    assert all(e["dur"] >= 0 and e["ts"] >= 0 for e in trace["traceEvents"] if e["ph"] == "X")


def test_profile_of_a_new_pipeline_invents_inputs(tmp_path: Path) -> None:
    with CpuPipeline(handmade.plan(), "lookup") as pipeline:
        assert pipeline.profile(tmp_path / "t.json").exists()


def test_closed_pipelines_refuse(tmp_path: Path) -> None:
    path = tmp_path / "m.fused"
    plan_file.write(handmade.plan(), path)
    pipeline = CpuPipeline(plan_file.read(path), "affine")
    x = ramp(2, 3)
    result = pipeline(x=x)
    pipeline.close()
    pipeline.close()
    np.testing.assert_array_equal(result.y, handmade.expected(x)[0])
    for attempt in (
        lambda: pipeline(x=x),
        lambda: pipeline.submit(x=x),
        lambda: pipeline.profile(tmp_path / "t"),
    ):
        with pytest.raises(InputError, match="closed"):
            attempt()


class _Waiting(CpuPipeline):
    """Whose calls begin when they may."""

    def __init__(self) -> None:
        super().__init__(handmade.plan(), "affine")
        self.may = threading.Event()

    def __call__(self, /, *args: Any, out: Any = None, **inputs: Any) -> Any:
        assert self.may.wait(10)
        return super().__call__(*args, out=out, **inputs)


def test_closing_in_a_callback_of_a_call() -> None:
    pipeline, closed = _Waiting(), threading.Event()
    done = pipeline.submit(x=ramp(2, 3))
    done.add_done_callback(lambda _: (pipeline.close(), closed.set()))  # type: ignore[func-returns-value]
    pipeline.may.set()
    assert closed.wait(10)
    np.testing.assert_array_equal(done.result().y, handmade.expected(ramp(2, 3))[0])
    with pytest.raises(InputError, match="closed"):
        pipeline(x=ramp(2, 3))


def test_calls_under_way_finish_and_none_is_taken_any_more() -> None:
    pipeline = _Waiting()
    done = [pipeline.submit(x=ramp(2, 3)) for _ in range(6)]  # by four threads
    closing = [threading.Thread(target=pipeline.close) for _ in range(2)]
    for thread in closing:
        thread.start()
    while not pipeline._closing:
        time.sleep(0.001)
    with pytest.raises(InputError, match="closed"):
        pipeline.submit(x=ramp(2, 3))
    pipeline.may.set()
    for thread in closing:
        thread.join(10)
    for future in done:
        np.testing.assert_array_equal(future.result(0).y, handmade.expected(ramp(2, 3))[0])


def test_choosing_a_pipeline() -> None:
    with pytest.raises(InputError, match="several pipelines: affine, lookup"):
        CpuPipeline(handmade.plan())
    with pytest.raises(InputError, match="no pipeline is called 'x'"):
        CpuPipeline(handmade.plan(), "x")
    for threads in (0, 65, True, 1.5):
        with pytest.raises(InputError, match="threads"):
            CpuPipeline(handmade.plan(), "affine", threads=threads)  # type: ignore[arg-type]


def test_objects_that_do_not_fit() -> None:
    with pytest.raises(DeviceError, match="no CPU code"):
        CpuPipeline(handmade.plan(objects={}), "affine")
    with pytest.raises(PlanError, match="does not load"):
        CpuPipeline(handmade.plan(objects={"v3": b"\x7fELF" + bytes(100)}), "affine")
    missing = replace(
        handmade.lookup(), steps=(replace(handmade.lookup().steps[0], symbol="nosuch"),)
    )
    with pytest.raises(PlanError, match="nosuch"):
        CpuPipeline(handmade.plan(missing))


def test_too_large_for_memory_and_too_small_slots() -> None:
    huge = replace(handmade.affine(), slots=(f"12*B*T + {1 << 50}",))
    with CpuPipeline(handmade.plan(huge)) as pipeline, pytest.raises(OutOfMemory):
        pipeline(x=ramp(1, 3))
    small = replace(handmade.affine(), slots=("12*B*T - 1",))
    with CpuPipeline(handmade.plan(small)) as pipeline, pytest.raises(PlanError, match="its slot"):
        pipeline(x=ramp(1, 3))


def test_scalars() -> None:
    argument = handmade.lookup().inputs[0]
    scalar = replace(
        handmade.lookup(),
        inputs=(replace(argument, shape=()), handmade.lookup().inputs[1]),
        buffers=(replace(handmade.lookup().buffers[0], shape=()), *handmade.lookup().buffers[1:]),
        dims=handmade.lookup().dims[1:],
        steps=(replace(handmade.lookup().steps[0], dims=("1",)),),
        sites=(),
    )
    with CpuPipeline(handmade.plan(scalar)) as pipeline:
        ids = np.zeros(2, np.int64)
        for value in (2.5, np.float32(2.5), np.array(2.5, np.float32)):
            np.testing.assert_array_equal(pipeline(table=value, ids=ids), [2.5, 2.5])
        np.testing.assert_array_equal(pipeline(table=2, ids=ids), [2, 2])
        for value in (True, "x", np.float64(1)):
            with pytest.raises(InputError):
                pipeline(table=value, ids=ids)


def test_weights_of_any_layout() -> None:
    strided = np.array([1, 9, 2, 9, 3, 9], np.float32)[::2]
    with CpuPipeline(handmade.plan(handmade.affine(), arrays={"w": strided})) as pipeline:
        check(pipeline, ramp(2, 6))
