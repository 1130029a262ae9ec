"""Random graphs, fused and compiled, against the reference interpreter in float64."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest

from stagefuse.compiler.graph import Ref
from stagefuse.compiler.graph_builder import Builder
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.dtypes import F32, F64, I64, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.types import TensorType

from ..fuzz.measured import check
from .graph_run import both, graph_of, native
from .measured_graph import measured

SIZES = ({"M": 1, "N": 1}, {"M": 0, "N": 3}, {"M": 5, "N": 7}, {"M": 33, "N": 50})
UNARY = ("neg", "abs", "tanh", "sigmoid", "exp", "erf", "floor", "sqrt")
BINARY = ("add", "sub", "mul", "maximum", "minimum")


class _Random:
    """Grows a graph over two named sizes; values stay moderate so that errors stay bounded."""

    def __init__(self, seed: int, dtype: DType) -> None:
        self.rng = random.Random(seed)
        self.dtype = dtype
        self.b = Builder(Facts({"M": (0, 64), "N": (0, 64)}))
        self.shapes: list[tuple[Expr, ...]] = [
            (sym("M"), sym("N")), (sym("N"), sym("M")), (sym("M"), const(6), sym("N")),
            (sym("N"),), (sym("M"), const(1)),
        ]  # fmt: skip
        self.values = [
            self.b.input(f"x{i}", TensorType(dtype, s)) for i, s in enumerate(self.shapes)
        ]

    def pick(self) -> Ref:
        return self.rng.choice(self.values[-6:] if self.rng.random() < 0.7 else self.values)

    def bounded(self, x: Ref) -> Ref:
        return self.b.map("tanh", x)

    def step(self) -> None:
        b, rng = self.b, self.rng
        x = self.pick()
        type = b.type(x)
        kind = rng.randrange(9)
        if kind <= 1:
            fn = rng.choice(UNARY)
            if fn == "exp":
                x = self.bounded(x)
            if fn in ("sqrt", "floor"):
                x = b.map("abs", x) if fn == "sqrt" else x
                fn = "sqrt" if fn == "sqrt" else "neg"
            made = b.map(fn, x)
        elif kind <= 3:
            y = self.pick()
            small, large = sorted((x, y), key=lambda r: b.type(r).rank)
            if not self.broadcasts(b.type(small).shape, b.type(large).shape):
                small = large
            small = b.broadcast(small, b.type(large).shape)
            made = b.map(rng.choice(BINARY), large, small)
        elif kind <= 5 and type.rank:
            axes = sorted(rng.sample(range(type.rank), rng.randint(1, type.rank)))
            reduced = b.reduce(rng.choice(("sum", "max", "min")), self.bounded(x), axes)
            kept = iter(b.type(reduced).shape)
            shape = [const(1) if i in axes else next(kept) for i in range(type.rank)]
            made = b.broadcast(b.reshape(reduced, shape), type.shape)
            made = reduced if rng.random() < 0.3 else made
            if any(d.as_int() is None for d in type.shape):
                made = b.map("tanh", made)  # of nothing, max is minus infinity
        elif kind == 6 and type.rank > 1:
            perm = list(range(type.rank))
            rng.shuffle(perm)
            made = b.transpose(x, perm)
        elif kind == 7 and type.rank:
            axis = rng.randrange(type.rank)
            shape = list(type.shape)
            shape[axis] = shape[axis] + 2
            made = b.view(
                x, shape, lambda *i: [e - (n == axis) for n, e in enumerate(i)],
                lambda *i: [i[axis] - 1, type.shape[axis] - i[axis]], 0.5,
            )  # fmt: skip
        elif type.rank == 2:
            made = self.product(x, type)
        else:
            made = b.concat([x, x], 0) if type.rank else x
        self.values.append(made)

    def product(self, x: Ref, type: TensorType) -> Ref:
        b = self.b
        m, n = type.shape
        shape = (m, m, n)
        left = b.view(self.bounded(x), shape, lambda i, j, k: (i, k))
        right = b.view(self.bounded(x), shape, lambda i, j, k: (j, k))
        return self.bounded(b.reduce("sum", b.map("mul", left, right), (2,)))

    @staticmethod
    def broadcasts(small: tuple[Expr, ...], large: tuple[Expr, ...]) -> bool:
        tail = large[len(large) - len(small) :]
        return all(a == b or a.as_int() == 1 for a, b in zip(small, tail, strict=True))


def feeds_for(graph: Any, sizes: dict[str, int], rng: np.random.Generator) -> dict[str, Any]:
    found = {}
    for node in graph.nodes.values():
        if type(node.primitive).__name__ == "Input":
            shape = [d.evaluate(sizes) for d in node.type.shape]
            values = rng.standard_normal(shape) * 2
            found[node.primitive.name] = values.astype(node.type.dtype.numpy)
    return found


@pytest.mark.parametrize("case", range(24))
@pytest.mark.parametrize("dtype", [F32, F64], ids=str)
def test_random_graphs_equal_the_reference(
    case: int, dtype: DType, program_seed: int, rng: np.random.Generator
) -> None:
    grown = _Random(program_seed, dtype)
    for _ in range(10):
        grown.step()
    results = [r for r in grown.values[-4:] if grown.b.type(r).rank <= 4]
    graph = graph_of(grown.b, results)
    pipe = native(graph, ("M", "N"))
    for sizes in SIZES:
        feeds = feeds_for(graph, sizes, rng)
        given = pipe(**feeds)
        outs = given if isinstance(given, tuple) else (given,)
        for found, wanted in zip(outs, measured(graph, feeds, sizes), strict=True):
            assert not check(found, wanted), sizes


def test_gather_of_a_table_and_a_count(rng: np.random.Generator) -> None:
    b = Builder(Facts({"M": (0, 64), "N": (0, 64)}))
    table = b.input("table", TensorType(F32, (sym("M"), const(5))))
    ids = b.input("ids", TensorType(I64, (sym("N"),)))
    from stagefuse.compiler.graph import Indirect

    rows = b.gather(
        table, [ids], (sym("N"), const(5)), ("i0", "i1"), (Indirect(1, (sym("i0"),)), sym("i1"))
    )
    graph = graph_of(b, [rows, b.reduce("sum", rows, (0, 1))])
    feeds = {"table": rng.standard_normal((7, 5)).astype("f4"),
             "ids": rng.integers(-7, 7, 11)}  # fmt: skip
    for found, wanted in both(graph, feeds, {"M": 7, "N": 11}):
        np.testing.assert_allclose(found, wanted, rtol=1e-5)


def test_scatter_into_nothing_is_reported() -> None:
    from stagefuse.runtime.errors import IndexOutOfRange

    b = Builder(Facts({n: (0, 64) for n in "MNK"}))
    base = b.input("base", TensorType(F32, (sym("M"), sym("N"))))
    ids = b.input("ids", TensorType(I64, (sym("K"),)))
    updates = b.input("updates", TensorType(F32, (sym("K"), sym("N"))))
    pipe = native(graph_of(b, [b.scatter("add", base, ids, updates)]), ("M", "N", "K"))
    some = {"ids": np.zeros(1, "i8"), "updates": np.ones((1, 3), "f4")}
    np.testing.assert_array_equal(pipe(base=np.ones((1, 3), "f4"), **some), [[2, 2, 2]])
    with pytest.raises(IndexOutOfRange):
        pipe(base=np.ones((0, 3), "f4"), **some)
    none = {"ids": np.zeros(0, "i8"), "updates": np.ones((0, 3), "f4")}
    assert pipe(base=np.ones((0, 3), "f4"), **none).shape == (0, 3)
