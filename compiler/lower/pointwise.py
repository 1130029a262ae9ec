"""Pointwise kernels: flat stretches of elements, or rows of the innermost axis."""

from __future__ import annotations

from stagefuse.dsl.dims import const, floordiv, minimum, sym

from ..graph import (
    Map,
    Scalar,
    View,
)
from .blocks import Parallel
from .expressions import product_of
from .values import Lowering


def lower_pointwise(low: Lowering) -> Parallel:
    domain = low.group.domain
    if not domain:
        low.store(())
        return [], const(1)
    low.flat = _is_flat(low)
    total = product_of(domain) if low.flat else domain[-1]
    outer = [] if low.flat else low.axes(range(len(domain) - 1))
    index = "d0" if low.flat else f"d{len(domain) - 1}"
    lead = [sym(name) for name, _ in outer]
    if outer:
        parallel, lo, hi = outer, const(0), total
    else:
        chunk = low.schedule.chunk
        parallel = [("chunk", floordiv(total + (chunk - 1), chunk, low.facts))]
        lo = sym("chunk") * chunk
        hi = minimum(lo + chunk, total)
    low.bind(parallel)
    work = (total if outer else const(low.schedule.chunk)) * max(1, low.cost())
    low.loop(index, lo, hi, lambda: low.store((*lead, sym(index))), vector=True)
    return parallel, work


def _is_flat(low: Lowering) -> bool:
    """Whether every operand is read just where the result is written, or is one element."""
    identity = tuple(sym(f"d{i}") for i in range(len(low.group.domain)))
    for member in low.group.members:
        node = low.graph.nodes[member]
        if isinstance(node.primitive, View):
            if low.graph.type(node.operands[0]).shape or node.primitive.guard:
                return False
        elif not isinstance(node.primitive, Map | Scalar):
            return False
        for ref in node.operands:
            shape = low.graph.type(ref).shape
            if shape and (shape != low.group.domain):
                return False
    return len(identity) > 0 and all(
        low.graph.type(r).shape == low.group.domain for r in low.group.roots
    )
