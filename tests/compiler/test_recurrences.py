"""Recurrences: graph, passes, kernels and plans against their meaning in NumPy."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import stagefuse as sf
from stagefuse import tables
from stagefuse.compiler.build_graph import build_graph
from stagefuse.compiler.driver import check_file, compile_file
from stagefuse.compiler.errors import PlanError, VerifyError
from stagefuse.compiler.graph import Carried, Constant, Contract, Graph, Recurrence
from stagefuse.compiler.graph_text import parse_graph, print_graph, same_graph
from stagefuse.compiler.graph_verify import verify_graph
from stagefuse.compiler.interpret import evaluate
from stagefuse.compiler.passes import pipeline_of
from stagefuse.compiler.plan import LoopPlan, read, write
from stagefuse.compiler.plan_check import check as check_plan
from stagefuse.compiler.recurrence import symbols_of
from stagefuse.compiler.run_passes import bounds_of, run_passes
from stagefuse.dsl.program import Pipeline
from stagefuse.runtime.errors import IndexOutOfRange, OutOfMemory

from .ir_cases import no_weights, with_node
from .recurrences import CASES, SIZES, Case


def test_bytes_of_constants_are_not_kept() -> None:
    data = np.arange(999.0).tobytes()
    before = sys.getrefcount(data)
    assert symbols_of(Constant(data)) == frozenset()
    assert sys.getrefcount(data) == before


def checked(source: str, folder: Path) -> tuple[Path, Pipeline]:
    path = folder / "scan.pipe"
    path.write_text(source)
    program, found = check_file(path)
    assert not found, found
    return path, program.pipelines[0]


def passed(pipeline: Pipeline) -> Graph:
    return run_passes(build_graph(pipeline), pipeline_of(no_weights), bounds_of(pipeline))[0]


def of(source: str, folder: Path) -> Graph:
    return passed(checked(source, folder)[1])


def several(found: Any) -> tuple[Any, ...]:
    return found if isinstance(found, tuple) else (found,)


def compare(case: Case, pipe: Any, pipeline: Pipeline, rng: np.random.Generator) -> None:
    for sizes in SIZES:
        if min(sizes["T"], sizes["D"], sizes["B"]) < case.least:
            continue
        inputs = case.inputs(pipeline, sizes, rng)
        wanted = case.meaning(*(v.astype(np.float64 if v.dtype.kind == "f" else np.int64)
                                for v in inputs.values()))  # fmt: skip
        for found, expected in zip(several(pipe(sizes, inputs)), wanted, strict=True):
            assert np.shape(found) == np.shape(expected)
            # seven steps of products of at most 17 elements, in f32
            np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_graphs_mean_what_numpy_computes(
    case: Case, tmp_path: Path, rng: np.random.Generator
) -> None:
    _, pipeline = checked(case.source, tmp_path)
    before, after = build_graph(pipeline), passed(pipeline)
    for graph in (before, after):
        assert verify_graph(graph, bounds_of(pipeline)).open == []
        assert same_graph(parse_graph(print_graph(graph, data=True)), graph)

        def run(sizes: Any, inputs: Any, graph: Graph = graph) -> list[Any]:
            return evaluate(graph, inputs, {d: sizes[d] for d in pipeline.dims})

        compare(case, lambda s, i, r=run: tuple(r(s, i)), pipeline, rng)  # type: ignore[misc]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_native_code_computes_what_numpy_does(
    case: Case, threads: int, tmp_path: Path, rng: np.random.Generator
) -> None:
    path, pipeline = checked(case.source, tmp_path)
    pipe = sf.compile(path, threads=threads)
    for _ in range(2):  # a loop starts anew at every call
        compare(case, lambda sizes, inputs: pipe(**inputs), pipeline, rng)


@pytest.mark.parametrize(
    ("case", "target"),
    [(case, "h100") for case in CASES] + [(CASES[0], "a100"), (CASES[0], "l40")],
    ids=lambda v: v if isinstance(v, str) else v.name,
)
def test_ptx_computes_what_numpy_does(
    case: Case, target: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    path, pipeline = checked(case.source, tmp_path)
    pipe = sf.compile(path, device="emulator", target=target)
    compare(case, lambda sizes, inputs: pipe(**inputs), pipeline, rng)


def primitives(graph: Graph, kind: type) -> list[Any]:
    return [n.primitive for n in graph.nodes.values() if isinstance(n.primitive, kind)]


def recurrence(graph: Graph) -> Any:
    (found,) = [n for n in graph.nodes.values() if isinstance(n.primitive, Recurrence)]
    return found


def test_the_product_by_the_input_is_one_for_all_steps(tmp_path: Path) -> None:
    graph = of(CASES[0].source, tmp_path)
    inside, outside = sorted(primitives(graph, Contract), key=lambda c: len(c.rows))
    assert len(outside.rows) == 2 and "step1" not in outside.base.symbols()
    assert len(inside.rows) == 1 and "step1" in inside.base.symbols()


AFTER = """
pipeline p(x: f32[T, 8], w: f32[8, 8], v: f32[8, 99]) -> f32[T, 99]:
    scan t in 0..T with h = zeros([8], f32):
        h = tanh(x[t] + h @ w)
        y[t] = h @ v
    y
"""


def test_what_no_later_step_needs_is_computed_after_the_steps(tmp_path: Path) -> None:
    graph = of(AFTER, tmp_path)
    assert recurrence(graph).types[1].shape[1:] == graph.nodes[1].type.shape[1:]  # h, not y
    assert max(len(c.rows) for c in primitives(graph, Contract)) == 1


def test_a_large_state_is_not_gathered_for_a_small_result(tmp_path: Path) -> None:
    source = """
pipeline p(x: f32[T, 8], q: f32[T, 64], k: f32[T, 64]) -> f32[T, 8]:
    scan t in 0..T with s = zeros([64, 8], f32):
        s = 0.9 * s + k[t][:, None] * x[t]
        y[t] = q[t] @ s
    y
"""
    assert [t.rank for t in recurrence(of(source, tmp_path)).types] == [3, 2]


def test_what_is_carried_for_nothing_is_dropped(tmp_path: Path) -> None:
    graph = of(next(c for c in CASES if c.name == "sides").source, tmp_path)
    assert len(primitives(graph, Carried)) == 1


def test_a_scan_without_anything_carried_is_no_recurrence(tmp_path: Path) -> None:
    source = """
pipeline p(x: f32[T, D]) -> (f32[T, D], f32[T]):
    scan t in 0..T:
        y[t] = x[t] * 2.0
        z[T - 1 - t] = sum(x[t])
    y, z
"""
    path, pipeline = checked(source, tmp_path)
    assert primitives(passed(pipeline), Recurrence) == []
    x = np.arange(6, dtype=np.float32).reshape(3, 2)
    y, z = sf.compile(path)(x=x)
    np.testing.assert_array_equal(y, 2 * x)
    np.testing.assert_array_equal(z, x.sum(1)[::-1])


def broken(graph: Graph, invariant: int) -> None:
    with pytest.raises(VerifyError) as found:
        verify_graph(graph)
    assert found.value.invariant == invariant


def test_the_verifier_knows_what_a_recurrence_is(tmp_path: Path) -> None:
    graph = of(CASES[0].source, tmp_path)
    end = recurrence(graph)
    held = [n for n in graph.nodes.values() if isinstance(n.primitive, Carried)]
    wrong_order = (*end.operands[1::-1], *end.operands[2:])
    broken(with_node(graph, end.id, operands=wrong_order), 10)
    swapped = replace(held[0].primitive, step="step9")
    broken(with_node(graph, held[0].id, primitive=swapped), 10)
    broken(with_node(graph, end.id, operands=end.operands[:-1]), 4)
    inside = with_node(graph, end.id)
    inside.results = (end.operands[2],)
    broken(inside, 10)


def test_kernels_of_a_step_stand_in_a_loop_of_the_plan(tmp_path: Path) -> None:
    path, _ = checked(CASES[0].source, tmp_path)
    plan = compile_file(path, targets=("cpu", "h100"), levels=("v3",))
    write(plan, tmp_path / "p.fused")
    again = read(tmp_path / "p.fused").pipelines[0]
    assert again == plan.pipelines[0]
    (loop,) = again.loops
    assert (loop.step, loop.count) == ("step1", "T")
    using = [n for n, step in enumerate(again.steps) if "step1" in step.dims]
    assert using == list(range(loop.first, loop.end))
    assert again.gpu[0].loops[0].count == "T"


@pytest.mark.parametrize(
    ("loops", "words"),
    [
        ((LoopPlan("T", "T", 0, 1),), "no name of its own"),
        ((LoopPlan("s", "Q", 0, 1),), "unknown dim 'Q'"),
        ((LoopPlan("s", "T", 1, 1),), "runs from 1 to 1"),
        ((LoopPlan("s", "T", 0, 2), LoopPlan("u", "T", 1, 3)), "neither inside"),
        ((LoopPlan("s", "T", 0, 2), LoopPlan("s", "T", 0, 1)), "neither inside"),
        ((), "unknown dim 'step1'"),
    ],
)
def test_a_plan_with_wrong_loops_is_refused(
    loops: tuple[LoopPlan, ...], words: str, tmp_path: Path
) -> None:
    path, _ = checked(CASES[0].source, tmp_path)
    plan = compile_file(path, levels=("v3",))
    wrong = replace(plan.pipelines[0], loops=loops)
    with pytest.raises(PlanError, match=words):
        check_plan(replace(plan, pipelines=(wrong,)))


GATHERS = """
pipeline p(ids: i64[T], x: f32[N]) -> (f32, i64):
    scan t in 0..T with s = 0.0, n = 0:
        s = s + x[ids[t]] * f32(n)
        n = n + 1
    s, n
"""


def test_an_id_out_of_range_in_a_step_is_reported_and_the_next_call_is_right(
    tmp_path: Path,
) -> None:
    path, _ = checked(GATHERS, tmp_path)
    pipe = sf.compile(path)
    x = np.ones(3, np.float32)
    with pytest.raises(IndexOutOfRange, match="7"):
        pipe(ids=np.array([0, 1, 7, 0]), x=x)
    s, n = pipe(ids=np.array([0, 1, 2, 0]), x=x)
    assert (float(s), int(n)) == (6.0, 4)


def test_a_profile_shows_every_step(tmp_path: Path) -> None:
    import json

    path, _ = checked(next(c for c in CASES if c.name == "nested").source, tmp_path)
    pipe = sf.compile(path)
    x = np.ones((3, 4), np.float32)
    events = json.loads(pipe.profile(tmp_path / "t.json", calls=1, x=x).read_text())["traceEvents"]
    names = [e["name"] for e in events if e.get("cat") == "step"]
    assert max(map(names.count, names)) >= 12


def test_more_steps_than_a_graph_should_hold_are_refused_on_a_gpu(tmp_path: Path) -> None:
    """Where steps are launches: one kernel may have any number."""
    text = """
pipeline large(x: f32[T]) -> f32[1000000]:
    scan t in 0..T with s = zeros([1000000], f32):
        s = 0.5 * concat([s[1:], s[:1]]) + x[t]
    s
"""
    path, _ = checked(text, tmp_path)
    pipe = sf.compile(path, device="emulator")
    with pytest.raises(OutOfMemory, match="launches"):
        pipe(x=np.zeros(1 << 17, np.float32))


def test_explain_says_how_often_a_kernel_runs(tmp_path: Path) -> None:
    path, _ = checked(CASES[0].source, tmp_path)
    report = sf.compile(path).report()
    turns = [r.turns for r in tables.rows(report, {"T": 5, "B": 1, "D": 1, "H": 1})]
    assert turns.count("T") == 2
    totals = [tables.rows(report, {"T": t, "B": 2, "D": 3, "H": 4}) for t in (3, 6)]
    (once, twice) = (sum(r.flops or 0 for r in rows) for rows in totals)
    assert twice == 2 * once
