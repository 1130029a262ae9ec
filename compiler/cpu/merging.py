"""Two loops over adjacent axes become one, where everything they read and write lies so.

The rows of an image are short and, in a tensor as it lies, adjacent: a reduction over height and
width is one over all elements, in whole vectors and with several sums at once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import TypeAlias

from stagefuse.compiler.kernel_ir import (
    Alloc,
    Fold,
    For,
    If,
    Index,
    Kernel,
    Let,
    Load,
    Statement,
    Store,
    Value,
)
from stagefuse.dsl.dims import Expr, const, floordiv, sym

from .bodies import is_unrolled, values_of, walk
from .values import parts, renamed

Shapes: TypeAlias = Mapping[str, Sequence[Expr]]
Pair: TypeAlias = tuple[str, str, Expr]
"""The indices of an outer and an inner loop, and the extent of the inner one."""


def merged(kernel: Kernel) -> Kernel:
    """The kernel with such loops merged: the outer index is 0, and the inner one goes on beyond
    its extent, which no address is wrong by."""
    shapes = {b.name: b.shape for b in kernel.buffers}
    shapes |= {s.name: s.shape for s in walk(kernel.body) if isinstance(s, Alloc)}
    return replace(kernel, body=_statements(kernel.body, shapes))


def _statements(body: Sequence[Statement], shapes: Shapes) -> tuple[Statement, ...]:
    return tuple(_statement(s, shapes) for s in body)


def _statement(s: Statement, shapes: Shapes) -> Statement:
    if isinstance(s, If):
        return replace(s, body=_statements(s.body, shapes))
    if isinstance(s, Fold):
        return fold_as_one(s, shapes)
    if not isinstance(s, For):
        return s
    s = replace(s, body=_statements(s.body, shapes))
    match s.body:
        case (For(lo=lo) as inner,) if lo == const(0):
            return as_one(s, inner, shapes) or s
        case (For() as inner,):
            return _stretch(s, inner, shapes) or s
    return s


def _stretch(s: For, inner: For, shapes: Shapes) -> For | None:
    """Loops over rows of some width, and of each over what is between two places counted flat over
    all of them: as one loop from place to place."""
    begin, stop = _sides(inner.lo, "max"), _sides(inner.hi, "min")
    if begin is None or stop is None or begin[0] != const(0):
        return None
    (_, first), (wide, last) = begin, stop
    first, last = first + sym(s.index) * wide, last + sym(s.index) * wide
    if s.index in first.symbols() | last.symbols() or (wide.as_int() or 0) < 1:
        return None
    if (s.lo, s.hi) != (floordiv(first, wide), floordiv(last + (wide - 1), wide)):
        return None
    found = as_one(s, replace(inner, lo=const(0), hi=wide), shapes)
    return None if found is None else replace(found, lo=first, hi=last)


def _sides(expr: Expr, kind: str) -> tuple[Expr, Expr] | None:
    """The number and the other side that an expression is the minimum or maximum of."""
    match expr.terms:
        case ((((atom, 1),), 1),) if atom.kind == kind:
            one, other = atom.args
            return (one, other) if one.as_int() is not None else (other, one)
    return None


def fold_as_one(s: Fold, shapes: Shapes) -> Fold:
    """A fold whose last loops are one, as far as they lie so."""
    while len(s.loops) > 1 and not is_unrolled(s):
        *lead, (outer, count), (name, extent) = s.loops
        if not _lie_so([s.value], (outer, name, extent), shapes):
            break
        value = renamed(s.value, {outer: const(0)})
        s = replace(s, loops=(*lead, (name, count * extent)), value=value)
    return s


def as_one(s: For, inner: For, shapes: Shapes) -> For | None:
    """Two loops as one, the inner one from 0 on, if they lie so; the inner one's promise holds for
    both, as of what they store nothing is read but, where it is stored, what was there."""
    if not inner.vector or s.index in inner.hi.symbols():
        return None
    if not all(isinstance(x, Let | Store) for x in inner.body):
        return None
    values, pair = list(values_of(inner.body)), (s.index, inner.index, inner.hi)
    stores = [x for x in inner.body if isinstance(x, Store)]
    written = {x.buffer: x.indices for x in stores}
    reads = [load for load in _loads(values) if load.buffer in written]
    if reads and len(written) < len(stores):
        return None
    if any(load.indices != written[load.buffer] for load in reads):
        return None
    places = {id(i) for x in stores for i in x.indices}
    rest = [v for v in values if id(v) not in places]
    if not _lie_so(rest, pair, shapes):
        return None
    if not all(_lies_so(x.indices, shapes[x.buffer], pair, written=True) for x in stores):
        return None
    here = {s.index: const(0)}
    body = tuple(_renamed(x, here) for x in inner.body)
    return replace(inner, lo=s.lo * inner.hi, hi=s.hi * inner.hi, body=body)


def _renamed(s: Statement, names: Mapping[str, Expr]) -> Statement:
    if isinstance(s, Store):
        places = tuple(renamed(v, names) for v in s.indices)
        return replace(s, indices=places, value=renamed(s.value, names))
    assert isinstance(s, Let)
    return replace(s, value=renamed(s.value, names))


def _loads(values: Iterable[Value]) -> Iterator[Load]:
    pending, seen = list(values), set()
    while pending:
        value = pending.pop()
        if id(value) not in seen:
            seen.add(id(value))
            pending += parts(value)
            if isinstance(value, Load):
                yield value


def _lie_so(values: Sequence[Value], pair: Pair, shapes: Shapes) -> bool:
    """Whether values depend on two indices in nothing but where they read, and there on both as if
    on one."""
    pending, seen = list(values), set()
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Index) and value.expr.symbols() & {*pair[:2]}:
            return False
        if isinstance(value, Load):
            if not _lies_so(value.indices, shapes[value.buffer], pair):
                return False
            pending += [*value.guard, *(i for i in value.indices if not isinstance(i, Index))]
        else:
            pending += parts(value)
    return True


def _lies_so(
    indices: Sequence[Value], shape: Sequence[Expr], pair: Pair, written: bool = False
) -> bool:
    """Whether the place of an element depends on two indices as if on one: not at all, or, as it
    must where elements are `written`, in equal steps."""
    place, stride = const(0), const(1)
    for value, extent in reversed(list(zip(indices, shape, strict=True))):
        if isinstance(value, Index):
            place = place + value.expr * stride
        stride = stride * extent
    outer, inner, extent = pair
    steps = [place.coefficient(name) for name in (outer, inner)]
    if steps[0] is None or steps[1] is None or steps[0] != steps[1] * extent:
        return False
    if written and steps[1] == const(0):
        return False
    rest = place - sym(outer) * steps[0] - sym(inner) * steps[1]
    return not rest.symbols() & {outer, inner}
