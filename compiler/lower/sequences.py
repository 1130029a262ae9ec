"""Kernels whose elements depend on each other along an axis: scans, sorts and scatters."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stagefuse.compiler.first_read import first_read
from stagefuse.compiler.graph import (
    Node,
    Scan,
    Scatter,
    Sort,
)
from stagefuse.compiler.kernel_ir import (
    Alloc,
    Checked,
    Const,
    Index,
    Let,
    Load,
    Local,
    Op,
    SortRow,
    Store,
    Value,
)
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.dtypes import BOOL, I64, DType

from .blocks import Parallel
from .expressions import COMBINE, as_dtype, at_least_one, start_of
from .values import Lowering


def _other_axes(low: Lowering, axis: int) -> tuple[list[tuple[str, Expr]], list[Expr]]:
    domain = low.group.domain
    parallel = low.axes([a for a in range(len(domain)) if a != axis])
    low.bind(parallel)
    return parallel, [sym(f"d{a}") for a in range(len(domain))]


SCANNED, UPDATED = 256, 4096
"""Adjacent columns that are scanned or updated side by side, where memory runs along another axis:
as many sums are 1 KB of f32; whole rows are copied as fast as memory is."""


def _in_columns(
    low: Lowering, axis: int, most: int
) -> tuple[list[tuple[str, Expr]], Expr, Expr] | None:
    """The parallel loops where columns of the last axis, which is another one, are done side by
    side, `most` at a time; the first column of a step and the one behind its last."""
    *_, last = low.group.domain
    if not low.schedule.columns_by_memory or axis == len(low.group.domain) - 1 or last == const(1):
        return None
    others = low.axes([a for a in range(len(low.group.domain) - 1) if a != axis])
    parallel = [*others, ("cb", floordiv(last + (most - 1), most, low.facts))]
    low.bind(parallel)
    first = sym("cb") * most
    return parallel, first, minimum(first + most, last, low.facts)


def lower_scan(low: Lowering) -> Parallel:
    node, primitive = _anchor(low, Scan)
    axis = primitive.axis
    if (columns := _in_columns(low, axis, SCANNED)) is not None:
        return _scan_columns(low, *columns)
    parallel, _ = _other_axes(low, axis)
    size = low.group.domain[axis]
    scan_along(low, const(0), size, start_of(primitive.kind, node.type.dtype.compute))
    return parallel, at_least_one(size) * 4


def _scan_columns(
    low: Lowering, parallel: list[tuple[str, Expr]], first: Expr, stop: Expr
) -> Parallel:
    """A row of columns after the other, what each has added up so far in scratch."""
    node, primitive = _anchor(low, Scan)
    dtype, size = node.type.dtype.compute, low.group.domain[primitive.axis]
    last = f"d{len(low.group.domain) - 1}"
    total = low.name("total")
    low.emit(Alloc(total, dtype, (const(SCANNED),)))
    so_far = (Index(sym(last) - first),)
    here = tuple(Index(sym(f"d{a}")) for a in range(len(low.group.domain)))
    out = low.buffer(low.group.roots[0], "out")

    def begin() -> None:
        low.emit(Store(total, so_far, start_of(primitive.kind, dtype)))

    def step() -> None:
        value = as_dtype(low.value(node.operands[0], here, ()), dtype)
        name = low.name("v")
        low.emit(Let(name, Op(COMBINE[primitive.kind], (Load(total, so_far, dtype), value), dtype)))
        low.emit(Store(total, so_far, Local(name, dtype)))
        low.emit(Store(out.name, here, Local(name, dtype)))

    low.loop(last, first, stop, begin, vector=True)
    low.loop(
        f"d{primitive.axis}", const(0), size, lambda: low.loop(last, first, stop, step, vector=True)
    )
    return parallel, at_least_one(size) * SCANNED


def scan_along(low: Lowering, lo: Expr, hi: Expr, start: Value) -> None:
    """The loop of a scan over a part of its axis, from what lies before that."""
    node, primitive = _anchor(low, Scan)
    dtype = node.type.dtype.compute
    total = low.name("total")
    low.emit(Alloc(total, dtype, ()))
    low.emit(Store(total, (), start))
    here = tuple(Index(sym(f"d{a}")) for a in range(len(low.group.domain)))

    def step() -> None:
        value = as_dtype(low.value(node.operands[0], here, ()), dtype)
        so_far = Op(COMBINE[primitive.kind], (Load(total, (), dtype), value), dtype)
        name = low.name("v")
        low.emit(Let(name, so_far))
        low.emit(Store(total, (), Local(name, dtype)))
        out = low.buffer(low.group.roots[0], "out")
        low.emit(Store(out.name, here, Local(name, dtype)))

    low.loop(f"d{primitive.axis}", lo, hi, step)


def lower_sort(low: Lowering) -> Parallel:
    node, primitive = _anchor(low, Sort)
    axis = primitive.axis
    size = low.group.domain[axis]
    parallel, at = _other_axes(low, axis)
    keys, order = low.name("keys"), low.name("order")
    dtype = node.type.dtype.compute
    low.emit(Alloc(keys, dtype, (size,)))
    low.emit(Alloc(order, I64, (size,)))
    here: tuple[Value, ...] = tuple(map(Index, at))
    along: tuple[Value, ...] = (Index(sym(f"d{axis}")),)

    def fill() -> None:
        low.emit(Store(keys, along, low.value(node.operands[0], here, ())))

    def spill() -> None:
        for ref, name, kind in zip(low.group.roots, (keys, order), (dtype, I64), strict=False):
            out = low.buffer(ref, "out")
            low.emit(Store(out.name, here, Load(name, along, kind)))

    low.loop(f"d{axis}", const(0), size, fill)
    first = first_read(low.graph, node) if low.schedule.columns_by_memory else None
    wanted = None if not first else minimum(size, const(first), low.facts)
    low.emit(SortRow(keys, order, size, primitive.descending, wanted))
    low.loop(f"d{axis}", const(0), size if wanted is None else wanted, spill)
    return parallel, at_least_one(size) * 32


def lower_scatter(low: Lowering) -> Parallel:
    node, primitive = _anchor(low, Scatter)
    axis = primitive.axis
    base, _, updates = node.operands
    size = low.group.domain[axis]
    columns = _in_columns(low, axis, UPDATED)
    parallel = _other_axes(low, axis)[0] if columns is None else columns[0]
    ref = low.group.roots[0]
    here: tuple[Value, ...] = tuple(Index(sym(f"d{a}")) for a in range(len(low.group.domain)))

    def side_by_side(body: Callable[[], None]) -> None:
        if columns is None:
            return body()
        low.loop(f"d{len(here) - 1}", *columns[1:], body, vector=True)

    def copy() -> None:
        value = low.value(base, here, ())
        low.emit(Store(low.buffer(ref, "out").name, here, value))

    def step() -> None:
        name = low.name("at")
        low.emit(Let(name, position_of(low, sym("u"))))

        def update() -> None:
            low.emit(update_at(low, here, Local(name, I64)))

        if low.facts.is_positive(size):
            return side_by_side(update)
        low.branch(is_some(size), lambda: side_by_side(update))

    low.loop(f"d{axis}", const(0), size, lambda: side_by_side(copy))
    count = low.graph.type(updates).shape[axis]
    low.loop("u", const(0), count, step)
    wide = const(1) if columns is None else minimum(low.group.domain[-1], const(UPDATED))
    return parallel, at_least_one(size + count) * wide


def position_of(low: Lowering, update: Expr) -> Checked:
    """Where along its axis a scatter's update goes."""
    node, primitive = _anchor(low, Scatter)
    size = low.group.domain[primitive.axis]
    wanted = low.value(node.operands[1], (Index(update),), ())
    return Checked(wanted, size, low.sites.number(node.span, size))


def is_some(size: Expr) -> Value:
    """Whether there is an element. In nothing every position is out of range: it is reported, and
    there is none to write."""
    return Op("ge", (Index(size - 1), Const(0, I64)), BOOL)


def update_at(low: Lowering, here: Sequence[Value], at: Value) -> Store:
    """The store that combines a scatter's update `u` with the element at a position of its axis,
    and of the other axes as `here` has them."""
    node, primitive = _anchor(low, Scatter)
    axis, dtype = primitive.axis, node.type.dtype
    place: tuple[Value, ...] = (*here[:axis], at, *here[axis + 1 :])
    source = (*here[:axis], Index(sym("u")), *here[axis + 1 :])
    value = low.value(node.operands[2], source, ())
    out = low.buffer(low.group.roots[0], "inout")
    return Store(
        out.name, place, combined(primitive.kind, Load(out.name, place, dtype), value, dtype)
    )


def combined(kind: str, before: Load, update: Value, dtype: DType) -> Value:
    """An element with one more update of a scatter."""
    if kind == "set":
        return update
    return Op({"add": "add", "max": "maximum"}[kind], (before, update), dtype.compute)


def _anchor(low: Lowering, kind: type) -> tuple[Node, Any]:
    node = low.graph.nodes[low.group.roots[0].node]
    assert isinstance(node.primitive, kind)
    return node, node.primitive
