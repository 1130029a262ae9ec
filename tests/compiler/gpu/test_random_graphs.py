"""Random graphs, fused for a GPU and run in the emulator, against the reference in float64."""

from __future__ import annotations

import numpy as np
import pytest

from stagefuse.compiler.driver import compile_graphs
from stagefuse.compiler.graph import Input
from stagefuse.dsl.dtypes import F32, F64, DType
from stagefuse.dsl.program import Pipeline

from ...fuzz.measured import check
from ..graph_run import NOWHERE, graph_of
from ..measured_graph import measured
from ..test_fused_graphs import SIZES, _Random, feeds_for
from .gpu_run import Emulated


@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_random_graphs_equal_the_reference(
    case: int, dtype: DType, program_seed: int, rng: np.random.Generator
) -> None:
    grown = _Random(program_seed, dtype)
    for _ in range(10):
        grown.step()
    graph = graph_of(grown.b, [r for r in grown.values[-4:] if grown.b.type(r).rank <= 4])
    inputs = tuple(
        (node.primitive.name, node.type, NOWHERE)
        for node in graph.nodes.values()
        if isinstance(node.primitive, Input)
    )
    results = tuple((f"r{i}", i) for i in range(len(graph.results)))
    signature = Pipeline("test", "", inputs, results, {}, (), graph.facts, ("M", "N"))
    plan = compile_graphs(
        [(signature, graph)], lambda *_: np.zeros(0), NOWHERE.source, targets=("a100",)
    )
    emulated = Emulated(plan, "sm_80")
    for sizes in SIZES:
        feeds = feeds_for(graph, sizes, rng)
        for found, wanted in zip(
            emulated(feeds, sizes), measured(graph, feeds, sizes), strict=True
        ):
            assert not check(found, wanted), sizes
