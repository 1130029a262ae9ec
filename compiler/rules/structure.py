"""Rules for views, reductions and the rest: what moves elements without changing them."""

from __future__ import annotations

from stagefuse.compiler.folded_views import fold_views
from stagefuse.compiler.graph import (
    WIDE,
    Concat,
    Constant,
    Gather,
    Indirect,
    Position,
    Reduce,
    Ref,
    Scan,
    Scatter,
    Sort,
    View,
)
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.dtypes import I64
from stagefuse.dsl.types import TensorType

from .record import Made, Match, Rule

SPLAT_BYTES = 1 << 16
"""Constants up to this size are looked through for a single value."""
EXACT_KINDS = ("max", "min", "any", "all")


def _view_of_view(m: Match) -> Made:
    if not isinstance(m.primitive, View) or not isinstance(m.below(m.operands[0]), View):
        return None
    found = fold_views(m.b, m.primitive, m.operands[0], m.type)
    return None if found is None else m.simplify(*found)[0]


def _whole_view(m: Match) -> Made:
    view, x = m.primitive, m.operands[0]
    assert isinstance(view, View)
    sizes = m.b.type(x).shape
    if view.guard or not m.fits(sizes):
        return None
    plain = zip(view.indices, view.symbols, sizes, strict=True)
    same = all(e == sym(s) or (e == const(0) and d.as_int() == 1) for e, s, d in plain)
    return x if same else None


def _filled_view(m: Match) -> Made:
    view = m.primitive
    assert isinstance(view, View)
    facts = m.b.ranges(view.symbols, m.type.shape)
    if any(facts.is_nonneg(-1 - g) for g in view.guard):
        return m.full(view.fill)
    value = m.number(m.operands[0])
    if view.guard and value is not None and repr(value) == repr(view.fill):
        return m.full(value)
    return None


def _unguarded(m: Match) -> Made:
    view = m.primitive
    assert isinstance(view, View)
    facts = m.b.ranges(view.symbols, m.type.shape)
    kept = tuple(g for g in view.guard if not facts.is_nonneg(g))
    if kept == view.guard:
        return None
    fill = view.fill if kept else 0
    return m.simplify(View(view.symbols, view.indices, kept, fill), m.operands, m.types)[0]


def _view_of_position(m: Match) -> Made:
    view, inner = m.primitive, m.below(m.operands[0])
    assert isinstance(view, View)
    if view.guard or not isinstance(inner, Position):
        return None
    at = dict(zip(inner.symbols, view.indices, strict=True))
    expr = inner.expr.substitute(at, m.b.ranges(view.symbols, m.type.shape))
    return m.b.position(m.type.shape, view.symbols, expr)


def _view_of_concat(m: Match) -> Made:
    view, inner = m.primitive, m.below(m.operands[0])
    assert isinstance(view, View)
    if view.guard or not isinstance(inner, Concat):
        return None
    facts = m.b.ranges(view.symbols, m.type.shape)
    index, start = view.indices[inner.axis], const(0)
    for part in m.under(m.operands[0]):
        size = m.b.type(part).shape[inner.axis]
        inside = facts.simplify(index - start)
        if facts.is_nonneg(inside) and facts.is_nonneg(size - 1 - inside):
            axis = inner.axis
            indices = (*view.indices[:axis], inside, *view.indices[axis + 1 :])
            return m.simplify(View(view.symbols, indices), (part,), m.types)[0]
        start = start + size
    return None


def _splat(m: Match) -> Made:
    constant = m.primitive
    assert isinstance(constant, Constant)
    size = m.type.dtype.itemsize
    one, count = constant.data[:size], len(constant.data) // size
    if count < 2 or len(constant.data) > SPLAT_BYTES or one * count != constant.data:
        return None
    import numpy as np

    return m.full(np.frombuffer(one, m.type.dtype.numpy)[0].item())


def _concat(m: Match) -> Made:
    concat = m.primitive
    assert isinstance(concat, Concat)
    parts: list[Ref] = []
    for ref in m.operands:
        inner = m.below(ref)
        nested = isinstance(inner, Concat) and inner.axis == concat.axis
        parts.extend(m.under(ref) if nested else (ref,))
    kept = [r for r in parts if m.b.type(r).shape[concat.axis].as_int() != 0] or parts[:1]
    if tuple(kept) == m.operands or len(kept) > max(WIDE, len(m.operands)):
        return None
    return kept[0] if len(kept) == 1 else m.simplify(concat, kept, m.types)[0]


def _gather(m: Match) -> Made:
    gather = m.primitive
    assert isinstance(gather, Gather)
    extents = m.b.type(m.operands[0]).shape
    indices = tuple(_direct(m, i, e) for i, e in zip(gather.indices, extents, strict=True))
    if indices == gather.indices:
        return None
    plain = tuple(i for i in indices if isinstance(i, Expr))
    if len(plain) == len(indices):
        return m.simplify(View(gather.symbols, plain), m.operands[:1], m.types)[0]
    return m.simplify(Gather(gather.symbols, indices), m.operands, m.types)[0]


def _direct(m: Match, index: Expr | Indirect, extent: Expr) -> Expr | Indirect:
    """An index whose tensor's values are known, if it is in range for all sizes."""
    if isinstance(index, Expr):
        return index
    ref, gather = m.operands[index.operand], m.primitive
    assert isinstance(gather, Gather)
    facts = m.b.ranges(gather.symbols, m.type.shape)
    number, below = m.number(ref), m.below(ref)
    if number is not None:
        value = const(int(number))
    elif isinstance(below, Position):
        at = dict(zip(below.symbols, index.indices, strict=True))
        value = below.expr.substitute(at, facts)
    else:
        return index
    value = value * index.scale + index.offset
    if facts.is_nonneg(-1 - value):
        value = value + extent
    inside = facts.is_nonneg(value) and facts.is_nonneg(extent - 1 - value)
    return value if inside else index


def _single_axes(m: Match) -> Made:
    """Axes of size 1 that a reduction need not visit."""
    reduce, x = m.primitive, m.operands[0]
    assert isinstance(reduce, Reduce)
    shape = m.b.type(x).shape
    single = [a for a in reduce.axes if shape[a].as_int() == 1]
    left = [a for a in reduce.axes if a not in single]
    if not single or reduce.kind.startswith("arg"):
        return None
    # 0.0 + -0.0 is 0.0: a float's sum of one keeps its zero only as a sum
    if not left and reduce.kind == "sum" and m.type.dtype.is_float:
        return None
    kept = [a for a in range(len(shape)) if a not in single]
    symbols = m.b.symbols(len(kept))
    at = iter(map(sym, symbols))
    indices = tuple(const(0) if a in single else next(at) for a in range(len(shape)))
    smaller = TensorType(m.b.type(x).dtype, tuple(shape[a] for a in kept))
    (made,) = m.simplify(View(symbols, indices), (x,), (smaller,))
    if not left:
        return m.b.cast(made, m.type.dtype)
    axes = tuple(kept.index(a) for a in left)
    return m.simplify(Reduce(reduce.kind, axes), (made,), m.types)[0]


def _reduce_of_reduce(m: Match) -> Made:
    outer, inner = m.primitive, m.below(m.operands[0])
    assert isinstance(outer, Reduce)
    if not isinstance(inner, Reduce) or inner.kind != outer.kind or not m.once[0]:
        return None
    if outer.kind.startswith("arg"):  # positions of positions are not those of the elements
        return None
    if outer.kind not in EXACT_KINDS and not m.type.dtype.is_int:
        return None
    (x,) = m.under(m.operands[0])
    if m.b.type(m.operands[0]).dtype != m.type.dtype:
        return None
    kept = [a for a in range(m.b.type(x).rank) if a not in inner.axes]
    axes = tuple(sorted((*inner.axes, *(kept[a] for a in outer.axes))))
    return m.simplify(Reduce(outer.kind, axes), (x,), m.types)[0]


def _reduce_of_repeats(m: Match) -> Made:
    """A reduction along axes on which a view does not depend."""
    reduce, view = m.primitive, m.below(m.operands[0])
    assert isinstance(reduce, Reduce)
    if not isinstance(view, View) or view.guard or reduce.kind not in (*EXACT_KINDS, "sum"):
        return None
    shape = m.b.type(m.operands[0]).shape
    used = frozenset[str]().union(*(e.symbols() for e in view.indices))
    free = [a for a in reduce.axes if view.symbols[a] not in used and shape[a].as_int() != 1]
    if reduce.kind != "sum":
        free = [a for a in free if m.facts.is_positive(shape[a])]
    if not free or (reduce.kind == "sum" and not m.type.dtype.is_int):
        return None
    first = {view.symbols[a]: const(0) for a in free}
    indices = tuple(e.substitute(first) for e in view.indices)
    cut = tuple(const(1) if a in free else d for a, d in enumerate(shape))
    type = TensorType(m.b.type(m.operands[0]).dtype, cut)
    (one,) = m.simplify(View(view.symbols, indices), m.under(m.operands[0]), (type,))
    (made,) = m.simplify(reduce, (one,), m.types)
    if reduce.kind != "sum":
        return made
    times = const(1)
    for axis in free:
        times = times * shape[axis]
    count = m.b.position(m.type.shape, m.b.symbols(m.type.rank), times)
    return m.map("mul", made, m.map("cast", count) if m.type.dtype != I64 else count)


def _scan(m: Match) -> Made:
    scan = m.primitive
    assert isinstance(scan, Scan)
    plain = scan.kind == "prod" or m.type.dtype.is_int
    return m.operands[0] if plain and m.type.shape[scan.axis].as_int() == 1 else None


def _sort(m: Match) -> Made:
    sort = m.primitive
    assert isinstance(sort, Sort)
    if m.type.shape[sort.axis].as_int() != 1:
        return None
    return m.operands[0], m.full(0, I64)


def _scatter(m: Match) -> Made:
    nothing = m.b.type(m.operands[1]).shape[0].as_int() == 0
    return m.operands[0] if nothing else None


RULES = (
    Rule("view-of-view", View, (), _view_of_view, "a composition of index maps is one"),
    Rule("whole-view", View, (), _whole_view, "the identity map"),
    Rule("unguarded", View, (), _unguarded, "a guard that always holds"),
    Rule("filled-view", View, (), _filled_view, "a guard that never holds, or fills with the same"),
    Rule("view-of-position", View, (), _view_of_position, "positions at positions are positions"),
    Rule("view-of-concat", View, (), _view_of_concat, "what lies within one part is read from it"),
    Rule("splat", Constant, (), _splat, "one value, repeated: nothing to store or load"),
    Rule("concat", Concat, (), _concat, "parts of parts, without the empty ones"),
    Rule("gather", Gather, (), _gather,
         "positions known while compiling need no check and no load"),
    Rule("single-axes", Reduce, (), _single_axes, "the reduction of one element is the element"),
    Rule("reduce-of-reduce", Reduce, (), _reduce_of_reduce, "max of max, where each step is exact"),
    Rule("reduce-of-repeats", Reduce, (), _reduce_of_repeats,
         "the sum of n equal integers is n times one; their maximum is one, for n of at least 1"),
    Rule("scan-of-one", Scan, (), _scan, "the running product of one element"),
    Rule("sort-of-one", Sort, (), _sort, "one element is in order"),
    Rule("scatter-of-nothing", Scatter, (), _scatter, "nothing is added"),
)  # fmt: skip
