"""Finds attention of a single query in a graph: sums that are a row times a matrix.

As a reduction such a sum is a kernel of its own, and scores and weights go through memory; as a
product it can be joined with the softmax between (`attention.py`).
"""

from __future__ import annotations

from stagefuse.compiler.graph import Graph, Node, Reduce

from .attention import WIDEST_HEAD
from .contract import axes_of
from .operand_matrices import total_of
from .softmax import factors, plain, scores_of, viewed


def single_query_sums(graph: Graph) -> frozenset[int]:
    """The sums of products whose weights are the softmax of sums of products, and those, where in
    both a row is multiplied by a matrix."""
    found: set[int] = set()
    for node in graph.nodes.values():
        for factor in factors(graph, node):
            scores = scores_of(graph, factor)
            sums = (node, scores)
            if scores is not None and all(x and _has_one_row(graph, x) for x in sums):
                found |= {node.id, scores.id}
    return frozenset(found)


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
