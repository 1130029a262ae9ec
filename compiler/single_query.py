"""Finds attention of a single query in a graph: sums that are a row times a matrix.

As a reduction such a sum is a kernel of its own, and scores and weights go through memory; as a
product it can be joined with the softmax between (`attention.py`).
"""

from __future__ import annotations

from .attention import WIDEST_HEAD
from .contract import axes_of, total_of
from .graph import Graph, Map, Node, Reduce, Ref, View
from .softmax import plain, viewed, weight


def single_query_sums(graph: Graph) -> frozenset[int]:
    """The sums of products whose weights are the softmax of sums of products, and those, where in
    both a row is multiplied by a matrix."""
    found: set[int] = set()
    for node in graph.nodes.values():
        for factor in _factors(graph, node):
            scores = _scores_of(graph, factor)
            sums = (node, scores)
            if scores is not None and all(x and _has_one_row(graph, x) for x in sums):
                found |= {node.id, scores.id}
    return frozenset(found)


def _factors(graph: Graph, node: Node) -> tuple[Ref, ...]:
    """The factors of the products that a node is sums of, if it is that."""
    if not isinstance(node.primitive, Reduce) or node.primitive.kind != "sum":
        return ()
    product = graph.nodes[viewed(graph, plain(graph, node.operands[0])).node]
    return product.operands if product.primitive == Map("mul") else ()


def _has_one_row(graph: Graph, sums: Node) -> bool:
    """Whether one factor varies along no axis of the result along which the other does not, and
    the sums are such as attention in one kernel has: of few elements, or of few columns."""
    (source,) = sums.operands
    product = graph.nodes[viewed(graph, plain(graph, source)).node]
    shape = product.type.shape
    if product.id != plain(graph, source).node:
        return False
    assert isinstance(sums.primitive, Reduce)
    depth = set(sums.primitive.axes)
    u, v = (axes_of(graph, plain(graph, x)) - depth for x in product.operands)
    columns = sorted(u ^ v)
    sizes = [total_of(shape, x).as_int() for x in (columns, sorted(depth))]
    few = any(n is not None and n <= WIDEST_HEAD for n in sizes)
    return (u <= v or v <= u) and bool(columns) and few


def _scores_of(graph: Graph, factor: Ref) -> Node | None:
    """The sums of products that a factor is the softmax of, along the last axis."""
    node = graph.nodes[viewed(graph, plain(graph, factor)).node]
    if node.primitive not in (Map("div"), Map("mul")):
        return None
    for operand in node.operands:
        weights = plain(graph, operand)
        parts = weight(graph, weights, (graph.type(weights).rank - 1,))
        if parts is not None:
            made = [graph.nodes[n] for n in _made_of(graph, parts[0])]
            sums = [n for n in made if _factors(graph, n)]
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
