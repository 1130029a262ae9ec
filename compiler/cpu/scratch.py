"""How much private memory a kernel needs, and in what pieces."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stagefuse.compiler.kernel_ir import (
    Alloc,
    Kernel,
    SortRow,
    Statement,
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


def _scratch_sizes(body: Sequence[Statement]) -> Iterator[Expr]:
    dtypes: dict[str, DType] = {}
    for s in walk(body):
        if isinstance(s, Alloc):
            dtypes[s.name] = s.dtype
            yield alloc_size(s)
        elif isinstance(s, SortRow):
            yield padded(as_expr(s.count) * dtypes[s.keys].itemsize)
            yield padded(as_expr(s.count) * 8)
