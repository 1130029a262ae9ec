"""Quotients of exponentials by their sum, which multiply by the sum's reciprocal.

A vector unit divides in the time of five to ten products. In a softmax the divisor is at least 1,
or at least a constant that it is bounded by, and at most the length of the row: its reciprocal is
a normal number, and the product is within 1.5 units in the last place of the quotient.
"""

from __future__ import annotations

from collections.abc import Iterator

from stagefuse.compiler.graph import Graph, Map, Node, Reduce, Ref, View
from stagefuse.compiler.kernel_ir import Op, Value
from stagefuse.compiler.patterns.softmax import number, plain, viewed, weight

LEAST = 2.0**-60
"""Of a constant that bounds a divisor from below."""


def shared_sum(graph: Graph, node: Node) -> int | None:
    """The node that adds up the numerators of a quotient, if the quotient is a softmax's."""
    if node.primitive != Map("div"):
        return None
    numerators = plain(graph, node.operands[0])
    for total, is_bounded in _totals(graph, viewed(graph, node.operands[1])):
        found = graph.nodes[total.node]
        if not isinstance(found.primitive, Reduce) or found.primitive.kind != "sum":
            continue
        if plain(graph, found.operands[0]) != numerators:
            continue
        parts = weight(graph, numerators, found.primitive.axes)
        if parts is None or not _is_of_its_row(graph, parts[1], found.primitive.axes):
            continue
        if is_bounded or parts[2] is None:
            return found.id
    return None


def share(numerator: Value, divisor: Value) -> Value:
    """The quotient, as a product."""
    dtype = numerator.dtype
    return Op("mul", (numerator, Op("reciprocal", (divisor,), dtype)), dtype)


def _totals(graph: Graph, divisor: Ref) -> Iterator[tuple[Ref, bool]]:
    """What a divisor may be the sum of, and whether a constant of a fair size bounds it."""
    node = graph.nodes[divisor.node]
    if node.primitive != Map("maximum"):
        yield divisor, False
        return
    for value, limit in (node.operands, node.operands[::-1]):
        least = number(graph, limit)
        if least is not None and least >= LEAST:
            yield viewed(graph, value), True


def _is_of_its_row(graph: Graph, spread: Ref, axes: tuple[int, ...]) -> bool:
    """Whether what is spread along the axes is, in each row, that row's own."""
    view = graph.nodes[spread.node].primitive
    return isinstance(view, View) and [str(i) for i in view.indices] == [
        symbol for axis, symbol in enumerate(view.symbols) if axis not in axes
    ]
