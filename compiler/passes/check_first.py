"""Puts the checks of positions before what a failed call must not have done."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

from stagefuse.compiler.graph import Gather, Graph, Indirect, Node, Ref, Update, View
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.proofs.value_ranges import is_position
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.types import TensorType

from .record import Pass


@frozen
class CheckFirst(Pass):
    """In a pipeline that updates states, positions from data are checked on their own.

    An update of a state comes after every check, so that a call that fails leaves the state as it
    was. A gather that checks while it reads may be computed anew behind an update; checked
    positions are stored, and what reads at them needs no check.
    """

    name: ClassVar[str] = "check_first"

    def run(self, graph: Graph) -> Graph:
        if not any(isinstance(n.primitive, Update) and n.primitive.state
                   for n in graph.nodes.values()):  # fmt: skip
            return graph
        b, new = Builder(graph.facts), dict[Ref, Ref]()
        for node in graph.nodes.values():
            operands = [new[ref] for ref in node.operands]
            primitive = node.primitive
            with b.at(node.span, node.stack, node.label):
                if isinstance(primitive, Gather):
                    primitive, operands = _checked(b, node, primitive, operands)
                made = b.add(primitive, operands, node.types)
            new.update({Ref(node.id, i): ref for i, ref in enumerate(made)})
        b.graph.results = tuple(new[ref] for ref in graph.results)
        return b.graph


def _checked(
    b: Builder, node: Node, gather: Gather, operands: Sequence[Ref]
) -> tuple[Gather, list[Ref]]:
    """A gather whose positions are known to be inside, and its operands."""
    table, *tensors = operands
    sizes = dict(zip(gather.symbols, node.type.shape, strict=True))
    facts = b.facts.at_element(gather.symbols, node.type.shape)
    indices: list[Expr | Indirect] = []
    for index, extent in zip(gather.indices, b.type(table).shape, strict=True):
        if not isinstance(index, Indirect):
            indices.append(index)
            continue
        ref = tensors[index.operand - 1]
        plain = index.scale == const(1)
        if plain and is_position(b.graph, ref, extent, index.offset, facts):
            indices.append(index)
            continue
        found, own = _positions(b, ref, index, sizes)
        tensors.append(b.within(found, extent, const(1)))
        indices.append(Indirect(len(tensors), tuple(map(sym, own))))
    used = [i.operand for i in indices if isinstance(i, Indirect)]
    kept = sorted(set(used))
    indices = [
        replace(i, operand=kept.index(i.operand) + 1) if isinstance(i, Indirect) else i
        for i in indices
    ]
    return Gather(gather.symbols, tuple(indices)), [table, *(tensors[n - 1] for n in kept)]


def _positions(
    b: Builder, ref: Ref, index: Indirect, sizes: dict[str, Expr]
) -> tuple[Ref, list[str]]:
    """An index tensor at the elements that a gather reads, by the symbols that they depend on."""
    exprs = (*index.indices, index.scale, index.offset)
    own = [name for name in sizes if any(name in e.symbols() for e in exprs)]
    names = b.symbols(len(own))
    at = dict(zip(own, map(sym, names), strict=True))
    shape = tuple(sizes[name] for name in own)

    def renamed(expr: Expr) -> Expr:
        return expr.substitute(at)

    places = tuple(map(renamed, index.indices))
    same = places == tuple(map(sym, names)) and b.type(ref).shape == shape
    if not same:
        type = TensorType(b.type(ref).dtype, shape)
        ref = b.add(View(names, places), (ref,), (type,))[0]
    for fn, expr, nothing in (("mul", index.scale, const(1)), ("add", index.offset, const(0))):
        if expr != nothing:
            ref = b.map(fn, ref, b.position(shape, names, renamed(expr)))
    return ref, own
