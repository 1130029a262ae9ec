"""The order of kernels, and the loops of steps that some of them stand in."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import networkx as nx

from stagefuse.compiler.graph import Graph, Recurrence
from stagefuse.compiler.plan import LoopPlan

if TYPE_CHECKING:
    from .groups import Group


def ordered_groups(
    graph: Graph,
    groups: Sequence[Group],
    depth: int = 0,
    before: Sequence[tuple[Group, Group]] = (),
) -> list[Group]:
    """Kernels sorted so that each follows the kernels whose results it reads, and so that of each
    pair of `before` the first comes first; those of one recurrence stand together."""
    maker = {root: i for i, g in enumerate(groups) for root in g.roots}
    blocks: dict[str, list[int]] = {}
    for i, group in enumerate(groups):
        name = group.nest[depth] if len(group.nest) > depth else f"#{i}"
        blocks.setdefault(name, []).append(i)
    block_of = {i: name for name, members in blocks.items() for i in members}
    order = nx.DiGraph()
    order.add_nodes_from(blocks)
    for i, group in enumerate(groups):
        for ref in group.reads(graph):
            if ref in maker and block_of[maker[ref]] != block_of[i]:
                order.add_edge(block_of[maker[ref]], block_of[i])
    place = {group: i for i, group in enumerate(groups)}
    for first, second in before:
        ends = [block_of[place[g]] for g in (first, second) if g in place]
        if len(ends) == 2 and ends[0] != ends[1]:
            order.add_edge(*ends)
    priority = {
        name: max(r.node for i in members for r in map(groups[i].source, groups[i].roots))
        for name, members in blocks.items()
    }
    found: list[Group] = []
    for name in nx.lexicographical_topological_sort(order, key=lambda n: (priority[n], n)):
        inside = [groups[i] for i in blocks[name]]
        if name.startswith("#"):
            found += inside
        else:
            found += ordered_groups(graph, inside, depth + 1, before)
    return found


def loops_of(graph: Graph, nests: Sequence[tuple[str, ...]]) -> tuple[LoopPlan, ...]:
    """The loops around kernels in order, given the recurrences of each; outer loops first."""
    counts = {
        n.primitive.step: str(n.primitive.count)
        for n in graph.nodes.values()
        if isinstance(n.primitive, Recurrence)
    }
    found: list[LoopPlan] = []
    for depth in range(max(map(len, nests), default=0)):
        first = 0
        for number, nest in enumerate((*nests, ())):
            step = nest[depth] if len(nest) > depth else ""
            before = nests[number - 1] if number else ()
            last = before[depth] if len(before) > depth else ""
            if step != last:
                if last:
                    found.append(LoopPlan(last, counts[last], first, number))
                first = number
    return tuple(found)
