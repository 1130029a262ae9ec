"""Random graphs, fused for a GPU and run in the emulator, against the reference in float64."""

from __future__ import annotations

import random

import numpy as np
import pytest

from stagefuse.compiler.driver import compile_graphs
from stagefuse.compiler.graph import Input
from stagefuse.compiler.interpret import evaluate
from stagefuse.dsl.dtypes import F32, F64, DType
from stagefuse.dsl.program import Pipeline

from ..graph_run import NOWHERE, graph_of
from ..test_fused_graphs import SIZES, _Random, feeds_for
from .gpu_run import Emulated


@pytest.mark.parametrize("case", range(6))
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_random_graphs_equal_the_reference(case: int, dtype: DType) -> None:
    seed = random.randrange(1 << 32)
    print("seed", seed)
    grown = _Random(seed, dtype)
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
    rng = np.random.default_rng(seed)
    unit = float(np.finfo(dtype.numpy).eps)
    for sizes in SIZES:
        feeds = feeds_for(graph, sizes, rng)
        wanted_of_all = evaluate(graph, feeds, sizes)
        for found, wanted in zip(emulated(feeds, sizes), wanted_of_all, strict=True):
            assert found.shape == wanted.shape
            # 10 steps, each a few units, sums of at most 64*6*64 terms below 1 in magnitude
            with np.errstate(invalid="ignore"):
                error = np.where(found == wanted, 0, np.abs(found - wanted))
            error = error / np.maximum(1, np.abs(wanted))
            assert not np.any(error > 4096 * unit), (sizes, np.nanmax(error))
            assert np.array_equal(np.isnan(found), np.isnan(wanted))
