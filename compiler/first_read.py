"""How many of a sort's elements are read: those of a top-k are its first."""

from __future__ import annotations

from typing import Any

from stagefuse.dsl.facts import Facts

from .graph import Gather, Graph, Indirect, Node, Ref, Sort, View


def first_read(graph: Graph, sort: Node) -> int | None:
    """The number of first elements that are all that is read of a sort, if that is known."""
    assert isinstance(sort.primitive, Sort)
    refs, axis = [Ref(sort.id, i) for i in range(len(sort.types))], sort.primitive.axis
    if any(ref in graph.results for ref in refs):
        return None
    uses = graph.uses()
    readers = [graph.nodes[n] for n in dict.fromkeys(n for r in refs for n in uses.get(r, ()))]
    found = [
        _most(graph.facts, node, number, axis)
        for node in readers
        for number, ref in enumerate(node.operands)
        if ref in refs
    ]
    return None if None in found else max((n for n in found if n is not None), default=None)


def _most(facts: Facts, node: Node, operand: int, axis: int) -> int | None:
    """How many elements of an axis of an operand a node may read at most, as far as is known."""
    if not isinstance(node.primitive, View | Gather):
        return None
    places: tuple[Any, ...] = node.primitive.indices
    indices = [places[axis]]
    if operand:  # positions of a gather
        used = [p for p in places if isinstance(p, Indirect) and p.operand == operand]
        indices = [p.indices[axis] for p in used]
    if not indices or any(isinstance(index, Indirect) for index in indices):
        return None
    at = facts.at_element(node.primitive.symbols, node.type.shape)
    highest = [at.bounds(index)[1] for index in indices]
    return None if None in highest else 1 + max(n for n in highest if n is not None)
