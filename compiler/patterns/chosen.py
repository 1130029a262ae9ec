"""Operands of products that indices choose: matrices of a batch, or rows of the left operand.

What a gather would store is read in the table that it gathers from. Where an element of the operand
lies is then an expression over the product's own indices and a few more names, each of which stands
for a position that is read from data.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.graph import (
    Contract,
    Gather,
    Graph,
    Indirect,
    Map,
    Node,
    Ref,
    View,
    flatten_index,
    split_index,
)
from stagefuse.dsl.dims import Expr, sym
from stagefuse.dsl.frozen import frozen

from .gathered import Gathered, is_gathered
from .steps import count_of, steps_in, steps_of

Steps = tuple[Expr, Expr, Expr]


@frozen
class Position:
    """A name for a position along an axis of `extent`, which the gather `node` reads from data."""

    name: str
    node: int
    read: Indirect
    extent: Expr


@frozen
class Chosen:
    """Elements of a gather, as elements of its table at `indices`, in which the names of some
    positions stand."""

    table: Ref
    indices: tuple[Expr, ...]
    positions: tuple[Position, ...]


def chosen(graph: Graph, stored: Ref, at: Sequence[Expr], name: str) -> Chosen | None:
    """Where the element at a position of a gather's result lies in its table, if that has elements
    for all sizes; positions are called `name` and a number."""
    node = graph.nodes[stored.node]
    gather = node.primitive
    if not isinstance(gather, Gather):
        return None
    here = dict(zip(gather.symbols, at, strict=True))
    shape = graph.type(node.operands[0]).shape
    if not all(graph.facts.is_positive(extent) for extent in shape):
        return None
    indices: list[Expr] = []
    found: list[Position] = []
    for index, extent in zip(gather.indices, shape, strict=True):
        if isinstance(index, Indirect):
            read = replace(
                index,
                indices=tuple(e.substitute(here, graph.facts) for e in index.indices),
                scale=index.scale.substitute(here),
                offset=index.offset.substitute(here),
            )
            found.append(Position(f"{name}{len(found)}", node.id, read, extent))
            indices.append(sym(found[-1].name))
        else:
            indices.append(index.substitute(here, graph.facts))
    return Chosen(node.operands[0], tuple(indices), tuple(found))


def moves_with(positions: Sequence[Position]) -> frozenset[str]:
    """The symbols that positions depend on."""
    exprs = [e for p in positions for e in (*p.read.indices, p.read.scale, p.read.offset)]
    return frozenset[str]().union(*(e.symbols() for e in exprs))


def stored_before(graph: Graph, ref: Ref) -> Ref:
    """What an operand is packed and converted from."""
    for kind in (View, Map):
        node = graph.nodes[ref.node]
        if isinstance(node.primitive, kind) and (kind is View or node.primitive == Map("cast")):
            ref = node.operands[0]
    return ref


def chosen_matrices(graph: Graph, product: Node) -> Chosen | None:
    """The right operand of a product, if it is of matrices that the batch chooses by indices; the
    symbols are those of the view that packs its panels."""
    panels = product.operands[1]
    view = graph.nodes[panels.node].primitive
    if not isinstance(view, View):
        return None
    found = chosen(graph, stored_before(graph, panels), view.indices, "right")
    if found is None or moves_with(found.positions) & set(view.symbols[-3:]):
        return None
    return found


def chosen_steps(graph: Graph, product: Node) -> Steps | None:
    """The steps of a right operand, as `steps_of` has them, in the table that its matrices are
    chosen from; None where they are not those that the chosen ones would have."""
    found, panels = chosen_matrices(graph, product), product.operands[1]
    plain = steps_of(graph, panels, product)
    if found is None or plain is None:
        return None
    offset = flatten_index(found.indices, graph.type(found.table).shape)
    steps = steps_in(graph, panels, product, offset)
    return steps if steps is not None and steps[1:] == plain[1:] else None


def chosen_rows(graph: Graph, product: Node) -> tuple[Gathered, tuple[Position, ...]] | None:
    """The left operand of a product, if it is of rows that are chosen by indices."""
    contract, left = product.primitive, product.operands[0]
    assert isinstance(contract, Contract)
    stored = graph.nodes[left.node]
    ref = stored.operands[0] if stored.primitive == Map("cast") else left
    if not isinstance(graph.nodes[ref.node].primitive, Gather):
        return None
    *outer, last = graph.type(ref).shape
    lead = tuple(f"i{a}" for a in contract.batch)
    sizes = [product.type.shape[a] for a in contract.batch]
    rows = count_of([product.type.shape[a] for a in contract.rows])
    first = flatten_index([sym(n) for n in lead], sizes) * rows
    same, facts = graph.facts.prove_eq, graph.facts
    dense = same(contract.base, first * contract.depth) and same(contract.row_stride, last)
    if not dense or not same(last, contract.depth):
        return None
    at = [*map(sym, lead), sym("row")]
    if len(outer) != len(at) or not all(map(same, outer, (*sizes, rows))):
        if lead:
            return None
        facts = facts.with_ranges({"row": (0, rows - 1)})
        at = split_index(sym("row"), outer, facts)
    found = chosen(graph, ref, (*at, sym("depth")), "left")
    if found is None or "depth" in moves_with(found.positions):
        return None
    rows_of = Gathered(found.table, lead, "row", "depth", found.indices, ())
    return (rows_of, found.positions) if is_gathered(graph, rows_of) else None


def chooses(graph: Graph, group: Group, operand: Ref) -> bool:
    """Whether a group reads an operand of its product in the table of a gather."""
    if operand not in group.packs:
        return False
    members = group.packs[operand].members
    return any(isinstance(graph.nodes[m].primitive, Gather) for m in members)


def steps_taken(graph: Graph, group: Group, product: Node) -> Steps | None:
    """Where a group finds the elements of its right operand."""
    if chooses(graph, group, product.operands[1]):
        return chosen_steps(graph, product)
    return steps_of(graph, product.operands[1], product)
