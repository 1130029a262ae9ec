"""Kernels that write some elements of a buffer and leave the others as they are."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stagefuse.compiler.graph import Indirect, Update
from stagefuse.compiler.kernel_ir import Checked, Index, Op, Store, Value
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.dtypes import I64

from .blocks import Parallel
from .expressions import as_dtype, product_of
from .values import Lowering


def lower_update(low: Lowering) -> Parallel:
    """Loops over the value that is stored.

    Axes along which positions differ run in parallel. Along the others, those of index tensors, a
    position may repeat: they run in order, and the last holds.
    """
    (ref,) = low.group.roots
    node = low.graph.nodes[ref.node]
    update = node.primitive
    assert isinstance(update, Update)
    domain = low.group.domain
    apart = [a for a, name in enumerate(update.symbols) if _differs(update, name)]
    ordered = [a for a in range(len(domain)) if a not in apart]
    work = max(1, low.cost())

    def store(at: Sequence[Expr]) -> None:
        here = dict(zip(update.symbols, map(Index, at), strict=True))
        places: list[Value] = []
        for index, extent in zip(update.indices, low.graph.type(ref).shape, strict=True):
            if not isinstance(index, Indirect):
                places.append(low.index(index, here))
                continue
            spot = tuple(low.index(e, here) for e in index.indices)
            place = as_dtype(low.value(node.operands[index.operand], spot, ()), I64)
            if index.offset != const(0):
                place = Op("add", (place, low.index(index.offset, here)), I64)
            places.append(Checked(place, extent, 0, proved=True))
        value = low.value(node.operands[1], tuple(map(Index, at)), ())
        low.emit(Store(low.buffer(ref, "out").name, tuple(places), value))

    at = [sym(f"d{a}") for a in range(len(domain))]
    last = len(domain) - 1
    if not apart or last not in apart:  # a step is one element, or a row of those in order
        parallel = low.axes(apart)
        low.bind(parallel)
        _in_order(low, ordered, lambda: store(at))
        return parallel, product_of([domain[a] for a in ordered]) * work
    outer = low.axes(apart[:-1])
    chunk = const(low.schedule.chunk)
    lo, hi = const(0), domain[last]
    if not outer and not ordered:
        outer = [("chunk", floordiv(domain[last] + (chunk - 1), chunk, low.facts))]
        lo = sym("chunk") * chunk
        hi = minimum(lo + chunk, domain[last])
    low.bind(outer)
    _in_order(low, ordered, lambda: low.loop(f"d{last}", lo, hi, lambda: store(at), vector=True))
    return outer, product_of([domain[a] for a in (*ordered, last)]) * work


def _differs(update: Update, name: str) -> bool:
    """Whether two positions along an axis of the value are two positions in the base."""
    for index in update.indices:
        expr = index.offset if isinstance(index, Indirect) else index
        if isinstance(index, Indirect) and any(name in e.symbols() for e in index.indices):
            continue
        step = expr.coefficient(name) if expr.symbols() >= {name} else None
        others = expr.symbols() & set(update.symbols) - {name}
        if step is not None and step.as_int() not in (None, 0) and not others:
            return True
    return False


def _in_order(low: Lowering, axes: Sequence[int], body: Callable[[], None]) -> None:
    if not axes:
        return body()
    first, *rest = axes
    low.loop(f"d{first}", const(0), low.group.domain[first], lambda: _in_order(low, rest, body))
