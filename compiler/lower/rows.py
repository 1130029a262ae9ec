"""Reductions with what follows them: a row at a time, or adjacent columns side by side."""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym

from ..cpu.bodies import UNROLLED
from ..graph import Node, Reduce, Ref, flatten_index
from ..kernel_ir import (
    Alloc,
    Index,
    Load,
    Op,
    Store,
    Value,
)
from .blocks import Parallel
from .expressions import COMBINE, as_dtype, at_least_one, product_of, start_of
from .planes import lower_plane, plane_of
from .values import Lowering

WINDOW, WINDOW_WIDTH = 64, 16
"""Elements of a window, of a row of it, up to which a fold of them is written out, is short."""


def lower_row(low: Lowering) -> Parallel:
    plane = plane_of(low)
    if plane is not None:
        return lower_plane(low, plane)
    domain, inner = low.group.domain, low.group.row_axes or ()
    outer = [a for a in range(len(domain)) if a not in inner]
    alone = all(domain[a].as_int() == 1 for a in inner)
    if _is_column(low) and (alone if low.schedule.columns_by_memory else not inner):
        return _columns(low)
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
        low.nest(low.axes(sorted(inner)), store)
    length = product_of([domain[a] for a in inner])
    for member in low.group.members:
        node = low.graph.nodes[member]
        if isinstance(node.primitive, Reduce):
            shape = low.graph.type(node.operands[0]).shape
            reduced = product_of([shape[a] for a in node.primitive.axes])
            length = length if inner else reduced
    return parallel, at_least_one(length) * max(1, low.cost())


def _is_column(low: Lowering) -> bool:
    """Whether memory runs along the kept axis: then accumulate whole stretches of columns."""
    if not low.group.domain or low.group.domain[-1].as_int() in range(8):
        return False
    along, steps = False, const(0)
    for member in low.group.members:
        node = low.graph.nodes[member]
        if isinstance(node.primitive, Reduce):
            if node.primitive.kind.startswith("arg"):
                return False
            shape = low.graph.type(node.operands[0]).shape
            steps = steps + product_of([shape[a] for a in node.primitive.axes])
            last = len(shape) - 1 in node.primitive.axes
            along = along or (last and not _is_large_window(low, node))
    few = steps.as_int() in range(UNROLLED + 1)
    found = None if few or not low.schedule.columns_by_memory else _runs_along_kept(low)
    return not along if found is None else found


def _runs_along_kept(low: Lowering) -> bool | None:
    """Whether what reductions read is adjacent along the last axis of the domain, and not along
    what is reduced; None if it is neither, or along both as in a window."""
    last, found = f"d{len(low.group.domain) - 1}", None
    for ref in low.group.loads(low.graph):
        for access in low.group.accesses.get(ref.node, []):
            symbols = [e.symbols() for e in access or ()]
            reduced = [any(name.startswith("f") for name in s) for s in symbols]
            if not access or not any(reduced):
                continue
            if reduced[-1] and last in symbols[-1]:
                return None
            if reduced[-1] and any(last in s for s in symbols):
                return False
            if not reduced[-1] and access[-1].coefficient(last) == const(1):
                found = True
    return found


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


def _columns(low: Lowering) -> Parallel:
    domain = low.group.domain
    last = len(domain) - 1
    blocks = floordiv(domain[last] + (low.schedule.columns - 1), low.schedule.columns, low.facts)
    parallel = [*low.axes(range(last)), ("block", blocks)]
    low.bind(parallel)
    lo = sym("block") * low.schedule.columns
    hi = minimum(lo + low.schedule.columns, domain[last])
    low.column = (lo, hi)
    position = [const(0) if size.as_int() == 1 else sym(f"d{a}") for a, size in enumerate(domain)]
    symbol = f"d{last}"
    low.facts = low.facts.with_ranges({symbol: (0, domain[last] - 1)})
    marks = tuple(map(Index, position))
    for member in sorted(low.group.members):  # accumulators first, in order of the graph
        node = low.graph.nodes[member]
        if isinstance(node.primitive, Reduce):
            access = tuple(map(Index, low.group.accesses[member][0] or ()))
            _accumulate(low, Ref(member), access if access else marks)
    low.loop(symbol, lo, hi, lambda: _store_columns(low, position), vector=True)
    return parallel, const(low.schedule.columns * 16)


def _store_columns(low: Lowering, position: Sequence[Expr]) -> None:
    """Stores every root at a position of the domain, or where that lies in a root of other axes."""
    for ref in low.group.roots:
        source = low.group.source(ref)
        is_whole = low.graph.type(source).shape == low.group.domain
        at = position if is_whole else low.group.accesses[source.node][0]
        low.store_root(ref, at or ())


def _accumulate(low: Lowering, ref: Ref, at: tuple[Value, ...]) -> None:
    """Emits the accumulation of a block of columns and remembers where the sums are."""
    assert low.column is not None
    lo, hi = low.column
    node = low.graph.nodes[ref.node]
    primitive = node.primitive
    assert isinstance(primitive, Reduce)
    dtype = node.type.dtype.compute
    name = low.name("columns")
    low.emit(Alloc(name, dtype, (const(low.schedule.columns),)))
    symbol = f"d{len(low.group.domain) - 1}"
    here = (Index(sym(symbol) - lo),)
    start = start_of(primitive.kind, dtype)
    low.loop(symbol, lo, hi, lambda: low.emit(Store(name, here, start)), vector=True)
    operand = node.operands[0]
    shape = low.graph.type(operand).shape
    loops = [(f"f{a}", shape[a]) for a in primitive.axes]
    kept = iter(at)
    inside = tuple(
        Index(sym(f"f{a}")) if a in primitive.axes else next(kept) for a in range(len(shape))
    )
    combine = COMBINE[primitive.kind]

    def step() -> None:
        value = as_dtype(low.value(operand, inside, ()), dtype)
        total = Op(combine, (Load(name, here, dtype), value), dtype)
        low.emit(Store(name, here, total))

    def nest(rest: list[tuple[str, Expr]]) -> None:
        if rest:
            low.loop(rest[0][0], const(0), rest[0][1], lambda: nest(rest[1:]))
        else:
            low.loop(symbol, lo, hi, step, vector=True)

    nest(loops)
    low.scopes[0].known[(ref, at)] = Load(name, here, dtype)
