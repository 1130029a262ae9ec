"""How many of a sort's elements are read: those of a top-k are its first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stagefuse.dsl.facts import Facts

from .graph import Gather, Graph, Indirect, Node, Sort, View


def first_read(graph: Graph) -> Mapping[int, int]:
    """The sorts of which no more than so many first elements are read, as far as is known."""
    read: dict[int, list[int | None]] = {ref.node: [None] for ref in graph.results}
    for node in graph.nodes.values():
        for number, ref in enumerate(node.operands):
            source = graph.nodes[ref.node]
            if isinstance(source.primitive, Sort):
                most = _most(graph.facts, node, number, source.primitive.axis)
                read.setdefault(ref.node, []).append(most)
    found = dict[int, int]()
    for number, listed in read.items():
        known = [n for n in listed if n is not None]
        if len(known) == len(listed):
            found[number] = max(known)
    return found


def _most(facts: Facts, node: Node, operand: int, axis: int) -> int | None:
    """How many elements of an axis of an operand a node may read at most, as far as is known."""
    indices: list[Any] = []
    if isinstance(node.primitive, View):
        indices = [node.primitive.indices[axis]]
    elif isinstance(node.primitive, Gather) and operand == 0:
        indices = [node.primitive.indices[axis]]
    elif isinstance(node.primitive, Gather):
        places = node.primitive.indices
        used = [p for p in places if isinstance(p, Indirect) and p.operand == operand]
        indices = [p.indices[axis] for p in used]
    if not indices or any(isinstance(index, Indirect) for index in indices):
        return None
    assert isinstance(node.primitive, View | Gather)
    at = facts.at_element(node.primitive.symbols, node.type.shape)
    highest = [at.bounds(index)[1] for index in indices]
    return None if None in highest else 1 + max(n for n in highest if n is not None)
