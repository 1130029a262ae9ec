"""Groups that are the same kernel: the layers of a model are made of the same nodes.

What lowering sees of a group is its *form*: the nodes inside with what they compute, their types
and how they are connected, and what kind of node gives each value that they read. Values are
numbered from the results back, so that it does not matter which they are. The kernel of a group is
that of every group of the same form, with other values as arguments.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import fields, replace
from typing import Any, Generic, TypeVar

from stagefuse.compiler.graph import (
    Concat,
    Contract,
    Gather,
    Graph,
    Map,
    Position,
    Ref,
    Scalar,
    Scatter,
    View,
    Within,
)
from stagefuse.compiler.lower import Lowered
from stagefuse.compiler.lower.kernel import label_of
from stagefuse.compiler.patterns.attention import Softmax
from stagefuse.dsl.dims import const
from stagefuse.dsl.frozen import frozen

from .groups import Access, Group

About = TypeVar("About")
SEEN_THROUGH = (Map, View, Position, Scalar, Concat, Gather, Within)
"""What gives a value that is read and may matter to its readers; of others they know the type."""
REPORTING = (Gather, Within, Scatter)
"""Nodes that may report a position, with their place in the source."""


@frozen
class Form:
    """What lowering sees of a group; `nodes` are those that `key` numbers, in order."""

    key: Hashable
    nodes: tuple[int, ...]


class Forms:
    """The forms of the groups of a graph."""

    def __init__(self, graph: Graph) -> None:
        self.uses = graph.uses()

    def of(self, graph: Graph, group: Group) -> Form:
        """The form of a group in the graph, or in one that differs in what is inside the group."""
        walk = _Walk(graph, group)
        panels = any(self._are_panels(graph, root) for root in group.roots)
        key = (walk.group(group), walk.records(), group.roots[0] if panels else None)
        return Form(key, tuple(walk.numbers))

    def _are_panels(self, graph: Graph, root: Ref) -> bool:
        """Whether a product reads a value as its panels: how they are packed depends on it."""
        readers = (graph.nodes[user] for user in self.uses.get(root, ()))
        return any(isinstance(n.primitive, Contract) and n.operands[1] == root for n in readers)


class _Walk:
    """Numbers the nodes of a group from its results back, then what they read, and that of these:
    a conversion before a product may be left to the product."""

    def __init__(self, graph: Graph, group: Group) -> None:
        self.graph = graph
        self.numbers: dict[int, int] = {}
        parts = list(_parts(group))
        self.inside = set[int]().union(*(part.members for part in parts))
        for part in parts:
            for ref in (*part.roots, *(source for source, _ in part.placed.values())):
                self._number(ref.node)
        for member in sorted(self.inside):
            self._number(member)
        self._number_outside()

    def _number_outside(self) -> None:
        """Numbers what is read, and what that is made of: a value behind a conversion may be taken
        in place of it."""
        behind = [(number, 0) for number in self.numbers]
        for number, depth in behind:
            node = self.graph.nodes[number]
            moves = isinstance(node.primitive, View) or node.primitive == Map("cast")
            if depth and not isinstance(node.primitive, SEEN_THROUGH) or depth > 1 and not moves:
                continue
            for ref in node.operands:
                if ref.node not in self.numbers:
                    self.numbers[ref.node] = len(self.numbers)
                    behind.append((ref.node, depth if depth and moves else depth + 1))

    def _number(self, node: int) -> None:
        pending = [node]
        while pending:
            here = pending.pop()
            if here not in self.numbers and here in self.inside:
                self.numbers[here] = len(self.numbers)
                pending += [ref.node for ref in reversed(self.graph.nodes[here].operands)]

    def records(self) -> tuple[Hashable, ...]:
        """What is known of each node, in order. Whether a position from data needs a check may
        depend on all that it comes from."""
        strict = any(isinstance(self.graph.nodes[n].primitive, Gather) for n in self.inside)
        return tuple(self._record(number, strict) for number in list(self.numbers))

    def _record(self, number: int, strict: bool) -> Hashable:
        node = self.graph.nodes[number]
        if number in self.inside:
            site = node.span if isinstance(node.primitive, REPORTING) else None
            return node.primitive, node.types, tuple(map(self.of, node.operands)), site
        if strict:
            return number
        if not isinstance(node.primitive, SEEN_THROUGH):
            return type(node.primitive), node.types
        operands = tuple(self.of(ref) for ref in node.operands if ref.node in self.numbers)
        return node.primitive, node.types, operands

    def of(self, value: Any) -> Any:
        """A value with numbers instead of nodes."""
        if isinstance(value, Ref):
            return self.numbers.setdefault(value.node, len(self.numbers)), value.result
        if isinstance(value, tuple | list):
            return tuple(map(self.of, value))
        if isinstance(value, Mapping):
            return tuple((self.of(k), self.of(v)) for k, v in value.items())
        if isinstance(value, Softmax):
            return tuple(self.of(getattr(value, f.name)) for f in fields(value))
        return self.group(value) if isinstance(value, Group) else value

    def group(self, group: Group) -> Hashable:
        """All that a group says."""
        says = {f.name: getattr(group, f.name) for f in fields(group)}
        says["members"] = sorted(self.numbers[member] for member in group.members)
        says["anchor"] = None if group.anchor is None else Ref(group.anchor)
        accesses = {
            Ref(node): found if node in self.inside else [_without_numbers(at) for at in found]
            for node, found in group.accesses.items()
        }
        says["accesses"] = sorted(self.of(accesses), key=_first)
        return tuple(map(self.of, says.values()))


def _without_numbers(access: Access) -> Access:
    """An access without the positions that are known, such as the number of a layer."""
    if access is None:
        return None
    return tuple(const(0) if e.as_int() is not None else e for e in access)


def _first(pair: tuple[Any, ...]) -> Any:
    return pair[0]


def _node(ref: Ref) -> int:
    """The node of a value, or of the product whose parts a value stands for."""
    return ref.node if ref.node >= 0 else -1 - ref.node


def _parts(group: Group) -> Iterable[Group]:
    yield group
    for part in (*([group.rows] if group.rows else []), *group.packs.values()):
        yield from _parts(part)


class Copies(Generic[About]):
    """The kernels of a graph's groups, each with what else its maker says about it."""

    def __init__(self, graph: Graph) -> None:
        self.forms = Forms(graph)
        self.kept: dict[Hashable, tuple[Form, list[tuple[Lowered, About]]]] = {}

    def of(self, graph: Graph, group: Group) -> Alike[About]:
        """The kernels of a group: made for one like it, or yet to be made."""
        alike = Alike(self, graph, group, self.forms.of(graph, group))
        first, made = self.kept.get(alike.form.key, (alike.form, []))
        alike.made = [(alike.copied(first, lowered), about) for lowered, about in made]
        return alike


class Alike(Generic[About]):
    """The kernels of one group, none before they are made and kept."""

    def __init__(self, copies: Copies[About], graph: Graph, group: Group, form: Form) -> None:
        self.copies, self.graph, self.group, self.form = copies, graph, group, form
        self.made: list[tuple[Lowered, About]] = []

    def keep(self, made: Sequence[tuple[Lowered, About]]) -> None:
        """These are the kernels of the group, and of those like it if they read nothing else."""
        self.made = list(made)
        known = set(self.form.nodes)
        if all(_node(ref) in known for lowered, _ in made for ref in lowered.values):
            self.copies.kept[self.form.key] = self.form, self.made

    def copied(self, first: Form, lowered: Lowered) -> Lowered:
        """A kernel that was made for a group of the same form, with this group's values."""
        new = dict(zip(first.nodes, self.form.nodes, strict=True))
        values = tuple(
            Ref(new[ref.node] if ref.node >= 0 else -1 - new[_node(ref)], ref.result)
            for ref in lowered.values
        )
        nodes = tuple(sorted(new[number] for number in lowered.nodes))
        return replace(lowered, values=values, label=label_of(self.graph, self.group), nodes=nodes)
