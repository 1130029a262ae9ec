"""Panels that a kernel packs itself: scratch, filled with what their columns read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from stagefuse.compiler.graph import Map, View
from stagefuse.compiler.kernel_ir import Alloc, Const, Index, Store, Value
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, sym

from .expressions import as_dtype
from .values import Lowering

if TYPE_CHECKING:
    from .product import Depth, Product

TOGETHER = (8, 4, 2, 1)
"""Rows of a panel that are computed of codes at a time, the first of these that divides."""


def holds_codes(low: Lowering, p: Product) -> bool:
    """Whether the kernel computes its panels of codes."""
    ref = p.operands[1]
    return ref in low.group.packs and isinstance(low.graph.nodes[ref.node].primitive, Map)


def panel_scratch(low: Lowering, p: Product, count: Expr, depth: Expr) -> str:
    name = low.name("panels")
    low.emit(Alloc(name, p.stored, (count, depth, const(p.panel))))
    return name


def pack(low: Lowering, p: Product, scratch: str, panel: Expr, place: Expr, piece: Depth) -> None:
    """Fills a panel of scratch with a stretch: what its columns read, elsewhere what the view has
    there, such as the border of what is padded."""
    ref = p.operands[1]
    node = low.graph.nodes[ref.node]
    view = node.primitive
    if holds_codes(low, p):
        return _unfold(low, p, scratch, panel, place, piece)
    assert isinstance(view, View)
    lead = [*(sym(n) for n, _ in p.batch), panel, piece.begin + sym("k")]
    guards = [g for g in view.guard if not _is_tail(g, view, p)]
    spot = (Index(place), Index(sym("k")))

    def put(value: Value, column: Expr) -> None:
        low.emit(Store(scratch, (*spot, Index(column)), as_dtype(value, p.stored.compute)))

    def element(column: Expr) -> None:
        here = dict(zip(view.symbols, map(Index, (*lead, column)), strict=True))
        at = tuple(low.index(e, here) for e in view.indices)
        put(low.value(node.operands[0], at, ()), column)

    def guards_at(column: Expr) -> list[Expr]:
        at = dict(zip(view.symbols, (*lead, column), strict=True))
        return [g.substitute(at, low.facts) for g in guards]

    def one_k() -> None:
        fill = int(view.fill) if p.stored.is_int else float(view.fill)
        border = Const(fill, p.stored.compute)
        start = const(0) if guards else p.width(panel)
        if start != const(p.panel):
            low.loop("c", start, const(p.panel), lambda: put(border, sym("c")), vector=True)
        over_columns(low, p, panel, element, guards_at)

    with low.part(low.group.packs[ref], {}):
        low.loop("k", const(0), piece.length, one_k)


def _unfold(
    low: Lowering, p: Product, scratch: str, panel: Expr, place: Expr, piece: Depth
) -> None:
    """Fills a panel of scratch with a stretch of what is computed of codes, all columns of it.

    A few rows at a time: they share bytes and scales.
    """
    ref = p.operands[1]
    lead = [*(sym(n) for n, _ in p.batch), panel]
    facts = low.facts
    together = next(n for n in TOGETHER if all(facts.divides(e, n) for e in (p.depth, piece.begin)))

    def put(k: Expr) -> None:
        value = low.value(ref, tuple(map(Index, (*lead, piece.begin + k, sym("c")))), ())
        spot = (Index(place), Index(k), Index(sym("c")))
        low.emit(Store(scratch, spot, as_dtype(value, p.dtype)))

    def some() -> None:
        for n in range(together):
            put(sym("k") * together + n)

    def rows() -> None:
        low.loop("c", const(0), const(p.panel), some, vector=True)

    with low.part(low.group.packs[ref], {}):
        low.loop("k", const(0), floordiv(piece.length, together, facts), rows)


def _is_tail(guard: Expr, view: View, p: Product) -> bool:
    """Whether a guard of a packing says no more than that the column is one of the product's."""
    panel, column = sym(view.symbols[-3]), sym(view.symbols[-1])
    if p.panels.as_int() == 1:
        panel = const(0)
    return guard == p.columns - 1 - (panel * p.panel + column)


def over_columns(
    low: Lowering,
    p: Product,
    panel: Expr,
    body: Callable[[Expr], None],
    guards: Callable[[Expr], Sequence[Expr]] = lambda _: (),
) -> None:
    """Runs a body for the columns of a panel at which guards hold, given their place there.

    Columns of several axes are taken a row of the last axis at a time: neither the axes' indices
    nor what is contiguous then need a division for each column.
    """
    sizes = [p.domain[a] for a in p.primitive.columns if p.domain[a].as_int() != 1]
    first, width = panel * p.panel, p.width(panel)
    if len(sizes) < 2:
        _guarded(low, (const(0), width), None, guards(sym("c")), lambda: body(sym("c")))
        return
    inner = sizes[-1]

    def one_row() -> None:
        column = sym("s") * inner - first + sym("c")
        low.facts = low.facts.with_ranges({"c": (0, inner - 1)})
        ends = (
            maximum(first - sym("s") * inner, 0),
            minimum(first + width - sym("s") * inner, inner),
        )
        _guarded(low, ends, inner, guards(column), lambda: body(column))

    rows = floordiv(first + width + (inner - 1), inner, low.facts)
    low.loop("s", floordiv(first, inner, low.facts), rows, one_row)


def _guarded(
    low: Lowering,
    ends: tuple[Expr, Expr],
    within: Expr | None,
    guards: Sequence[Expr],
    body: Callable[[], None],
) -> None:
    """A vector loop over c between two ends, below `within`, where guards hold.

    Guards that step by a number with c become ends of the loop; the others are tested, outside
    where they can be.
    """
    lo, hi = ends
    outside: list[Expr] = []
    inside: list[Expr] = []
    for guard in guards:
        step = guard.coefficient("c")
        known = None if step is None else step.as_int()
        if known is None:
            inside.append(guard)
            continue
        rest = guard - sym("c") * known
        if known > 0:
            lo = maximum(lo, floordiv(-rest + (known - 1), known))
        elif known < 0:
            hi = minimum(hi, floordiv(rest, -known) + 1)
        else:
            outside.append(guard)

    def at_column() -> None:
        if within is not None:
            low.facts = low.facts.with_ranges({"c": (0, within - 1)})
        low.when(inside, body)

    low.when(outside, lambda: low.loop("c", lo, hi, at_column, vector=True))
