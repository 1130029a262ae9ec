"""States: every scenario on the CPU, in the emulator and by the interpreter equals NumPy's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler.build_graph import build_graph
from stagefuse.compiler.driver import check_file, compile_file
from stagefuse.compiler.graph import Update
from stagefuse.compiler.interpret import evaluate
from stagefuse.compiler.passes import pipeline_of
from stagefuse.compiler.run_passes import run_passes
from stagefuse.runtime.api import host_levels
from stagefuse.runtime.devices import open_plan
from stagefuse.runtime.pipeline import Pipeline

Array = np.ndarray[Any, Any]
State = dict[str, Any]
DEVICES = ("cpu", "emulator:sm_80", "emulator:sm_90a")
ULP = float(np.finfo(np.float32).eps)


@dataclass(frozen=True)
class Case:
    """A pipeline, the sizes of a session, calls, and what NumPy says of a call.

    `model` changes the states in place and gives the results; `error` bounds the results' error,
    in units of f32.
    """

    text: str
    sizes: dict[str, int]
    calls: Callable[[np.random.Generator], Iterator[dict[str, Any]]]
    model: Callable[..., Any]
    initial: State = field(default_factory=dict)
    error: float = 0.0


def rows(rng: np.random.Generator, *shape: int, dtype: Any = np.float32) -> Array:
    return rng.standard_normal(shape).astype(dtype)


# A cache of keys: several rows a call, at a position that is itself a state

APPEND = """\
pipeline append(x: f32[T, D]) -> f32[S, D]
where T in 0..=7, S in 7..=64:
    state cache: f32[2, S, D] = 0.0
    state length: i64 = 0
    for layer in 0..2:
        cache[layer, length : length + T] = x * f32(layer + 1)
    length = length + T
    cache[1]
"""


def append(state: State, x: Array) -> Array:
    n = int(state["length"])
    for layer in range(2):
        state["cache"][layer, n : n + len(x)] = x * np.float32(layer + 1)
    state["length"] += len(x)
    return np.array(state["cache"][1])


def appended(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for count in (3, 1, 0, 1, 7):
        yield {"x": rows(rng, count, 5)}


# A recurrence: the state is used and replaced whole

RECUR = """\
pipeline recur(x: f32[B, 3], u: f32[3, 4], w: f32[4, 4]) -> (y: f32[B, 4], first: f32[B]):
    state h: f32[B, 4] = 0.5
    before = h[:, 0]
    h = tanh(x @ u + h @ w)
    h, before
"""


def recur(state: State, x: Array, u: Array, w: Array) -> Any:
    before = np.array(state["h"][:, 0])
    state["h"] = np.tanh(x.astype(float) @ u + state["h"].astype(float) @ w).astype(np.float32)
    return state["h"], before


def recurred(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    u, w = rows(rng, 3, 4), rows(rng, 4, 4)
    for _ in range(3):
        yield {"x": rows(rng, 2, 3), "u": u, "w": w}


# Old and new values in one expression, so that the old one has to be copied

BOTH = """\
pipeline both(x: f32[N], at: i64) -> (sums: f32[S, N], again: f32[S, N], old: f32[S, N]):
    state kept: f32[S, N] = -1.5
    old = kept
    kept[at] = x
    middle = kept
    kept[-1] = x * 2.0
    old + kept, middle - old, old
"""


def both(state: State, x: Array, at: Any) -> Any:
    old = np.array(state["kept"])
    state["kept"][int(at)] = x
    middle = np.array(state["kept"])
    state["kept"][-1] = x * 2
    return old + state["kept"], middle - old, old


def both_called(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for at in (0, 2, -3):
        yield {"x": rows(rng, 6), "at": np.int64(at)}


# Positions of every kind

PLACES = """\
pipeline places(x: f32[N], ids: i32[K], y: f32[K, 3], n: i64) -> f32[4, N, 3]:
    state a: f32[4, N, 3] = 0.0
    state count: i64[5] = 7
    a[0, :, 1] = x
    a[1, ids] = y
    a[2, ::-2, 0] = 4.0
    a[3, n : n + 2, None, 1:] = a[0, n : n + 2, None, :2] + 1.0
    a[-1, ..., 0] = a[-1, ..., 0] * 0.5 + x
    count[n] = count[n] + 1
    count[1:4] = count[0:3]
    a
"""


def places(state: State, x: Array, ids: Array, y: Array, n: Any) -> Array:
    a, count, n = state["a"], state["count"], int(n)
    a[0, :, 1] = x
    for at, row in zip(ids, y, strict=True):  # of repeated ones the last holds
        a[1, at] = row
    a[2, ::-2, 0] = 4.0
    a[3, n : n + 2, 1:] = a[0, n : n + 2, :2] + np.float32(1)
    a[-1, ..., 0] = a[-1, ..., 0] * np.float32(0.5) + x
    count[n] = count[n] + 1
    count[1:4] = np.array(count[0:3])
    return np.array(a)


def placed(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for count in (4, 0, 1, 11):
        ids = rng.integers(-7, 7, count).astype(np.int32)
        n = np.int64(rng.integers(0, 5))
        yield {"x": rows(rng, 7), "ids": ids, "y": rows(rng, count, 3), "n": n}


# Every dtype, and states of no and of one element

KINDS = (
    ("f64", np.float64, -2.0), ("f16", np.float16, 0.25), ("bf16", ml_dtypes.bfloat16, 1.5),
    ("i8", np.int8, -3), ("u8", np.uint8, 200), ("i64", np.int64, -1 << 62),
    ("bool", np.bool_, True), ("f8e5m2", ml_dtypes.float8_e5m2, 2.0),
)  # fmt: skip
PARAMETERS = ", ".join(f"x{n}: {name}[3]" for n, (name, _, _) in enumerate(KINDS))
DTYPES = "\n    ".join([
    f"pipeline dtypes({PARAMETERS}, at: i64) -> i64:",
    *(f"state k{n}: {name}[S, 3] = {first}" for n, (name, _, first) in enumerate(KINDS)),
    *(f"state one{n}: {name}[] = {first}" for n, (name, _, first) in enumerate(KINDS)),
    "state none: f32[0, S] = 0.5",
    *(f"k{n}[at] = x{n}" for n in range(len(KINDS))),
    *(f"one{n} = x{n}[1]" for n in range(len(KINDS))),
    "at\n",
])  # fmt: skip


def dtypes(state: State, at: Any, **x: Array) -> Any:
    for n in range(len(KINDS)):
        state[f"k{n}"][int(at)] = x[f"x{n}"]
        state[f"one{n}"] = x[f"x{n}"][1]
    return at


def of_dtypes(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for at in (0, 4, -1):
        given = {f"x{n}": (rng.standard_normal(3) * 9).astype(kind)
                 for n, (_, kind, _) in enumerate(KINDS)}  # fmt: skip
        yield {**given, "at": np.int64(at)}


# A scan that carries a state, with updates of what its steps compute

STEPS = """\
fn put(table: f32[K, D], at: i64, row: f32[D]) -> f32[K, D]:
    table[at] = row
    table

pipeline steps(x: f32[T, 3], ids: i64[T]) -> (y: f32[T, 4, 3], seen: i64[T]):
    state table: f32[4, 3] = 0.0
    state count: i64 = 0
    scan t in 0..T with table = table, n = count:
        before = table[0]
        table = put(table, ids[t], x[t])
        local = x[t] * 2.0
        local[1] = before[1]
        table[-1] = local
        n = n + 1
        y[t] = table
        seen[t] = n
    count = n
    y, seen
"""


def steps(state: State, x: Array, ids: Array) -> Any:
    y, seen = np.zeros((len(x), 4, 3), np.float32), np.zeros(len(x), np.int64)
    table = state["table"]
    for t, (row, at) in enumerate(zip(x, ids, strict=True)):
        before = np.array(table[0])
        table[at] = row
        local = row * np.float32(2)
        local[1] = before[1]
        table[-1] = local
        state["count"] += 1
        y[t], seen[t] = table, state["count"]
    return y, seen


def stepped(rng: np.random.Generator) -> Iterator[dict[str, Any]]:
    for count in (3, 0, 1, 5):
        yield {"x": rows(rng, count, 3), "ids": rng.integers(-4, 4, count)}


CASES = {
    "steps": Case(STEPS, {}, stepped, steps,
                  {"table": np.zeros((4, 3), np.float32), "count": np.int64(0)}),
    "append": Case(APPEND, {"S": 13, "D": 5}, appended, append,
                   {"cache": np.zeros((2, 13, 5), np.float32), "length": np.int64(0)}),
    # a sum of 7 products, and tanh of at most 2 units
    "recur": Case(RECUR, {"B": 2}, recurred, recur,
                  {"h": np.full((2, 4), 0.5, np.float32)}, error=64),
    "both": Case(BOTH, {"S": 3, "N": 6}, both_called, both,
                 {"kept": np.full((3, 6), -1.5, np.float32)}),
    "places": Case(PLACES, {"N": 7}, placed, places,
                   {"a": np.zeros((4, 7, 3), np.float32), "count": np.full(5, 7)}),
    "dtypes": Case(DTYPES, {"S": 5}, of_dtypes, dtypes,
                   {**{f"k{n}": np.full((5, 3), v, kind) for n, (_, kind, v) in enumerate(KINDS)},
                    **{f"one{n}": kind(v) for n, (_, kind, v) in enumerate(KINDS)},
                    "none": np.zeros((0, 5), np.float32)}),
}  # fmt: skip


@pytest.fixture(scope="module")
def plans(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    made: dict[str, Any] = {}
    folder = tmp_path_factory.mktemp("sessions")

    def plan(text: str) -> Any:
        if text not in made:
            path = folder / f"s{len(made)}.pipe"
            path.write_text(text)
            made[text] = compile_file(path, targets=("cpu", "a100", "h100"),
                                      levels=host_levels())  # fmt: skip
        return made[text]

    return plan


def copied(state: State) -> State:
    return {name: np.array(value) for name, value in state.items()}


def same(found: Any, wanted: Any, error: float) -> None:
    items = (
        list(zip(found, wanted, strict=True)) if isinstance(wanted, tuple) else [(found, wanted)]
    )
    for ours, theirs in items:
        if error:
            np.testing.assert_allclose(ours, theirs, rtol=0, atol=error * ULP)
        else:
            np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("name", CASES)
def test_a_session_equals_numpy(
    name: str, device: str, plans: Callable[[str], Any], rng: np.random.Generator
) -> None:
    case = CASES[name]
    with open_plan(plans(case.text), None, device) as pipe:
        session, wanted = pipe.session(**case.sizes), copied(case.initial)
        for inputs in case.calls(rng):
            found = session(**inputs)
            same(found, case.model(wanted, **inputs), case.error)
            for state, value in session.snapshot().items():
                same(value, wanted[state], case.error)
            if case.error:  # errors do not add up over calls
                wanted = session.snapshot()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("passed", [False, True])
def test_the_interpreter_equals_numpy(
    name: str, passed: bool, tmp_path: Path, rng: np.random.Generator
) -> None:
    case = CASES[name]
    path = tmp_path / "case.pipe"
    path.write_text(case.text)
    program, problems = check_file(path)
    assert not problems
    (pipeline,) = program.pipelines
    graph = build_graph(pipeline)
    if passed:
        graph, _ = run_passes(graph, pipeline_of(lambda *_: None))
    kept = [graph.nodes[r.node].primitive for r in graph.results[len(pipeline.results) :]]
    names = [p.state for p in kept if isinstance(p, Update)]
    state, wanted = copied(case.initial), copied(case.initial)
    for inputs in case.calls(rng):
        dims = dict(case.sizes)
        for argument, type, _ in pipeline.inputs:
            for size, extent in zip(type.shape, np.shape(inputs[argument]), strict=True):
                if size.as_symbol():
                    dims[str(size)] = extent
        found = evaluate(graph, inputs, dims, wide=False, states=state)
        model = case.model(wanted, **inputs)
        model = model if isinstance(model, tuple) else (model,)
        same(tuple(found[: len(model)]), model, case.error)
        new = dict(zip(names, found[len(model) :], strict=True))
        for key, value in new.items():
            same(value, wanted[key], case.error)
            state[key] = wanted[key] = np.asarray(value).astype(np.asarray(wanted[key]).dtype)


# A call that fails

LATE = """\
pipeline late(x: f32[N], at: i64, ids: i64[K], table: i64[9]) -> (i64[K], f32[N]):
    state kept: f32[S, N] = 0.0
    state order: i64[S] = 3
    state length: i64 = 0
    kept[length] = x
    order[length] = at
    found = table[order[ids]]          # known only behind an update
    length = length + 1
    found, kept[at]
"""


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize(
    ("length", "at", "ids", "line"), [(5, 0, 0, 5), (0, 5, 1, 9), (0, 4, 6, 7), (0, 9, 0, 7)]
)
def test_a_call_that_fails_leaves_the_states_as_they_were(
    device: str, length: int, at: int, ids: int, line: int,
    plans: Callable[[str], Any], rng: np.random.Generator,
) -> None:  # fmt: skip
    with open_plan(plans(LATE), None, device) as pipe:
        session = pipe.session(S=5, N=4)
        table, fine = np.arange(9), {"at": np.int64(1), "ids": np.array([1, 0])}
        before = {"kept": rows(rng, 5, 4), "order": np.array([3, 4, 1, 0, 2]),
                  "length": np.int64(length)}  # fmt: skip
        session.restore(before)
        with pytest.raises(sf.IndexOutOfRange) as caught:
            session(x=rows(rng, 4), at=np.int64(at), ids=np.array([ids]), table=table)
        assert caught.value.line == line or (at == 9 and caught.value.line == 9)
        for name, value in session.snapshot().items():
            np.testing.assert_array_equal(value, before[name])
        session.restore({**before, "length": np.int64(2)})
        x = rows(rng, 4)
        found, kept = session(x=x, **fine, table=table)
        np.testing.assert_array_equal(found, table[[4, 3]])
        np.testing.assert_array_equal(kept, before["kept"][1])
        np.testing.assert_array_equal(session.state["kept"][2], x)
        assert session.state["length"] == 3


# What is moved


def steps_of(pipe: Pipeline) -> list[str]:
    return [f"{step.label} {step.report['bytes']}" for step in pipe._plan.steps]


def test_an_append_moves_what_it_writes_and_no_more(plans: Callable[[str], Any]) -> None:
    with open_plan(plans(APPEND), None, "cpu") as pipe:
        updates = [s for s in pipe._plan.steps if s.label == "append.update"]
        assert len(updates) == 2 and all("S" not in s.report["bytes"] for s in updates)
        roles = [[pipe._plan.buffers[b].role for b in s.buffers] for s in updates]
        assert all("state" in r and r.count("arena") <= 1 for r in roles), roles


def test_only_what_is_read_again_is_copied(plans: Callable[[str], Any]) -> None:
    whole = "8*N*S"  # a copy reads and writes
    with open_plan(plans(BOTH), None, "cpu") as pipe:
        assert sum(s.report["bytes"] == whole for s in pipe._plan.steps) <= 3, steps_of(pipe)


@pytest.mark.parametrize(("lines", "shape"), [
    (["kept[0] = x", "kept[1]"], "3"),
    (["kept = kept * 2.0 + x", "x * 2.0"], "3"),
    (["y = kept[1] + x", "kept[1] = x", "y"], "3"),
    (["kept[0:2] = kept[0:2] + x", "kept"], "S, 3"),
])  # fmt: skip
def test_updates_that_need_no_copy(lines: Sequence[str], shape: str, tmp_path: Path) -> None:
    path = tmp_path / "p.pipe"
    body = "\n    ".join(["state kept: f32[S, 3] = 0.0", *lines])
    path.write_text(f"pipeline p(x: f32[3]) -> f32[{shape}]\nwhere S in 2..=9:\n    {body}\n")
    plan = compile_file(path, levels=host_levels())
    (pipeline,) = plan.pipelines
    for step in pipeline.steps:
        roles = [pipeline.buffers[b].role for b in step.buffers]
        assert "state" not in roles or "arena" not in roles or len(roles) > 2, step
    assert not [b for b in pipeline.buffers if b.role == "arena" and "S" in b.shape]
