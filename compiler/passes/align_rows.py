"""Computes softmax between two products over the rows that the second one multiplies."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from stagefuse.compiler.graph import Graph, Map, Node, Reduce, Ref, View
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.patterns.operand_matrices import total_of
from stagefuse.compiler.patterns.single_query import single_query_sums
from stagefuse.compiler.patterns.softmax import factors, plain, scores_of, viewed
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.types import TensorType

from .record import Pass


@frozen
class AlignRows(Pass):
    """Softmax between two products has the rows of the second, and so has the first one's result.

    Queries of heads that share keys are often rows of one matrix in the products but axes of their
    own between them, where a mask tells them apart. Such reshapes move in front of the first
    product, as index maps of what it multiplies: then nothing stands between the two. Without
    `single_queries`, only where the first product has several rows.
    """

    name: ClassVar[str] = "align_rows"
    breaks: ClassVar[tuple[str, ...]] = ("views-folded", "simplified")
    single_queries: bool = False

    def run(self, graph: Graph) -> Graph:
        uses = graph.uses()
        found = {n: rows for n in graph.nodes if (rows := _rows_of(graph, n, uses)) is not None}
        if not self.single_queries:
            rowless = single_query_sums(graph)
            found = {n: rows for n, rows in found.items() if rows.scores not in rowless}
        if not found:
            return graph
        b, new = Builder(graph.facts), dict[Ref, Ref]()
        for node in graph.nodes.values():
            with b.at(node.span, node.stack, node.label):
                aligned = None
                if node.id in found:
                    aligned = _Aligned(graph, b, new, found[node.id]).sums(node)
                made = (
                    (aligned,)
                    if aligned
                    else b.add(node.primitive, [new[r] for r in node.operands], node.types)
                )
            new.update({Ref(node.id, n): ref for n, ref in enumerate(made)})
        b.graph.results = tuple(new[ref] for ref in graph.results)
        return b.graph.live()


@frozen
class _Rows:
    """Of sums of weighted values: the factor that is a softmax, the axes of their domain that it
    varies along, last the one that is summed, and the nodes from the sums of products that it is
    the softmax of, `scores`, to the factor."""

    factor: Ref
    axes: tuple[int, ...]
    scores: int
    between: frozenset[int]


def _rows_of(graph: Graph, number: int, uses: Mapping[Ref, Sequence[int]]) -> _Rows | None:
    """The softmax that sums of products weight by, if it has other rows than they have."""
    node = graph.nodes[number]
    for factor in factors(graph, node):
        scores, mul = scores_of(graph, factor), graph.nodes[node.operands[0].node]
        if scores is None or mul.primitive != Map("mul"):
            continue
        assert isinstance(node.primitive, Reduce)
        root = viewed(graph, plain(graph, factor))
        shape, at = graph.type(root).shape, _place(graph, factor, root)
        (depth, *others), used = node.primitive.axes, frozenset[str]().union(*map(Expr.symbols, at))
        axes = (*(a for a in range(mul.type.rank) if f"i{a}" in used and a != depth), depth)
        longer = [e for e in at if e != const(0)]
        if scores.type.shape == shape and longer == [sym(f"i{a}") for a in axes]:
            continue  # they are the same
        *lead, last = at
        if others or last != sym(f"i{depth}") or any(f"i{depth}" in e.symbols() for e in lead):
            continue
        rows = total_of(mul.type.shape, axes[:-1])
        if not graph.facts.prove_eq(rows, total_of(shape, range(len(lead)))):
            continue
        between = _between(graph, factor.node, scores.id)
        if between is not None and _is_private(graph, between, mul.id, uses):
            return _Rows(factor, axes, scores.id, between)
    return None


def _place(graph: Graph, ref: Ref, root: Ref) -> tuple[Expr, ...]:
    """The element of a value that an element i0, i1... of a view of it, or of a view of its
    conversion, is."""
    at = tuple(
        const(0) if d.as_int() == 1 else sym(f"i{n}")
        for n, d in enumerate(graph.type(ref).shape)
    )  # fmt: skip
    facts = graph.facts.at_element([f"i{n}" for n in range(len(at))], graph.type(ref).shape)
    while ref != root:
        node = graph.nodes[ref.node]
        if isinstance(node.primitive, View):
            at = _through(node.primitive, at)
        (ref,) = node.operands
    return tuple(map(facts.simplify, at))


def _through(view: View, at: Sequence[Expr]) -> tuple[Expr, ...]:
    """Where the element at a place of a view lies."""
    known = dict(zip(view.symbols, at, strict=True))
    return tuple(e.substitute(known, None) for e in view.indices)


def _between(graph: Graph, top: int, scores: int) -> frozenset[int] | None:
    """The nodes from scores to a softmax of them; None if some are no maps, views or reductions of
    rows."""
    found: dict[int, bool] = {scores: True}

    def depends(number: int) -> bool:
        if number not in found:
            operands = [r.node for r in graph.nodes[number].operands]
            found[number] = any([depends(n) for n in operands])
        return found[number]

    depends(top)
    between = frozenset(n for n, inside in found.items() if inside)
    for number in between - {scores}:
        node = graph.nodes[number]
        p = node.primitive
        row = isinstance(p, Reduce) and p.axes == (graph.type(node.operands[0]).rank - 1,)
        if not row and not isinstance(p, Map) and not (isinstance(p, View) and not p.guard):
            return None
    return between


def _is_private(
    graph: Graph, between: frozenset[int], reader: int, uses: Mapping[Ref, Sequence[int]]
) -> bool:
    """Whether nothing but one node reads some others, which are no results."""
    if any(r.node in between for r in graph.results):
        return False
    users = {user for ref, by in uses.items() if ref.node in between for user in by}
    return users - between == {reader}


class _Aligned:
    """Values between two products, over the rows of the second one: [rows..., keys]."""

    def __init__(self, graph: Graph, b: Builder, new: Mapping[Ref, Ref], rows: _Rows) -> None:
        self.graph, self.b, self.new, self.rows = graph, b, new, rows
        self.made: dict[tuple[Ref, tuple[Expr, ...], int], Ref] = {}
        self.splits = False  # rows of the first product, so that they may be no rows any more

    def sums(self, node: Node) -> Ref | None:
        """The second product, if the first one is as it was but for the order of its axes."""
        (product,) = node.operands
        mul, factor, axes = self.graph.nodes[product.node], self.rows.factor, self.rows.axes
        domain = mul.type.shape
        names = {axis: sym(f"i{n}") for n, axis in enumerate(axes)}
        shape = [domain[a] for a in axes]
        at = tuple(names.get(a, const(0)) for a in range(len(domain)))
        weights = self.value(factor, at, shape)
        if self.splits:
            return None
        spread = self.b.view(weights, domain, lambda *i: [i[a] for a in axes])
        operands = [spread if r == factor else self.new[r] for r in mul.operands]
        assert isinstance(node.primitive, Reduce)
        return self.b.reduce(
            "sum", self.b.map("mul", *operands), node.primitive.axes, node.type.dtype
        )

    def value(self, ref: Ref, at: tuple[Expr, ...], shape: Sequence[Expr]) -> Ref:
        """A tensor of a shape whose element i0, i1... is that of a value at a place."""
        facts = self.b.ranges(self.b.symbols(len(shape)), shape)
        at = tuple(map(facts.simplify, at))
        key = (ref, at, len(shape))
        if key not in self.made:
            self.made[key] = self._value(ref, at, shape)
        return self.made[key]

    def _value(self, ref: Ref, at: tuple[Expr, ...], shape: Sequence[Expr]) -> Ref:
        node, b = self.graph.nodes[ref.node], self.b
        p = node.primitive
        if ref.node not in self.rows.between:
            return self._seen(ref, at, shape)
        if ref.node == self.rows.scores:
            return self._scores(node, at, shape)
        if isinstance(p, Map):
            made = [self.value(r, at, shape) for r in node.operands]
            return b.add(p, made, (TensorType(node.type.dtype, tuple(shape)),))[0]
        (operand,) = node.operands
        if isinstance(p, Reduce):  # of rows, so that no place is along the keys
            keys = self.graph.type(operand).shape[-1]
            row = self.value(operand, (*at, sym(f"i{len(shape)}")), [*shape, keys])
            return b.reduce(p.kind, row, [len(shape)], node.type.dtype)
        assert isinstance(p, View)
        inner = _through(p, at)
        along = f"i{len(self.rows.axes) - 1}"
        if len(shape) < len(self.rows.axes) or any(along in e.symbols() for e in inner):
            return self.value(operand, inner, shape)
        found = self.value(operand, inner, shape[:-1])
        return b.view(found, shape, lambda *i: i[:-1])

    def _scores(self, node: Node, at: tuple[Expr, ...], shape: Sequence[Expr]) -> Ref:
        """The first product."""
        (source,) = node.operands
        longer = [e for e in at if e != const(0)]
        self.splits = self.splits or any(e.as_symbol() is None for e in longer)
        assert isinstance(node.primitive, Reduce)
        inner, outer = self.graph.type(source).shape, iter(at)
        depth = node.primitive.axes
        places = {a: sym(f"i{len(shape) + n}") for n, a in enumerate(depth)}
        whole = tuple(places[a] if a in places else next(outer) for a in range(len(inner)))
        product = self._spread(source, whole, [*shape, *(inner[a] for a in depth)])
        axes = range(len(shape), len(shape) + len(depth))
        return self.b.reduce("sum", product, axes, node.type.dtype)

    def _spread(self, ref: Ref, at: tuple[Expr, ...], shape: Sequence[Expr]) -> Ref:
        """The same of what the first product sums: a product, perhaps converted or viewed."""
        node = self.graph.nodes[ref.node]
        if isinstance(node.primitive, Map) and node.primitive.fn in ("mul", "cast"):
            made = [self._spread(r, at, shape) for r in node.operands]
            type = TensorType(node.type.dtype, tuple(shape))
            return self.b.add(node.primitive, made, (type,))[0]
        if isinstance(node.primitive, View) and not node.primitive.guard:
            return self._spread(node.operands[0], _through(node.primitive, at), shape)
        return self._seen(ref, at, shape)

    def _seen(self, ref: Ref, at: tuple[Expr, ...], shape: Sequence[Expr]) -> Ref:
        return self.b.view(self.new[ref], shape, lambda *_: at)
