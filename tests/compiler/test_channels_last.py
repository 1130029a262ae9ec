"""Convolutions as products of places by channels: the same values, and no order but the last."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.errors import VerifyError
from stagefuse.compiler.fusion.fuse import partition
from stagefuse.compiler.fusion.join import join
from stagefuse.compiler.gpu.compile import JOINS
from stagefuse.compiler.gpu.draft import SourceLowering
from stagefuse.compiler.gpu.matmul.lowering import lower_contract
from stagefuse.compiler.graph import Contract, Graph
from stagefuse.compiler.graph_verify import verify_graph
from stagefuse.compiler.interpret import evaluate
from stagefuse.compiler.kernel_text import parse_kernel, print_kernel
from stagefuse.compiler.kernel_verify import verify_kernel
from stagefuse.compiler.lower import Sites, finish
from stagefuse.compiler.passes import pipeline_of
from stagefuse.compiler.patterns.gathered import gathered_of
from stagefuse.compiler.proofs.bounds import Bounds
from stagefuse.compiler.run_passes import run_passes
from stagefuse.compiler.schedule import GPU, GPU_HALF
from stagefuse.dsl.dtypes import F64

from .ir_cases import of_text
from .test_convolutions import CASES, of


def moved(graph: Graph) -> Graph:
    """The graph after the passes for GPUs."""
    passes = pipeline_of(lambda *_: np.zeros(0), channels_last=True)
    return run_passes(graph, passes, Bounds())[0]


def products(graph: Graph) -> list[Any]:
    return [n for n in graph.nodes.values() if isinstance(n.primitive, Contract)]


@pytest.mark.parametrize(
    "case", [c for c in CASES if c.get("dtype") != F64], ids=lambda c: f"{c['source']}{c['kernel']}"
)
def test_windows_are_rows(case: dict[str, Any], rng: np.random.Generator) -> None:
    graph = of(case)
    before, after = run_passes(graph, pipeline_of(lambda *_: np.zeros(0)))[0], moved(graph)
    assert verify_graph(after, Bounds()).open == []
    (product,) = products(after)
    plain = all(k == 1 for k in case["kernel"]) and "stride" not in case
    assert plain or gathered_of(after, product) is not None
    group = next(g for g in join(after, partition(after), JOINS).groups if g.anchor == product.id)
    if not plain:
        assert product.operands[0] in group.packs  # its rows are stored nowhere
        low = SourceLowering(after, group, Sites(), GPU_HALF)
        kernel = finish(low, {"contract": lower_contract}).kernel
        assert verify_kernel(kernel, after.facts).open == []
        assert parse_kernel(print_kernel(kernel)) == kernel
    names = {s for s in case["source"] if isinstance(s, str)}
    sizes = {d: 2 if d == "B" else int(rng.integers(9, 30)) for d in names}
    shape = [sizes[s] if isinstance(s, str) else s for s in case["source"]]
    of_weights = (case["outer"], shape[1], *case["kernel"])
    given = {"x": shape, "w": of_weights, "bias": (case["outer"],)}
    feeds = {n: rng.standard_normal(s) for n, s in given.items()}
    for found, wanted in zip(
        evaluate(after, feeds, sizes), evaluate(before, feeds, sizes), strict=True
    ):
        np.testing.assert_allclose(found, wanted, rtol=1e-9, atol=1e-9)


NETWORK = """
import nn
pipeline p(x: f32[B, 3, 12, 12], a: f32[16, 3, 3, 3], b: f32[16, 16, 3, 3], c: f32[24, 32, 1, 1],
           g: f32[24, 8, 3, 3], d: f32[24, 1, 3, 3]) -> f32[B, 24]
where B in 1..=8:
    h = nn.max_pool(nn.relu(same(x, a, 1)), 3, stride=2, padding=1)
    h = concat([nn.relu(same(h, b, 1) + h), h], axis=1)
    h = nn.gelu(nn.convolve2d(h, c, 1, 1, 1))
    h = nn.relu(same(same(h, g, 3), d, 24))
    nn.global_avg_pool(h / (1.0 + sum(h, axis=1, keepdims=True)))

fn same(x: f32[B, C, H, W], w: f32[O, I, 3, 3], groups: int):
    nn.convolve2d(pad(x, [(0, 0), (0, 0), (1, 1), (1, 1)]), w, 1, 1, groups)
"""


def test_what_lies_between_convolutions_has_channels_last(rng: np.random.Generator) -> None:
    built = of_text(NETWORK)
    after = moved(built.graph)
    assert verify_graph(after, Bounds()).open == []
    found = join(after, partition(after), JOINS)
    stored = {root: after.type(root).shape for g in found.groups for root in g.roots}
    images = [s for s in stored.values() if len(s) == 4 and s[0].as_int() is None]
    assert images and not any(s[1].as_int() in (3, 16, 24, 32) for s in images)
    assert sum(isinstance(n.primitive, Contract) for n in after.nodes.values()) == 4
    shapes = {"x": (3, 3, 12, 12), "a": (16, 3, 3, 3), "b": (16, 16, 3, 3), "c": (24, 32, 1, 1),
              "g": (24, 8, 3, 3), "d": (24, 1, 3, 3)}  # fmt: skip
    feeds = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    (wanted,), (got,) = (evaluate(g, feeds, {"B": 3}) for g in (built.graph, after))
    np.testing.assert_allclose(got, wanted, rtol=1e-8, atol=1e-8)


def test_products_alone_stay_as_they_are() -> None:
    text = "pipeline p(x: f32[N, 64], w: f32[64, 64]) -> f32[N, 64]:\n    x @ w\n"
    graph = of_text(text).graph
    names = {p.name: p for p in pipeline_of(lambda *_: np.zeros(0), channels_last=True)}
    after = names["find_products"].run(graph)
    assert names["channels_last"].run(after) is after


def test_a_gathered_operand_is_verified() -> None:
    graph = moved(of(CASES[1]))
    group = next(g for g in join(graph, partition(graph), JOINS).groups if g.kind == "contract")
    low = SourceLowering(graph, group, Sites(), GPU)
    text = print_kernel(finish(low, {"contract": lower_contract}).kernel)
    assert " a_guard=[" in text
    head, rest = text.split(" a_guard=[", 1)
    wrong = parse_kernel(head + rest.split("]", 1)[1])
    with pytest.raises(VerifyError) as error:
        verify_kernel(wrong, graph.facts)
    assert error.value.invariant == 6
