"""Panels that a kernel packs itself: scratch, filled with what their columns read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeAlias

from stagefuse.compiler.cpu.turns import SIZES
from stagefuse.compiler.graph import Map, View
from stagefuse.compiler.kernel_ir import Alloc, Const, Index, Load, Store, Value
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, sym

from .expressions import as_dtype
from .values import Lowering

if TYPE_CHECKING:
    from .product import Depth, Product

TOGETHER = (8, 4, 2, 1)
"""Rows of a panel that are computed of codes at a time, the first of these that divides."""


LINE = 128
"""Elements that are computed at a time of rows that become columns of a panel: 32 KB of f32."""
Body: TypeAlias = Callable[[], None]


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
    guards = [g for g in view.guard if not _is_tail(g, view, p)]
    turned = not guards and _lies_along_depth(view)
    if turned and _is_computed(low, p):
        return _turn(low, p, scratch, panel, place, piece)
    lead = [*(sym(n) for n, _ in p.batch), panel, piece.begin + sym("k")]
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

    def outside() -> None:
        fill = int(view.fill) if p.stored.is_int else float(view.fill)
        border = Const(fill, p.stored.compute)
        start = const(0) if guards else p.width(panel)
        if start != const(p.panel):
            low.loop("c", start, const(p.panel), lambda: put(border, sym("c")), vector=True)

    def inside() -> None:
        over_columns(low, p, panel, element, guards_at)

    def both() -> None:
        outside()
        inside()

    with low.part(low.group.packs[ref], {}):
        if turned:  # by a loop of its own, which is then made of shuffles
            for part in (outside, inside):
                low.loop("k", const(0), piece.length, part)
        else:
            low.loop("k", const(0), piece.length, both)


def _is_computed(low: Lowering, p: Product) -> bool:
    """Whether the kernel computes or converts elements for its panels, to what can be turned."""
    source = low.graph.nodes[p.operands[1].node].operands[0]
    own = source.node in low.group.packs[p.operands[1]].members
    return p.stored.itemsize in SIZES and (own or low.graph.type(source).dtype != p.stored)


def _lies_along_depth(view: View) -> bool:
    """Whether columns of panels are rows of what they are packed from."""
    *_, k, column = view.symbols
    used = [e.symbols() for e in view.indices]
    along = view.indices[-1].coefficient(k) if view.indices else None
    return along == const(1) and column not in used[-1] and not any(k in x for x in used[:-1])


def _turn(
    low: Lowering, p: Product, scratch: str, panel: Expr, place: Expr, piece: Depth
) -> None:
    """Fills a panel of scratch with a stretch, of rows that become its columns: so many elements of
    each are computed side by side, in lines of scratch of their own."""
    node = low.graph.nodes[p.operands[1].node]
    view, width = node.primitive, p.width(panel)
    assert isinstance(view, View)
    lines, first = low.name("lines"), sym("l") * LINE
    lead = [*(sym(n) for n, _ in p.batch), panel, piece.begin + sym("k"), sym("c")]
    here = dict(zip(view.symbols, map(Index, lead), strict=True))
    line = (Index(sym("c")), Index(sym("k") - first))
    spot = (Index(place), Index(sym("k")), Index(sym("c")))
    border = Const(float(view.fill), p.stored.compute)

    def compute() -> None:
        at = tuple(low.index(e, here) for e in view.indices)
        value = as_dtype(low.value(node.operands[0], at, ()), p.stored.compute)
        low.emit(Store(lines, line, value))

    def over(outer: tuple[str, Expr, Expr], inner: tuple[str, Expr, Expr], body: Body) -> None:
        low.loop(*outer, lambda: low.loop(*inner, body, vector=True))

    def some() -> None:
        along = ("k", first, minimum(first + LINE, piece.length))
        across = ("c", const(0), width)
        over(across, along, compute)
        over(along, across, lambda: low.emit(Store(scratch, spot, Load(lines, line, p.stored))))
        if width != const(p.panel):
            rest = ("c", width, const(p.panel))
            over(along, rest, lambda: low.emit(Store(scratch, spot, border)))

    low.emit(Alloc(lines, p.stored, (const(p.panel), const(LINE))))
    with low.part(low.group.packs[p.operands[1]], {}):
        low.loop("l", const(0), floordiv(piece.length + (LINE - 1), LINE, low.facts), some)


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
