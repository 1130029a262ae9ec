"""How far a compiled graph may be from its meaning, node by node."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from stagefuse.compiler.graph import Concat, Graph, Input, Map, Node, Reduce, Ref, Scalar, View
from stagefuse.compiler.interpret import _Run

from ..fuzz import measured as m
from ..fuzz.measured import Measured

EXACT = ("neg", "abs", "maximum", "minimum")


def measured(
    graph: Graph,
    feeds: Mapping[str, Any],
    sizes: Mapping[str, int],
    dtype: str | None = None,
    roundings: float = 8.0,
    least: float = 0.0,
) -> list[Measured]:
    """The results with bounds on their errors, for graphs of `test_fused_graphs._Random`.

    Each function is off by so many roundings to its dtype (or to `dtype`), and by `least`.
    """
    run = _Run(graph, feeds, sizes, True, {}, {})
    found: dict[Ref, Measured] = {}
    for node in graph.nodes.values():
        args = [found[r] for r in node.operands]
        kind = dtype or str(node.type.dtype)
        found[Ref(node.id, 0)] = _node(run, node, [replace(a, dtype=kind) for a in args], kind)
        if isinstance(node.primitive, Map) and node.primitive.fn not in EXACT:
            made = found[Ref(node.id, 0)]
            found[Ref(node.id, 0)] = m.rounded(made.v, made.e + least, kind, roundings)
    return [replace(found[r], dtype=str(graph.type(r).dtype)) for r in graph.results]


def _node(run: _Run, node: Node, args: list[Measured], dtype: str) -> Measured:
    def f(*values: Any) -> Any:
        return run.node(node, values)[0]

    match node.primitive:
        case Input() | Scalar():
            return m.given(f(), dtype)
        case Map(fn="abs"):
            return Measured(*m.lipschitz(f, args[0]), dtype)
        case Map(fn="sqrt"):  # of what is not negative
            return Measured(*m.corners(lambda x: f(np.maximum(x, 0)), args[0]), dtype)
        case Map():
            return Measured(*m.corners(f, *args), dtype)
        case View() as view:
            blank = replace(node, primitive=replace(view, fill=0.0))
            return Measured(f(args[0].v), run.node(blank, [args[0].e])[0], dtype)
        case Concat():
            return Measured(f(*(a.v for a in args)), f(*(a.e for a in args)), dtype)
        case Reduce(kind="sum", axes=axes):
            return m.total(args[0], axes, False)
        case Reduce(kind=kind, axes=axes):
            return m.extreme(args[0], axes, False, kind)
        case _:
            raise TypeError(f"not an operation of random graphs: {node.primitive}")
