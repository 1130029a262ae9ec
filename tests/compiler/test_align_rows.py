"""Reshapes between two products and the softmax between them, moved in front of the first."""

from __future__ import annotations

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler.fusion.fuse import partition
from stagefuse.compiler.fusion.join import join
from stagefuse.compiler.graph_text import print_graph
from stagefuse.compiler.passes import pipeline_of
from stagefuse.compiler.run_passes import run_passes

from .ir_cases import of_text

HEAD = """
import nn

pipeline p(q: f32[2, 6, T, 8], k: f32[2, 3, S, 8], v: f32[2, 3, S, 5]) -> f32[2, 6, T, 5]
where T in 1..=9, S in 1..=99:
"""
GROUPED = """
    s = reshape(q, [2, 3, 2 * T, 8]) @ transpose(k, [0, 1, 3, 2])
    seen = iota(S)[None] <= iota(T)[:, None] + (S - T)
    p = nn.masked_softmax(reshape(s, [2, 6, T, S]), seen)
    reshape(reshape(p, [2, 3, 2 * T, S]) @ v, [2, 6, T, 5])
"""
TURNED = """
    s = transpose(reshape(q, [2, 3, 2 * T, 8]) @ transpose(k, [0, 1, 3, 2]), [1, 0, 2, 3])
    p = nn.softmax(s)
    reshape(transpose(p, [1, 0, 2, 3]) @ v, [2, 6, T, 5])
"""
FORMS = {"grouped": GROUPED, "turned": TURNED}


def expected(given: dict[str, np.ndarray], causal: bool) -> np.ndarray:
    q, k, v = (given[n].astype(np.float64) for n in "qkv")
    k, v = (np.repeat(x, 2, axis=1) for x in (k, v))
    scores = q @ k.swapaxes(2, 3)
    t, s = scores.shape[2:]
    if causal:
        keep = np.arange(s)[None] <= np.arange(t)[:, None] + (s - t)
        scores = np.where(keep, scores, -np.inf)
    e = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True) @ v


@pytest.mark.parametrize("name", FORMS)
def test_results_are_the_same_and_nothing_is_between(name: str, rng: np.random.Generator) -> None:
    graph = of_text(HEAD + FORMS[name]).passed()
    groups = join(graph, partition(graph)).groups
    assert [g.kind for g in groups if g.kind in ("chain", "row", "contract")] == ["chain"]
    pipe = sf.compile(HEAD + FORMS[name])
    for t, s in ((1, 1), (2, 7), (9, 99)):
        shapes = {"q": (2, 6, t, 8), "k": (2, 3, s, 8), "v": (2, 3, s, 5)}
        given = {n: rng.standard_normal(shape).astype(np.float32) for n, shape in shapes.items()}
        wanted = expected(given, name == "grouped")
        # f32: 12 roundings of scores whose terms sum to 40 at most, twice; sums of 99 values to 5
        lost = (2 * 12 * 40 + 99) * 2.0**-24 * 5
        np.testing.assert_allclose(pipe(**given), wanted, rtol=0, atol=lost)


OTHERS = {
    "read twice": GROUPED.replace("@ v, [2, 6, T, 5])", "@ v, [2, 6, T, 5]) + sum(p)"),
    "of heads that do not share rows": """
    s = q @ transpose(nn.repeat_heads(k, 2), [0, 1, 3, 2])
    p = reshape(nn.softmax(s), [2, 3, 2 * T, S])
    reshape(p @ v, [2, 6, T, 5])
""",
    "repeated": """
    s = sum(q, axis=(0, 1)) @ transpose(k[0, 0], [1, 0])
    p = broadcast_to(nn.softmax(s)[None, None], [2, 6, T, S])
    p @ nn.repeat_heads(v, 2)
""",
    "another axis": """
    s = q @ transpose(nn.repeat_heads(k, 2), [0, 1, 3, 2])
    p = reshape(nn.softmax(s, axis=2), [2, 3, 2 * T, S])
    reshape(p @ v, [2, 6, T, 5])
""",
}


@pytest.mark.parametrize("name", OTHERS)
def test_what_would_be_computed_again_stays(name: str) -> None:
    built = of_text(HEAD + OTHERS[name])
    apart = [p for p in pipeline_of(built.load) if p.name != "align_rows"]
    wanted, _ = run_passes(built.graph, apart)
    assert print_graph(built.passed()) == print_graph(wanted)
