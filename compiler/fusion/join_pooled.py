"""Products of an image's windows that other windows pool, where their tiles are.

A tile has the places of whole windows if these share none, and then only what they come to is
stored. For GPUs.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod

from stagefuse.compiler.graph import Contract, Graph, View
from stagefuse.compiler.patterns.gathered import gathered_of
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.frozen import frozen

from .groups import Access, Group
from .join_reduced import ReducedJoiner, reductions_of

SIZES = (2, 4, 8)
"""Places of a window: tiles, and the parts of them that blocks of a cluster store, have a multiple
of rows."""
REASON = (
    "its places are pooled in its tiles, so that it is not stored, where there are enough tiles "
    "without splitting its depth"
)


@frozen
class Pooled:
    """How windows that share no place pool a product: by axis of its result which axis of what is
    pooled goes with it, None where there is one window, and how many windows and places of each
    there are."""

    axes: tuple[int | None, ...]
    counts: tuple[Expr, ...]
    places: tuple[int, ...]


def pooled_of(graph: Graph, group: Group, product: int) -> Pooled | None:
    """How the reductions of a group pool the node `product`, if they read nothing else of it."""
    found = reductions_of(graph, group)
    accesses = set(group.accesses.get(product, []))
    if not found or len(accesses) != 1 or any(r.kind.startswith("arg") for _, r in found):
        return None
    (node, reduce), extents = found[0], graph.nodes[product].type.shape
    reduced = graph.type(node.operands[0]).shape
    loops = {f"f{a}": reduced[a].as_int() for a in reduce.axes if reduced[a].as_int() != 1}
    access: Access = accesses.pop()
    parts = [p for p in (_axis(e, loops) for e in access or ()) if p is not None]
    axes, places = tuple(axis for axis, _ in parts), tuple(n for _, n in parts)
    if len(parts) < len(extents) or prod(places) != prod(n or 0 for n in loops.values()):
        return None
    taken = {a for a in axes if a is not None}
    if {n for n, e in enumerate(group.domain) if e.as_int() != 1} != taken:
        return None
    counts = tuple(const(1) if a is None else group.domain[a] for a in axes)
    ends = zip(counts, places, extents, strict=True)
    inside = all(graph.facts.prove_le(count * n, size) for count, n, size in ends)
    return Pooled(axes, counts, places) if inside else None


def _axis(index: Expr, loops: Mapping[str, int | None]) -> tuple[int | None, int] | None:
    """The axis of a kernel that an index goes along, if it does along one, and the places of a
    window there."""
    inner, outer = ([x for x in index.symbols() if (x in loops) == has] for has in (True, False))
    if len(inner) > 1 or len(outer) > 1 or any(not name.startswith("d") for name in outer):
        return None
    places = loops[inner[0]] if inner else 1
    if places is None:
        return None
    at = sum((sym(x) * places for x in outer), const(0)) + sum(map(sym, inner), const(0))
    return (int(outer[0][1:]) if outer else None, places) if index == at else None


class PooledJoiner(ReducedJoiner):
    """Joins of products and the windows that pool them."""

    def _pooled(self, group: Group) -> None:
        if group.kind != "row" or group.nest or group.placed:
            return
        product = self._product_of(group, None)
        if product is None or not self._gathers_alone(product):
            return
        (ref,) = product.roots
        found = pooled_of(self.graph, group, ref.node)
        if found is None or any(self.graph.type(r).shape != group.domain for r in group.roots):
            return
        if prod(found.places) not in SIZES or found.places[-1] != 1 or found.axes[-1] is None:
            return
        self._reduce(product, group, REASON)

    def _gathers_alone(self, product: Group) -> bool:
        """Whether a product's rows are windows that are gathered, of no batch."""
        node = self.graph.nodes[-1 if product.anchor is None else product.anchor]
        contract, left = node.primitive, node.operands[0]
        assert isinstance(contract, Contract)
        is_view = isinstance(self.graph.nodes[left.node].primitive, View)
        gathers = left in product.packs and is_view and gathered_of(self.graph, node) is not None
        return gathers and not contract.batch
