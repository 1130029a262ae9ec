"""Gives convolutions for GPUs, and what lies between them, the channels as their last axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import ClassVar, TypeAlias, TypeVar

from stagefuse.compiler.graph import (
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
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.patterns.convolved import (
    Convolution,
    convolution_of,
    convolve,
    folded,
    last,
)
from stagefuse.dsl.dims import Expr, const
from stagefuse.dsl.frozen import frozen

from .record import Pass

T = TypeVar("T")
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
    """A value with its axes in another order, in which the last one is that of channels."""

    ref: Ref
    order: tuple[int, ...]


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
            self.new[ref] = self.view(made.ref, shape, lambda *at: _in_order(at, made.order))
        return self.new[ref]

    def ordered(self, ref: Ref, order: tuple[int, ...]) -> Ref:
        """A value with its axes in an order; of a conversion, what it converts."""
        made, node = self.moved.get(ref), self.graph.nodes[ref.node]
        if made is not None and made.order == order:
            return made.ref
        if node.primitive == Map("cast"):
            return self.b.cast(self.ordered(node.operands[0], order), node.type.dtype)
        if isinstance(node.primitive, View) and ref not in self.moved:
            stored = self._weights(node, node.primitive, order)
            if stored is not None:
                return stored
        shape = _in_order(self.graph.type(ref).shape, order)
        return self.view(self.plain(ref), shape, lambda *at: _restored(at, order))

    def _weights(self, node: Node, view: View, order: tuple[int, ...]) -> Ref | None:
        """A view of weights with axes in an order, which are then stored along the last one."""
        (source,), axis = node.operands, order[-1]
        if not isinstance(self.graph.nodes[source.node].primitive, Weight | Constant):
            return None
        names = [e.as_symbol() for e in view.indices]
        if view.guard or view.symbols[axis] not in names[:-1]:
            return None
        own, shape = names.index(view.symbols[axis]), self.graph.type(source).shape
        along = _with_last(own, len(shape))
        turned = _in_order(shape, along)
        stored = self.b.view(self.plain(source), turned, lambda *at: _restored(at, along))

        def place(*at: Expr) -> list[Expr]:
            here = dict(zip(view.symbols, _restored(at, order), strict=True))
            return last([e.substitute(here) for e in view.indices], own)

        return self.b.view(stored, _in_order(node.type.shape, order), place)

    def is_last(self, ref: Ref, axis: int) -> bool:
        """Whether a value is stored with an axis last, or what it is converted from is."""
        return ref in self.moved and self.moved[ref].order[-1] == axis

    def view(
        self, x: Ref, shape: Sequence[Expr], place: Place, guard: Place | None = None,
        fill: float | int | bool = 0,
    ) -> Ref:  # fmt: skip
        """A view, folded into one that it looks at."""
        made = self.b.view(x, shape, place, guard, fill)
        return made if made == x else folded(self.b, made)

    def _keep(self, node: Node, ref: Ref, order: Sequence[int]) -> bool:
        self.moved[Ref(node.id)] = _Moved(ref, tuple(order))
        return True

    # Nodes

    def _moved(self, node: Node) -> bool:
        """Whether a node is computed with an axis last, as its operands are."""
        primitive = node.primitive
        if node.id in self.found:
            return self._convolve(node, self.found[node.id])
        if isinstance(primitive, View):
            return self._viewed(node, primitive)
        order = next((self.moved[ref].order for ref in node.operands if ref in self.moved), None)
        if order is None:
            return False
        if isinstance(primitive, Map):
            operands = [self.ordered(ref, order) for ref in node.operands]
            made = self.b.map(primitive.fn, *operands, dtype=node.type.dtype)
            return self._keep(node, made, order)
        if isinstance(primitive, Concat):
            operands = [self.ordered(ref, order) for ref in node.operands]
            return self._keep(node, self.b.concat(operands, order.index(primitive.axis)), order)
        if isinstance(primitive, Reduce) and order[-1] not in primitive.axes:
            (operand,) = node.operands
            axes = [order.index(a) for a in primitive.axes]
            whole = self.ordered(operand, order)
            made = self.b.reduce(primitive.kind, whole, axes, node.type.dtype)
            kept = [a for a in order if a not in primitive.axes]
            return self._keep(node, made, [sorted(kept).index(a) for a in kept])
        return False

    def _viewed(self, node: Node, view: View) -> bool:
        """A view of a value in another order; the last of its own axes is that along memory."""
        made = self.moved.get(node.operands[0])
        if made is None:
            return False
        indices = _in_order(view.indices, made.order)

        def at_axes(exprs: Sequence[Expr]) -> Place:
            return lambda *at: [e.substitute(dict(zip(view.symbols, at, strict=True)))
                                for e in exprs]  # fmt: skip

        shape, fill = node.type.shape, view.fill
        plain = self.view(made.ref, shape, at_axes(indices), at_axes(view.guard), fill)
        self.new[Ref(node.id)] = plain
        axis = self._innermost(plain)
        if axis is None:
            return True

        order = _with_last(axis, len(shape))

        def restored(place: Place) -> Place:
            return lambda *at: place(*_restored(at, order))

        ways = restored(at_axes(indices)), restored(at_axes(view.guard))
        moved = self.view(made.ref, _in_order(shape, order), *ways, fill)
        return self._keep(node, moved, order)

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
        shape = self.graph.type(found.source).shape
        image = self.ordered(found.source, _with_last(found.axis, len(shape)))
        weights = self.plain(found.weights)
        return self._keep(node, *convolve(self.b, node, found, image, weights, ready))


def _in_order(items: Sequence[T], order: Sequence[int]) -> list[T]:
    return [items[a] for a in order]


def _restored(at: Sequence[Expr], order: Sequence[int]) -> list[Expr]:
    """An index whose parts are in an order, in that of the axes."""
    return [at[order.index(a)] for a in range(len(order))]


def _with_last(axis: int, rank: int) -> tuple[int, ...]:
    """All axes, one of them last."""
    return tuple(last(range(rank), axis))
