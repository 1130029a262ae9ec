"""Runs a graph natively and by the reference, for tests."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stagefuse.compiler.driver import compile_graphs
from stagefuse.compiler.graph import Graph, Input, Ref
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.interpret import evaluate
from stagefuse.dsl.program import Pipeline
from stagefuse.dsl.source import Source, Span
from stagefuse.runtime.api import host_levels
from stagefuse.runtime.cpu_pipeline import CpuPipeline as Loaded

NOWHERE = Span(Source("test.pipe", "\n"), 0, 0)


def graph_of(builder: Builder, results: Sequence[Ref]) -> Graph:
    builder.graph.results = tuple(results)
    return builder.graph.live()


def native(
    graph: Graph,
    dims: Sequence[str],
    threads: int | None = None,
    levels: Sequence[str] | None = None,
) -> Loaded:
    """The graph compiled for this machine, or for some levels."""
    inputs = tuple(
        (node.primitive.name, node.type, NOWHERE)
        for node in graph.nodes.values()
        if isinstance(node.primitive, Input)
    )
    results = tuple((f"r{i}", i) for i in range(len(graph.results)))
    signature = Pipeline("test", "", inputs, results, {}, (), graph.facts, tuple(dims))
    graphs = [(signature, graph)]
    plan = compile_graphs(graphs, lambda *_: np.zeros(0), NOWHERE.source, levels or host_levels())
    return Loaded(plan, threads=threads)


def both(
    graph: Graph, feeds: Mapping[str, Any], sizes: Mapping[str, int], pipe: Loaded | None = None
) -> list[tuple[Any, Any]]:
    """Each result as (native, reference in float64)."""
    pipe = pipe or native(graph, tuple(sizes))
    found = pipe(**feeds)
    found = list(found) if isinstance(found, tuple) else [found]
    wanted = evaluate(graph, feeds, sizes)
    return list(zip(found, wanted, strict=True))
