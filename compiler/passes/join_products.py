"""Joins products of one matrix with several weights into one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

from stagefuse.compiler.graph import Constant, Graph, Map, Node, Reduce, Ref, View, Weight
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.patterns.panel_width import panel_width
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.types import TensorType

from .record import Pass, Place


@frozen
class JoinProducts(Pass):
    """Layers that read one input, such as the queries, keys and values of attention, are one layer.

    Their weights and biases are concatenated, which is done while compiling, and what read one of
    them reads columns of the whole. Only where every part fills whole panels of the joined
    product: then no panel is cut, no column is padded, and the input is read once.
    """

    name: ClassVar[str] = "join_products"
    requires: ClassVar[tuple[str, ...]] = ("views-folded",)
    breaks: ClassVar[tuple[str, ...]] = ("views-folded", "simplified")

    def run(self, graph: Graph) -> Graph:
        groups = [layers for layers in _siblings(graph) if _fills_panels(layers)]
        return _joined(graph, groups) if groups else graph

    def reasons(self, graph: Graph) -> dict[Place, str]:
        return {
            (layer.last.span, layer.last.stack): _reason(layers)
            for layers in _siblings(graph)
            for layer in layers
        }


class _Key(NamedTuple):
    """What layers must share: the input and how it is read, rows, depth, the weight's order."""

    source: Ref
    indices: tuple[Expr, ...]
    rows: tuple[Expr, ...]
    depth: Expr
    transposed: bool
    has_bias: bool
    dtype: str


@frozen
class _Layer:
    key: _Key
    last: Node  # the product, or the sum with the bias
    mul: Node
    weight: Ref
    bias: Ref | None
    columns: int


def _layer(graph: Graph, uses: dict[Ref, list[int]], node: Node) -> _Layer | None:
    """The layer whose product is this node: sum over the last axis of x[..., k] * w[n, k]."""
    if node.primitive != Reduce("sum", (node.type.rank,)) or not node.type.dtype.is_float:
        return None
    mul = graph.nodes[node.operands[0].node]
    if mul.primitive != Map("mul") or node.type.rank < 2 or mul.type.dtype != node.type.dtype:
        return None
    left, right = (graph.nodes[ref.node] for ref in mul.operands)
    x, w = left.primitive, right.primitive
    if not isinstance(x, View) or not isinstance(w, View) or x.guard or w.guard:
        return None
    *_, n, k = w.symbols
    order = [(sym(n), sym(k)), (sym(k), sym(n))]
    columns = mul.type.shape[-2].as_int()
    used = frozenset[str]().union(*(e.symbols() for e in x.indices))
    if w.indices not in order or columns is None or x.symbols[-2] in used:
        return None
    weight = right.operands[0]
    if not isinstance(graph.nodes[weight.node].primitive, Weight | Constant):
        return None
    last, bias = _with_bias(graph, uses, node)
    key = _Key(left.operands[0], x.indices, node.type.shape[:-1], mul.type.shape[-1],
               w.indices != order[0], bias is not None, node.type.dtype.name)  # fmt: skip
    return _Layer(key, last, mul, weight, bias, columns)


def _with_bias(graph: Graph, uses: dict[Ref, list[int]], node: Node) -> tuple[Node, Ref | None]:
    """The only user of a product, if that adds a weight to its columns, and the weight."""
    users = [graph.nodes[n] for n in uses.get(Ref(node.id), ())]
    if len(users) != 1 or Ref(node.id) in graph.results or users[0].primitive != Map("add"):
        return node, None
    other = next((r for r in users[0].operands if r.node != node.id), None)
    if other is None:
        return node, None
    view = graph.nodes[other.node]
    if not isinstance(view.primitive, View) or view.primitive.guard:
        return node, None
    source = graph.nodes[view.operands[0].node]
    along = view.primitive.indices == (sym(view.primitive.symbols[-1]),)
    if not along or not isinstance(source.primitive, Weight | Constant):
        return node, None
    return users[0], view.operands[0]


def _siblings(graph: Graph) -> list[list[_Layer]]:
    """Layers that could be one but for their widths, two or more at a time."""
    found: dict[_Key, list[_Layer]] = {}
    uses = graph.uses()
    for node in graph.nodes.values():
        layer = _layer(graph, uses, node)
        if layer is not None:
            found.setdefault(layer.key, []).append(layer)
    return [layers for layers in found.values() if len(layers) > 1]


def _fills_panels(layers: Sequence[_Layer]) -> bool:
    return all(layer.columns % _width(layers) == 0 for layer in layers)


def _width(layers: Sequence[_Layer]) -> int:
    return panel_width(const(sum(layer.columns for layer in layers)))


def _reason(layers: Sequence[_Layer]) -> str:
    columns = ", ".join(str(layer.columns) for layer in layers)
    width = _width(layers)
    if _fills_panels(layers):
        return f"layers of {columns} columns read one input and fill whole panels of {width}"
    return f"not joined: layers of {columns} columns would cut panels of {width}"


def _joined(graph: Graph, groups: Sequence[Sequence[_Layer]]) -> Graph:
    of = {layer.last.id: layers for layers in groups for layer in layers}
    b = Builder(graph.facts)
    new: dict[Ref, Ref] = {}
    whole: dict[int, Ref] = {}

    def moved(ref: Ref) -> Ref:
        """A weight's node, which may come later in the old graph."""
        if ref not in new:
            node = graph.nodes[ref.node]
            new[ref] = b.add(node.primitive, (), node.types)[ref.result]
        return new[ref]

    for node in graph.nodes.values():
        with b.at(node.span, node.stack, node.label):
            layers = of.get(node.id)
            if layers is None:
                operands = [new[ref] for ref in node.operands]
                made = b.add(node.primitive, operands, node.types)
                new.update({Ref(node.id, i): ref for i, ref in enumerate(made)})
                continue
            key = id(layers)
            if key not in whole:
                weights = [moved(layer.weight) for layer in layers]
                biases = [moved(layer.bias) for layer in layers if layer.bias is not None]
                whole[key] = _whole(b, new[layers[0].key.source], layers, weights, biases)
            start = 0
            for layer in layers:
                if layer.last.id == node.id:
                    new[Ref(node.id)] = _slice(b, whole[key], start, node.type)
                start += layer.columns
    b.graph.results = tuple(new[ref] for ref in graph.results)
    return b.graph.live()


def _whole(
    b: Builder, x: Ref, layers: Sequence[_Layer], weights: list[Ref], biases: list[Ref]
) -> Ref:
    """The joined layer, at the place of its first part."""
    key = layers[0].key
    total = const(sum(layer.columns for layer in layers))
    domain = (*key.rows, total, key.depth)
    w = b.concat(weights, 1 if key.transposed else 0)
    symbols = b.symbols(len(domain))
    type = TensorType(b.type(x).dtype, domain)
    left = b.add(View(symbols, key.indices), (x,), (type,))[0]
    order = (-1, -2) if key.transposed else (-2, -1)
    right = b.view(w, domain, lambda *at: [at[a] for a in order])
    product = b.reduce("sum", b.map("mul", left, right), (len(domain) - 1,))
    if not biases:
        return product
    return b.map("add", product, b.broadcast(b.concat(biases, 0), domain[:-1]))


def _slice(b: Builder, whole: Ref, start: int, type: TensorType) -> Ref:
    return b.view(whole, type.shape, lambda *at: [*at[:-1], at[-1] + start])
