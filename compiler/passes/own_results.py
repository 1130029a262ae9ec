"""Gives every result a node of its own."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from stagefuse.dsl.dims import sym

from ..graph import Constant, Graph, Input, Node, Ref, Scalar, View, Weight
from .record import Pass


@dataclass(frozen=True)
class OwnResults(Pass):
    """Results that are inputs, weights or constants are copied, as are those that occur again.

    A caller owns what it gets: no result shares its memory with an input or another result.
    """

    name: ClassVar[str] = "own_results"
    establishes: ClassVar[tuple[str, ...]] = ("results-computed",)

    def run(self, graph: Graph) -> Graph:
        copy = Graph(graph.facts)
        for node in graph.nodes.values():
            copy.add(node)
        results: list[Ref] = []
        for ref in graph.results:
            source = isinstance(graph.nodes[ref.node].primitive, Input | Weight | Constant | Scalar)
            results.append(_copied(copy, ref) if source or ref in results else ref)
        copy.results = tuple(results)
        return copy


def _copied(graph: Graph, ref: Ref) -> Ref:
    """A new node with the same value."""
    node, type = graph.nodes[ref.node], graph.type(ref)
    symbols = tuple(f"i{i}" for i in range(type.rank))
    view = View(symbols, tuple(map(sym, symbols)))
    made = max(graph.nodes) + 1
    graph.add(Node(made, view, (ref,), (type,), node.span, node.stack, node.label))
    return Ref(made)
