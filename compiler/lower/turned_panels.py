"""Pointwise kernels that pack panels of rows of a matrix: rows become columns, by way of scratch.

Where columns are of an unknown number, the last panel has fewer, so that what is read is guarded;
and elements may be converted. Both keep LLVM from more than an element at a time.
"""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.cpu.turns import SIZES, place_of
from stagefuse.compiler.kernel_ir import (
    Alloc,
    Const,
    For,
    Index,
    Load,
    Op,
    Statement,
    Store,
    Value,
)
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, sym

from .bands import WIDEST
from .blocks import Parallel
from .expressions import product_of
from .panels import LINE
from .values import Lowering


def in_turned_panels(low: Lowering, made: Parallel) -> Parallel:
    """A pointwise kernel that was made; where it copies so many elements of each of a few rows to
    where they are columns, all of them are read along the rows, and turned in registers."""
    parallel, work = made
    match low.scopes[0].body:
        case [For(vector=True, body=(Store(value=Load() as load) as store,)) as loop] if parallel:
            pass
        case _:
            return made
    name, extent = parallel[-1]
    end = _unguarded(loop, load.guard, name)
    if end is None or not _turns(low, loop, store, load, name):
        return made
    if load.stored == load.dtype and end == loop.hi:  # squares are as good
        return made
    first = sym(f"{name}s") * LINE
    stop = minimum(first + LINE, extent, low.facts)
    low.scopes[0].body[:] = _statements(low, (loop, store, load), end, (name, first, stop))
    outside = [*parallel[:-1], (f"{name}s", floordiv(extent + (LINE - 1), LINE, low.facts))]
    low.bind(outside)
    return outside, product_of([work, const(LINE)])


def _unguarded(loop: For, guards: Sequence[Value], name: str) -> Expr | None:
    """Where a loop ends so that its guards hold, if they say no more than that."""
    end = loop.hi
    for guard in guards:
        match guard:
            case Op("ge", (Index(expr), Const(0))) if expr.coefficient(loop.index) == const(-1):
                rest = expr + sym(loop.index)
            case _:
                return None
        if {name, loop.index} & rest.symbols():
            return None
        end = minimum(end, rest + 1)
    return end


def _turns(low: Lowering, loop: For, store: Store, load: Load, name: str) -> bool:
    """Whether rows of what is read are columns of what is written."""
    read = {b.name: b.shape for b in low.buffers.values() if b.mode == "in"}
    written = next(b for b in low.buffers.values() if b.name == store.buffer)
    if load.buffer not in read or loop.lo != const(0) or written.dtype != load.dtype:
        return False
    wide = loop.hi.as_int()
    if wide is None or wide > WIDEST or load.dtype.itemsize not in SIZES:
        return False
    source, to = place_of(load, read), place_of(store, {store.buffer: written.shape})
    if source is None or to is None:
        return False
    step = source.coefficient(loop.index)
    return (
        source.coefficient(name) == const(1)
        and step is not None
        and step not in (const(0), const(1))
        and to.coefficient(loop.index) == const(1)
    )


def _statements(
    low: Lowering, copy: tuple[For, Store, Load], end: Expr, along: tuple[str, Expr, Expr]
) -> list[Statement]:
    """The copy of a stretch, `along` which elements of rows lie."""
    loop, store, load = copy
    name, first, _ = along
    across = (loop.index, const(0), end)
    row, column = Index(sym(loop.index)), Index(sym(name) - first)
    plain = Load(load.buffer, load.indices, load.stored)
    turned, found = low.name("turned"), list[Statement]()
    found.append(Alloc(turned, load.dtype, (const(LINE), loop.hi)))

    def over(outer: tuple[str, Expr, Expr], inner: tuple[str, Expr, Expr], body: Store) -> None:
        found.append(For(*outer, (For(*inner, (body,), True),)))

    if load.stored != load.dtype:
        lines = low.name("lines")
        found.append(Alloc(lines, load.dtype, (loop.hi, const(LINE))))
        over(across, along, Store(lines, (row, column), plain))
        plain = Load(lines, (row, column), load.dtype)
    over(along, across, Store(turned, (column, row), plain))
    if end != loop.hi:
        rest = (loop.index, maximum(end, 0, low.facts), loop.hi)
        over(along, rest, Store(turned, (column, row), Const(load.fill, load.dtype)))
    whole = Store(store.buffer, store.indices, Load(turned, (column, row), load.dtype))
    over(along, (loop.index, const(0), loop.hi), whole)
    return found
