"""Gives convolutions for GPUs, and what lies between them, the channels as their last axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias

from stagefuse.dsl.dims import Expr, const
from stagefuse.dsl.frozen import frozen

from ..convolved import Convolution, convolution_of, convolve, folded, last
from ..graph import (
    Concat,
    Constant,
    Contract,
    Graph,
    Map,
    Node,
    Reduce,
    Ref,
    Scalar,
    View,
    Weight,
    flatten_index,
)
from ..graph_builder import Builder
from .record import Pass

Place: TypeAlias = Callable[..., Sequence[Expr]]


@frozen
class ChannelsLast(Pass):
    """A convolution becomes a product of places by channels, whose left operand is windows of a
    tensor with channels last; so are the values between convolutions, until something needs
    another order. Only tensors that come from elsewhere are stored in another order first.
    """

    name: ClassVar[str] = "channels_last"
    requires: ClassVar[tuple[str, ...]] = ("products-found",)
    breaks: ClassVar[tuple[str, ...]] = ("views-folded",)

    def run(self, graph: Graph) -> Graph:
        known = _constants(graph)
        found = {
            node.id: made
            for node in graph.nodes.values()
            if isinstance(node.primitive, Contract)
            and (made := convolution_of(graph, node)) is not None
            and made.source.node not in known
        }
        if not any(made.must_move for made in found.values()):
            return graph
        return _Mover(graph, found).run()


def _constants(graph: Graph) -> set[int]:
    """The nodes of known values. None is an image: groups of quantised weights look like one."""
    known = set[int]()
    for node in graph.nodes.values():
        stored = isinstance(node.primitive, Weight | Constant | Scalar)
        if stored or node.operands and all(ref.node in known for ref in node.operands):
            known.add(node.id)
    return known


@frozen
class _Moved:
    """A value with one of its axes last."""

    ref: Ref
    axis: int


class _Mover:
    def __init__(self, graph: Graph, found: dict[int, Convolution]) -> None:
        self.graph, self.found = graph, found
        self.b = Builder(graph.facts)
        self.new: dict[Ref, Ref] = {}
        self.moved: dict[Ref, _Moved] = {}

    def run(self) -> Graph:
        for node in self.graph.nodes.values():
            with self.b.at(node.span, node.stack, node.label):
                if not self._moved(node):
                    operands = [self.plain(ref) for ref in node.operands]
                    made = self.b.add(node.primitive, operands, node.types)
                    self.new.update({Ref(node.id, i): ref for i, ref in enumerate(made)})
        self.b.graph.results = tuple(self.plain(ref) for ref in self.graph.results)
        return self.b.graph.live()

    # Values in either order

    def plain(self, ref: Ref) -> Ref:
        """A value as it was before."""
        if ref not in self.new:
            made, shape = self.moved[ref], self.graph.type(ref).shape
            self.new[ref] = self.view(made.ref, shape, lambda *at: last(at, made.axis))
        return self.new[ref]

    def last(self, ref: Ref, axis: int) -> Ref:
        """A value with an axis last; of a conversion, what it converts."""
        made, node = self.moved.get(ref), self.graph.nodes[ref.node]
        if made is not None and made.axis == axis:
            return made.ref
        if node.primitive == Map("cast"):
            return self.b.cast(self.last(node.operands[0], axis), node.type.dtype)
        if isinstance(node.primitive, View) and ref not in self.moved:
            stored = self._weights(node, node.primitive, axis)
            if stored is not None:
                return stored
        shape = last(self.graph.type(ref).shape, axis)
        return self.view(self.plain(ref), shape, lambda *at: _restored(at, axis))

    def _weights(self, node: Node, view: View, axis: int) -> Ref | None:
        """A view of weights with an axis last, along which they are then stored."""
        (source,) = node.operands
        if not isinstance(self.graph.nodes[source.node].primitive, Weight | Constant):
            return None
        names = [e.as_symbol() for e in view.indices]
        if view.guard or view.symbols[axis] not in names[:-1]:
            return None
        own, shape = names.index(view.symbols[axis]), self.graph.type(source).shape
        stored = self.b.view(self.plain(source), last(shape, own), lambda *at: _restored(at, own))

        def place(*at: Expr) -> list[Expr]:
            here = dict(zip(view.symbols, _restored(at, axis), strict=True))
            return last([e.substitute(here) for e in view.indices], own)

        return self.b.view(stored, last(node.type.shape, axis), place)

    def is_last(self, ref: Ref, axis: int) -> bool:
        """Whether a value is stored with an axis last, or what it is converted from is."""
        return ref in self.moved and self.moved[ref].axis == axis

    def view(
        self, x: Ref, shape: Sequence[Expr], place: Place, guard: Place | None = None,
        fill: float | int | bool = 0,
    ) -> Ref:  # fmt: skip
        """A view, folded into one that it looks at."""
        made = self.b.view(x, shape, place, guard, fill)
        return made if made == x else folded(self.b, made)

    def _keep(self, node: Node, ref: Ref, axis: int) -> bool:
        self.moved[Ref(node.id)] = _Moved(ref, axis)
        return True

    # Nodes

    def _moved(self, node: Node) -> bool:
        """Whether a node is computed with an axis last, as its operands are."""
        primitive = node.primitive
        if node.id in self.found:
            return self._convolve(node, self.found[node.id])
        if isinstance(primitive, View):
            return self._viewed(node, primitive)
        axis = next((self.moved[ref].axis for ref in node.operands if ref in self.moved), None)
        if axis is None:
            return False
        if isinstance(primitive, Map):
            operands = [self.last(ref, axis) for ref in node.operands]
            made = self.b.map(primitive.fn, *operands, dtype=node.type.dtype)
            return self._keep(node, made, axis)
        if isinstance(primitive, Concat):
            operands = [self.last(ref, axis) for ref in node.operands]
            along = _moved_to(primitive.axis, axis, node.type.rank)
            return self._keep(node, self.b.concat(operands, along), axis)
        if isinstance(primitive, Reduce) and axis not in primitive.axes:
            (operand,) = node.operands
            rank = self.graph.type(operand).rank
            axes = [_moved_to(a, axis, rank) for a in primitive.axes]
            made = self.b.reduce(primitive.kind, self.last(operand, axis), axes, node.type.dtype)
            return self._keep(node, made, axis - sum(a < axis for a in primitive.axes))
        return False

    def _viewed(self, node: Node, view: View) -> bool:
        """A view of a value with an axis last; of its own axes the one that runs along memory."""
        made = self.moved.get(node.operands[0])
        if made is None:
            return False
        indices = last(view.indices, made.axis)

        def at_axes(exprs: Sequence[Expr]) -> Place:
            return lambda *at: [e.substitute(dict(zip(view.symbols, at, strict=True)))
                                for e in exprs]  # fmt: skip

        shape, fill = node.type.shape, view.fill
        plain = self.view(made.ref, shape, at_axes(indices), at_axes(view.guard), fill)
        self.new[Ref(node.id)] = plain
        axis = self._innermost(plain)
        if axis is None:
            return True

        def restored(place: Place) -> Place:
            return lambda *at: place(*_restored(at, axis))

        ways = restored(at_axes(indices)), restored(at_axes(view.guard))
        return self._keep(node, self.view(made.ref, last(shape, axis), *ways, fill), axis)

    def _innermost(self, ref: Ref) -> int | None:
        """The axis of a view along which elements are adjacent in memory."""
        node = self.b.graph.nodes[ref.node]
        view = node.primitive
        if not isinstance(view, View):
            return None
        shape = self.b.type(node.operands[0]).shape
        facts = self.b.ranges(view.symbols, node.type.shape)
        place = facts.simplify(flatten_index(view.indices, shape))
        for axis, name in enumerate(view.symbols):
            if place.coefficient(name) == const(1):
                return axis
        return None

    def _convolve(self, node: Node, found: Convolution) -> bool:
        """A convolution; one of single elements only where its source has channels last, or of
        8-bit operands."""
        ready = self.is_last(found.source, found.axis)
        if not found.must_move and not ready:
            return False
        image, weights = self.last(found.source, found.axis), self.plain(found.weights)
        ref, order = convolve(self.b, node, found, image, weights, ready)
        shape, axis = node.type.shape, order[-1]

        def place(*at: Expr) -> list[Expr]:
            plain = _restored(at, axis)
            return [plain[a] for a in order]

        return self._keep(node, self.view(ref, last(shape, axis), place), axis)


def _restored(at: Sequence[Expr], axis: int) -> list[Expr]:
    """An index with its last part back at an axis."""
    return [*at[:axis], at[-1], *at[axis:-1]]


def _moved_to(axis: int, moved: int, rank: int) -> int:
    """Where an axis is after another one has been moved to the end."""
    return rank - 1 if axis == moved else axis - (axis > moved)
