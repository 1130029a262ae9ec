"""Updates in place: what lies where, and an order of kernels in which that is right.

An update writes into the memory of its base. Whatever else reads the base runs before it, an
update of a state also after everything that may report a position out of range, so that a call
that fails leaves its session as it was. Where no order can be found, the base is copied.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import networkx as nx

from stagefuse.compiler.graph import (
    Gather,
    Graph,
    Indirect,
    Node,
    Ref,
    Scalar,
    Scatter,
    State,
    Update,
    View,
    Within,
)
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.proofs.value_ranges import is_position
from stagefuse.dsl.dims import const, sym
from stagefuse.dsl.frozen import frozen

from .groups import SOURCES, Group, Partition
from .kernel_order import ordered_groups

Form = Callable[[Graph, frozenset[int]], Partition]
"""The kernels of a graph, in which some updates have their values stored before."""


def arrange(graph: Graph, form: Form) -> tuple[Graph, Partition]:
    """The graph with the copies that updates need, and its kernels in an order that is right."""
    apart: frozenset[int] = frozenset()
    while True:
        found = form(graph, apart)
        if not any(isinstance(n.primitive, Update) for n in graph.nodes.values()):
            return graph, found
        order = _Order(graph, found.groups, apart)
        if order.problem is None:
            return graph, Partition(order.groups(), found.decisions)
        if order.problem.is_apart:
            apart |= {order.problem.update}
        else:
            graph, new = _copied(graph, order.problem.update)
            apart = frozenset(new[node] for node in apart)


def reports(graph: Graph, node: Node) -> bool:
    """Whether the node may find a position out of range."""
    primitive = node.primitive
    if isinstance(primitive, Gather):
        extents = graph.type(node.operands[0]).shape
        facts = graph.facts.at_element(primitive.symbols, node.type.shape)
        return any(
            isinstance(index, Indirect)
            and not (
                index.scale == const(1)
                and is_position(graph, node.operands[index.operand], extent, index.offset, facts)
            )
            for index, extent in zip(primitive.indices, extents, strict=True)
        )
    return isinstance(primitive, Within | Scatter)


@frozen
class _Problem:
    """An update that is wrong as it is: its value has to be stored before, or its base copied."""

    update: int
    is_apart: bool = False


class _Order:
    """The kernels, and which have to come before which.

    Those of a recurrence stand together: `levels` has an order for the kernels in each nest of
    recurrences, in which an inner recurrence is one.
    """

    def __init__(self, graph: Graph, found: list[Group], apart: frozenset[int]) -> None:
        self.graph, self.found, self.apart = graph, found, apart
        self.maker = {root: g for g in found for root in g.roots}
        self.loads = {g: g.loads(graph) for g in found}
        self.levels: dict[tuple[str, ...], nx.DiGraph] = {}
        self.before: list[tuple[Group, Group]] = []
        updates = [n for n in graph.nodes.values() if isinstance(n.primitive, Update)]
        self.updates = [n for n in updates if Ref(n.id) in self.maker]
        for group in found:
            for ref in group.reads(graph) | self.loads[group]:
                self._edge(self.maker.get(ref, group), group)
        self.problem = self._problem()

    def groups(self) -> list[Group]:
        """The kernels in the order, otherwise as they were."""
        return ordered_groups(self.graph, self.found, before=self.before)

    def _ends(self, first: Group, second: Group) -> tuple[nx.DiGraph, object, object]:
        """The order that has both kernels, and what stands for each in it."""
        depth = 0
        while first.nest[depth : depth + 1] == second.nest[depth : depth + 1] != ():
            depth += 1
        level = self.levels.setdefault(first.nest[:depth], nx.DiGraph())
        ends = [g.nest[depth] if len(g.nest) > depth else g for g in (first, second)]
        level.add_nodes_from(ends)
        return level, ends[0], ends[1]

    def _edge(self, first: Group, second: Group) -> None:
        if first is not second:
            level, one, other = self._ends(first, second)
            level.add_edge(one, other)

    def _before(self, first: Group, second: Group) -> bool:
        """Put a kernel before another, if that can be."""
        level, one, other = self._ends(first, second)
        if nx.has_path(level, other, one):
            return False
        level.add_edge(one, other)
        self.before.append((first, second))
        return True

    def _problem(self) -> _Problem | None:
        for node in self.updates:
            wrong = self._wrong(node)
            if wrong is not None:
                return wrong
        careful = [g for g in self.found if self._reports(g)]
        for node in self.updates:
            assert isinstance(node.primitive, Update)
            own = self.maker[Ref(node.id)]
            for group in careful if node.primitive.state else ():
                if group is own:
                    return _Problem(node.id, is_apart=True)
                if not self._before(group, own):
                    return _Problem(node.id)
        return None

    def _wrong(self, node: Node) -> _Problem | None:
        """What is wrong with an update; else its readers are put before it."""
        base, own = node.operands[0], self.maker[Ref(node.id)]
        source = self.graph.nodes[base.node].primitive
        assert isinstance(node.primitive, Update)
        if not node.primitive.state:
            kept = isinstance(source, Update) and source.state
            if isinstance(source, (*SOURCES, Scalar)) or kept or self.maker[base].nest != own.nest:
                return _Problem(node.id)
        if base in self.graph.results:
            return _Problem(node.id)
        if base in self.loads[own] and not self._is_even(node, own):
            return _Problem(node.id, is_apart=node.id not in self.apart)
        readers = [g for g, refs in self.loads.items() if base in refs]
        readers += [self.maker[Ref(u.id)] for u in self.updates if u.operands[0] == base]
        for group in readers:
            if group is not own and not self._before(group, own):
                return _Problem(node.id)
        return None

    def _is_even(self, node: Node, group: Group) -> bool:
        """Whether a kernel reads its base nowhere but where it writes, element by element."""
        places = group.accesses[node.operands[0].node]
        return len(group.roots) == 1 and len(places) == 1 and places[0] is not None

    def _reports(self, group: Group) -> bool:
        inside = [*group.packs.values(), *([group.rows] if group.rows else [])]
        nodes = self.graph.nodes
        return any(reports(self.graph, nodes[m]) for m in sorted(group.members)) or any(
            map(self._reports, inside)
        )


def _copied(graph: Graph, update: int) -> tuple[Graph, dict[int, int]]:
    """The graph with a copy of an update's base, and the numbers of its nodes there.

    Updates of a state that came from that one are no longer updates in its place: what the state
    becomes is written into it at the end.
    """
    b, new = Builder(graph.facts), dict[Ref, Ref]()
    latest: dict[str, Ref] = {}
    for node in graph.nodes.values():
        operands = [new[ref] for ref in node.operands]
        primitive = node.primitive
        with b.at(node.span, node.stack, node.label):
            if node.id == update:
                operands[0] = _copy(b, operands[0])
            if isinstance(primitive, Update) and primitive.state:
                if latest.get(primitive.state) != operands[0]:
                    primitive = replace(primitive, state="")
            made = b.add_apart(primitive, operands, node.types)
        if isinstance(primitive, State):
            latest[primitive.name] = made[0]
        elif isinstance(primitive, Update) and primitive.state:
            latest[primitive.state] = made[0]
        new.update({Ref(node.id, i): ref for i, ref in enumerate(made)})
    results: list[Ref] = []
    for ref in graph.results:
        before = graph.nodes[ref.node]
        state = before.primitive.state if isinstance(before.primitive, Update) else ""
        if state and new[ref] != latest[state]:
            with b.at(before.span, before.stack, before.label):
                results.append(b.whole_update(latest[state], new[ref], state))
        else:
            results.append(new[ref])
    b.graph.results = tuple(results)
    return b.graph, {ref.node: made.node for ref, made in new.items()}


def _copy(b: Builder, ref: Ref) -> Ref:
    """The same values in other memory."""
    type = b.type(ref)
    symbols = b.symbols(type.rank)
    return b.add_apart(View(symbols, tuple(map(sym, symbols))), (ref,), (type,))[0]
