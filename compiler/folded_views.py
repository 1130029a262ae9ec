"""Views of views as one view."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stagefuse.dsl.dims import Atom, Expr
from stagefuse.dsl.types import TensorType

from .graph import Node, Ref, View
from .graph_builder import Builder

TANGLED = 16
"""Divisions in an index map from which on it is stored rather than composed with others."""


def is_tangled(indices: Iterable[Expr], limit: int = TANGLED) -> bool:
    """Whether an index map holds so many divisions that it is worth storing what it reads.

    Reshapes of transposes of reshapes nest them, and each level multiplies them.
    """
    texts = map(str, indices)
    return sum(text.count("//") + text.count("%") for text in texts) > limit


def divisions(indices: Iterable[Expr]) -> int:
    """How many quotients and remainders an index map takes, each of them once."""
    found: set[Atom] = set()
    pending = list(indices)
    while pending:
        new = {atom for m, _ in pending.pop().terms for atom, _ in m if atom.args} - found
        found |= new
        pending += [arg for atom in new for arg in atom.args]
    return sum(atom.kind in ("//", "%") for atom in found)


def fold_views(
    b: Builder, outer: View, operand: Ref, type: TensorType
) -> tuple[View, tuple[Ref, ...], tuple[TensorType, ...]] | None:
    """view(view(x)) is one view, where at most one of them pads or both pad with one value."""
    below = b.graph.nodes[operand.node]
    inner = below.primitive
    if not isinstance(inner, View):
        return None
    if inner.guard and outer.guard and repr(inner.fill) != repr(outer.fill):
        return None
    at = dict(zip(inner.symbols, outer.indices, strict=True))
    facts = b.ranges(outer.symbols, type.shape)
    # A guarded map may leave the inner symbols' ranges, under which inner maps were simplified.
    raw = tuple(e.substitute(at, None) for e in inner.indices)
    if is_tangled(raw, 4 * TANGLED):
        return None
    indices = tuple(facts.simplify(e) for e in raw)
    if is_tangled(indices, TANGLED):
        return None
    guard = tuple(facts.simplify(g.substitute(at, None)) for g in inner.guard)
    guards = tuple(g for g in dict.fromkeys((*outer.guard, *guard)) if not facts.is_nonneg(g))
    fill = outer.fill if outer.guard else inner.fill
    return View(outer.symbols, indices, guards, fill), below.operands, (type,)


def folded_view(b: Builder, node: Node, operands: Sequence[Ref]) -> tuple[Ref, ...] | None:
    """The node added as one view of what its operand is a view of; None where it can't be."""
    if not isinstance(node.primitive, View):
        return None
    found = fold_views(b, node.primitive, operands[0], node.type)
    return None if found is None else b.add(*found)
