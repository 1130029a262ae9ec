"""What a node needs and how it is written; and how a graph is searched for structure."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from stagefuse.compiler.graph import Graph, Map, Node, Reduce, Ref, Scalar, View
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.frozen import frozen

from .folds import Folds
from .layout import Layout
from .maps import Maps
from .model import Model, Tensor
from .sizes import Sizes
from .views import Views

Write: TypeAlias = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@frozen
class Form:
    """The values that a node is written from, and how: the tensors of its results."""

    needs: tuple[Ref, ...]
    write: Write


def one(needs: Sequence[Ref], write: Callable[..., Tensor]) -> Form:
    """A form with one result, of a function of the tensors."""
    return Form(tuple(needs), lambda tensors: [write(*tensors)])


@frozen
class Traced:
    """A value behind views without guards: value[symbols] = root[indices]."""

    root: Ref
    symbols: tuple[str, ...]
    indices: tuple[Expr, ...]


class Context:
    """A graph, and the writers of its model."""

    def __init__(self, graph: Graph, model: Model, sizes: Sizes) -> None:
        self.graph, self.model, self.sizes = graph, model, sizes
        self.layout = Layout(model, sizes)
        self.views = Views(model, sizes, self.layout)
        self.maps = Maps(model)
        self.folds = Folds(model, sizes, self.layout)

    # The graph

    def node(self, ref: Ref) -> Node:
        return self.graph.nodes[ref.node]

    def shape(self, ref: Ref) -> tuple[Expr, ...]:
        return self.graph.type(ref).shape

    def mapped(self, ref: Ref, fn: str) -> tuple[Ref, ...] | None:
        """The operands, if the value is that function of them."""
        node = self.node(ref)
        return node.operands if node.primitive == Map(fn) else None

    def traced(self, ref: Ref, levels: int = 99) -> Traced:
        """What a value is a view of."""
        symbols = tuple(f"i{n}" for n in range(len(self.shape(ref))))
        indices = tuple(const(0) if d.as_int() == 1 else sym(s)
                        for s, d in zip(symbols, self.shape(ref), strict=True))  # fmt: skip
        node = self.node(ref)
        while levels and isinstance(node.primitive, View) and not node.primitive.guard:
            view = node.primitive
            given = dict(zip(view.symbols, indices, strict=True))
            indices = tuple(e.substitute(given, self.graph.facts) for e in view.indices)
            ref, levels = node.operands[0], levels - 1
            node = self.node(ref)
        return Traced(ref, symbols, indices)

    def number(self, ref: Ref) -> float | int | bool | None:
        """The number that a value is everywhere."""
        primitive = self.node(self.traced(ref).root).primitive
        return primitive.value if isinstance(primitive, Scalar) else None

    def folded(
        self, ref: Ref, kind: str, axes: tuple[int, ...] | None = None
    ) -> tuple[Ref, tuple[int, ...]] | None:
        """What is reduced, and along which axes, where a value repeats that reduction along them.

        The value has the shape of what is reduced.
        """
        found = self.traced(ref)
        inner = self.reduced(found.root, kind)
        if inner is None or axes not in (None, inner[1]):
            return None
        x, along = inner
        shape = self.shape(x)
        wanted = tuple(const(0) if d.as_int() == 1 else sym(f"i{n}")
                       for n, d in enumerate(shape) if n not in along)  # fmt: skip
        return inner if self.shape(ref) == shape and found.indices == wanted else None

    def reduced(self, ref: Ref, kind: str) -> tuple[Ref, tuple[int, ...]] | None:
        """What is reduced and the axes, where a value is that reduction; means are found too."""
        node = self.node(ref)
        if isinstance(node.primitive, Reduce):
            return (node.operands[0], node.primitive.axes) if node.primitive.kind == kind else None
        if kind == "mean" and node.primitive == Map("div"):
            total = self.reduced(node.operands[0], "sum")
            if total is not None and self._is_count(node.operands[1], *total):
                return total
        return None

    def _is_count(self, ref: Ref, x: Ref, axes: tuple[int, ...]) -> bool:
        """Whether a value is the number of elements along some axes."""
        from stagefuse.compiler.graph import Position

        count = const(1)
        for axis in axes:
            count = count * self.shape(x)[axis]
        known = count.as_int()
        if known is not None:
            return self.number(ref) == known
        root = self.traced(ref).root
        while (inner := self.mapped(root, "cast")) is not None:
            root = self.traced(inner[0]).root
        primitive = self.node(root).primitive
        return isinstance(primitive, Position) and primitive.expr == count

    def factors(self, ref: Ref, depth: int = 4) -> list[Ref]:
        """The factors of a product of products."""
        operands = self.mapped(ref, "mul")
        if operands is None or not depth:
            return [ref]
        return [f for operand in operands for f in self.factors(operand, depth - 1)]
