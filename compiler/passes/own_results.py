"""Gives every result a node of its own."""

from __future__ import annotations

from typing import ClassVar

from stagefuse.compiler.graph import (
    Constant,
    Graph,
    Input,
    Node,
    Ref,
    Scalar,
    State,
    Update,
    View,
    Weight,
)
from stagefuse.dsl.dims import sym
from stagefuse.dsl.frozen import frozen

from .record import Pass


@frozen
class OwnResults(Pass):
    """Results that are inputs, weights or constants are copied, as are those that occur again.

    A caller owns what it gets: no result shares its memory with an input or another result, nor
    with a state. The updates that give states their new values stay as they are.
    """

    name: ClassVar[str] = "own_results"
    establishes: ClassVar[tuple[str, ...]] = ("results-computed",)

    def run(self, graph: Graph) -> Graph:
        copy = Graph(graph.facts)
        for node in graph.nodes.values():
            copy.add(node)
        results: list[Ref] = []
        for number, ref in enumerate(graph.results):
            primitive = graph.nodes[ref.node].primitive
            shared = isinstance(primitive, Input | State | Weight | Constant | Scalar)
            if isinstance(primitive, Update) and primitive.state:
                shared = _is_updated(graph, ref) or ref in graph.results[number + 1 :]
            results.append(_copied(copy, ref) if shared or ref in results else ref)
        copy.results = tuple(results)
        return copy


def _is_updated(graph: Graph, ref: Ref) -> bool:
    """Whether a state has another value after this one."""
    return any(
        isinstance(node.primitive, Update) and node.primitive.state and node.operands[0] == ref
        for node in graph.nodes.values()
    )


def _copied(graph: Graph, ref: Ref) -> Ref:
    """A new node with the same value."""
    node, type = graph.nodes[ref.node], graph.type(ref)
    symbols = tuple(f"i{i}" for i in range(type.rank))
    view = View(symbols, tuple(map(sym, symbols)))
    made = max(graph.nodes) + 1
    graph.add(Node(made, view, (ref,), (type,), node.span, node.stack, node.label))
    return Ref(made)
