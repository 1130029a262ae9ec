"""Sums of products of small integers as sums of f32, where those are exact."""

from __future__ import annotations

from math import prod
from typing import ClassVar

import numpy as np

from stagefuse.compiler.graph import Constant, Graph, Map, Node, Reduce, Ref, Scalar, View, Weight
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.patterns.contract import cast_of, through
from stagefuse.dsl.dtypes import F32, I32, I64
from stagefuse.dsl.frozen import frozen

from .record import Pass

EXACT = 1 << 24
"""Integers up to here in magnitude are numbers of f32."""
DEPTH = 20
"""Operands of operands that a proof may go down."""


@frozen
class FloatSums(Pass):
    """A sum of products of two integers becomes one of f32 where no part of it leaves the integers
    that f32 holds: vectors multiply and add those at once. What is quantised is so, in convolutions
    that are no matrix products, as those of single channels.
    """

    name: ClassVar[str] = "float_sums"
    requires: ClassVar[tuple[str, ...]] = ("products-found",)

    def run(self, graph: Graph) -> Graph:
        found = {n.id for n in graph.nodes.values() if _is_exact(graph, n)}
        if not found:
            return graph
        builder = Builder(graph.facts)
        new: dict[Ref, Ref] = {}
        for node in graph.nodes.values():
            with builder.at(node.span, node.stack, node.label):
                operands = [new[ref] for ref in node.operands]
                if node.id in found:
                    made: tuple[Ref, ...] = (_as_floats(builder, node, operands[0]),)
                else:
                    made = builder.add(node.primitive, operands, node.types)
            new.update({Ref(node.id, i): ref for i, ref in enumerate(made)})
        builder.graph.results = tuple(new[ref] for ref in graph.results)
        return builder.graph.live()


def _as_floats(b: Builder, node: Node, products: Ref) -> Ref:
    assert isinstance(node.primitive, Reduce)
    views, product = _seen(b.graph, products)
    factors = [cast_of(b, ref, F32) for ref in product.operands]
    for view in reversed(views):
        factors = [through(b, view, ref) for ref in factors]
    total = b.reduce("sum", b.map("mul", *factors), node.primitive.axes, F32)
    return b.cast(b.cast(total, I32), node.type.dtype)


def _is_exact(graph: Graph, node: Node) -> bool:
    """Whether a node is a sum of products of integers of which f32 holds each part."""
    total = node.primitive
    if not isinstance(total, Reduce) or total.kind != "sum" or node.type.dtype not in (I32, I64):
        return False
    views, product = _seen(graph, node.operands[0])
    if any(isinstance(view.primitive, View) and view.primitive.guard for view in views):
        return False
    if product.primitive != Map("mul") or product.type.dtype not in (I32, I64):
        return False
    sizes = [graph.type(node.operands[0]).shape[a].as_int() for a in total.axes]
    count = prod(size or EXACT for size in sizes)
    largest = [_largest(graph, ref, DEPTH) for ref in product.operands]
    return all(most is not None for most in largest) and (
        count * prod(most or 0 for most in largest) <= EXACT
    )


def _seen(graph: Graph, ref: Ref) -> tuple[list[Node], Node]:
    """The views that a value is, outermost first, and what they look at."""
    views, node = [], graph.nodes[ref.node]
    while isinstance(node.primitive, View):
        views.append(node)
        node = graph.nodes[node.operands[0].node]
    return views, node


def _largest(graph: Graph, ref: Ref, depth: int) -> int | None:
    """What the magnitude of an integer tensor's elements is at most, if that is known."""
    node, dtype = graph.nodes[ref.node], graph.type(ref).dtype
    primitive = node.primitive
    if dtype.is_int and dtype.bits == 8:
        return 128 if dtype.kind == "int" else 255
    if depth == 0 or not dtype.is_int:
        return None
    if isinstance(primitive, Scalar):
        return abs(int(primitive.value))
    if isinstance(primitive, Constant):
        found = np.frombuffer(primitive.data, dtype.numpy)
        return int(max(abs(int(found.max())), abs(int(found.min())))) if found.size else 0
    if isinstance(primitive, Weight) or not isinstance(primitive, Map | View):
        return None
    below = [_largest(graph, operand, depth - 1) for operand in node.operands]
    if any(most is None for most in below):
        return None
    known = [most or 0 for most in below]
    if isinstance(primitive, View):
        return max(known[0], abs(int(primitive.fill)) if primitive.guard else 0)
    most = {"cast": known[0], "neg": known[0], "abs": known[0],
            "add": sum(known), "sub": sum(known), "mul": prod(known)}.get(primitive.fn)  # fmt: skip
    return most if most is not None and most < 1 << (dtype.bits - 1) else None
