"""Layers in one tensor: a kernel takes the number of the layer that it is about as an argument.

A decoder keeps the keys and values of all its layers in one state, and each layer reads and
writes at a number of its own; what all its layers look at may be one input. Were that number part
of the kernel, there would be as many kernels as layers. Here it becomes a symbol, which kernels
have like any dimension; what it stands for is said at each launch.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from typing import TypeAlias

from stagefuse.compiler.graph import Gather, Graph, Input, Node, Ref, State, Update, View
from stagefuse.dsl.dims import Expr, sym
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen

from .groups import Group

MOST_NUMBERS = 4
"""Of one kernel. One that uses more layers is like no other."""
Axis: TypeAlias = tuple[Ref, int]
"""Of a tensor with layers: the value that is there first, and which axis."""


@frozen
class Numbered:
    """A graph in which numbers of layers are symbols, and the number that each stands for."""

    graph: Graph
    numbers: Mapping[str, int]

    def known(self, expr: Expr) -> Expr:
        """The expression for these numbers."""
        return expr.substitute(self.numbers)

    def dims(self, names: tuple[str, ...]) -> tuple[str, ...]:
        """What a kernel's dimensions are: their names, or numbers."""
        return tuple(str(self.numbers.get(name, name)) for name in names)


class Layers:
    """The axes of states, inputs and updated values along which several layers lie.

    Those of inputs and of values are axes of layers where every kernel is about one of them.
    """

    def __init__(self, graph: Graph, groups: Iterable[Group]) -> None:
        self.graph = graph
        self.facts: dict[tuple[tuple[str, Expr], ...], Facts] = {}  # which remember proofs
        self.homes: dict[Ref, Ref] = {}  # in whose memory, or in a copy of it, a value lies
        for node in graph.nodes.values():
            if isinstance(node.primitive, State | Input):
                self.homes[Ref(node.id)] = Ref(node.id)
            elif isinstance(node.primitive, Update):
                base = node.operands[0]
                self.homes[Ref(node.id)] = self.homes.setdefault(base, base)
        numbers: dict[Axis, set[int]] = {}
        mixed: set[Axis] = set()
        for group in groups:
            own: dict[Axis, set[int]] = {}
            for member in _members(group):
                node = graph.nodes[member]
                for place, number in self._numbers(node):
                    own.setdefault((self._home(node), place), set()).add(number)
            for axis, found in own.items():
                numbers.setdefault(axis, set()).update(found)
                if len(found) > 1 and not isinstance(graph.nodes[axis[0].node].primitive, State):
                    mixed.add(axis)
        self.axes = {axis for axis, found in numbers.items() if len(found) > 1} - mixed

    def of(self, group: Group) -> Numbered:
        """The graph as it is for the kernel of a group."""
        names: dict[tuple[Expr, int], str] = {}
        changed: dict[int, Node] = {}
        for member in sorted(_members(group)) if self.axes else ():
            node = self.graph.nodes[member]
            for axis, number in self._numbers(node):
                if (self._home(node), axis) in self.axes:
                    extent = self._shape(node)[axis]
                    name = names.setdefault((extent, number), f"layer{len(names)}")
                    changed[member] = _at(changed.get(member, node), axis, sym(name))
        if not 0 < len(names) <= MOST_NUMBERS:
            return Numbered(self.graph, {})
        graph = replace(
            self.graph,
            nodes={**self.graph.nodes, **changed},
            facts=self._within(tuple((name, extent) for (extent, _), name in names.items())),
        )
        return Numbered(graph, {name: number for (_, number), name in names.items()})

    def _within(self, symbols: tuple[tuple[str, Expr], ...]) -> Facts:
        """What is known with symbols that are positions along axes."""
        if symbols not in self.facts:
            ranges = {name: (0, extent - 1) for name, extent in symbols}
            self.facts[symbols] = self.graph.facts.with_ranges(ranges)
        return self.facts[symbols]

    def _home(self, node: Node) -> Ref:
        return self.homes[node.operands[0]]

    def _shape(self, node: Node) -> tuple[Expr, ...]:
        return self.graph.type(node.operands[0]).shape

    def _numbers(self, node: Node) -> Iterator[tuple[int, int]]:
        """The axes at which a node reads or updates one layer, and which. Elements of the last axis
        are no layers."""
        primitive = node.primitive
        if not isinstance(primitive, View | Gather | Update):
            return
        if node.operands[0] not in self.homes:
            return
        for axis, index in enumerate(primitive.indices[:-1]):
            number = index.as_int() if isinstance(index, Expr) else None
            if number is not None and self._shape(node)[axis].as_int() != 1:
                yield axis, number


def _members(group: Group) -> set[int]:
    """The nodes that a kernel computes, also those of kernels that are part of it."""
    parts = [*group.packs.values(), *([group.rows] if group.rows else [])]
    return group.members.union(*map(_members, parts))


def _at(node: Node, axis: int, index: Expr) -> Node:
    """The node with another position along an axis of its base."""
    primitive: View | Gather | Update
    if isinstance(node.primitive, View):
        before = node.primitive.indices
        primitive = replace(node.primitive, indices=(*before[:axis], index, *before[axis + 1 :]))
    else:
        assert isinstance(node.primitive, Gather | Update)
        places = node.primitive.indices
        primitive = replace(node.primitive, indices=(*places[:axis], index, *places[axis + 1 :]))
    return replace(node, primitive=primitive)
