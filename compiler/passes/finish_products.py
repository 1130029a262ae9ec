"""Has what follows a product computed in the product's own axes, where views merge some of them."""

from __future__ import annotations

from typing import ClassVar

import networkx as nx

from stagefuse.compiler.folded_views import folded_view
from stagefuse.compiler.fusion.inverse import inverse
from stagefuse.compiler.graph import Contract, Graph, Map, Node, Reduce, Ref, View
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.patterns.convolved import folded
from stagefuse.dsl.dims import Expr
from stagefuse.dsl.frozen import frozen

from .record import Pass


@frozen
class FinishProducts(Pass):
    """Maps of a product that a view has reordered are computed before the view.

    A convolution in groups is a product of groups by channels of each, whose view has them as one
    axis. A bias, norm, activation or residual that follows the view would be a kernel of its own.
    Only where views merge axes, or order them: then whatever else the maps read is read at sums of
    the product's axes, without divisions. What is reduced afterwards stays as it is, and so does
    what also needs something else that is made of the product: its kernel could not compute that.
    """

    name: ClassVar[str] = "finish_products"
    requires: ClassVar[tuple[str, ...]] = ("products-found",)
    breaks: ClassVar[tuple[str, ...]] = ("views-folded",)

    def run(self, graph: Graph) -> Graph:
        if not any(isinstance(n.primitive, Contract) for n in graph.nodes.values()):
            return graph
        mover = _Mover(graph)
        after = mover.run()
        return after if mover.moved else graph


@frozen
class _Apart:
    """A value as a view of what has the axes of a `product`; `at`: where their elements go."""

    product: int
    inside: Ref
    view: View
    at: tuple[Expr, ...]


class _Mover:
    def __init__(self, graph: Graph) -> None:
        self.graph, self.b = graph, Builder(graph.facts)
        self.kept = _kept(graph)
        self.after: dict[int, set[int]] = {}
        """What is made of the results of products."""
        self.finished: dict[Ref, int] = {}
        """Products and maps of them, in the new graph, and which product."""
        self.apart: dict[Ref, _Apart] = {}
        """What is a view of one of these, by what it was in the old graph."""
        self.moved = set[Ref]()
        """What was computed after a view, in the old graph."""

    def run(self) -> Graph:
        new: dict[Ref, Ref] = {}
        for node in self.graph.nodes.values():
            with self.b.at(node.span, node.stack, node.label):
                operands = [new[ref] for ref in node.operands]
                moved = self._moved(node, operands)
                again = any(ref in self.moved for ref in node.operands)
                made = moved or (folded_view(self.b, node, operands) if again else None)
                made = made or self.b.add(node.primitive, operands, node.types)
                new.update({Ref(node.id, i): ref for i, ref in enumerate(made)})
                self._note(node, operands, made[0])
        self.b.graph.results = tuple(new[ref] for ref in self.graph.results)
        return self.b.graph.live()

    def _note(self, node: Node, operands: list[Ref], made: Ref) -> None:
        """Notes what is a product or a map of one, or is a view of such."""
        primitive, ref = node.primitive, Ref(node.id)
        if ref in self.moved:
            return
        of = [self.finished[x] for x in operands if x in self.finished]
        if isinstance(primitive, Contract):
            self.finished[made] = node.id
        elif isinstance(primitive, Map) and of:
            self.finished[made] = of[0]
        elif isinstance(primitive, View) and operands[0] in self.finished:
            at = self._merged(primitive, node, operands[0])
            if at is not None:
                self.apart[ref] = _Apart(of[0], operands[0], primitive, at)

    def _merged(self, view: View, node: Node, inside: Ref) -> tuple[Expr, ...] | None:
        """Where the elements of what a view reads go, if it merges axes and all stay adjacent."""
        shape = self.b.type(inside).shape
        if view.guard or len(view.symbols) >= len(shape):
            return None
        at = inverse(view, node.type.shape, shape, self.graph.facts)
        if at is None or not at or any(str(e).count("//") + str(e).count("%") for e in at):
            return None
        last = max((n for n, d in enumerate(shape) if d.as_int() != 1), default=-1)
        step = at[-1].coefficient(f"d{last}")
        return at if step is not None and step.as_int() == 1 else None

    def _moved(self, node: Node, operands: list[Ref]) -> tuple[Ref, ...] | None:
        """A map computed in the axes of a product that it reads a view of."""
        if not isinstance(node.primitive, Map) or node.id in self.kept:
            return None
        apart = [self.apart[x] for x in node.operands if x in self.apart]
        found = next((x for x in apart if self._may_finish(x, node)), None)
        if found is None:
            return None
        inside = [
            self.apart[old].inside
            if old in self.apart and self.apart[old].view == found.view
            and self.b.type(self.apart[old].inside).shape == self.b.type(found.inside).shape
            else self._within(ref, found)
            for old, ref in zip(node.operands, operands, strict=True)
        ]  # fmt: skip
        made = self.b.map(node.primitive.fn, *inside, dtype=node.type.dtype)
        self.finished[made] = found.product
        self.apart[Ref(node.id)] = _Apart(found.product, made, found.view, found.at)
        self.moved.add(Ref(node.id))
        return self.b.add(found.view, (made,), node.types)

    def _may_finish(self, found: _Apart, node: Node) -> bool:
        """Whether nothing else that a map reads is made of what the product's kernel stores."""
        product = found.product
        if product not in self.after:
            self.after[product] = nx.descendants(self.graph.topology, product)
        others = (x for x in node.operands if x.node in self.after[product])
        return all(x in self.apart and self.apart[x].product == product for x in others)

    def _within(self, ref: Ref, found: _Apart) -> Ref:
        """Another operand in a product's axes; of a conversion, what it converts."""
        node = self.b.graph.nodes[ref.node]
        if node.primitive == Map("cast"):
            return self.b.cast(self._within(node.operands[0], found), node.type.dtype)
        names = [f"d{n}" for n in range(self.b.type(found.inside).rank)]

        def place(*at: Expr) -> list[Expr]:
            here = dict(zip(names, at, strict=True))
            return [e.substitute(here) for e in found.at]

        return folded(self.b, self.b.view(ref, self.b.type(found.inside).shape, place))


def _kept(graph: Graph) -> set[int]:
    """The maps whose rows are reduced, or that are sorted or read by position, and conversions for
    products and such, whose readers convert what is stored."""
    whole, converted, uses = set[int](), set[int](), graph.uses()
    for node in reversed(list(graph.nodes.values())):
        users = [graph.nodes[u] for u in uses.get(Ref(node.id), ())]
        if any(u.id in whole or _takes_rows(graph, u) for u in users) and not _is_window(node):
            whole.add(node.id)
        if node.primitive == Map("cast") and not any(isinstance(u.primitive, Map) for u in users):
            converted.add(node.id)
    return whole | converted


def _takes_rows(graph: Graph, node: Node) -> bool:
    """Whether a node reads whole rows of what it is made of, or elements wherever they lie."""
    primitive = node.primitive
    if isinstance(primitive, Reduce):
        return graph.type(node.operands[0]).rank - 1 in primitive.axes
    return not isinstance(primitive, Map | View | Contract)


def _is_window(node: Node) -> bool:
    """Whether a node is a view along one of whose axes two indices move, as in pooling."""
    view = node.primitive
    if not isinstance(view, View):
        return False
    return any(len(e.symbols() & set(view.symbols)) > 1 for e in view.indices)
