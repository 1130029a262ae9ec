"""Rows of scratch that can lie where their kernel's result is written in the end.

A kernel that computes a row into scratch and writes its result from there, such as a softmax,
stores to memory in a burst in which it computes little. With the scratch row in the result's place,
the lines are fetched while the row is computed, and the last loop finds them in the first cache.
"""

from __future__ import annotations

from stagefuse.compiler.kernel_ir import Alloc, For, Index, Kernel, Let, Load, Store
from stagefuse.dsl.dims import const, sym
from stagefuse.dsl.frozen import frozen

from .bodies import is_walk, values_of, walk
from .values import post_order


@frozen
class RowInResult:
    """The scratch row `row` may lie where `store`, in the kernel's `last` loop, stores."""

    row: str
    last: For
    store: Store


def row_in_result(kernel: Kernel) -> RowInResult | None:
    """A row that nothing reads after its place in the result is written.

    The last statement must be a loop along the whole row, and reads it only at its own position.
    The store is the last of the loop: those before it have read the row by then.
    """
    last = kernel.body[-1] if kernel.body else None
    if not (isinstance(last, For) and last.vector and last.lo == const(0) and last.body):
        return None
    store = last.body[-1]
    if not isinstance(store, Store) or not all(isinstance(x, Let | Store) for x in last.body):
        return None
    results = {b.name: b for b in kernel.buffers if b.mode == "out"}
    written = [s.buffer for s in walk(kernel.body) if isinstance(s, Store)]
    if store.buffer not in results or written.count(store.buffer) != 1:
        return None
    if not is_walk(store, results[store.buffer].shape, last.index):
        return None
    here = (Index(sym(last.index)),)
    rows = [
        s.name
        for s in kernel.body
        if isinstance(s, Alloc) and s.dtype == results[store.buffer].dtype and s.shape == (last.hi,)
    ]
    for row in reversed(rows):
        loads = [
            part.indices
            for value in values_of(last.body)
            for part in post_order(value)
            if isinstance(part, Load) and part.buffer == row
        ]
        if loads and all(place == here for place in loads):
            return RowInResult(row, last, store)
    return None
