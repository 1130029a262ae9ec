"""Stored views that hold, at some sizes, what their operand holds, byte for byte.

Rows of an operand are stored again where they may begin at no multiple of 16 bytes, as tensor
copies and vectors need; at sizes at which they do, what is stored is what was there. Then launches
read it there, and what would store it again does not run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.graph import (
    Carried,
    Graph,
    Recurrence,
    Ref,
    State,
    Update,
    View,
    flatten_index,
)
from stagefuse.dsl.dims import Expr, const, maximum, minimum, sym
from stagefuse.dsl.facts import Facts


class Alias(NamedTuple):
    """A stored view, its operand, and 1 at sizes at which they hold the same, else 0."""

    view: Ref
    operand: Ref
    when: Expr


def alias_of(graph: Graph, group: Group) -> Alias | None:
    """The view that a kernel stores and nothing else, if it is its operand at some sizes, and
    nothing overwrites either."""
    if len(group.members) != 1 or group.placed or group.packs or group.nest:
        return None
    (number,) = group.members
    node = graph.nodes[number]
    if not isinstance(node.primitive, View) or group.roots != [Ref(number)]:
        return None
    (operand,) = node.operands
    if Ref(number) in graph.results:
        return None
    if any(_is_overwritten(graph, ref) for ref in (operand, Ref(number))):
        return None
    offset = flatten_index(node.primitive.indices, graph.type(operand).shape)
    apart = _apart(offset, node.primitive.guard, node.type.shape, graph.facts)
    if apart is None:
        return None
    total = sum(dict.fromkeys(apart), const(0))
    when = graph.facts.simplify(1 - minimum(total, 1, graph.facts))
    return None if when.as_int() is not None else Alias(Ref(number), operand, when)


def _is_overwritten(graph: Graph, ref: Ref) -> bool:
    """Whether a value lies where others may be stored after it."""
    if isinstance(graph.nodes[ref.node].primitive, State | Update | Carried | Recurrence):
        return True
    updates = (n for n in graph.nodes.values() if isinstance(n.primitive, Update))
    return any(ref == node.operands[0] for node in updates)


def _apart(
    offset: Expr, guards: Sequence[Expr], shape: Sequence[Expr], facts: Facts
) -> list[Expr] | None:
    """Sizes, never negative, all of which are 0 where each element i0, i1... of a shape is at an
    offset that is its own in a row-major array, and all guards hold; None if that is never so, or
    cannot be told."""
    names = [f"i{n}" for n in range(len(shape))]
    own = flatten_index(list(map(sym, names)), shape)
    found, rest = list[Expr](), offset
    for name in names:
        here, there = offset.coefficient(name), own.coefficient(name)
        if here is None or there is None or here.symbols() & set(names):
            return None
        low, high = (here, there) if facts.prove_le(here, there) else (there, here)
        if not facts.prove_le(low, high):
            return None
        found.append(facts.simplify(high - low))
        rest = rest - here * sym(name)
    for guard in guards:
        least = guard
        for name, size in zip(names, shape, strict=True):
            slope = guard.coefficient(name)
            step = None if slope is None else slope.as_int()
            if step is None:
                return None
            least = least.substitute({name: const(0) if step >= 0 else size - 1})
        found.append(maximum(facts.simplify(-least), 0, facts))
    return found if rest == const(0) else None
