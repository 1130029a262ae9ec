"""Finds softmax between two products, whatever it was written as: the structure of attention.

Weights of keys are exp(s - max s), where something says that they are kept, times what follows
from their sum. With them the rows of scores need not be stored: partial sums are corrected when a
greater score comes (Milakov and Gimelshein, "Online normalizer calculation for softmax", 2018).
"""

from __future__ import annotations

from stagefuse.compiler.buffers import size_of
from stagefuse.compiler.graph import (
    Contract,
    Gather,
    Graph,
    Map,
    Node,
    Position,
    Reduce,
    Ref,
    Scalar,
    View,
)
from stagefuse.dsl.dtypes import F32, DType
from stagefuse.dsl.frozen import frozen

from .softmax import plain, weight

WIDEST_HEAD = 256
"""Elements of a query, and of a value, in attention."""
CHEAP_FLOPS = 16
"""Arithmetic of an element of a mask that is computed where it is read."""


@frozen
class Softmax:
    """Values of a graph over rows: a weight is exp(`score` - max of it), 0 where `keep` does not
    hold; `total` is their sum; the result is the weight `by` (div or mul) `norm`, which depends on
    the total alone."""

    score: Ref
    keep: Ref | None
    total: Ref
    norm: Ref
    by: str


def find_softmax(
    graph: Graph, root: Ref, scores: Ref, members: set[int], rounds: DType | None
) -> Softmax | None:
    """The structure of a row kernel's only result, if it is a softmax of something of `scores`.

    `rounds`: what weights are rounded to before they are multiplied."""
    root = plain(graph, root, rounds)
    node = graph.nodes[root.node]
    if not isinstance(node.primitive, Map) or node.primitive.fn not in ("div", "mul"):
        return None
    pairs = [node.operands] if node.primitive.fn == "div" else [node.operands, node.operands[::-1]]
    for first, norm in pairs:
        weights = plain(graph, first)
        total = _sum_under(graph, norm, members)
        if total is None or plain(graph, graph.nodes[total.node].operands[0]) != weights:
            continue
        found = weight(graph, weights, (graph.type(weights).rank - 1,))
        if found is None:
            continue
        score, _, keep = found
        parts = [score] if keep is None else [score, keep]
        if any(_reduces(graph, ref, members) for ref in parts):
            continue
        if keep is not None and not _reads(graph, score, scores, members):
            continue
        return Softmax(score, keep, total, norm, node.primitive.fn)
    return None


def _under(graph: Graph, ref: Ref, members: set[int]) -> list[int]:
    """The members that a value is made of, as far as the first reductions and products."""
    found: list[int] = []
    pending, seen = [ref.node], {ref.node}
    while pending:
        number = pending.pop()
        found.append(number)
        node = graph.nodes[number]
        if number not in members or isinstance(node.primitive, Reduce | Contract):
            continue
        fresh = [r.node for r in node.operands if r.node not in seen]
        seen.update(fresh)
        pending += fresh
    return found


def _sum_under(graph: Graph, norm: Ref, members: set[int]) -> Ref | None:
    """The only reduction that a value depends on, if it is a sum along the rows."""
    inside = _under(graph, norm, members)
    sums = [n for n in inside if isinstance(graph.nodes[n].primitive, Reduce)]
    others = [n for n in inside if n not in members or _is_product(graph, n)]
    if len(sums) != 1 or others:
        return None
    node = graph.nodes[sums[0]]
    assert isinstance(node.primitive, Reduce)
    last = graph.type(node.operands[0]).rank - 1
    return Ref(sums[0]) if node.primitive.kind == "sum" and node.primitive.axes == (last,) else None


def _is_product(graph: Graph, number: int) -> bool:
    return isinstance(graph.nodes[number].primitive, Contract)


def _reduces(graph: Graph, ref: Ref, members: set[int]) -> bool:
    inside = _under(graph, ref, members)
    return any(n in members and isinstance(graph.nodes[n].primitive, Reduce) for n in inside)


def _reads(graph: Graph, ref: Ref, scores: Ref, members: set[int]) -> bool:
    return scores.node in _under(graph, ref, members)


def is_cheap(graph: Graph, numbers: set[int], flops: int) -> bool:
    """Whether nodes are maps of so little arithmetic that a mask is computed where it is read."""
    kinds = (Map, View, Position, Scalar, Gather)
    return flops <= CHEAP_FLOPS and all(
        isinstance(graph.nodes[n].primitive, kinds) for n in numbers
    )


def is_narrow(first: Node, last: Node) -> bool:
    """Whether registers and shared memory hold a query and a value of attention, in f32."""
    scores, sums = first.primitive, last.primitive
    assert isinstance(scores, Contract) and isinstance(sums, Contract)
    columns = size_of([last.type.shape[a] for a in sums.columns]).as_int()
    sizes = (scores.depth.as_int(), columns)
    narrow = all(n is not None and 0 < n <= WIDEST_HEAD for n in sizes)
    return narrow and first.type.dtype == last.type.dtype == F32
