"""Recurrences as `Loop`: the nodes of a step are written into its body.

What is carried stands for both of its halves in the graph: a tensor of size 1 along the axis that
the step chooses from. The turn of the loop is the step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import onnx

from stagefuse.compiler.graph import Node, Recurrence, Ref
from stagefuse.compiler.recurrence import Nests
from stagefuse.dsl.dims import Expr, sym
from stagefuse.dsl.dtypes import BOOL, I64, DType

from .forms import Form
from .model import ELEMENT, Tensor
from .views import Access

if TYPE_CHECKING:
    from .lower import Lowering


class Incomplete(Exception):
    """A node of a body has no ONNX form."""


class Body:
    """The nodes of one recurrence: their forms, and what these need from around it."""

    def __init__(self, owner: Lowering, node: Node) -> None:
        assert isinstance(node.primitive, Recurrence)
        self.owner, self.node, self.primitive = owner, node, node.primitive
        n = self.primitive.carried
        self.held, self.ends = node.operands[:n], node.operands[n:]
        self.starts = [owner.graph.nodes[ref.node].operands[0] for ref in self.held]
        depends = Nests(owner.graph).depends
        self.inside = {k for k, steps in depends.items() if self.primitive.step in steps}
        self.inner = owner.inside()
        self.forms = self.inner.forms(
            {ref.node for ref in self.ends if ref.node in self.inside}, self.inside, self.held
        )
        needed = [ref for form in self.forms.values() for ref in form.needs]
        outer = [ref for ref in (*needed, *self.ends) if ref.node not in self.inside]
        self.needs = tuple(dict.fromkeys((*self.starts, *outer)))

    def form(self) -> Form:
        return Form(self.needs, self.write)

    def write(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The loop in the model around; its results as the graph has them."""
        given = dict(zip(self.needs, tensors, strict=True))
        model, context = self.owner.model, self.owner.context
        states = []
        for start in self.starts:
            states.append(context.layout.whole(given[start], self.owner.graph.type(start).shape))
        body, kinds = self._body(states, given)
        trips = self.owner.sizes.scalar(self.primitive.count)
        always = model.constant(True, BOOL)
        made = model.many("Loop", [trips, always, *states], kinds, body=body)
        results = [context.layout.unsqueezed(t, [0]) for t in made[: len(states)]]
        for tensor, place in zip(made[len(states) :], self.primitive.places, strict=True):
            results.append(self._ordered(self._sized(tensor), place))
        return results

    def _sized(self, x: Tensor) -> Tensor:
        """What is gathered in no turns has a shape nevertheless: engines can't know all of it."""
        known = all(d.as_int() is not None for d in x.shape[1:])
        if known or self.owner.sizes.facts.is_positive(x.shape[0]):
            return x
        sizes = self.owner.sizes.vector(x.shape)
        return self.owner.model.node("Reshape", [x, sizes], x.dtype, x.shape, allowzero=1)

    def _ordered(self, x: Tensor, place: Expr) -> Tensor:
        """The values of all turns, each at its place."""
        if place == sym(self.primitive.step):
            return x
        symbols = tuple(f"i{n}" for n in range(x.rank))
        indices = (x.shape[0] - 1 - sym(symbols[0]), *map(sym, symbols[1:]))
        return self.owner.context.views.write(x, Access(x.shape, symbols, x.shape, indices))

    def _body(
        self, states: Sequence[Tensor], given: dict[Ref, Tensor]
    ) -> tuple[onnx.GraphProto, list[tuple[DType, tuple[Expr, ...]]]]:
        """The graph of a turn, and the dtypes and shapes of the loop's results."""
        inner = self.inner
        inner.begin(self.owner, given)
        model, graph = inner.model, self.owner.graph
        turn = model.input(model.fresh("turn"), I64, ())
        going = model.input(model.fresh("going"), BOOL, ())
        carried = [model.input(model.fresh(f"{s.name}.here"), s.dtype, s.shape) for s in states]
        inner.sizes.steps[self.primitive.step] = inner.context.layout.unsqueezed(turn, [0])
        for ref, tensor in zip(self.held, carried, strict=True):
            inner.values[ref] = inner.context.layout.unsqueezed(tensor, [0])
        inner.write_all(self.forms)
        if any(ref not in inner.values for ref in self.ends):
            raise Incomplete
        results = [model.node("Identity", [going], BOOL, ())]
        kinds: list[tuple[DType, tuple[Expr, ...]]] = []
        for place, ref in enumerate(self.ends):
            shape = graph.type(ref).shape
            found = inner.context.layout.whole(inner.values[ref], shape)
            results.append(model.copy(found, "result"))
            first = () if place < len(states) else (self.primitive.count,)
            kinds.append((found.dtype, (*first, *shape)))
        made = onnx.helper.make_graph(
            model.nodes, "step", [_typed(t) for t in (turn, going, *carried)],
            [_typed(t) for t in results],
        )  # fmt: skip
        return made, kinds


def _typed(tensor: Tensor) -> onnx.ValueInfoProto:
    shape = [known if (known := d.as_int()) is not None else str(d) for d in tensor.shape]
    made: onnx.ValueInfoProto = onnx.helper.make_tensor_value_info(
        tensor.name, ELEMENT[tensor.dtype.name], shape
    )
    return made


def read_inside(node: onnx.NodeProto) -> set[str]:
    """The names that a node reads, in its bodies too."""
    found = set(node.input)
    for attribute in node.attribute:
        for inner in attribute.g.node:
            found |= read_inside(inner)
    return found

