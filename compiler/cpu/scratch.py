"""How much private memory a kernel needs, and in what pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stagefuse.compiler.kernel_ir import (
    Alloc,
    Kernel,
    SortRow,
    Statement,
    TileProduct,
)
from stagefuse.dsl.dims import Expr, as_expr, const, floordiv
from stagefuse.dsl.dtypes import DType

from .bodies import walk

SCRATCH_ALIGN = 64


def scratch_bytes(kernel: Kernel) -> Expr:
    """The private memory a thread needs for a kernel."""
    total = const(0)
    for size in _scratch_sizes(kernel.body):
        total = total + size
    return total


def padded(size: Expr) -> Expr:
    known = size.as_int()
    if known is not None:
        return const(-(-known // SCRATCH_ALIGN) * SCRATCH_ALIGN)
    return floordiv(size + (SCRATCH_ALIGN - 1), SCRATCH_ALIGN) * SCRATCH_ALIGN


def alloc_size(statement: Alloc) -> Expr:
    size = const(statement.dtype.itemsize)
    for extent in statement.shape:
        size = size * extent
    return padded(size)


def places_of(body: Sequence[Statement]) -> Iterator[tuple[Expr, Expr]]:
    """The rows of panels that a table places, each once: where they begin, and their number."""
    products = (s for s in walk(body) if isinstance(s, TileProduct))
    found = ((s.panel_place, s.depth) for s in products if s.panel_place is not None)
    yield from dict.fromkeys(found)


def _scratch_sizes(body: Sequence[Statement]) -> Iterator[Expr]:
    dtypes: dict[str, DType] = {}
    for s in walk(body):
        if isinstance(s, Alloc):
            dtypes[s.name] = s.dtype
            yield alloc_size(s)
        elif isinstance(s, SortRow):
            yield padded(as_expr(s.count) * dtypes[s.keys].itemsize)
            yield padded(as_expr(s.count) * 8)
    for _, count in places_of(body):
        yield padded(count * 8)
