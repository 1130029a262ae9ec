"""What is computed of the sum, or another reduction, of a whole tensor, in the kernel that has it.

Fusion leaves such a reduction to kernels of its own, since one thread would do all of it. Where its
parts are reduced by many blocks, and what they give by a last one, that block goes on: a mean and
its root are no kernels more. For GPUs.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from stagefuse.compiler.graph import Graph, Map, Position, Scalar, View
from stagefuse.dsl.dims import const

from .groups import Decision, Group, Partition

REASON = "computed where the parts of a reduction come together"
COMPUTED = (Map, Position, Scalar, View)
Test = Callable[[Graph, Group], bool]


def finish_wholes(graph: Graph, found: Partition, whole: Test) -> Partition:
    """The kernels, with those that only finish what one of the `whole` ones gives in that one."""
    groups = list(found.groups)
    decisions = {d.node: d for d in found.decisions}
    n = 0
    while n < len(groups):
        group = groups[n]
        follower = _follower(graph, groups, group) if whole(graph, group) else None
        if follower is None:
            n += 1
            continue
        members = group.members | follower.members
        groups.remove(follower)
        read = {ref for g in groups if g is not group for ref in g.loads(graph)}
        kept = [r for r in group.roots if r in graph.results or r in read]
        accesses = {**follower.accesses, **group.accesses}
        made = replace(group, roots=[*kept, *follower.roots], members=members, accesses=accesses)
        n = groups.index(group)
        groups[n] = made
        for root in follower.roots:
            decisions[root.node] = Decision(root.node, True, REASON)
    return Partition(groups, list(decisions.values()))


def _follower(graph: Graph, groups: list[Group], group: Group) -> Group | None:
    """The first kernel of single elements that reads what a kernel stores, and nothing that another
    one does."""
    stored = {root for g in groups for root in g.roots}
    for other in groups:
        plain = other.kind == "pointwise" and other.when == const(1)
        if not plain or other.placed or other.packs or other.apart or other.nest or group.nest:
            continue
        if other.domain != group.domain or other.members & group.members:
            continue
        loads = other.loads(graph)
        if not loads & set(group.roots) or (loads & stored) - set(group.roots):
            continue
        if all(isinstance(graph.nodes[m].primitive, COMPUTED) for m in other.members):
            return other
    return None
