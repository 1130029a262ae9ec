"""Recurrences in a dataflow graph: which nodes are computed at each step, and how to build one.

The body of a recurrence has no graph of its own. Its nodes stand among the others and are told by
what they depend on: the symbol of the step, or a `Carried` node of it. What does not depend on
the step is therefore never inside.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from functools import lru_cache
from typing import Any

from stagefuse.dsl.dims import Expr, const, mod, sym
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.types import TensorType

from .graph import Carried, Constant, Graph, Primitive, Recurrence, Ref
from .graph_builder import Builder


class Nests:
    """The recurrences of a graph and what each node depends on.

    `depends`: the steps that a node's value changes with. `of`: the recurrences that a node is
    computed in, outermost first; those around a recurrence are around its body. `ends`: the
    `Recurrence` node of each step.
    """

    def __init__(self, graph: Graph) -> None:
        self.ends = {
            n.primitive.step: n.id
            for n in graph.nodes.values()
            if isinstance(n.primitive, Recurrence)
        }
        self.depends: dict[int, frozenset[str]] = {}
        known = self.ends.keys() | {
            n.primitive.step for n in graph.nodes.values() if isinstance(n.primitive, Carried)
        }
        for node in graph.nodes.values() if known else ():
            found = symbols_of(node.primitive) & known
            found |= frozenset[str]().union(*(self.depends[r.node] for r in node.operands))
            if isinstance(node.primitive, Carried):
                found |= {node.primitive.step}
            if isinstance(node.primitive, Recurrence):
                found -= {node.primitive.step}
            self.depends[node.id] = found
        self._around: dict[str, tuple[str, ...]] = {}

    def of(self, node: int) -> tuple[str, ...]:
        """The recurrences in which a node is computed, outermost first."""
        steps: set[str] = set()
        for step in self.depends.get(node, ()):
            steps.update(self.inside(step))
        return tuple(sorted(steps, key=lambda s: (len(self.inside(s)), s)))

    def inside(self, step: str) -> tuple[str, ...]:
        """The recurrences around the body of one, with itself."""
        if step not in self._around:
            around = self.of(self.ends[step]) if step in self.ends else ()
            self._around[step] = (*around, step)
        return self._around[step]


@frozen
class Held:
    """A value of this shape that a recurrence keeps: in `root`, at a place along its first axis,
    stored at the steps of `nest`."""

    root: Ref
    place: Expr
    shape: tuple[Expr, ...]
    nest: tuple[str, ...]


def held_values(graph: Graph, nests: Nests) -> dict[Ref, list[Held]]:
    """What the recurrences of a graph keep of each value."""
    found: dict[Ref, list[Held]] = {}

    def hold(ref: Ref, root: Ref, place: Expr, nest: tuple[str, ...]) -> None:
        found.setdefault(ref, []).append(Held(root, place, graph.type(ref).shape, nest))

    for node in graph.nodes.values():
        p = node.primitive
        if isinstance(p, Carried):
            hold(node.operands[0], Ref(node.id), const(0), nests.inside(p.step)[:-1])
        elif isinstance(p, Recurrence):
            half = mod(sym(p.step) + 1, 2, graph.facts)
            places = (*[half] * p.carried, *p.places)
            for number, place in enumerate(places):
                ref = node.operands[p.carried + number]
                hold(ref, Ref(node.id, number), place, nests.inside(p.step))
    return found


def symbols_of(primitive: Primitive) -> frozenset[str]:
    """Every symbol in the expressions of a primitive."""
    # A constant is its bytes, which are not to be kept.
    return frozenset() if isinstance(primitive, Constant) else _symbols_of(primitive)


@lru_cache(maxsize=1 << 12)
def _symbols_of(primitive: Primitive) -> frozenset[str]:
    return frozenset[str]().union(*(e.symbols() for e in _exprs(primitive)))


def _exprs(part: Any) -> Iterator[Expr]:
    if isinstance(part, Expr):
        yield part
    elif isinstance(part, tuple):
        for item in part:
            yield from _exprs(item)
    elif is_dataclass(part):
        for field in fields(part):
            yield from _exprs(getattr(part, field.name))


def carried(b: Builder, step: str, number: int, start: Ref) -> Ref:
    """The value that a recurrence carries, at its step."""
    type = b.type(start)
    both = TensorType(type.dtype, (const(2), *type.shape))
    (held,) = b.add(Carried(step, number), (start,), (both,))
    return latest(b, held, sym(step))


def latest(b: Builder, held: Ref, step: Expr) -> Ref:
    """Of the two latest values of what is carried, the one at a step."""
    half = mod(step, 2, b.facts)
    return b.view(held, b.type(held).shape[1:], lambda *at: [half, *at])


def recurrence(
    b: Builder,
    step: str,
    count: Expr,
    held: Sequence[Ref],
    following: Sequence[Ref],
    gathered: Sequence[tuple[Ref, Expr]],
) -> tuple[Ref, ...]:
    """The two latest of each carried value, and what is gathered, each with a step's place."""
    types = [b.type(ref) for ref in held]
    for ref, _ in gathered:
        types.append(gathered_type(b.type(ref), count))
    primitive = Recurrence(step, count, len(held), tuple(at for _, at in gathered))
    return b.add(primitive, (*held, *following, *(ref for ref, _ in gathered)), types)


def gathered_type(type: TensorType, count: Expr) -> TensorType:
    """The type of the values of all steps."""
    return TensorType(type.dtype, (count, *type.shape))
