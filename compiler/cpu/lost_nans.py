"""Maxima that need not be NaN where an element is, since everything made with them is NaN anyway.

A softmax stores exp(x - m) of each element x of a row, where m is their maximum, and what it makes
of those it divides by their sum. With a NaN among the elements the sum is NaN, and so are all
results, whatever m is. A processor's maximum of vectors loses a NaN on one side, and to keep it
takes three instructions in place of one.
"""

from __future__ import annotations

from collections.abc import Iterator

from stagefuse.compiler.kernel_ir import (
    Fold,
    For,
    Kernel,
    Load,
    Local,
    Op,
    Statement,
    Store,
    Value,
)
from stagefuse.compiler.kernel_text import values_of
from stagefuse.dsl.dims import sym

from .bodies import folds_what_it_stores, walk
from .values import post_order, renamed

STRICT = frozenset({"add", "sub", "mul", "div", "neg", "exp", "reciprocal"})
"""Functions of floats whose result is NaN where an operand is."""


def lost_nans(kernel: Kernel) -> frozenset[str]:
    """The names of folds that may lose a NaN."""
    found = set()
    for body in _bodies(kernel.body):
        for most, loop, total in zip(body, body[1:], body[2:], strict=False):
            if isinstance(most, Fold) and isinstance(loop, For) and isinstance(total, Fold):
                row = _row(most, loop, total)
                if row is not None and _drowns(kernel, most, loop, total, row):
                    found.add(most.name)
    return frozenset(found)


def _bodies(body: tuple[Statement, ...]) -> Iterator[tuple[Statement, ...]]:
    yield body
    yield from (s.body for s in walk(body) if isinstance(s, For))


def _row(most: Fold, loop: For, total: Fold) -> str | None:
    """Where a loop stores what is NaN wherever its element is, if that is then summed up."""
    if most.kind not in ("max", "min") or total.kind != "sum" or len(most.loops) != 1:
        return None
    ((name, extent),) = most.loops
    if extent != loop.hi or not folds_what_it_stores(loop, total) or len(loop.body) != 1:
        return None
    (store,) = loop.body
    element = renamed(most.value, {name: sym(loop.index)})
    shifted = Op("sub", (element, Local(most.name, most.dtype)), most.dtype)
    if not isinstance(store, Store) or not _is_nan_where(store.value, shifted):
        return None
    return store.buffer if _is_nan_where(total.value, total_of(total, store.buffer)) else None


def total_of(total: Fold, row: str) -> Value | None:
    """The element of a row that a sum reads."""
    reads = [v for v in post_order(total.value) if isinstance(v, Load) and v.buffer == row]
    return reads[0] if len(reads) == 1 else None


def _drowns(kernel: Kernel, most: Fold, loop: For, total: Fold, row: str) -> bool:
    """Whether nothing else is made of the maximum, and nothing of the row but with its sum."""
    own, summed = Local(most.name, most.dtype), Local(total.name, total.dtype)
    scratch = row not in {b.name for b in kernel.buffers}
    for s in walk(kernel.body):
        for value in values_of(s):
            parts = post_order(value)
            reads = any(isinstance(v, Load) and v.buffer == row for v in parts)
            if reads and s is not total and not _is_nan_where(value, summed):
                return False
            if own in parts and s is not loop.body[0]:
                return False
    return scratch


def _is_nan_where(value: Value, part: Value | None) -> bool:
    """Whether a value is NaN wherever a part of it is."""
    nan: set[int] = set()
    for v in post_order(value):
        strict = isinstance(v, Op) and v.fn in STRICT and any(id(a) in nan for a in v.args)
        if strict or v == part:
            nan.add(id(v))
    return id(value) in nan
