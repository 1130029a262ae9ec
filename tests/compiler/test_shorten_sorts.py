"""The first elements of long sorts, from sorts of pieces: the same values from the same places."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.graph import Graph, Ref, Sort
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.graph_verify import verify_graph
from stagefuse.compiler.interpret import evaluate
from stagefuse.compiler.passes.shorten_sorts import SHORT, ShortenSorts, has_long_sorts
from stagefuse.compiler.proofs.bounds import Bounds
from stagefuse.compiler.proofs.value_ranges import is_position
from stagefuse.dsl.dims import const, sym
from stagefuse.dsl.dtypes import DTYPES
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.types import TensorType

from .gpu.gpu_run import Emulated, compiled


def first(dtype: str, shape: list[Any], axis: int, count: int, descending: bool) -> Graph:
    """The first elements of a sort, and where they came from; N is in 4100..=9000."""
    b = Builder(Facts(ranges={"N": (4100, 9000)}))
    sizes = [sym(d) if isinstance(d, str) else const(d) for d in shape]
    x = b.input("x", TensorType(DTYPES[dtype], tuple(sizes)))
    heads = [*sizes]
    heads[axis] = const(count)
    both = b.sort(x, axis, descending)
    b.graph.results = tuple(b.view(ref, heads, lambda *at: at) for ref in both)
    return b.graph


def sorts(graph: Graph) -> list[int | None]:
    """How long each sort's rows are."""
    found = [n for n in graph.nodes.values() if isinstance(n.primitive, Sort)]
    return [n.type.shape[n.primitive.axis].as_int() for n in found]  # type: ignore[union-attr]


def data(rng: np.random.Generator, dtype: str, shape: tuple[int, ...]) -> Any:
    """Numbers with many equal ones, and what is at the ends of the dtype."""
    kind = DTYPES[dtype].numpy
    x = rng.integers(-300, 300, shape)
    if not DTYPES[dtype].is_float:
        ends = (0, 1) if dtype == "bool" else (np.iinfo(kind).min, np.iinfo(kind).max)
        return np.where(rng.random(shape) < 0.3, rng.choice(ends, shape), x).astype(kind)
    odd = rng.choice([np.nan, np.inf, -np.inf, 0.0, -0.0], shape)
    return np.where(rng.random(shape) < 0.3, odd, x).astype(kind)


@pytest.mark.parametrize("descending", [False, True])
@pytest.mark.parametrize(
    "dtype", ["f32", "f64", "f16", "bf16", "f8e4m3", "f8e5m2", "i64", "i8", "u8", "bool"]
)
def test_of_every_dtype(dtype: str, descending: bool, rng: np.random.Generator) -> None:
    graph = first(dtype, [2, 4111], 1, 37, descending)
    after = ShortenSorts().run(graph)
    assert sorts(graph) == [4111] and sorts(after) == [2048, 3 * 37]
    assert verify_graph(after, Bounds()).open == []
    x = data(rng, dtype, (2, 4111))
    found, wanted = (evaluate(g, {"x": x}, {}) for g in (after, graph))
    for ours, theirs in zip(found, wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize(
    ("shape", "axis", "count", "lengths"),
    [
        ([40961], 0, 256, [2048, 2048, 3 * 256]),  # what comes first is itself long
        ([8192, 3], 0, 1, [2048, 4]),
        ([2, 4097, 2], 1, 256, [2048, 3 * 256]),
        ([9001], 0, 257, [4096, 3 * 257]),
        ([9001], 0, 1024, [4096, 3 * 1024]),
        ([9001], 0, 1025, [9001]),
        ([4096], 0, 5, [4096]),
        (["N"], 0, 9, [2048, None]),
    ],
)
def test_lengths(
    shape: list[Any], axis: int, count: int, lengths: list[int | None], rng: np.random.Generator
) -> None:
    graph = first("f32", shape, axis, count, True)
    after = ShortenSorts().run(graph)
    assert has_long_sorts(graph) == (shape != [SHORT]) and sorts(after) == lengths
    assert verify_graph(after, Bounds()).open == []
    for size in (4100, 6143, 6144) if "N" in shape else (0,):
        x = data(rng, "f32", tuple(size if d == "N" else d for d in shape))
        dims = {"N": size} if size else {}
        found, wanted = (evaluate(g, {"x": x}, dims) for g in (after, graph))
        for ours, theirs in zip(found, wanted, strict=True):
            np.testing.assert_array_equal(ours, theirs)


def test_positions_need_no_check() -> None:
    graph = ShortenSorts().run(first("f32", [5000], 0, 8, True))
    assert is_position(graph, graph.results[1], const(5000))


def test_what_reads_more_is_left_alone() -> None:
    graph = first("f32", [5000], 0, 8, True)
    (sort,) = (n for n in graph.nodes.values() if isinstance(n.primitive, Sort))
    graph.results = (*graph.results, Ref(sort.id, 0))
    assert ShortenSorts().run(graph) is graph and ShortenSorts().reasons(graph) == {}


def test_emulated(tmp_path: Path, rng: np.random.Generator) -> None:
    """A token among the likeliest of a vocabulary, the reader of positions included."""
    text = (
        "pipeline p(x: f32[2, 4111], names: i64[4111]) -> (v: f32[2, 5], n: i64[2, 5]):\n"
        "    v, i = topk(x, 5)\n    (v, names[i])\n"
    )
    plan = compiled(tmp_path / "p.pipe", text, ("sm_90a",))
    assert not plan.pipelines[0].sites
    x = rng.integers(0, 900, (2, 4111)).astype(np.float32)
    names = rng.permutation(4111)
    values, found = Emulated(plan, "sm_90a")({"x": x, "names": names}, {})
    order = np.argsort(-x, axis=1, kind="stable")[:, :5]
    np.testing.assert_array_equal(values, np.take_along_axis(x, order, 1))
    np.testing.assert_array_equal(found, names[order])
