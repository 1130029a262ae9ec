"""Softmax as graphs write it: exponentials of scores less their maximum."""

from __future__ import annotations

from .graph import Graph, Map, Reduce, Ref, Scalar, View


def plain(graph: Graph, ref: Ref) -> Ref:
    """A value before conversions between floats, which a fused kernel need not make."""
    node = graph.nodes[ref.node]
    while node.primitive == Map("cast") and node.type.dtype.is_float:
        (source,) = node.operands
        if not graph.type(source).dtype.is_float:
            break
        ref, node = source, graph.nodes[source.node]
    return ref


def weight(graph: Graph, ref: Ref, axes: tuple[int, ...]) -> tuple[Ref, Ref, Ref | None] | None:
    """The scores of exp(scores - their maximum along the axes), that maximum spread over them,
    and where the weight is kept: it is 0 elsewhere."""
    keep: Ref | None = None
    node = graph.nodes[ref.node]
    if node.primitive == Map("select"):
        keep, kept, other = node.operands
        if number(graph, other) != 0:
            return None
        node = graph.nodes[plain(graph, kept).node]
    if node.primitive != Map("exp"):
        return None
    shifted = graph.nodes[plain(graph, node.operands[0]).node]
    if shifted.primitive != Map("sub"):
        return None
    score, spread = plain(graph, shifted.operands[0]), shifted.operands[1]
    most = graph.nodes[viewed(graph, spread).node]
    if most.primitive != Reduce("max", axes) or plain(graph, most.operands[0]) != score:
        return None
    return score, spread, keep


def viewed(graph: Graph, ref: Ref) -> Ref:
    """What a value repeats or converts."""
    node = graph.nodes[ref.node]
    while isinstance(node.primitive, View) and not node.primitive.guard:
        ref = plain(graph, node.operands[0])
        node = graph.nodes[ref.node]
    return ref


def number(graph: Graph, ref: Ref) -> float | None:
    primitive = graph.nodes[viewed(graph, ref).node].primitive
    return float(primitive.value) if isinstance(primitive, Scalar) else None
