"""Each rule fires, does not where its guard fails, and keeps every bit of the results."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagefuse.compiler.graph import Concat, Constant, Gather, Graph, Indirect, Position, Ref, View
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.graph_verify import verify_graph
from stagefuse.compiler.interpret import evaluate
from stagefuse.compiler.passes.simplify import Simplify
from stagefuse.compiler.rules import RULES
from stagefuse.compiler.rules.pointwise import holds
from stagefuse.compiler.scalar import convert, wide
from stagefuse.dsl.dims import const, floordiv, sym
from stagefuse.dsl.dtypes import BF16, BOOL, DTYPES, F16, F32, F64, I8, I32, I64, U8, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.types import TensorType

from .graph_run import both, graph_of
from .ir_cases import random_graph
from .test_passes import shape_of

FACTS = Facts({"N": (0, 64), "M": (1, 64)})
N, M = sym("N"), sym("M")
SPECIAL = [0.0, -0.0, 1.0, -1.0, np.inf, -np.inf, np.nan, 1e-40, 3e38, 2.5, -2.5, 0.5, 7.0, -1e-45]
WHOLE = [0, 1, -1, 2, -7, 8, 100, -128, 127, 3, 64, 255, -(1 << 31), (1 << 31) - 1]


class Made:
    """A builder with inputs of every kind: x, y, z f32; i, j i32; u u8; h f16; p, q bool."""

    def __init__(self) -> None:
        self.b = Builder(FACTS)
        kinds = {"x": F32, "y": F32, "z": F64, "i": I32, "j": I32, "u": U8, "h": F16, "s": I8,
                 "p": BOOL, "q": BOOL}  # fmt: skip
        self.kinds = kinds
        for name, dtype in kinds.items():
            setattr(self, name, self.b.input(name, TensorType(dtype, (N, const(14)))))

    def __getattr__(self, name: str) -> Any:
        return getattr(self.b, name)

    def c(self, value: float, dtype: DType = F32) -> Ref:
        return self.b.scalar(value, dtype, (N, const(14)))

    def row(self, ref: Ref) -> Ref:
        """The first row, repeated: a view of repeats along axis 0."""
        return self.b.view(ref, (M, const(14)), lambda i, j: [0, j], lambda i, j: [N - 1])


Case = Callable[[Any], Ref | tuple[Ref, ...]]


def gathered(k: Any, table: Ref, index: Ref, extent: int = 14) -> Ref:
    found: Ref = k.b.gather(
        table, [index], (N, const(14)), ("i0", "i1"),
        (sym("i0"), Indirect(1, (sym("i0"), sym("i1")))),
    )  # fmt: skip
    return found


def columns(k: Any, lo: int, hi: int, of: Ref) -> Ref:
    found: Ref = k.b.view(of, (N, const(hi - lo)), lambda i, j: [i, j + lo])
    return found


def partly(k: Any, value: float, fill: float) -> Ref:
    """A number where there are rows to read, and a fill elsewhere."""
    found: Ref = k.b.view(
        k.c(value), (M, const(3)), lambda i, j: [i, j], lambda i, j: [N - 1 - i], fill
    )
    return found


def one_plus(k: Any, fn: str, u: Ref, dtype: DType = F32) -> Ref:
    found: Ref = k.map("add", k.c(1.0, dtype), k.map(fn, u))
    return found


def gelu(k: Any, x: Ref, dtype: DType = F32, by: float = 0.7071067811865476) -> Ref:
    """0.5 * x * (1 + erf(x * by)), as the library writes it."""
    scaled = k.map("mul", x, k.c(by, dtype))
    half = k.map("mul", k.c(0.5, dtype), x)
    found: Ref = k.map("mul", half, one_plus(k, "erf", scaled, dtype))
    return found


def single(k: Any, ref: Ref) -> Ref:
    """The first column as an axis of size 1."""
    found: Ref = k.b.view(ref, (N, const(1)), lambda i, j: [i, 0])
    return found


CASES: dict[str, tuple[list[Case], list[Case]]] = {
    "known": (
        [lambda k: k.map("exp", k.c(0.5)), lambda k: k.map("lt", k.c(1.0), k.c(2.0)),
         lambda k: k.map("cast", k.c(2.7), dtype=I32), lambda k: k.map("add", k.c(0.1, BF16),
                                                                       k.c(0.3, BF16))],
        [lambda k: k.map("exp", k.x), lambda k: k.map("pow", k.c(2.0), k.x)],
    ),
    "constant-last": (
        [lambda k: k.map("add", k.c(2.0), k.x), lambda k: k.map("eq", k.c(2.0), k.x)],
        [lambda k: k.map("sub", k.c(2.0), k.x), lambda k: k.map("add", k.x, k.y),
         lambda k: k.map("lt", k.c(2.0), k.x)],
    ),
    "identity": (
        [lambda k: k.map("add", k.x, k.c(-0.0)), lambda k: k.map("add", k.i, k.c(0, I32)),
         lambda k: k.map("sub", k.x, k.c(0.0)), lambda k: k.map("mul", k.c(1.0), k.x),
         lambda k: k.map("div", k.x, k.c(1.0)), lambda k: k.map("pow", k.x, k.c(1.0)),
         lambda k: k.map("floordiv", k.i, k.c(1, I32)), lambda k: k.map("and", k.p, k.c(1, BOOL)),
         lambda k: k.map("or", k.p, k.c(0, BOOL)), lambda k: k.map("bitand", k.u, k.c(255, U8)),
         lambda k: k.map("bitand", k.i, k.c(-1, I32)), lambda k: k.map("shl", k.i, k.c(0, I32)),
         lambda k: k.map("maximum", k.x, k.c(-np.inf)),
         lambda k: k.map("minimum", k.s, k.c(127, I8))],
        [lambda k: k.map("add", k.x, k.c(0.0)), lambda k: k.map("sub", k.x, k.c(-0.0)),
         lambda k: k.map("sub", k.c(0.0), k.x), lambda k: k.map("mul", k.x, k.c(2.0)),
         lambda k: k.map("div", k.c(1.0), k.x), lambda k: k.map("floordiv", k.x, k.c(1.0)),
         lambda k: k.map("maximum", k.x, k.c(-3e38)), lambda k: k.map("bitand", k.u, k.c(127, U8))],
    ),
    "absorbing": (
        [lambda k: k.map("mul", k.i, k.c(0, I32)), lambda k: k.map("and", k.p, k.c(0, BOOL)),
         lambda k: k.map("or", k.p, k.c(1, BOOL)), lambda k: k.map("bitand", k.u, k.c(0, U8)),
         lambda k: k.map("mod", k.i, k.c(1, I32))],
        [lambda k: k.map("mul", k.x, k.c(0.0)), lambda k: k.map("mod", k.x, k.c(1.0)),
         lambda k: k.map("mul", k.i, k.c(3, I32))],
    ),
    "idempotent": (
        [lambda k: k.map("maximum", k.x, k.x), lambda k: k.map("and", k.p, k.p)],
        [lambda k: k.map("maximum", k.x, k.y), lambda k: k.map("add", k.x, k.x)],
    ),
    "with-itself": (
        [lambda k: k.map("eq", k.i, k.i), lambda k: k.map("lt", k.u, k.u),
         lambda k: k.map("sub", k.i, k.i), lambda k: k.map("bitxor", k.p, k.p)],
        [lambda k: k.map("eq", k.x, k.x), lambda k: k.map("sub", k.x, k.x),
         lambda k: k.map("sub", k.i, k.j)],
    ),
    "projection": (
        [lambda k: k.map("abs", k.map("abs", k.x)), lambda k: k.map("sign", k.map("sign", k.x))],
        [lambda k: k.map("exp", k.map("exp", k.x)), lambda k: k.map("abs", k.map("sign", k.x))],
    ),
    "whole": (
        [lambda k: k.map("floor", k.map("ceil", k.x)),
         lambda k: k.map("round", k.map("cast", k.i, dtype=F32))],
        [lambda k: k.map("floor", k.x), lambda k: k.map("floor", k.map("cast", k.z, dtype=F32))],
    ),
    "inverse": (
        [lambda k: k.map("neg", k.map("neg", k.x)), lambda k: k.map("not", k.map("not", k.p)),
         lambda k: k.map("invert", k.map("invert", k.i))],
        [lambda k: k.map("neg", k.map("abs", k.x)), lambda k: k.map("exp", k.map("log", k.x))],
    ),
    "abs-of-negated": (
        [lambda k: k.map("abs", k.map("neg", k.x)), lambda k: k.map("abs", k.map("neg", k.i)),
         lambda k: k.map("abs", k.map("neg", k.u))],
        [lambda k: k.map("abs", k.map("exp", k.x))],
    ),
    "add-negated": (
        [lambda k: k.map("add", k.x, k.map("neg", k.y)),
         lambda k: k.map("add", k.map("neg", k.x), k.y),
         lambda k: k.map("add", k.i, k.map("neg", k.j))],
        [lambda k: k.map("add", k.x, k.map("abs", k.y))],
    ),
    "subtract-negated": (
        [lambda k: k.map("sub", k.x, k.map("neg", k.y)),
         lambda k: k.map("sub", k.i, k.map("neg", k.j))],
        [lambda k: k.map("sub", k.map("neg", k.x), k.y)],
    ),
    "signs": (
        [lambda k: k.map("mul", k.map("neg", k.x), k.map("neg", k.y)),
         lambda k: k.map("div", k.map("neg", k.x), k.map("neg", k.y)),
         lambda k: k.map("mul", k.map("neg", k.x), k.c(3.0)),
         lambda k: k.map("mul", k.map("neg", k.i), k.map("neg", k.j))],
        [lambda k: k.map("mul", k.map("neg", k.x), k.y),
         lambda k: k.map("mul", k.map("neg", k.i), k.c(3, I32))],
    ),
    "collected": (
        [lambda k: k.map("add", k.map("add", k.i, k.c(3, I32)), k.c(2147483647, I32)),
         lambda k: k.map("mul", k.map("mul", k.u, k.c(9, U8)), k.c(77, U8))],
        [lambda k: k.map("add", k.map("add", k.x, k.c(3.0)), k.c(1e8)),
         lambda k: k.map("mul", k.map("add", k.i, k.c(3, I32)), k.c(2, I32))],
    ),
    "cast": (
        [lambda k: k.map("cast", k.map("cast", k.i, dtype=I64), dtype=F32),
         lambda k: k.map("cast", k.map("cast", k.h, dtype=F32), dtype=I8),
         lambda k: k.map("cast", k.map("cast", k.u, dtype=F32), dtype=U8),
         lambda k: k.map("cast", k.map("cast", k.x, dtype=F64), dtype=BF16),
         lambda k: k.map("cast", k.map("cast", k.i, dtype=I64), dtype=I8)],
        [lambda k: k.map("cast", k.map("cast", k.x, dtype=F16), dtype=F32),
         lambda k: k.map("cast", k.map("cast", k.i, dtype=F64), dtype=I8),
         lambda k: k.map("cast", k.map("cast", k.i, dtype=F32), dtype=F64),
         lambda k: k.map("cast", k.map("cast", k.i, dtype=I8), dtype=I32),
         lambda k: k.map("cast", k.map("cast", k.x, dtype=BOOL), dtype=F32)],
    ),
    "not-compared": (
        [lambda k: k.map("not", k.map("eq", k.x, k.y)),
         lambda k: k.map("not", k.map("lt", k.i, k.j))],
        [lambda k: k.map("not", k.map("lt", k.x, k.y)),
         lambda k: k.map("not", k.map("and", k.p, k.q))],
    ),
    "select": (
        [lambda k: k.map("select", k.p, k.x, k.x),
         lambda k: k.map("select", k.c(1, BOOL), k.x, k.y),
         lambda k: k.map("select", k.c(0, BOOL), k.x, k.y),
         lambda k: k.map("select", k.map("not", k.p), k.x, k.y),
         lambda k: k.map("select", k.p, k.c(1, BOOL), k.c(0, BOOL)),
         lambda k: k.map("select", k.p, k.c(0, BOOL), k.c(1, BOOL))],
        [lambda k: k.map("select", k.p, k.x, k.y),
         lambda k: k.map("select", k.p, k.c(0.0), k.c(-0.0))],
    ),
    "power": (
        [lambda k: k.map("pow", k.i, k.c(2, I32)), lambda k: k.map("pow", k.i, k.c(3, I32)),
         lambda k: k.map("pow", k.x, k.c(0.0)), lambda k: k.map("pow", k.x, k.c(-1.0)),
         lambda k: k.map("pow", k.x, k.c(2.0)), lambda k: k.map("pow", k.x, k.c(0.5)),
         lambda k: k.map("pow", k.z, k.c(0.5, F64)), lambda k: k.map("pow", k.h, k.c(0.5, F16)),
         lambda k: k.map("pow", k.x, k.c(-0.5)), lambda k: k.map("pow", k.x, k.c(0.75)),
         lambda k: k.map("pow", k.z, k.c(0.25, F64))],
        [lambda k: k.map("pow", k.x, k.c(1.5)), lambda k: k.map("pow", k.i, k.c(-1, I32)),
         lambda k: k.map("pow", k.x, k.y)],
    ),
    "divide": (
        [lambda k: k.map("div", k.x, k.c(8.0)), lambda k: k.map("div", k.x, k.c(-0.25)),
         lambda k: k.map("div", k.h, k.c(2.0, F16)),
         lambda k: k.map("div", k.z, k.c(2.0**900, F64))],
        [lambda k: k.map("div", k.x, k.c(3.0)), lambda k: k.map("div", k.x, k.c(0.0)),
         lambda k: k.map("div", k.x, k.c(np.inf)), lambda k: k.map("div", k.x, k.c(2.0**127)),
         lambda k: k.map("div", k.x, k.c(1e-45)), lambda k: k.map("div", k.h, k.c(2.0**-24, F16)),
         lambda k: k.map("div", k.z, k.c(2.0**-1074, F64))],
    ),
    "floor-divide": (
        [lambda k: k.map("floordiv", k.i, k.c(8, I32)),
         lambda k: k.map("floordiv", k.u, k.c(128, U8))],
        [lambda k: k.map("floordiv", k.i, k.c(6, I32)),
         lambda k: k.map("floordiv", k.i, k.c(-8, I32)),
         lambda k: k.map("floordiv", k.i, k.c(0, I32)), lambda k: k.map("floordiv", k.x, k.c(8.0))],
    ),
    "modulo": (
        [lambda k: k.map("mod", k.i, k.c(8, I32)), lambda k: k.map("mod", k.s, k.c(64, I8))],
        [lambda k: k.map("mod", k.i, k.c(6, I32)), lambda k: k.map("mod", k.i, k.c(-8, I32)),
         lambda k: k.map("mod", k.x, k.c(8.0))],
    ),
    "view-of-view": (
        [lambda k: k.transpose(k.row(k.x), [1, 0])],
        [lambda k: k.view(k.row(k.x), (M, const(15)), lambda i, j: [i, j - 1],
                          lambda i, j: [j - 1], 1.0)],
    ),
    "whole-view": (
        [lambda k: k.transpose(k.transpose(k.x, [1, 0]), [1, 0]),
         lambda k: k.reshape(k.reshape(k.x, (N * 14,)), (N, 14))],
        [lambda k: k.transpose(k.x, [1, 0])],
    ),
    "unguarded": (
        [lambda k: k.b._one(View(("i0",), (sym("i0"), const(3)), (sym("i0") + 1,)), [k.x],
                            TensorType(F32, (N,)))],
        [lambda k: k.view(k.x, (N,), lambda i: [i, 3], lambda i: [i - 1])],
    ),
    "filled-view": (
        [lambda k: k.view(k.x, (M, const(3)), lambda i, j: [i, j], lambda i, j: [-1 - i], 2.5),
         lambda k: partly(k, 2.5, 2.5)],
        [lambda k: k.row(k.x),
         lambda k: partly(k, 0.0, -0.0)],
    ),
    "view-of-position": (
        [lambda k: k.view(k.position((N, M), ("i0", "i1"), sym("i0") * 3 + sym("i1") + N), (M, N),
                          lambda i, j: [j, i])],
        [lambda k: k.row(k.position((N, const(14)), ("i0", "i1"), sym("i0"))),
         lambda k: k.transpose(k.i, [1, 0])],
    ),
    "view-of-concat": (
        [lambda k: columns(k, 3, 10, k.concat([k.x, k.y], 1)),
         lambda k: columns(k, 14, 28, k.concat([k.x, k.y], 1))],
        [lambda k: columns(k, 10, 20, k.concat([k.x, k.y], 1)),
         lambda k: k.transpose(k.concat([k.x, k.y], 1), [1, 0])],
    ),
    "splat": (
        [lambda k: k.map("exp", k.constant(np.full((3, 4), -0.0, "f4"), F32))],
        [lambda k: k.map("exp", k.constant(np.array([0.0, -0.0], "f4"), F32)),
         lambda k: k.map("exp", k.constant(np.array([2.0], "f4"), F32))],
    ),
    "concat": (
        [lambda k: k.concat([k.concat([k.x, k.y], 1), k.x], 1),
         lambda k: k.concat([columns(k, 3, 3, k.x), k.y], 1)],
        [lambda k: k.concat([k.concat([k.x, k.y], 1), k.concat([k.y, k.x], 1)], 0)],
    ),
    "gather": (
        [lambda k: gathered(k, k.x, k.position((N, const(14)), ("i0", "i1"), 13 - sym("i1"))),
         lambda k: gathered(k, k.x, k.c(3, I64)), lambda k: gathered(k, k.x, k.c(-3, I64))],
        [lambda k: gathered(k, k.x, k.cast(k.map("mod", k.u, k.c(13, U8)), I64))],
    ),
    "single-axes": (
        [lambda k: k.reduce("max", single(k, k.x), [1]),
         lambda k: k.reduce("sum", single(k, k.i), [1], I64),
         lambda k: k.reduce("sum", single(k, k.x), [0, 1])],
        [lambda k: k.reduce("sum", single(k, k.x), [1]), lambda k: k.reduce("max", k.x, [1]),
         lambda k: k.reduce("argmax", single(k, k.x), [1])],
    ),
    "reduce-of-reduce": (
        [lambda k: k.reduce("max", k.reduce("max", k.x, [1]), [0]),
         lambda k: k.reduce("sum", k.reduce("sum", k.i, [0]), [0]),
         lambda k: k.reduce("any", k.reduce("any", k.p, [0]), [0])],
        [lambda k: k.reduce("sum", k.reduce("sum", k.x, [1]), [0]),
         lambda k: k.reduce("max", k.reduce("min", k.x, [1]), [0]),
         lambda k: (lambda r: (k.reduce("max", r, [0]), r))(k.reduce("max", k.x, [1]))],
    ),
    "reduce-of-repeats": (
        [lambda k: k.reduce("sum", k.broadcast(k.reduce("max", k.i, [0]), (N, 14)), [0]),
         lambda k: k.reduce("max", k.broadcast(k.reduce("max", k.x, [0]), (M, 14)), [0])],
        [lambda k: k.reduce("sum", k.broadcast(k.reduce("max", k.x, [0]), (N, 14)), [0]),
         lambda k: k.reduce("max", k.broadcast(k.reduce("max", k.x, [0]), (N, 14)), [0]),
         lambda k: k.reduce("sum", k.row(k.i), [0])],
    ),
    "scan-of-one": (
        [lambda k: k.scan("prod", single(k, k.x), 1), lambda k: k.scan("sum", single(k, k.i), 1)],
        [lambda k: k.scan("sum", single(k, k.x), 1), lambda k: k.scan("prod", k.x, 1)],
    ),
    "sort-of-one": ([lambda k: k.sort(single(k, k.x), 1)], [lambda k: k.sort(k.x, 1)]),
    "scatter-of-nothing": (
        [lambda k: k.scatter("add", k.x, k.constant(np.zeros(0, "i8"), I64),
                             k.constant(np.zeros((0, 14), "f4"), F32))],
        [lambda k: k.scatter("add", k.x, k.constant(np.zeros(1, "i8"), I64),
                             k.view(k.y, (1, 14), lambda i, j: [0, j], lambda i, j: [N - 1]))],
    ),
    "gelu": (
        [lambda k: gelu(k, k.x), lambda k: k.map("mul", gelu(k, k.x), k.y),
         lambda k: gelu(k, k.h, F16),
         lambda k: k.map("mul", k.x, k.map("mul", k.c(0.5), one_plus(
             k, "erf", k.map("div", k.x, k.c(1.41421356)))))],
        [lambda k: gelu(k, k.x, by=0.7), lambda k: k.map("mul", k.y, one_plus(k, "erf", k.x)),
         lambda k: k.map("mul", k.map("mul", k.y, k.c(0.5)), one_plus(
             k, "erf", k.map("mul", k.x, k.c(0.7071067811865476))))],
    ),
    "sigmoid": (
        [lambda k: k.map("mul", k.map("mul", k.x, k.c(0.5)), one_plus(k, "tanh", k.y))],
        [lambda k: k.map("mul", k.map("mul", k.x, k.c(0.25)), one_plus(k, "tanh", k.y)),
         lambda k: k.map("mul", k.x, one_plus(k, "tanh", k.y))],
    ),
}  # fmt: skip


def graph_for(case: Case) -> Graph:
    k = Made()
    made = case(k)
    return graph_of(k.b, [made] if isinstance(made, Ref) else list(made))


def fires(rule: str, graph: Graph) -> bool:
    return shape_of(Simplify().run(graph)) != shape_of(Simplify(without=(rule,)).run(graph))


def feeds(rows: int, seed: int) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    found: dict[str, Any] = {}
    for name, dtype in Made().kinds.items():
        pool = SPECIAL if dtype.is_float else [0, 1] if dtype.is_bool else WHOLE
        drawn = rng.choice(np.array(pool, "f8"), (rows, 14))
        values = convert(wide(drawn if dtype.is_float else drawn.astype("i8")), dtype)
        found[name] = np.asarray(values).astype(dtype.numpy)
    return found


def assert_same_bits(before: Graph, after: Graph, exact: bool = True, atol: float = 0.0) -> None:
    sizes = [{"N": 3, "M": 5}, {"N": 1, "M": 2}]
    for seed, dims in enumerate(sizes):
        given = feeds(dims["N"], seed)
        wanted = evaluate(before, given, dims, wide=False)
        found = evaluate(after, given, dims, wide=False)
        for a, b in zip(wanted, found, strict=True):
            assert a.dtype == b.dtype and a.shape == b.shape
            if a.dtype.kind != "f":
                assert np.array_equal(a, b)
                continue
            assert np.array_equal(np.isnan(a), np.isnan(b))
            kept = ~np.isnan(a)
            if exact:
                assert np.array_equal(a[kept], b[kept])
                assert np.array_equal(np.signbit(a[kept]), np.signbit(b[kept]))
            else:
                rtol = max(atol, 4 * 2.0**-23)
                np.testing.assert_allclose(a[kept], b[kept], rtol=rtol, atol=atol)


def each(which: int) -> list[Any]:
    return [
        pytest.param(name, case, id=f"{name}-{number}")
        for name, cases in CASES.items()
        for number, case in enumerate(cases[which])
    ]


def test_every_rule_has_cases() -> None:
    assert [r.name for r in RULES] == list(CASES)
    assert all(r.because for r in RULES)


@pytest.mark.parametrize(("rule", "case"), each(0))
def test_rule_fires_and_keeps_the_meaning(rule: str, case: Case) -> None:
    graph = graph_for(case)
    verify_graph(graph)
    assert fires(rule, graph)
    after = Simplify().run(graph)
    verify_graph(after)
    assert shape_of(Simplify().run(after)) == shape_of(after)
    if rule in ("gelu", "sigmoid"):  # the cancelling parts are right to units of x, at most 7
        unit = 2.0 ** (-10 if any(n.type.dtype == F16 for n in graph.nodes.values()) else -23)
        assert_same_bits(graph, after, exact=False, atol=4 * 7 * unit)
    else:
        assert_same_bits(graph, after, exact=rule != "power")


@pytest.mark.parametrize(("rule", "case"), each(1))
def test_rule_does_not_fire_where_its_guard_fails(rule: str, case: Case) -> None:
    graph = graph_for(case)
    verify_graph(graph)
    assert not fires(rule, graph)
    assert_same_bits(graph, Simplify().run(graph))


@pytest.mark.parametrize("wide_dtype", DTYPES.values(), ids=str)
@pytest.mark.parametrize("narrow", DTYPES.values(), ids=str)
def test_what_holds_loses_nothing(wide_dtype: DType, narrow: DType) -> None:
    values = [*SPECIAL, 448, 0.0625] if narrow.is_float else WHOLE
    given = np.array(values, "f8" if narrow.is_float else "i8")
    small = wide(np.asarray(convert(given, narrow)).astype(narrow.numpy))
    there = wide(np.asarray(convert(small, wide_dtype)).astype(wide_dtype.numpy))
    back = np.asarray(convert(there, narrow))
    if holds(wide_dtype, narrow):
        assert np.array_equal(back, small, equal_nan=narrow.is_float)


@given(st.integers(0, 1 << 32))
@settings(max_examples=60, deadline=None)
def test_random_graphs_keep_their_meaning(seed: int) -> None:
    from .test_fused_graphs import SIZES, feeds_for

    graph = random_graph(seed, steps=12).graph
    after = Simplify().run(graph)
    assert shape_of(Simplify().run(after)) == shape_of(after)
    for dims in SIZES:
        given = feeds_for(graph, dims, np.random.default_rng(seed))
        wanted = evaluate(graph, given, dims, wide=False)
        for a, b in zip(wanted, evaluate(after, given, dims, wide=False), strict=True):
            assert np.array_equal(a, b, equal_nan=True)


def test_conditions_of_views_of_views_know_where_positions_are() -> None:
    """(4*i + j) // 4 is i for j below 4, in conditions as in indices."""

    def case(k: Any) -> Any:
        rows = k.view(k.x, (N * 4,), lambda p: [floordiv(p, 4), 3], lambda p: [floordiv(p, 4) - 2])
        return k.view(rows, (N, const(4)), lambda i, j: [4 * i + j])

    graph = graph_for(case)
    after = Simplify().run(graph)
    (view,) = [n.primitive for n in after.nodes.values() if isinstance(n.primitive, View)]
    assert view.guard == (sym("i0") - 2,)
    assert_same_bits(graph, after)


def test_results_natively() -> None:
    """A chain that many rules touch, compiled."""
    b = Builder(FACTS)
    x = b.input("x", TensorType(F32, (N,)))
    shape = (N,)
    y = b.map("neg", b.map("neg", b.map("mul", b.scalar(1.0, F32, shape), x)))
    y = b.map("div", b.map("pow", y, b.scalar(2.0, F32, shape)), b.scalar(4.0, F32, shape))
    y = b.map("select", b.scalar(True, BOOL, shape), y, x)
    graph = graph_of(b, [y])
    assert len(Simplify().run(graph).nodes) == 5
    values = np.array([1.5, -0.0, np.inf, np.nan, 1e-15, 3e18], "f4")
    for found, wanted in both(graph, {"x": values}, {"N": 6}):
        np.testing.assert_allclose(found, wanted, rtol=1e-6)


def test_primitives_in_cases_are_used() -> None:
    kinds = {r.kind for r in RULES}
    assert {View, Constant, Concat, Gather} <= kinds
    assert Position not in kinds
