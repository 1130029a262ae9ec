"""Quotients of exponentials by their sum, which multiply by the sum's reciprocal.

A vector unit divides in the time of five to ten products. In a softmax the divisor is at least 1,
or at least a constant that it is bounded by, and at most the length of the row: its reciprocal is
a normal number, and the product is within 1.5 units in the last place of the quotient.
"""

from __future__ import annotations

from collections.abc import Iterator

from ..graph import Graph, Map, Node, Reduce, Ref, Scalar, View
from ..kernel_ir import Const, Op, Value

LEAST = 2.0**-60
"""Of a constant that bounds a divisor from below."""


def shared_sum(graph: Graph, node: Node) -> int | None:
    """The node that adds up the numerators of a quotient, if the quotient is a softmax's."""
    if not _is_map(node, "div"):
        return None
    numerators, divisor = node.operands[0], _unspread(graph, node.operands[1])
    exponentials = graph.nodes[numerators.node]
    bounded = _is_map(graph.nodes[divisor.node], "maximum")
    for total in _bounded(graph, divisor) if bounded else [divisor]:
        found = graph.nodes[total.node]
        if not (isinstance(found.primitive, Reduce) and found.primitive.kind == "sum"):
            continue
        if found.operands != (numerators,):
            continue
        if bounded:
            exponentials = _unmasked(graph, exponentials)
        if _is_below_one(graph, exponentials, found.primitive.axes):
            return found.id
    return None


def share(numerator: Value, divisor: Value) -> Value:
    """The quotient, as a product."""
    dtype = numerator.dtype
    return Op("mul", (numerator, Op("div", (Const(1.0, dtype), divisor), dtype)), dtype)


def _is_map(node: Node, fn: str) -> bool:
    return isinstance(node.primitive, Map) and node.primitive.fn == fn


def _unspread(graph: Graph, ref: Ref) -> Ref:
    """What a broadcast repeats."""
    while isinstance((node := graph.nodes[ref.node]).primitive, View):
        if node.primitive.guard:
            break
        ref = node.operands[0]
    return ref


def _bounded(graph: Graph, ref: Ref) -> Iterator[Ref]:
    """The operands of a maximum whose other operand is a constant of a fair size."""
    first, second = (_unspread(graph, operand) for operand in graph.nodes[ref.node].operands)
    for value, limit in ((first, second), (second, first)):
        primitive = graph.nodes[limit.node].primitive
        if isinstance(primitive, Scalar) and float(primitive.value) >= LEAST:
            yield value


def _unmasked(graph: Graph, node: Node) -> Node:
    """What a mask leaves where it does not put 0."""
    if _is_map(node, "select"):
        other = graph.nodes[_unspread(graph, node.operands[2]).node].primitive
        if isinstance(other, Scalar) and other.value == 0:
            return graph.nodes[node.operands[1].node]
    return node


def _is_below_one(graph: Graph, node: Node, axes: tuple[int, ...]) -> bool:
    """Whether values are exp(x - max(x)), the greatest along the axes taken away from each."""
    if not _is_map(node, "exp"):
        return False
    difference = graph.nodes[node.operands[0].node]
    if not _is_map(difference, "sub"):
        return False
    x, spread = difference.operands
    view = graph.nodes[spread.node]
    if not isinstance(view.primitive, View) or view.primitive.guard:
        return False
    kept = [s for axis, s in enumerate(view.primitive.symbols) if axis not in axes]
    largest = graph.nodes[view.operands[0].node]
    return (
        [str(i) for i in view.primitive.indices] == kept
        and isinstance(largest.primitive, Reduce)
        and largest.primitive.kind == "max"
        and largest.primitive.axes == axes
        and largest.operands == (x,)
    )
