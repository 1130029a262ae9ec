"""From the dataflow graph of a pipeline to the nodes of a model."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence, Set
from typing import Any

import numpy as np

from stagefuse.compiler.graph import (
    Concat,
    Constant,
    Gather,
    Graph,
    Indirect,
    Input,
    Map,
    Node,
    Position,
    Recurrence,
    Reduce,
    Ref,
    Scalar,
    Scan,
    Scatter,
    Sort,
    State,
    Update,
    View,
    Weight,
    Within,
)
from stagefuse.compiler.plan import ArgumentPlan
from stagefuse.compiler.plan_check import solve_order
from stagefuse.dsl.dims import Expr
from stagefuse.dsl.dtypes import BOOL, I64, DType
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.program import Pipeline

from .forms import Context, Form, one
from .loops import Body, Incomplete
from .model import ELEMENT, Array, Model, Tensor, Unsupported, carrier
from .naming import names_of
from .patterns import PATTERNS
from .products import product
from .sizes import Sizes
from .views import Access, Lookup
from .windows import pool


@frozen
class Failure:
    """A node that has no ONNX form, and why."""

    node: Node
    message: str
    opset: int


def lower(
    pipeline: Pipeline, graph: Graph, opset: int, load: Callable[[str, str], Array]
) -> tuple[Model, list[Tensor], list[Tensor], list[Failure]]:
    """The model, its inputs, its results, and what has no ONNX form."""
    run = Lowering(pipeline, graph, opset, load)
    inputs = run.inputs()
    results = run.results()
    return run.model, inputs, results, run.failures


class Lowering:
    def __init__(
        self, pipeline: Pipeline, graph: Graph, opset: int, load: Callable[[str, str], Array]
    ) -> None:
        self.pipeline, self.graph, self.load = pipeline, graph, load
        self.model = Model(opset)
        self.sizes = Sizes(self.model, graph.facts)
        self.context = Context(graph, self.model, self.sizes)
        self.values: dict[Ref, Tensor] = {}
        self.given: dict[str, Tensor] = {}
        self.failures: list[Failure] = []

    def inside(self) -> Lowering:
        """One that writes into the body of a loop."""
        found = copy.copy(self)
        found.model = Model(self.model.opset)
        found.sizes = Sizes(found.model, self.sizes.facts)
        found.context = Context(self.graph, found.model, found.sizes)
        return found

    def begin(self, around: Lowering, values: Mapping[Ref, Tensor]) -> None:
        """Start the body: it may read what the model around has made so far."""
        self.model.begin(around.model)
        self.sizes.sources, self.sizes.steps = around.sizes.sources, dict(around.sizes.steps)
        self.values = dict(values)

    def inputs(self) -> list[Tensor]:
        """The inputs, the states before the call, and the sizes that the shapes of both give."""
        declared = []
        states = [(s.name, s.type) for s in self.pipeline.states]
        for name, type in (*((n, t) for n, t, _ in self.pipeline.inputs), *states):
            self.given[name] = self.model.input(name, type.dtype, type.shape)
            declared.append(ArgumentPlan(name, "", tuple(map(str, type.shape)), 0))
        tensors = list(self.given.values())
        for name, at, axis, rest, factor in solve_order(declared):
            self.sizes.sources[name] = (tensors[at], axis, rest, factor)
        return tensors

    def results(self) -> list[Tensor]:
        """Each result, and each state after the call, whole, of its own dtype and name."""
        forms = self.forms({ref.node for ref in self.graph.results}, self.graph.nodes.keys())
        self.write_all(forms, names_of(self.graph))
        self.model.path = ""
        found: list[Tensor] = []
        after = [f"{s.name}.next" for s in self.pipeline.states if s.after != s.before]
        names = [*(name for name, _ in self.pipeline.results), *after]
        for place, (name, ref) in enumerate(zip(names, self.graph.results, strict=True)):
            if ref in self.values:
                many = len(self.graph.results) > 1
                default = f"result{place}" if many else "result"
                found.append(self._result(ref, name or default, bool(name), found))
        return found

    def write_all(
        self, forms: Mapping[int, Form], names: Mapping[int, tuple[int, str]] | None = None
    ) -> None:
        """The nodes of some forms, in order."""
        for node_id, form in forms.items():
            node = self.graph.nodes[node_id]
            if any(ref not in self.values for ref in form.needs):
                continue  # something before it failed
            self._write(node, form, (names or {}).get(node_id))

    def _write(self, node: Node, form: Form, name: tuple[int, str] | None) -> None:
        path = [re.sub(r"\W", "_", part) for part in node.label.split(".")[1:-1]]
        self.model.path = "/".join([*path, ""])
        before = len(self.model.nodes)
        try:
            made = form.write([self.values[ref] for ref in form.needs])
        except Incomplete:
            return  # something inside failed
        except Unsupported as error:
            self.failures.append(Failure(node, error.message, error.opset))
            return
        if name and len(self.model.nodes) > before and len(made) == 1 and made[0].known is None:
            own = self.model.nodes[-1].output[0]
            if own == made[0].name:
                depth, own_name = name
                full = "/".join([*path[:depth], own_name])
                made = [self._renamed(made[0], full, before)]
        for number, tensor in enumerate(made):
            self.values[Ref(node.id, number)] = tensor

    def _renamed(self, tensor: Tensor, name: str, since: int = 0) -> Tensor:
        found = Tensor(self.model.rename(tensor.name, name, since), tensor.dtype, tensor.shape)
        self.model.renamed(tensor, found)
        self.values.update((ref, found) for ref, t in self.values.items() if t == tensor)
        return found

    def _result(self, ref: Ref, name: str, is_named: bool, before: Sequence[Tensor]) -> Tensor:
        type = self.graph.type(ref)
        found = self.context.layout.whole(self.values[ref], type.shape)
        found = self._stored(found, type.dtype)
        fixed = found.name in self.model.constants or found in self.given.values()
        if fixed or found in before:
            found = self.model.copy(found)
        plain = re.fullmatch(r"[A-Za-z_]\w*", found.name) and found.name != found.name.title()
        if is_named and found.name != name or not is_named and not plain:
            found = self._renamed(found, name)
        return found

    def _stored(self, x: Tensor, dtype: DType) -> Tensor:
        """In the dtype of the result. Storing f8e5m2 keeps infinities and saturates the rest."""
        if dtype.name != "f8e5m2":
            return self.model.cast(x, dtype)
        maps, largest = self.context.maps, dtype.largest
        kept = maps.op("Max", maps.op("Min", x, maps.like(x, largest)), maps.like(x, -largest))
        infinite = self.model.node("IsInf", [x], BOOL, x.shape)
        whole = maps.where(infinite, x, kept)
        code = ELEMENT[dtype.name]
        return self.model.node("Cast", [whole], dtype, x.shape, to=code, saturate=0)

    # Forms

    def forms(
        self, roots: Set[int], among: Set[int], known: Sequence[Ref] = ()
    ) -> dict[int, Form]:
        """The forms of nodes among some that the roots need, in order of the graph; `known` need
        none."""
        wanted = set(roots)
        found: dict[int, Form] = {}
        for node in reversed(self.graph.nodes.values()):
            if node.id not in wanted or node.id not in among or Ref(node.id) in known:
                continue
            form = self._form(node)
            found[node.id] = form
            wanted.update(ref.node for ref in form.needs)
        return dict(reversed(found.items()))

    def _form(self, node: Node) -> Form:
        for pattern in (product, pool, *PATTERNS):
            form = pattern(self.context, node)
            if form is not None:
                return form
        return self._plain(node)

    def _plain(self, node: Node) -> Form:
        c, p, type = self.context, node.primitive, node.type
        shapes = [self.graph.type(ref).shape for ref in node.operands]
        match p:
            case Input():
                return one([], lambda: self._carried(self.given[p.name]))
            case State():
                return one([], lambda: self._carried(self.given[p.name]))
            case Weight():
                return one([], lambda: self._weight(p, node))
            case Constant():
                shape = [d.as_int() or 0 for d in type.shape]
                array = np.frombuffer(p.data, type.dtype.numpy).reshape(shape)
                return one([], lambda: self._carried(self.model.constant(array, type.dtype)))
            case Scalar():
                value = np.array(p.value)
                return one([], lambda: self.model.constant(value, carrier(type.dtype)))
            case Map():
                return Form(node.operands, lambda t: [self._map(p.fn, t, node)])
            case Reduce():
                return one(node.operands, lambda t: c.folds.reduce(
                    p.kind, t, shapes[0], p.axes, type.dtype))  # fmt: skip
            case View():
                access = Access(shapes[0], p.symbols, type.shape, p.indices, p.guard, p.fill)
                return one(node.operands, lambda t: c.views.write(t, access))
            case Gather():
                return Form(node.operands, lambda t: [self._gather(p, t, node)])
            case Position():
                return one([], lambda: self._position(p, type.shape))
            case Concat():
                return Form(node.operands, lambda t: [self._concat(p, t, node)])
            case Scan():
                return one(node.operands, lambda t: c.folds.scan(p.kind, t, type.shape, p.axis))
            case Sort():
                return Form(node.operands, lambda t: c.folds.sort(
                    t[0], type.shape, p.axis, p.descending, type.shape[p.axis]))  # fmt: skip
            case Scatter():
                return Form(node.operands, lambda t: [c.folds.scatter(
                    p.kind, t, shapes[0], shapes[2], p.axis)])  # fmt: skip
            case Within():
                return one(node.operands, lambda x: self._within(p, x))
            case Update():
                return Form(node.operands, lambda t: [self._update(p, t, node)])
            case Recurrence():
                return Body(self, node).form()
        return Form((), lambda _: self._refuse(p))

    def _refuse(self, primitive: Any) -> Sequence[Tensor]:
        raise Unsupported(f"`{type(primitive).__name__.lower()}` has no ONNX form here")

    def _carried(self, tensor: Tensor) -> Tensor:
        """A stored tensor in the dtype that the model computes with."""
        dtype = tensor.dtype
        if dtype.is_float and dtype.bits == 8:
            self.model.need(19, f"{dtype}")
        return self.model.cast(tensor, carrier(dtype))

    def _weight(self, p: Weight, node: Node) -> Tensor:
        array = self.load(p.weights, p.key)
        files = {n.primitive.weights for n in self.graph.nodes.values()
                 if isinstance(n.primitive, Weight)}  # fmt: skip
        name = p.key if len(files) == 1 else f"{p.weights}.{p.key}"
        return self._carried(self.model.weight(name, array, node.type.dtype))

    def _map(self, fn: str, operands: Sequence[Tensor], node: Node) -> Tensor:
        if fn == "cast" and node.type.dtype != carrier(node.type.dtype):
            return self._rounded(operands[0], node)
        return self.context.maps.apply(fn, operands, node.type.dtype)

    def _rounded(self, x: Tensor, node: Node) -> Tensor:
        """A conversion to a dtype that the model only stores."""
        dtype = node.type.dtype
        if dtype.bits == 8:
            self.model.need(19, f"{dtype}")
        own = self.graph.type(node.operands[0]).dtype
        if own == dtype:
            return x
        return self.model.cast(self.model.cast(x, dtype), carrier(dtype))

    def _gather(self, p: Gather, tensors: Sequence[Tensor], node: Node) -> Tensor:
        c = self.context
        access = self._access(p, tensors, node, node.type.shape)
        return c.views.write(c.layout.whole(tensors[0], access.own), access)

    def _update(self, p: Update, tensors: Sequence[Tensor], node: Node) -> Tensor:
        access = self._access(p, tensors, node, self.graph.type(node.operands[1]).shape)
        return self.context.views.update(tensors[0], tensors[1], access)

    def _access(
        self, p: Gather | Update, tensors: Sequence[Tensor], node: Node, shape: tuple[Expr, ...]
    ) -> Access:
        """Where the elements of a tensor of that shape lie in the first operand."""
        own = self.graph.type(node.operands[0]).shape
        indices = tuple(self._lookup(i, p.symbols, tensors, node, shape)
                        if isinstance(i, Indirect) else i for i in p.indices)  # fmt: skip
        return Access(own, p.symbols, shape, indices)

    def _lookup(
        self, index: Indirect, symbols: Sequence[str], tensors: Sequence[Tensor], node: Node,
        shape: Sequence[Expr],
    ) -> Lookup:
        """An index read from an operand of the node."""
        c, facts = self.context, self.graph.facts.at_element(symbols, shape)
        exprs = (*index.indices, index.scale, index.offset)
        used = frozenset[str]().union(*(e.symbols() for e in exprs))
        names = tuple(n for n in symbols if n in used)
        own = tuple(shape[symbols.index(n)] for n in names)

        def build() -> Tensor:
            ids = self.graph.type(node.operands[index.operand]).shape
            access = Access(ids, names, own, index.indices)
            found = c.views.write(tensors[index.operand], access)
            lines = {n: self.sizes.positions(d, len(names) - k - 1)
                     for k, (n, d) in enumerate(zip(names, own, strict=True))}  # fmt: skip
            if index.scale.as_int() != 1:
                by = self.sizes.value(index.scale, lines, facts)
                found = self.sizes.apply("Mul", found, by)
            if index.offset.terms:
                by = self.sizes.value(index.offset, lines, facts)
                found = self.sizes.apply("Add", found, by)
            return found

        return Lookup(names, build)

    def _within(self, p: Within, x: Tensor) -> Tensor:
        """Counted from the start; engines report what is out of range where it is used."""
        maps = self.context.maps
        below = maps.compare("Less", x, self.model.constant(np.array(0), I64))
        from_end = self.model.node("Add", [x, self.sizes.scalar(p.extent)], I64, x.shape)
        return maps.where(below, from_end, x)

    def _position(self, p: Position, shape: tuple[Expr, ...]) -> Tensor:
        lines = {n: self.sizes.positions(d, len(shape) - k - 1)
                 for k, (n, d) in enumerate(zip(p.symbols, shape, strict=True))}  # fmt: skip
        facts = self.graph.facts.at_element(p.symbols, shape)
        known = p.expr.as_int()
        if known is not None:
            return self.model.constant(known)
        if not p.expr.symbols() & set(p.symbols):
            return self.sizes.scalar(p.expr)
        return self.sizes.value(p.expr, lines, facts)

    def _concat(self, p: Concat, tensors: Sequence[Tensor], node: Node) -> Tensor:
        """The axes that all parts only repeat stay small."""
        c = self.context
        whole = []
        for tensor, ref in zip(tensors, node.operands, strict=True):
            shape = self.graph.type(ref).shape
            whole.append(c.layout.whole(tensor, shape))
        return self.model.node("Concat", whole, whole[0].dtype, node.type.shape, axis=p.axis)


__all__ = ["I64", "lower"]
