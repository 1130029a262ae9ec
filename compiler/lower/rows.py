"""Reductions with what follows them: a row at a time, or adjacent columns side by side."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import TypeAlias

from stagefuse.compiler.cpu.bodies import UNROLLED
from stagefuse.compiler.cpu.values import renamed
from stagefuse.compiler.fusion.groups import flops
from stagefuse.compiler.graph import (
    Gather,
    Indirect,
    Map,
    Node,
    Reduce,
    Ref,
    Scalar,
    View,
    flatten_index,
)
from stagefuse.compiler.kernel_ir import (
    Alloc,
    Const,
    Index,
    Load,
    Op,
    Store,
    Value,
)
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.dtypes import BOOL, I64, DType

from .blocks import Parallel
from .expressions import COMBINE, as_dtype, at_least_one, product_of, start_of
from .planes import lower_plane, plane_of
from .values import Lowering

CHEAP_FLOPS = 4
"""Arithmetic of an element of which several are computed together."""
WIDE, WIDEST, UNCACHED = 4 << 10, 16 << 10, 1 << 25
"""Bytes of a block's columns, of one row: where two blocks are left for threads to share; and where
four are, and rows are so many bytes in all that they come from memory. What is accumulated of them
stays in the first-level cache: in the third, sums of 64 x 32000 would take 1.08 of the time so."""
Place: TypeAlias = tuple[Ref, Sequence[Expr]]
"""A root and where in it an element is stored."""
WINDOW, WINDOW_WIDTH = 64, 16
"""Elements of a window, of a row of it, up to which a fold of them is written out, is short."""


def lower_row(low: Lowering) -> Parallel:
    plane = plane_of(low)
    if plane is not None:
        return lower_plane(low, plane)
    domain, inner = low.group.domain, low.group.row_axes or ()
    outer = [a for a in range(len(domain)) if a not in inner]
    if _is_column(low, inner):
        return _columns(low, inner)
    parallel = low.axes(outer)
    low.bind(parallel)
    position = [const(0) if e.as_int() == 1 else sym(f"d{a}") for a, e in enumerate(domain)]
    sources = {r: low.group.source(r) for r in low.group.roots}
    full = [r for r, source in sources.items() if low.graph.type(source).shape == domain]
    for ref, source in sources.items():
        if ref not in full:
            low.store_root(ref, low.group.accesses[source.node][0] or ())

    def store() -> None:
        for ref in full:
            low.store_root(ref, position)

    if full:
        low.nest(low.axes([a for a in sorted(inner) if domain[a].as_int() != 1]), store)
    length = product_of([domain[a] for a in inner])
    for member in low.group.members:
        node = low.graph.nodes[member]
        if isinstance(node.primitive, Reduce):
            shape = low.graph.type(node.operands[0]).shape
            reduced = product_of([shape[a] for a in node.primitive.axes])
            length = length if inner else reduced
    return parallel, at_least_one(length) * max(1, low.cost())


def _is_column(low: Lowering, inner: Sequence[int]) -> bool:
    """Whether memory runs along the kept axis: then accumulate whole stretches of columns."""
    domain, by_memory = low.group.domain, low.schedule.columns_by_memory
    if not domain or product_of([domain[-1], *_flat(low, inner)]).as_int() in range(8):
        return False
    if not by_memory and (inner or _finds_places(low)):
        return False
    if any(domain[a].as_int() != 1 for a in inner):
        return len(domain) - 1 not in inner and bool(_runs_along_kept(low))
    along, steps = False, const(0)
    for member in low.group.members:
        node = low.graph.nodes[member]
        if isinstance(node.primitive, Reduce):
            shape = low.graph.type(node.operands[0]).shape
            steps = steps + product_of([shape[a] for a in node.primitive.axes])
            last = len(shape) - 1 in node.primitive.axes
            along = along or (last and not _is_large_window(low, node))
    few = steps.as_int() in range(UNROLLED + 1)
    found = None if few or not by_memory else _runs_along_kept(low)
    return not along if found is None else found


def _flat(low: Lowering, inner: Sequence[int]) -> list[Expr]:
    """The sizes of axes right before the last one that are kept beside rows along others, and small
    enough for one block of columns with it: such as the places of a small image."""
    domain = low.group.domain
    columns, found = domain[-1].as_int(), list[Expr]()
    if not low.schedule.columns_by_memory or all(domain[a].as_int() == 1 for a in inner):
        return found
    for axis in reversed(range(1, len(domain) - 1)):
        size = domain[axis].as_int()
        if axis in inner or columns is None or not size:
            break
        columns *= size
        if columns > low.schedule.columns:
            break
        found.insert(0, domain[axis])
    return found


def _finds_places(low: Lowering) -> bool:
    """Whether a reduction gives positions."""
    reductions = (low.graph.nodes[member].primitive for member in low.group.members)
    return any(isinstance(r, Reduce) and r.kind.startswith("arg") for r in reductions)


def _runs_along_kept(low: Lowering) -> bool | None:
    """Whether what reductions read is adjacent along the last axis of the domain, and not along
    what is reduced; None if it is neither, or along both as in a window."""
    last, found = f"d{len(low.group.domain) - 1}", None
    read = sorted(low.group.loads(low.graph))
    for access in (access for ref in read for access in places_read(low, ref)):
        symbols = [e.symbols() for e in access]
        reduced = [any(name.startswith("f") for name in s) for s in symbols]
        if not any(reduced):
            continue
        if reduced[-1] and last in symbols[-1]:
            return None
        if reduced[-1] and any(last in s for s in symbols):
            return False
        if not reduced[-1] and access[-1].coefficient(last) == const(1):
            found = True
    return found


def places_read(low: Lowering, ref: Ref) -> Iterator[tuple[Expr, ...]]:
    """Where a tensor in memory is read: a position from data stands as the squares of what it is
    looked up by."""
    yield from filter(None, low.group.accesses.get(ref.node, []))
    for node in (low.graph.nodes[member] for member in sorted(low.group.members)):
        gather = node.primitive
        if not isinstance(gather, Gather) or node.operands[0] != ref:
            continue
        for access in filter(None, low.group.accesses[node.id]):
            at = dict(zip(gather.symbols, access, strict=True))
            yield tuple(
                sum((e * e for e in i.indices), const(0)).substitute(at)
                if isinstance(i, Indirect)
                else i.substitute(at)
                for i in gather.indices
            )


def _is_large_window(low: Lowering, node: Node) -> bool:
    """Whether a reduction reads little along its own last axis, but much else, and everything it
    reads runs along the kept axis too: a convolution with one channel in its result."""
    primitive = node.primitive
    assert isinstance(primitive, Reduce)
    shape = low.graph.type(node.operands[0]).shape
    last, whole = shape[-1].as_int(), product_of([shape[a] for a in primitive.axes]).as_int()
    if last is None or last > WINDOW_WIDTH or (whole is not None and whole <= WINDOW):
        return False
    column = f"d{len(low.group.domain) - 1}"
    steps = set()
    for ref in low.group.loads(low.graph):
        for access in low.group.accesses.get(ref.node, [None]):
            if access is None:
                return False
            steps.add(flatten_index(access, low.graph.type(ref).shape).coefficient(column))
    return const(1) in steps and steps <= {const(0), const(1)}


def _columns(low: Lowering, inner: Sequence[int]) -> Parallel:
    """Blocks of columns: each reduction of all of them, one row after the other, then the stores.

    Rows along other axes are read again for each reduction, and for the stores: a block of them
    stays in the second-level cache, and no value is kept.
    """
    domain = low.group.domain
    last = len(domain) - 1
    rows = [a for a in sorted(inner) if domain[a].as_int() != 1]
    low.staged = set()
    low.columns = wide = _width(low, rows)
    first = last - len(_flat(low, inner))
    low.beside = low.axes(list(range(first, last)))
    parallel = low.axes([a for a in range(first) if a not in rows])
    low.column = (const(0), domain[last])
    if not low.beside:
        lo = sym("block") * wide
        parallel += [("block", floordiv(domain[last] + (wide - 1), wide, low.facts))]
        low.column = (lo, minimum(lo + wide, domain[last]))
    low.bind(parallel)
    position = [const(0) if size.as_int() == 1 else sym(f"d{a}") for a, size in enumerate(domain)]
    symbol = f"d{last}"
    low.facts = low.facts.with_ranges(
        {name: (const(0), size - 1) for name, size in (*low.beside, (symbol, domain[last]))}
    )
    marks = tuple(map(Index, position))
    for member in sorted(low.group.members):  # accumulators first, in order of the graph
        node = low.graph.nodes[member]
        if isinstance(node.primitive, Reduce):
            access = tuple(map(Index, low.group.accesses[member][0] or ()))
            _accumulate(low, Ref(member), access if access else marks)
    for places, axes in zip(_stores(low, position, rows), ([], low.axes(rows)), strict=True):
        if places:
            _over_columns(low, axes, partial(_store_all, low, places))
    return parallel, const(wide * 16)


def _width(low: Lowering, rows: Sequence[int]) -> int:
    """The columns of a block. Where each row is read but once, longer stretches of it are read
    sooner."""
    width, known = low.schedule.columns, low.group.domain[-1].as_int()
    reductions = [m for m in low.group.members if isinstance(low.graph.nodes[m].primitive, Reduce)]
    once = not rows and len(reductions) == 1 and not _finds_places(low)
    if not once or known is None or not low.schedule.columns_by_memory:
        return width
    reduced = low.graph.nodes[reductions[0]]
    size = reduced.type.dtype.compute.itemsize
    total = product_of(low.graph.type(reduced.operands[0]).shape).as_int() or 0
    for most, blocks in ((WIDE, 2), (WIDEST if total * size >= UNCACHED else 0, 4)):
        while width * size < most and 7 * blocks * width <= 4 * known:
            width *= 2
    return width


def _stores(
    low: Lowering, position: Sequence[Expr], rows: Sequence[int]
) -> tuple[list[Place], list[Place]]:
    """The roots that have one element for all of the rows, perhaps with other axes than the
    domain, and those that have one for each."""
    once: list[Place] = []
    whole: list[Place] = []
    for ref in low.group.roots:
        source = low.group.source(ref)
        is_whole = low.graph.type(source).shape == low.group.domain
        at = position if is_whole else low.group.accesses[source.node][0] or ()
        (whole if is_whole and rows else once).append((ref, at))
    return once, whole


def _store_all(low: Lowering, places: Sequence[Place]) -> None:
    for ref, at in places:
        low.store_root(ref, at)


def _over_columns(
    low: Lowering, outer: Sequence[tuple[str, Expr]], body: Callable[[], None]
) -> None:
    """Loops over whole axes, and over the columns of the block inside them."""
    assert low.column is not None
    lo, hi = low.column

    def nest(axes: Sequence[tuple[str, Expr]]) -> None:
        if not axes:
            return low.loop(f"d{len(low.group.domain) - 1}", lo, hi, body, vector=True)
        (index, extent), *rest = axes
        low.loop(index, const(0), extent, lambda: nest(rest))

    nest([*outer, *low.beside])


def _accumulate(low: Lowering, ref: Ref, at: tuple[Value, ...]) -> None:
    """Emits the reduction of a block of columns and remembers where the results are."""
    node = low.graph.nodes[ref.node]
    primitive = node.primitive
    assert isinstance(primitive, Reduce)
    operand = node.operands[0]
    shape, kept = low.graph.type(operand).shape, iter(at)
    loops = [(f"f{a}", shape[a]) for a in primitive.axes]
    inside = tuple(
        Index(sym(f"f{a}")) if a in primitive.axes else next(kept) for a in range(len(shape))
    )
    many = low.schedule.rows_together if _is_cheap(low, operand) else 1
    if primitive.kind.startswith("arg"):
        result = _place_of_extreme(low, primitive.kind, (operand, inside), loops, many)
    else:
        dtype, element = node.type.dtype.compute, partial(low.value, operand, inside, ())
        result = _combined(
            low, primitive.kind, dtype, loops, lambda: as_dtype(element(), dtype), many
        )
    low.scopes[0].known[(ref, at)] = result


def _combined(
    low: Lowering,
    kind: str,
    dtype: DType,
    loops: Sequence[tuple[str, Expr]],
    element: Callable[[], Value],
    many: int,
) -> Value:
    """What a column's elements come to, `many` rows at a time along the last of the loops."""
    assert low.column is not None
    name = low.name("columns")
    low.emit(Alloc(name, dtype, (const(low.columns),)))
    column, wide = sym(f"d{len(low.group.domain) - 1}") - low.column[0], low.group.domain[-1]
    names, extents = zip(*low.beside, ("", wide), strict=True)
    here = (Index(flatten_index([*map(sym, names[:-1]), column], extents)),)
    _over_columns(low, [], lambda: low.emit(Store(name, here, start_of(kind, dtype))))
    total = Load(name, here, dtype)

    def both(a: Value, b: Value) -> Value:
        return Op(COMBINE[kind], (a, b), dtype)

    def step() -> None:
        low.emit(Store(name, here, both(total, element())))

    *outer, (index, extent) = loops
    known = extent.as_int()
    if many == 1 or (known is not None and known < many):
        _over_columns(low, loops, step)
        return total

    def steps() -> None:
        # what the loop says of its index is not what holds of the rows
        turns, low.facts = low.facts, low.facts.with_ranges({index: (0, extent - 1)})
        value = element()
        low.facts = turns
        values = [renamed(value, {index: sym(index) * many + n}) for n in range(many)]
        while len(values) > 1:
            values = list(map(both, values[::2], values[1::2]))
        low.emit(Store(name, here, both(total, values[0])))

    def along() -> None:
        whole, facts = floordiv(extent, const(many), low.facts), low.facts
        low.loop(index, const(0), whole, lambda: _over_columns(low, [], steps))
        low.facts = facts
        low.loop(index, whole * many, extent, lambda: _over_columns(low, [], step))

    nested = along
    for name_of, size in reversed(outer):
        nested = partial(low.loop, name_of, const(0), size, nested)
    nested()
    return total


def _is_cheap(low: Lowering, ref: Ref) -> bool:
    """Whether an element of several rows at a time is little code."""
    cost, seen, pending = 0, set[int](), [ref.node]
    while pending:
        node = low.graph.nodes[pending.pop()]
        if node.id in seen or node.id not in low.group.members:
            continue
        seen.add(node.id)
        if isinstance(node.primitive, Reduce):
            continue
        known = isinstance(node.primitive, Map | Scalar | View | Gather)
        if not known or node.id in low.staged:
            return False
        cost += flops(node)
        pending += [operand.node for operand in node.operands]
    return cost <= CHEAP_FLOPS


def _place_of_extreme(
    low: Lowering,
    kind: str,
    operand: tuple[Ref, tuple[Value, ...]],
    loops: Sequence[tuple[str, Expr]],
    many: int,
) -> Value:
    """argmax and argmin in two passes: the extreme, then the first place of it or of a NaN."""
    ref, inside = operand
    dtype = low.graph.type(ref).dtype.compute
    place = Index(flatten_index([sym(n) for n, _ in loops], [size for _, size in loops]))
    none = Const((1 << 63) - 1, I64)

    def element() -> Value:
        return as_dtype(low.value(ref, inside, ()), dtype)

    extreme = _combined(low, kind.removeprefix("arg"), dtype, loops, element, many)

    def found() -> Value:
        value = element()
        hit: Value = Op("eq", (value, extreme), BOOL)
        if dtype.is_float:
            hit = Op("or", (hit, Op("isnan", (value,), BOOL)), BOOL)
        return Op("select", (hit, place, none), I64)

    first = _combined(low, "min", I64, loops, found, many)
    return Op("select", (Op("eq", (first, none), BOOL), Const(0, I64), first), I64)
