"""Finds the first elements of long sorts piece by piece, for GPUs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import ClassVar

import numpy as np

from stagefuse.compiler.first_read import first_read
from stagefuse.compiler.graph import Graph, Indirect, Node, Ref, Sort
from stagefuse.compiler.graph_builder import Builder
from stagefuse.dsl.dims import Expr, const, floordiv, mod, sym
from stagefuse.dsl.dtypes import DType
from stagefuse.dsl.frozen import frozen

from .record import Pass, Place
from .simplify import Simplify

SHORT = 4096
"""Elements that one block sorts in shared memory."""
PIECES = ((256, 2048), (1024, SHORT))
"""How many elements may be looked for in pieces of a length: at most a quarter of a piece."""


@frozen
class ShortenSorts(Pass):
    """A sort of which only the first elements are read becomes sorts of pieces, and one of what
    comes first in each: nothing else can be among the first of all.

    Many blocks share the pieces, where a long row would be sorted by one, beyond shared memory.
    Equal elements keep their order: that of the pieces, and within each.
    """

    name: ClassVar[str] = "shorten_sorts"
    requires: ClassVar[tuple[str, ...]] = ("views-folded",)
    establishes: ClassVar[tuple[str, ...]] = ("simplified", "views-folded")

    def run(self, graph: Graph) -> Graph:
        found = dict(_found(graph))
        if not found:
            return graph
        b, new = Builder(graph.facts), dict[Ref, Ref]()
        for node in graph.nodes.values():
            operands = [new[ref] for ref in node.operands]
            with b.at(node.span, node.stack, node.label):
                if node.id in found:
                    made: Sequence[Ref] = _first(b, node, operands[0], *found[node.id])
                else:
                    made = b.add(node.primitive, operands, node.types)
            new.update({Ref(node.id, i): ref for i, ref in enumerate(made)})
        b.graph.results = tuple(new[ref] for ref in graph.results)
        return Simplify().run(b.graph.live())

    def reasons(self, graph: Graph) -> dict[Place, str]:
        return {
            (graph.nodes[number].span, graph.nodes[number].stack): (
                f"the first {count} are looked for in pieces of {piece}"
            )
            for number, (count, piece) in _found(graph)
        }


def has_long_sorts(graph: Graph) -> bool:
    """Whether a graph, before any pass, has sorts that might be shortened."""
    return any(
        isinstance(node.primitive, Sort) and _is_long(graph, node) for node in graph.nodes.values()
    )


def _is_long(graph: Graph, sort: Node) -> bool:
    assert isinstance(sort.primitive, Sort)
    least = graph.facts.bounds(sort.type.shape[sort.primitive.axis])[0]
    return least is not None and least > SHORT


def _found(graph: Graph) -> Iterator[tuple[int, tuple[int, int]]]:
    """The sorts to be shortened: how many elements are read, and the length of pieces."""
    for node in graph.nodes.values():
        if isinstance(node.primitive, Sort) and _is_long(graph, node):
            most = first_read(graph, node) or 0
            piece = next((piece for limit, piece in PIECES if 0 < most <= limit), None)
            if piece is not None:
                yield node.id, (most, piece)


def _first(b: Builder, sort: Node, x: Ref, count: int, piece: int) -> tuple[Ref, Ref]:
    """The first elements of a sort and where they came from."""
    assert isinstance(sort.primitive, Sort)
    axis, descending = sort.primitive.axis, sort.primitive.descending
    values, order = _sorted(b, x, axis, descending, count, piece)
    return _head(b, values, axis, count), _head(b, order, axis, count)


def _sorted(
    b: Builder, x: Ref, axis: int, descending: bool, count: int, piece: int
) -> tuple[Ref, Ref]:
    """At least the first elements of a sort, in order, and where they came from."""
    type = b.type(x)
    length = type.shape[axis]
    least = b.facts.bounds(length)[0]
    if least is None or least <= SHORT:
        return b.sort(x, axis, descending)
    before, after = type.shape[:axis], type.shape[axis + 1 :]
    pieces = b.facts.simplify(floordiv(length + (piece - 1), piece))
    cut = b.view(
        x,
        (*before, pieces, piece, *after),
        lambda *at: (*at[:axis], at[axis] * piece + at[axis + 1], *at[axis + 2 :]),
        lambda *at: [length - 1 - at[axis] * piece - at[axis + 1]],
        _after_all(type.dtype, descending),
    )
    values, order = b.sort(cut, axis + 1, descending)
    shape = (*before, pieces * count, *after)

    def first(*at: Expr) -> tuple[Expr, ...]:
        return (*at[:axis], floordiv(at[axis], count), mod(at[axis], count), *at[axis + 1 :])

    names = b.symbols(len(shape))
    start = b.position(shape, names, floordiv(sym(names[axis]), count) * piece)
    places = b.map("add", b.view(order, shape, first), start)
    # What lies behind the end is never among the first; this proves it to who reads at a place.
    places = b.map("minimum", places, b.position(shape, names, length - 1))
    values, order = _sorted(b, b.view(values, shape, first), axis, descending, count, piece)
    values, order = (_head(b, ref, axis, count) for ref in (values, order))
    symbols = tuple(map(sym, names))
    there: list[Expr | Indirect] = [*symbols]
    there[axis] = Indirect(1, symbols)
    return values, b.gather(places, [order], b.type(order).shape, names, there)


def _head(b: Builder, x: Ref, axis: int, count: int) -> Ref:
    shape = list(b.type(x).shape)
    shape[axis] = const(count)
    return b.view(x, shape, lambda *at: at)


def _after_all(dtype: DType, descending: bool) -> float | int | bool:
    """What no element of a sort comes behind."""
    if dtype.is_float:
        lowest = -dtype.largest if dtype.name == "f8e4m3" else -float("inf")
        return lowest if descending else float("nan")
    if dtype.is_bool:
        return not descending
    ends = np.iinfo(dtype.numpy)
    return int(ends.min if descending else ends.max)
