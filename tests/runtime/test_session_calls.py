"""Sessions as objects: sizes, snapshots, threads, lifetimes, on the CPU and on a fake GPU."""

from __future__ import annotations

import gc
import json
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler import plan_check, plan_file
from stagefuse.compiler.driver import compile_file
from stagefuse.compiler.plan import Plan
from stagefuse.runtime.api import host_levels
from stagefuse.runtime.devices import open_plan
from stagefuse.runtime.pipeline import Pipeline

from .cuda_run import read
from .fake_cuda import FakeCuda

SOURCE = """\
weights w = "start.npz"

pipeline remember(x: f32[D], at: i64) -> (sum: f32[D], count: i64)
where S in 1..=100, D in 2..=9:
    state kept: f32[S, D] = 0.0
    state h: f32[3] = w.h
    state small: bf16[S] = 1.5
    state count: i64 = 0
    kept[at] = x
    h = h * 2.0
    count = count + 1
    sum(kept, axis=0), count
"""
START = np.array([1, -2, 3], np.float32)


@pytest.fixture(scope="module")
def plan(tmp_path_factory: pytest.TempPathFactory) -> Plan:
    folder = tmp_path_factory.mktemp("plan")
    np.savez(folder / "start.npz", h=START)
    path = folder / "remember.pipe"
    path.write_text(SOURCE)
    return compile_file(path, targets=("cpu", "h100"), levels=host_levels())


@pytest.fixture(params=["cpu", "cuda:0"])
def pipe(request: pytest.FixtureRequest, plan: Plan) -> Iterator[Pipeline]:
    if request.param != "cpu":
        request.getfixturevalue("cuda")
        plan = replace(plan, cubins={})
    with open_plan(plan, None, request.param) as opened:
        yield opened


class Model:
    """What a session does, in NumPy."""

    def __init__(self, size: int, depth: int) -> None:
        self.kept = np.zeros((size, depth), np.float32)
        self.calls = 0

    def __call__(self, x: Any, at: int) -> Any:
        self.kept[at] = x
        self.calls += 1
        return self.kept.astype(np.float64).sum(axis=0), self.calls

    def check(self, found: Any, wanted: Any) -> None:
        # a sum of at most 9 numbers below 8
        np.testing.assert_allclose(found.sum, wanted[0], atol=8 * 9 * np.finfo(np.float32).eps)
        assert found.count == wanted[1]


def given(rng: np.random.Generator, size: int, depth: int) -> tuple[Any, int]:
    x = np.clip(rng.standard_normal(depth), -8, 8).astype(np.float32)
    return x, int(rng.integers(-size, size))


def test_sessions_do_not_mix(pipe: Pipeline, rng: np.random.Generator) -> None:
    sizes = ((5, 3), (5, 3), (9, 2))
    sessions = [(pipe.session(S=s, D=d), Model(s, d), s, d) for s, d in sizes]
    for number in rng.permutation(np.arange(30) % 3):
        session, model, s, d = sessions[number]
        x, at = given(rng, s, d)
        model.check(session(x=x, at=at), model(x, at))
    for session, model, *_ in sessions:
        np.testing.assert_array_equal(session.state["kept"], model.kept)
        np.testing.assert_array_equal(session.state["h"], START * 2.0**model.calls)
        assert session.state["count"] == model.calls


def test_threads_share_the_pipeline(pipe: Pipeline) -> None:
    """Sessions run at once; the calls of one from several threads run one after the other."""
    shared = pipe.session(S=8, D=4)

    def talk(seed: int) -> None:
        rng = np.random.default_rng(seed)
        with pipe.session(S=7, D=4) as session:
            model = Model(7, 4)
            for _ in range(10):
                x, at = given(rng, 7, 4)
                model.check(session(x=x, at=at), model(x, at))
                shared(x=x, at=at)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(talk, range(4)))
    assert shared.state["count"] == 40


def test_reset_snapshot_and_restore(pipe: Pipeline, rng: np.random.Generator) -> None:
    session, other = pipe.session(S=5, D=3), pipe.session(S=5, D=3)
    session(x=np.ones(3, np.float32), at=2)
    kept = session.snapshot()
    assert {k: (v.shape, v.dtype) for k, v in kept.items()} == {
        "kept": ((5, 3), np.float32), "h": ((3,), np.float32),
        "small": ((5,), ml_dtypes.bfloat16), "count": ((), np.int64),
    }  # fmt: skip
    x, _ = given(rng, 5, 3)
    wanted = session(x=x, at=0)
    other.restore(kept)
    found = other(x=x, at=0)
    np.testing.assert_array_equal(found.sum, wanted.sum)
    kept["kept"][:] = 9.0  # a snapshot is the caller's
    np.testing.assert_array_equal(session.state["kept"], other.state["kept"])
    session.reset()
    assert not session.state["kept"].any() and session.state["count"] == 0
    np.testing.assert_array_equal(session.state["h"], START)
    assert (session.state["small"] == ml_dtypes.bfloat16(1.5)).all()
    assert list(session.state) == ["kept", "h", "small", "count"] and len(session.state) == 4
    assert "kept: f32[5, 3]" in repr(session.state)
    with pytest.raises(KeyError):
        session.state["other"]


def test_snapshots_go_through_files(pipe: Pipeline, tmp_path: Path) -> None:
    session = pipe.session(S=5, D=3)
    session(x=np.arange(3, dtype=np.float32), at=1)
    np.savez(tmp_path / "kept.npz", **session.snapshot())  # type: ignore[arg-type]
    session.reset()
    with np.load(tmp_path / "kept.npz") as kept:
        session.restore(dict(kept))
    assert session.state["count"] == 1 and session.state["small"].dtype == ml_dtypes.bfloat16


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kept": None}, "lacks `kept`: remember keeps `kept`, `h`, `small`, `count`"),
        ({"more": np.zeros(3)}, "has `more`"),
        ({"kept": np.zeros((5, 4), np.float32)}, r"`kept` is f32\[5, 3\], and .* f32\[5, 4\]"),
        ({"count": np.int32(0)}, "`count` is i64, and the snapshot has i32"),
    ],
)
def test_snapshots_that_do_not_fit(pipe: Pipeline, change: dict[str, Any], words: str) -> None:
    session = pipe.session(S=5, D=3)
    session(x=np.ones(3, np.float32), at=0)
    kept = {k: v for k, v in {**session.snapshot(), **change}.items() if v is not None}
    before = session.snapshot()
    with pytest.raises(sf.InputError, match=words):
        session.restore(kept)
    for name, value in session.snapshot().items():
        np.testing.assert_array_equal(value, before[name])
    with pytest.raises(sf.InputError, match="a snapshot is a dict of arrays, not a list"):
        session.restore([])  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("sizes", "words"),
    [
        ({}, "a session of remember fixes the size D, S\n  = help: write `session\\(D=..., S="),
        ({"S": 5}, "fixes the size D"),
        ({"S": 0, "D": 3}, "S is 0, but remember takes S in 1..=100"),
        ({"S": 5, "D": 3, "T": 1}, "no size of a session is called `T`"),
        ({"S": 2.5, "D": 3}, "S is 2.5, but a size is a whole number"),
    ],
)
def test_sizes_that_do_not_fit(pipe: Pipeline, sizes: dict[str, Any], words: str) -> None:
    with pytest.raises(sf.InputError, match=words):
        pipe.session(**sizes)


def test_calls_without_a_session_are_refused(pipe: Pipeline, tmp_path: Path) -> None:
    x = np.zeros(3, np.float32)
    words = "remember keeps `kept`, .* so it is called through a session\n  = help: `session = "
    for call in (
        lambda: pipe(x=x, at=0), lambda: pipe.submit(x=x, at=0),
        lambda: list(pipe.map([{"x": x, "at": 0}])), lambda: pipe.profile(tmp_path / "t.json"),
    ):  # fmt: skip
        with pytest.raises(sf.InputError, match=words):
            call()


def test_sessions_of_what_keeps_nothing_are_refused() -> None:
    with sf.compile("pipeline p(x: f32) -> f32:\n    x\n", device="cpu") as pipe:
        with pytest.raises(sf.InputError, match="p keeps nothing between calls"):
            pipe.session()


def test_inputs_that_do_not_fit_the_session(pipe: Pipeline) -> None:
    session = pipe.session(S=5, D=3)
    with pytest.raises(sf.InputError, match="must be 3; D is 3 by the session"):
        session(x=np.zeros(4, np.float32), at=0)
    with pytest.raises(sf.InputError, match="no input is called `y`"):
        session(x=np.zeros(3, np.float32), y=0)
    assert session.state["count"] == 0


def test_out_takes_what_a_call_gives(pipe: Pipeline) -> None:
    session = pipe.session(S=5, D=3)
    out = (np.zeros(3, np.float32), np.zeros((), np.int64))
    assert session(x=np.ones(3, np.float32), at=0, out=out) is out
    assert out[1] == 1 and (out[0] == 1).all()


def test_a_profile_changes_nothing(pipe: Pipeline, tmp_path: Path) -> None:
    session = pipe.session(S=5, D=3)
    session(x=np.ones(3, np.float32), at=0)
    before = session.snapshot()
    trace = json.loads(session.profile(tmp_path / "trace.json", calls=2).read_text())
    names = [e["name"] for e in trace["traceEvents"]]
    assert "call 1" in names and any("update" in n for n in names)
    for name, value in session.snapshot().items():
        np.testing.assert_array_equal(value, before[name])


def test_closing(plan: Plan) -> None:
    pipe = open_plan(plan, None, "cpu")
    session, other = pipe.session(S=5, D=3), pipe.session(S=5, D=3)
    session.close()
    session.close()
    with pytest.raises(sf.InputError, match="the session of remember is closed"):
        session(x=np.zeros(3, np.float32), at=0)
    assert other(x=np.zeros(3, np.float32), at=0).count == 1
    pipe.close()
    for late in (lambda: other(x=np.zeros(3, np.float32), at=0), lambda: pipe.session(S=5, D=3)):
        with pytest.raises(sf.InputError, match="is closed"):
            late()


def test_zeros_are_not_copied_to_the_gpu(plan: Plan, cuda: FakeCuda) -> None:
    with open_plan(replace(plan, cubins={}), None, "cuda:0") as pipe:
        session = pipe.session(S=5, D=3)
        session(x=np.ones(3, np.float32), at=0)
        copies = cuda.counts["copy_in"]
        session.reset()
        assert cuda.counts["copy_in"] == copies + 3  # h, small, count
        assert not session.state["kept"].any()


def test_memory_on_the_gpu_goes_with_the_session(plan: Plan, cuda: FakeCuda) -> None:
    with open_plan(replace(plan, cubins={}), None, "cuda:0") as pipe:
        session = pipe.session(S=5, D=3)
        session(x=np.ones(3, np.float32), at=0)
        before = cuda.leaks()
        dropped = pipe.session(S=50, D=9)
        assert cuda.leaks() != before
        del dropped
        gc.collect()
        assert cuda.leaks() == before


def test_arrays_on_the_gpu_stay_there(plan: Plan, cuda: FakeCuda, rng: np.random.Generator) -> None:
    """Calls on the GPU's own arrays are ordered with those before, on whatever stream."""
    with open_plan(replace(plan, cubins={}), None, "cuda:0") as pipe:
        session, model = pipe.session(S=5, D=3), Model(5, 3)
        for _ in range(6):
            x, at = given(rng, 5, 3)
            inputs = {"x": cuda.tensor(x), "at": cuda.tensor(np.array(at))}
            found = session(**inputs)
            wanted = model(x, at)
            np.testing.assert_allclose(read(found.sum), wanted[0], atol=1e-4)
            assert read(found.count) == wanted[1]
        np.testing.assert_array_equal(session.state["kept"], model.kept)


def test_plans_with_states_go_through_files(plan: Plan, tmp_path: Path) -> None:
    path = tmp_path / "remember.fused"
    plan_file.write(plan, path)
    with sf.load(path, device="cpu") as pipe:
        assert str(pipe.signature) == (
            "remember(x: f32[D], at: i64) -> (sum: f32[D], count: i64) state (kept: f32[S, D], "
            "h: f32[3], small: bf16[S], count: i64) where D in 2..=9, S in 1..=100"
        )
        assert pipe.session(S=2, D=2)(x=np.ones(2, np.float32), at=0).count == 1


@pytest.mark.parametrize(
    ("number", "changes", "words"),
    [
        (0, {"initial": "00"}, "state kept begins as '00', no f32"),
        (0, {"initial": "xy"}, "begins as 'xy'"),
        (1, {"array": "w/other"}, "state h reads the array 'w/other'"),
        (3, {"name": "h"}, "state 'h' is there twice"),
        (0, {"shape": ("S", "S")}, "state kept and its buffer differ in type"),
        (0, {"buffer": 0}, "state kept is a buffer with the role 'input'"),
    ],
)
def test_damaged_plans(plan: Plan, number: int, changes: dict[str, Any], words: str) -> None:
    (pipeline,) = plan.pipelines
    states = list(pipeline.states)
    states[number] = replace(states[number], **changes)
    with pytest.raises(sf.PlanError, match=words):
        plan_check.check(replace(plan, pipelines=(replace(pipeline, states=tuple(states)),)))


def test_two_threads_wait_for_each_other(plan: Plan) -> None:
    """A session that is being called can't be closed under the call."""
    with open_plan(plan, None, "cpu") as pipe:
        session = pipe.session(S=100, D=9)
        stop, errors = threading.Event(), list[Exception]()

        def call() -> None:
            while not stop.is_set():
                try:
                    session(x=np.ones(9, np.float32), at=3)
                except sf.InputError as error:
                    errors.append(error)
                    return

        threads = [threading.Thread(target=call) for _ in range(3)]
        for thread in threads:
            thread.start()
        session.close()
        stop.set()
        for thread in threads:
            thread.join()
        assert all("closed" in str(e) for e in errors)


def test_updates_wait_for_checks_and_not_for_each_other(plan: Plan) -> None:
    from stagefuse.runtime.device_prepared import DevicePreparer

    (pipeline,) = plan.pipelines
    (gpu,) = pipeline.gpu
    launches = DevicePreparer(pipeline, gpu).prepare({"S": 5, "D": 3}).launches
    before: list[set[int]] = []
    for launch in launches:
        before.append(set(launch.after).union(*(before[n] for n in launch.after)))
    reporting = {n for n, launch in enumerate(launches) if launch.plan.reports}
    guarded = {n for n, launch in enumerate(launches) if launch.plan.guarded}
    assert len(reporting) == 1 and len(guarded) == 3
    for number in guarded:
        assert reporting <= before[number] and not guarded & before[number]
