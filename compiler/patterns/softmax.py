"""Softmax as graphs write it: exponentials of scores less their maximum, and the sums of products
that those may be and may weight."""

from __future__ import annotations

from stagefuse.compiler.graph import Contract, Graph, Map, Node, Reduce, Ref, Scalar, View
from stagefuse.dsl.dtypes import DType


def plain(graph: Graph, ref: Ref, rounds: DType | None = None) -> Ref:
    """A value before conversions between floats that a fused kernel need not make: those that
    change no value, those of products of their own dtype, and one to `rounds`."""
    node = graph.nodes[ref.node]
    while node.primitive == Map("cast") and node.type.dtype.is_float:
        (source,) = node.operands
        before, after = graph.type(source).dtype, node.type.dtype
        if not (_holds(after, before) or after == rounds or is_product(graph, node)):
            break
        ref, node = source, graph.nodes[source.node]
    return ref


def _holds(wide: DType, narrow: DType) -> bool:
    """Whether every value of a float dtype is one of another."""
    if not narrow.is_float:
        return False
    return wide.digits >= narrow.digits and wide.exponent >= narrow.exponent


def is_product(graph: Graph, node: Node) -> bool:
    """Whether a conversion is of sums in f32 of products of its own dtype: a product in this dtype,
    which may keep more digits inside a kernel."""
    contract = graph.nodes[node.operands[0].node]
    if not isinstance(contract.primitive, Contract):
        return False
    factor = graph.nodes[contract.operands[0].node]
    while isinstance(factor.primitive, View):
        factor = graph.nodes[factor.operands[0].node]
    if factor.primitive != Map("cast"):
        return False
    return graph.type(factor.operands[0]).dtype == node.type.dtype


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


def factors(graph: Graph, node: Node) -> tuple[Ref, ...]:
    """The factors of the products that a node is sums of, if it is that."""
    if not isinstance(node.primitive, Reduce) or node.primitive.kind != "sum":
        return ()
    product = graph.nodes[viewed(graph, plain(graph, node.operands[0])).node]
    return product.operands if product.primitive == Map("mul") else ()


def attention_sums(graph: Graph) -> frozenset[int]:
    """The sums of products whose weights are the softmax of sums of products, and those."""
    found: set[int] = set()
    for node in graph.nodes.values():
        for factor in factors(graph, node):
            scores = scores_of(graph, factor)
            found |= set() if scores is None else {node.id, scores.id}
    return frozenset(found)


def scores_of(graph: Graph, factor: Ref) -> Node | None:
    """The sums of products that a factor is the softmax of, along the last axis."""
    rounds = graph.type(factor).dtype
    node = graph.nodes[plain(graph, viewed(graph, plain(graph, factor, rounds)), rounds).node]
    if node.primitive not in (Map("div"), Map("mul")):
        return None
    for operand in node.operands:
        weights = plain(graph, operand)
        parts = weight(graph, weights, (graph.type(weights).rank - 1,))
        if parts is not None:
            made = [graph.nodes[n] for n in _made_of(graph, parts[0])]
            sums = [n for n in made if factors(graph, n)]
            return sums[0] if len(sums) == 1 else None
    return None


def _made_of(graph: Graph, ref: Ref) -> set[int]:
    """The nodes of other kinds from which maps and views make a value."""
    pending, seen, found = [ref.node], {ref.node}, set[int]()
    while pending:
        node = graph.nodes[pending.pop()]
        if not isinstance(node.primitive, Map | View):
            found.add(node.id)
            continue
        fresh = {r.node for r in node.operands} - seen
        seen |= fresh
        pending += sorted(fresh)
    return found
