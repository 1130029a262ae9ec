"""Positions that need no check: what is proved of integer tensors, and what is not."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler.build_graph import build_graph
from stagefuse.compiler.front import check_text
from stagefuse.compiler.graph import Graph
from stagefuse.compiler.proofs.value_ranges import is_position
from stagefuse.dsl.dims_text import parse
from stagefuse.dsl.source import Source


def graph_of(body: str, where: str = "where T in 1..=1000") -> Graph:
    text = f"pipeline p(x: f32[T], i: i64[T]) -> i64[T]\n{where}:\n    {body}\n"
    program, found, _ = check_text(Source("p.pipe", text), Path("."), {})
    assert not found, found
    return build_graph(program.pipelines[0])


PROVED = [
    ("iota(T)", "T"),
    ("maximum(minimum(i, T - 1), 0)", "T"),
    ("minimum(maximum(i, 0), T - 1)", "T"),
    ("clamp(i, 0, T - 1)", "T"),
    ("minimum(iota(T) + 1, T - 1)", "T"),
    ("i % T", "T"),
    ("i % 7", "7"),
    ("i64(clamp(x, 0.0, f32(T - 1)))", "T"),
    ("minimum(i64(clamp(floor(x), 0.0, f32(T - 1))) + 1, T - 1)", "T"),
    ("select(x > 0.0, iota(T), i % T)", "T"),
    ("flip(iota(T), axis=0)", "T"),
    ("minimum(i % 7 + iota(T), T - 1)", "T"),
]
OPEN = [
    ("i", "T"),
    ("iota(T) + 1", "T"),
    ("iota(T) - 1", "T"),
    ("minimum(i, T - 1)", "T"),
    ("maximum(i, 0)", "T"),
    ("clamp(i, 0, T)", "T"),
    ("abs(i)", "T"),
    ("i // 2", "T"),
    ("minimum(i + 1, T - 1)", "T"),  # i + 1 may wrap
    ("maximum(0, minimum(i + 1, T - 1) - 1)", "T - 1"),
    ("i64(clamp(x, 0.0, f32(T)))", "T"),
    ("select(x > 0.0, iota(T), i)", "T"),
    ("i % 7 + iota(T)", "T"),
    ("minimum(maximum(i, 0) + iota(T), T - 1)", "T"),  # the sum may wrap
]


@pytest.mark.parametrize(("body", "extent"), PROVED)
def test_is_proved_to_be_a_position(body: str, extent: str) -> None:
    graph = graph_of(body)
    assert is_position(graph, graph.results[0], parse(extent))


@pytest.mark.parametrize(("body", "extent"), OPEN)
def test_is_not_proved_to_be_a_position(body: str, extent: str) -> None:
    graph = graph_of(body)
    assert not is_position(graph, graph.results[0], parse(extent))


def test_nothing_is_a_position_in_what_may_be_empty() -> None:
    graph = graph_of("clamp(i, 0, T - 1)", "where T in 0..=1000")
    assert not is_position(graph, graph.results[0], parse("T"))


def test_a_limit_that_f32_does_not_hold_proves_nothing() -> None:
    graph = graph_of("i64(clamp(x, 0.0, f32(T - 1)))", "where T in 1..=100_000_000")
    assert not is_position(graph, graph.results[0], parse("T"))


def test_argmax_and_the_order_of_a_sort_are_positions() -> None:
    text = (
        "pipeline p(x: f32[B, T]) -> (a: i64[B], s: i64[B, 3])\n"
        "where B in 1..=9, T in 3..=1000:\n"
        "    argmax(x, axis=1), topk(x, 3)[1]\n"
    )
    program, found, _ = check_text(Source("p.pipe", text), Path("."), {})
    assert not found, found
    graph = build_graph(program.pipelines[0])
    assert all(is_position(graph, ref, parse("T")) for ref in graph.results)


@pytest.mark.parametrize("index", ["clamp(i, 0, T - 1)", "i % T", "i64(clamp(x, 0.0, f32(T - 1)))"])
def test_proved_positions_are_read_as_checked_ones(
    index: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    path = tmp_path / "p.pipe"
    path.write_text(
        f"pipeline p(x: f32[T], i: i64[T]) -> f32[T]\nwhere T in 1..=1000:\n    x[{index}]\n"
    )
    pipe = sf.compile(path)
    assert pipe._plan.sites == ()  # a call on a stream has nothing to wait for
    for size in (1, 2, 67, 1000):
        x = (rng.standard_normal(size) * 600 + 300).astype(np.float32)
        x[rng.integers(size)] = np.nan
        i = rng.integers(-(2**62), 2**62, size)
        at = {
            "clamp(i, 0, T - 1)": np.clip(i, 0, size - 1),
            "i % T": i % size,
        }.get(index, np.nan_to_num(np.clip(x, 0, size - 1)).astype(np.int64))
        np.testing.assert_array_equal(pipe(x=x, i=i), x[at])
