"""Questions about the statements of a kernel."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

from stagefuse.compiler.kernel_ir import (
    Attend,
    Fold,
    For,
    ForEqual,
    If,
    Index,
    Let,
    Load,
    Op,
    SortDigit,
    SortRow,
    Statement,
    Store,
    TileProduct,
)
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.compiler.scalar import FUNCTIONS
from stagefuse.dsl.dims import Expr, const, sym

from .values import post_order, renamed

UNROLLED, UNROLLED_VALUES = 32, 400
WINDOW, WINDOW_VALUES = 64, 2000
"""The same for folds over several loops, the windows of an image: whatever they read lies near."""
APART = tuple(map(const, range(5)))
"""Elements from one step of a loop to the next that vectors read together: shuffles part them."""


def walk(body: Sequence[Statement]) -> Iterator[Statement]:
    """Statements, outer before inner, in order."""
    for s in body:
        yield s
        if isinstance(s, For | ForEqual | If):
            yield from walk(s.body)


def written_buffers(body: Sequence[Statement]) -> frozenset[str]:
    """Names that statements write."""
    found = set()
    for s in walk(body):
        if isinstance(s, Store):
            found.add(s.buffer)
        elif isinstance(s, TileProduct):
            found.add(s.dst)
        elif isinstance(s, Attend):
            found |= {s.dst, s.totals, *filter(None, [s.most])}
        elif isinstance(s, SortRow):
            found |= {s.keys, s.order}
        elif isinstance(s, SortDigit):
            found |= {s.keys, *filter(None, (s.order, s.digits, s.before))}
    return frozenset(found)


def work_of(body: Sequence[Statement]) -> int:
    """Operations of plain statements, by what they cost."""
    return arithmetic(s.value for s in body if isinstance(s, Let | Store))


def arithmetic(values: Iterable[KernelValue]) -> int:
    """Operations of values, by what they cost."""
    return sum(
        FUNCTIONS[part.fn].flops if part.fn in FUNCTIONS else 1
        for value in values
        for part in post_order(value)
        if isinstance(part, Op)
    )


def is_short(s: Fold, most: int = UNROLLED, values: int = UNROLLED_VALUES) -> bool:
    """Whether a fold is short enough to be written out, so that a loop around it can be wide."""
    extents = [extent.as_int() for _, extent in s.loops]
    count = math.prod(most + 1 if e is None else e for e in extents)
    if None in extents or count > most or s.kind.startswith("arg"):
        return False
    return count * len(post_order(s.value)) <= values


def is_unrolled(s: Fold) -> bool:
    """Whether a fold is written out on the CPU: one that is short, or over a window."""
    window = sum(extent.as_int() != 1 for _, extent in s.loops) > 1
    return is_short(s, WINDOW, WINDOW_VALUES) if window else is_short(s)


def is_loop(s: Statement) -> bool:
    """Whether a statement becomes a loop of its own."""
    return isinstance(s, For) or (isinstance(s, Fold) and not is_unrolled(s))


def at_most(expr: Expr, limit: int) -> bool:
    """Whether an expression is plainly no greater than a number."""
    known = expr.as_int()
    if known is not None:
        return known <= limit
    if len(expr.terms) == 1 and expr.terms[0][1] == 1 and len(expr.terms[0][0]) == 1:
        atom, power = expr.terms[0][0][0]
        return power == 1 and atom.kind == "min" and any(at_most(a, limit) for a in atom.args)
    return False


def is_adjacent(values: Iterable[KernelValue], index: str) -> bool:
    """Whether what values read is adjacent along a loop, or a few elements apart, or the same:
    what vectors read is of a few vectors, and no gathers."""
    for value in values:
        for part in post_order(value):
            if isinstance(part, Load) and part.indices:
                *lead, last = part.indices
                if not isinstance(last, Index) or any(
                    not isinstance(v, Index) or index in v.expr.symbols() for v in lead
                ):
                    return False
                step = last.expr.coefficient(index)
                if step not in APART:
                    return False
    return True


def folds_what_it_stores(loop: For, fold: Fold) -> bool:
    """Whether a fold goes over the elements that the loop before it has stored, and over nothing
    else that it has: both can be one loop.
    """
    if not loop.vector or fold.kind.startswith("arg") or fold.loops != ((_name(fold), loop.hi),):
        return False
    if loop.lo != const(0) or not all(isinstance(x, Let | Store) for x in loop.body):
        return False
    here = {_name(fold): sym(loop.index)}
    stored = {x.buffer: x.indices for x in loop.body if isinstance(x, Store)}
    read = [
        (part.buffer, tuple(renamed(v, here) for v in part.indices))
        for part in post_order(fold.value)
        if isinstance(part, Load) and part.buffer in stored
    ]
    return bool(read) and all(stored[buffer] == place for buffer, place in read)


def _name(fold: Fold) -> str:
    return fold.loops[0][0] if fold.loops else ""


def values_of(body: Sequence[Statement]) -> Iterator[KernelValue]:
    """Values that statements always compute: not those inside branches and loops."""
    for s in body:
        if isinstance(s, Let):
            yield s.value
        elif isinstance(s, Store):
            yield from (*s.indices, s.value)


def is_walk(store: Store, shape: Sequence[Expr], index: str) -> bool:
    """Whether a store goes along its buffer, element by element, as the index does."""
    place, stride = const(0), const(1)
    for value, extent in reversed(list(zip(store.indices, shape, strict=True))):
        if not isinstance(value, Index):
            return False
        place = place + value.expr * stride
        stride = stride * extent
    return place.coefficient(index) == const(1)
