"""Kernels joined around matrix products: attention, convolution, results stored in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.fusion.fuse import partition
from stagefuse.compiler.fusion.join import inverse, join
from stagefuse.compiler.graph import Graph, Ref, View
from stagefuse.compiler.graph_builder import Builder
from stagefuse.dsl.dims import Expr, as_expr, const, floordiv, mod, sym
from stagefuse.dsl.dtypes import F32
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.types import TensorType

from .graph_run import both, graph_of, native

FACTS = Facts().with_ranges({"B": (0, 8), "T": (0, 512), "S": (0, 512)})


def tensor(*shape: Any) -> TensorType:
    return TensorType(F32, tuple(map(as_expr, shape)))


def product(b: Builder, x: Ref, y: Ref) -> Ref:
    """x [..., M, K] @ y [..., K, N] as the graph of `@` is: a sum of products."""
    *batch, m, k = b.type(x).shape
    n = b.type(y).shape[-1]
    domain = [*batch, m, n, k]
    left = b.view(x, domain, lambda *at: [*at[:-3], at[-3], at[-1]])
    right = b.view(y, domain, lambda *at: [*at[:-3], at[-1], at[-2]])
    return b.reduce("sum", b.map("mul", left, right), [len(domain) - 1])


def softmax(b: Builder, x: Ref) -> Ref:
    shape = b.type(x).shape
    last = len(shape) - 1

    def wide(ref: Ref) -> Ref:
        return b.view(ref, shape, lambda *at: at[:-1])

    e = b.map("exp", b.map("sub", x, wide(b.reduce("max", x, [last]))))
    return b.map("div", e, wide(b.reduce("sum", e, [last])))


def attention(heads: int = 3, width: int = 20, out: int = 20) -> Graph:
    b = Builder(FACTS)
    q = b.input("q", tensor(sym("B"), heads, sym("T"), width))
    k = b.input("k", tensor(sym("B"), heads, sym("S"), width))
    v = b.input("v", tensor(sym("B"), heads, sym("S"), out))
    scores = product(b, q, b.transpose(k, [0, 1, 3, 2]))
    scores = b.map("mul", scores, b.scalar(0.25, F32, b.type(scores).shape))
    mixed = product(b, softmax(b, scores), v)
    joined = b.reshape(b.transpose(mixed, [0, 2, 1, 3]), [sym("B"), sym("T"), heads * out])
    return graph_of(b, [joined])


def kinds(graph: Graph) -> list[str]:
    from stagefuse.compiler.patterns.contract import Rules, rebuild

    graph = rebuild(graph, Rules())
    return [g.kind for g in join(graph, partition(graph)).groups]


def test_attention_is_one_kernel_and_one_for_few_queries() -> None:
    assert kinds(attention()) == ["chain", "chain"]


@pytest.mark.parametrize("sizes", [(1, 1, 1), (2, 7, 5), (1, 37, 129), (3, 48, 48), (2, 100, 300),
                                   (1, 3, 0), (0, 4, 4), (2, 0, 3), (1, 300, 17)])  # fmt: skip
def test_attention(sizes: tuple[int, int, int], rng: np.random.Generator) -> None:
    batch, rows, keys = sizes
    graph = attention()
    feeds = {
        "q": rng.standard_normal((batch, 3, rows, 20)).astype(np.float32),
        "k": rng.standard_normal((batch, 3, keys, 20)).astype(np.float32),
        "v": rng.standard_normal((batch, 3, keys, 20)).astype(np.float32),
    }
    ((found, wanted),) = both(graph, feeds, {"B": batch, "T": rows, "S": keys})
    # |v| < 6; a score is a sum of 20 products, its relative error multiplies the exponential
    np.testing.assert_allclose(found, wanted, atol=6 * 64 * 2**-24)


@pytest.mark.parametrize("width, out", [(16, 16), (16, 48), (48, 16), (8, 32)])
def test_attention_of_heads_whose_tiles_differ(
    width: int, out: int, rng: np.random.Generator
) -> None:
    """Scores and values have panels of their own widths, and one number of rows a tile."""
    graph = attention(2, width, out)
    inputs = {
        name: rng.standard_normal((2, 2, size, wide), np.float32)
        for name, size, wide in (("q", 75, width), ("k", 53, width), ("v", 53, out))
    }
    ((found, wanted),) = both(graph, inputs, {"B": 2, "T": 75, "S": 53})
    # as above; a score is a sum of at most 48 products
    np.testing.assert_allclose(found, wanted, atol=6 * 3 * 64 * 2**-24)


def test_a_softmax_that_something_else_reads_is_stored() -> None:
    b = Builder(FACTS)
    q = b.input("q", tensor(sym("B"), sym("T"), 16))
    k = b.input("k", tensor(sym("B"), 16, 24))
    v = b.input("v", tensor(sym("B"), 24, 16))
    p = softmax(b, product(b, q, k))
    graph = graph_of(b, [product(b, p, v), b.map("exp", p)])
    assert "chain" not in kinds(graph)


@pytest.mark.parametrize("size", [7, 8, 19, 40])
def test_convolution_packs_its_patches_itself(size: int, rng: np.random.Generator) -> None:
    b = Builder(FACTS)
    x = b.input("x", tensor(sym("B"), 5, size, size))
    w = b.input("w", tensor(16, 5, 3, 3))
    rest = size - 2
    domain = [sym("B"), 16, rest, rest, 5, 3, 3]
    left = b.view(x, domain, lambda n, o, i, j, c, u, v: [n, c, i + u, j + v])
    right = b.view(w, domain, lambda n, o, i, j, c, u, v: [o, c, u, v])
    y = b.reduce("sum", b.map("mul", left, right), [4, 5, 6])
    graph = graph_of(b, [b.map("maximum", y, b.scalar(0.0, F32, b.type(y).shape))])
    assert kinds(graph) == ["contract"]
    feeds = {
        "x": rng.standard_normal((2, 5, size, size)).astype(np.float32),
        "w": rng.standard_normal((16, 5, 3, 3)).astype(np.float32),
    }
    ((found, wanted),) = both(graph, feeds, {"B": 2})
    np.testing.assert_allclose(found, wanted, atol=45 * 30 * 2**-24)


H, D = const(4), sym("D")
CASES: list[tuple[list[Expr], list[Expr], Callable[..., list[Expr]]]] = [
    ([sym("B"), sym("T")], [sym("T"), sym("B")], lambda i, j: [j, i]),
    ([sym("B"), H * D], [sym("B"), H, D], lambda i, j: [i, floordiv(j, D), mod(j, D)]),
    ([sym("B"), H, D], [sym("B"), H * D], lambda i, j, k: [i, j * D + k]),
    ([sym("T"), H * D], [H, sym("T"), D], lambda i, j: [floordiv(j, D), i, mod(j, D)]),
]


@pytest.mark.parametrize("case", range(len(CASES)))
def test_a_reordering_is_inverted(case: int) -> None:
    shape, source, place = CASES[case]
    names = tuple(f"i{n}" for n in range(len(shape)))
    facts = Facts().with_ranges({"B": (1, 9), "T": (1, 9), "D": (1, 9)})
    inside = facts.with_ranges({n: (0, s - 1) for n, s in zip(names, shape, strict=True)})
    indices = tuple(inside.simplify(e) for e in place(*map(sym, names)))
    at = inverse(View(names, indices), shape, source, facts)
    assert at is not None
    sizes = {"B": 3, "T": 5, "D": 2}
    extents = [e.evaluate(sizes) for e in source]
    for position in np.ndindex(*extents):
        there = [e.evaluate({**sizes, **{f"d{a}": p for a, p in enumerate(position)}}) for e in at]
        back = [e.evaluate({**sizes, **dict(zip(names, there, strict=True))}) for e in indices]
        assert tuple(back) == position


def test_what_repeats_or_leaves_out_is_not_inverted() -> None:
    facts = Facts().with_ranges({"B": (1, 9)})
    repeat = View(("i0", "i1"), (sym("i0"),))
    assert inverse(repeat, [sym("B"), const(2)], [sym("B")], facts) is None
    part = View(("i0",), (sym("i0") + 1,))
    assert inverse(part, [sym("B") - 1], [sym("B")], facts) is None


def test_a_slice_after_a_reordering_is_not_inverted() -> None:
    """Rows that the slice leaves out have no place in the result."""
    i = [sym(f"i{k}") for k in range(4)]
    view = View(("i0", "i1", "i2", "i3"), (i[0], i[3], i[1] * 6 + i[2]))
    source = tuple(map(const, (2, 3, 30)))
    facts = Facts()
    assert inverse(view, tuple(map(const, (2, 5, 6, 3))), source, facts) is not None
    assert inverse(view, tuple(map(const, (2, 5, 6, 2))), source, facts) is None


def test_one_loaded_attention_serves_every_size(rng: np.random.Generator) -> None:
    graph = attention(heads=2, width=8, out=33)
    pipe = native(graph, ("B", "T", "S"))
    for batch, rows, keys in ((1, 1, 512), (2, 512, 1), (1, 50, 49)):
        feeds = {
            "q": rng.standard_normal((batch, 2, rows, 8)).astype(np.float32),
            "k": rng.standard_normal((batch, 2, keys, 8)).astype(np.float32),
            "v": rng.standard_normal((batch, 2, keys, 33)).astype(np.float32),
        }
        sizes = {"B": batch, "T": rows, "S": keys}
        ((found, wanted),) = both(graph, feeds, sizes, pipe)
        np.testing.assert_allclose(found, wanted, atol=6 * 64 * 2**-24)
