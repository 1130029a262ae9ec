"""Applies the algebraic rules until none fits."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from stagefuse.compiler.graph import Graph, Map, Primitive, Ref
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.rules import RULES, Match, Rule
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.types import TensorType

from .record import Pass


@frozen
class Simplify(Pass):
    """Applies the local rules of `compiler.rules`; equal nodes become one, unused ones go.

    It ends: operands are simplified before the nodes that read them, and what a rule puts in a
    node's place has fewer nodes that are no index maps, or as many that cost less, or the same
    ones with constants further right. Rules between views shorten chains of views.
    """

    name: ClassVar[str] = "simplify"
    establishes: ClassVar[tuple[str, ...]] = ("simplified", "views-folded")
    without: tuple[str, ...] = ()

    def run(self, graph: Graph) -> Graph:
        return _Simplifier(graph, self.without).run()


def rules_for(primitive: Primitive) -> tuple[Rule, ...]:
    """The rules that look at a primitive, of maps by function."""
    fn = primitive.fn if isinstance(primitive, Map) else ""
    key = (type(primitive).__name__, fn)
    if key not in _BY_KIND:
        kind = type(primitive)
        found = (r for r in RULES if r.kind is kind and (not r.fns or fn in r.fns))
        _BY_KIND[key] = tuple(found)
    return _BY_KIND[key]


_BY_KIND: dict[tuple[str, str], tuple[Rule, ...]] = {}


class _Simplifier:
    def __init__(self, graph: Graph, without: tuple[str, ...]) -> None:
        self.graph, self.without = graph, without
        self.b = Builder(graph.facts)
        uses = graph.uses()
        self.once = {
            ref: len(users) == 1 and ref not in graph.results for ref, users in uses.items()
        }

    def run(self) -> Graph:
        new: dict[Ref, Ref] = {}
        for node in self.graph.nodes.values():
            operands = tuple(new[ref] for ref in node.operands)
            once = tuple(self.once[ref] for ref in node.operands)
            with self.b.at(node.span, node.stack, node.label):
                made = self.add(node.primitive, operands, node.types, once)
            new.update({Ref(node.id, i): ref for i, ref in enumerate(made)})
        self.b.graph.results = tuple(new[ref] for ref in self.graph.results)
        return self.b.graph.live()

    def add(
        self,
        primitive: Primitive,
        operands: Sequence[Ref],
        types: Sequence[TensorType],
        once: tuple[bool, ...] = (),
    ) -> tuple[Ref, ...]:
        """The results of a primitive, or of what a rule puts in its place."""
        match = Match(
            self.b, primitive, tuple(operands), tuple(types),
            once or (False,) * len(operands), self.add,
        )  # fmt: skip
        for rule in rules_for(primitive):
            if rule.name in self.without:
                continue
            made = rule.rewrite(match)
            if made is not None:
                return made if not isinstance(made, Ref) else (made,)
        return self.b.add(primitive, operands, types)
