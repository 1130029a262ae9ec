"""Matrix products by tiles, each finished by what follows it while it is in cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, sym
from stagefuse.dsl.dtypes import DType

from ..graph import Contract, Map, Ref, View, flatten_index, split_index
from ..kernel_ir import Alloc, Const, Index, Load, Store, TileProduct, Value
from .blocks import Parallel
from .expressions import as_dtype, at_least_one, product_of
from .values import Lowering

TOGETHER = (8, 4, 2, 1)
"""Rows of a panel that are computed of codes at a time, the first of these that divides."""


@dataclass(frozen=True)
class _Product:
    """A product and its sizes."""

    ref: Ref
    primitive: Contract
    domain: tuple[Expr, ...]
    dtype: DType
    rows: Expr
    columns: Expr
    panels: Expr
    row_tile: int
    operands: tuple[Ref, ...]

    @property
    def panel(self) -> int:
        return self.primitive.panel

    @property
    def depth(self) -> Expr:
        return self.primitive.depth

    def width(self, panel: Expr) -> Expr:
        """The columns of a panel; fewer in the last, unless they are known to come out even."""
        known = self.columns.as_int()
        if known is not None and known % self.panel == 0:
            return const(self.panel)
        return minimum(self.columns - panel * self.panel, const(self.panel))

    @property
    def all_of_it(self) -> _Depth:
        return _Depth(const(0), self.depth)

    @property
    def batch(self) -> list[tuple[str, Expr]]:
        return [(f"d{a}", self.domain[a]) for a in self.primitive.batch]

    @property
    def lead(self) -> Expr:
        """The flat index of the batch."""
        return flatten_index([sym(n) for n, _ in self.batch], [e for _, e in self.batch])

    @property
    def base(self) -> Expr:
        """Where the matrix of the batch at hand begins in its buffer."""
        return self.primitive.base.substitute({f"i{x}": sym(f"d{x}") for x in self.primitive.batch})

    def place(self, low: Lowering, row: Expr, column: Expr) -> list[Expr]:
        """The position in the result of a row and a column of the matrix."""
        product, domain = self.primitive, self.domain
        at: dict[int, Expr] = {x: sym(f"d{x}") for x in product.batch}
        rows = split_index(row, [domain[x] for x in product.rows], low.facts)
        columns = split_index(column, [domain[x] for x in product.columns], low.facts)
        at.update(zip(product.rows, rows, strict=True))
        at.update(zip(product.columns, columns, strict=True))
        return [at.get(x, const(0)) for x in range(len(domain))]


def _product(low: Lowering, anchor: int | None) -> _Product:
    assert anchor is not None
    node = low.graph.nodes[anchor]
    primitive = node.primitive
    assert isinstance(primitive, Contract)
    domain = node.type.shape
    columns = product_of([domain[a] for a in primitive.columns])
    return _Product(
        Ref(anchor), primitive, domain, node.type.dtype,
        product_of([domain[a] for a in primitive.rows]), columns,
        floordiv(columns + (primitive.panel - 1), primitive.panel, low.facts),
        low.schedule.row_tile[primitive.panel], node.operands,
    )  # fmt: skip


@dataclass(frozen=True)
class _Depth:
    """A stretch of a product's sum. `packed`: the panels at hand hold no more than the stretch.
    `adds`: to what earlier stretches gave."""

    begin: Expr
    length: Expr
    packed: bool = False
    adds: bool = False


@dataclass(frozen=True)
class _Matrix:
    """Rows of contiguous elements in a buffer or scratch: row i begins at start + i * step."""

    name: str
    start: Expr
    step: Expr


@dataclass(frozen=True)
class _Panels:
    """Packed panels in a buffer or scratch: panel p begins at (first + p) * depth * width."""

    name: str
    first: Expr


def lower_contract(low: Lowering) -> Parallel:
    """Blocks of rows by groups of panels: tiles are computed, then stored with what follows."""
    p = _product(low, low.group.anchor)
    packs = p.operands[1] in low.group.packs
    tiles, whole = _blocking(low, p, packs)
    deep = not whole and not packs  # stretches of the sum outside, panels inside
    group = low.schedule.deep_panels if deep else low.schedule.panel_group
    block = p.row_tile * tiles
    blocks = floordiv(p.rows + (block - 1), block, low.facts)
    groups = floordiv(p.panels + (group - 1), group, low.facts)
    parallel = [*p.batch, ("mb", blocks), ("nb", groups)]
    low.bind(parallel)
    tile = _tile(low, p, 1 if whole else tiles * group if deep else tiles)
    matrix = _Matrix(low.buffer(p.operands[0], "in").name, p.base, p.primitive.row_stride)
    first = sym("mb") * block
    end = minimum(first + block, p.rows)
    size = _stretch(low, p)
    held = p.depth if whole else const(size)
    scratch = _panel_scratch(low, p, const(1), held) if packs else None
    place = const(0) if whole else sym("t")
    if deep:
        place = place + (sym("p") - sym("nb") * group) * tiles

    def over_tiles(body: Callable[[Expr, Expr], None]) -> None:
        def one_tile() -> None:
            start = first + sym("t") * p.row_tile
            body(start, minimum(end - start, const(p.row_tile)))

        low.loop("t", const(0), floordiv(end - first + (p.row_tile - 1), p.row_tile), one_tile)

    def multiply(start: Expr, count: Expr, piece: _Depth) -> None:
        panels = _Panels(scratch, -sym("p")) if scratch else _stored_panels(low, p)
        target = (tile, place * (p.row_tile * p.panel), const(p.panel))
        _emit_product(low, p, target, matrix, panels, start, count, piece=piece)

    def finish(start: Expr, count: Expr) -> None:
        _finish(low, p, tile, place, start, count, sym("p"))

    def over_panels(body: Callable[[], None]) -> None:
        end = minimum(sym("nb") * group + group, p.panels)
        low.loop("p", sym("nb") * group, end, body)

    def in_stretches(body: Callable[[_Depth], None]) -> None:
        body(_Depth(const(0), minimum(const(size), p.depth), packed=packs))
        begin = sym("kb") * size
        rest = _Depth(begin, minimum(p.depth - begin, const(size)), packed=packs, adds=True)
        count = floordiv(p.depth + (size - 1), size, low.facts)
        low.loop("kb", const(1), count, lambda: body(rest))

    def one_block(piece: _Depth) -> None:
        if scratch:
            _pack(low, p, scratch, sym("p"), const(0), piece)
        over_tiles(lambda start, count: multiply(start, count, piece))

    def one_panel() -> None:
        if whole:
            if scratch:
                _pack(low, p, scratch, sym("p"), const(0), p.all_of_it)

            def one_tile(start: Expr, count: Expr) -> None:
                multiply(start, count, p.all_of_it)
                finish(start, count)

            over_tiles(one_tile)
            return
        in_stretches(one_block)
        over_tiles(finish)

    if deep:
        in_stretches(lambda piece: over_panels(lambda: one_block(piece)))
        over_panels(lambda: over_tiles(finish))
    else:
        over_panels(one_panel)
    return parallel, at_least_one(p.depth) * (group * p.panel)


def _blocking(low: Lowering, p: _Product, packs: bool) -> tuple[int, bool]:
    """Tiles down that a step computes, and whether over the whole depth at once."""
    schedule, depth = low.schedule, p.depth.as_int()
    if depth is not None and not packs:
        row_bytes = p.row_tile * max(1, depth) * p.dtype.itemsize
        tiles = min(schedule.tiles_per_block, schedule.block_bytes // row_bytes)
        if tiles >= min(4, schedule.tiles_per_block):
            return tiles, True
    whole = depth is not None and depth <= _stretch(low, p)
    return schedule.packed_tiles if packs else schedule.deep_tiles, whole


def _stretch(low: Lowering, p: _Product) -> int:
    """The part of the sum that is done at a time where not all of it is."""
    return low.schedule.codes_block if _holds_codes(low, p) else low.schedule.depth_block


def _holds_codes(low: Lowering, p: _Product) -> bool:
    """Whether the kernel computes its panels of codes."""
    ref = p.operands[1]
    return ref in low.group.packs and isinstance(low.graph.nodes[ref.node].primitive, Map)


def lower_chain(low: Lowering) -> Parallel:
    """Blocks of whole rows: a product into scratch, its row reductions there, the next product."""
    group, rows = low.group, low.group.rows
    assert rows is not None
    first = _product(low, rows.anchor)
    last = replace(_product(low, group.anchor), row_tile=first.row_tile)  # the same rows
    block = first.row_tile * low.schedule.packed_tiles
    parallel = [*first.batch, ("mb", floordiv(first.rows + (block - 1), block, low.facts))]
    low.bind(parallel)
    width = first.panels * first.panel
    scores = low.name("scores")
    low.emit(Alloc(scores, first.dtype, (const(first.row_tile), width)))
    tile = _tile(low, last)
    matrix = _Matrix(
        low.buffer(first.operands[0], "in").name, first.base, first.primitive.row_stride
    )
    keys, values = _all_panels(low, first), _all_panels(low, last)
    start_of = sym("mb") * block
    end = minimum(start_of + block, first.rows)

    def one_tile() -> None:
        start = start_of + sym("t") * first.row_tile
        count = minimum(end - start, const(first.row_tile))

        def score() -> None:
            _emit_product(
                low, first, (scores, sym("p") * first.panel, width), matrix, keys, start, count
            )

        low.loop("p", const(0), first.panels, score)
        low.loop("r", const(0), count, lambda: _row(low, first, scores, start))

        def one_panel() -> None:
            inside = _Matrix(scores, -start * width, width)
            target = (tile, const(0), const(last.panel))
            _emit_product(low, last, target, inside, values, start, count, "q")
            _finish(low, last, tile, const(0), start, count, sym("q"))

        low.loop("q", const(0), last.panels, one_panel)

    low.loop(
        "t", const(0), floordiv(end - start_of + (first.row_tile - 1), first.row_tile), one_tile
    )
    return parallel, at_least_one(first.depth + last.depth) * block


def _row(low: Lowering, p: _Product, scores: str, start: Expr) -> None:
    """The row kernel between two products, for one row: from its scratch into the same."""
    whole, rows = low.group, low.group.rows
    assert rows is not None
    row, column = start + sym("r"), f"d{len(rows.domain) - 1}"
    at = tuple(map(Index, p.place(low, row, sym(column))))

    def score(place: tuple[Value, ...]) -> Value:
        return Load(scores, (Index(sym("r")), place[-1]), p.dtype)

    def store() -> None:
        value = as_dtype(low.value(rows.roots[0], at, ()), p.dtype)
        low.emit(Store(scores, (Index(sym("r")), Index(sym(column))), value))

    with low.part(rows, {p.ref: score}):
        low.nest([(column, rows.domain[-1])], store)
    assert low.group is whole


def _tile(low: Lowering, p: _Product, count: int = 1) -> str:
    name = low.name("tile")
    low.emit(Alloc(name, p.dtype, (const(count), const(p.row_tile), const(p.panel))))
    return name


def _stored_panels(low: Lowering, p: _Product) -> _Panels:
    return _Panels(low.buffer(p.operands[1], "in").name, p.lead * p.panels)


def _panel_scratch(low: Lowering, p: _Product, count: Expr, depth: Expr) -> str:
    name = low.name("panels")
    low.emit(Alloc(name, p.dtype, (count, depth, const(p.panel))))
    return name


def _all_panels(low: Lowering, p: _Product) -> _Panels:
    """Every panel of the batch at hand: in memory, or packed here first."""
    if p.operands[1] not in low.group.packs:
        return _stored_panels(low, p)
    name = _panel_scratch(low, p, p.panels, p.depth)
    low.loop("p", const(0), p.panels, lambda: _pack(low, p, name, sym("p"), sym("p"), p.all_of_it))
    return _Panels(name, const(0))


def _pack(
    low: Lowering, p: _Product, scratch: str, panel: Expr, place: Expr, piece: _Depth
) -> None:
    """Fills a panel of scratch with a stretch: what its columns read, zeros elsewhere."""
    ref = p.operands[1]
    node = low.graph.nodes[ref.node]
    view = node.primitive
    if _holds_codes(low, p):
        return _unfold(low, p, scratch, panel, place, piece)
    assert isinstance(view, View)
    lead = [*(sym(n) for n, _ in p.batch), panel, piece.begin + sym("k")]
    guards = [g for g in view.guard if not _is_tail(g, view, p)]
    spot = (Index(place), Index(sym("k")))

    def put(value: Value, column: Expr) -> None:
        low.emit(Store(scratch, (*spot, Index(column)), as_dtype(value, p.dtype)))

    def element(column: Expr) -> None:
        here = dict(zip(view.symbols, map(Index, (*lead, column)), strict=True))
        at = tuple(low.index(e, here) for e in view.indices)
        put(low.value(node.operands[0], at, ()), column)

    def guards_at(column: Expr) -> list[Expr]:
        at = dict(zip(view.symbols, (*lead, column), strict=True))
        return [g.substitute(at, low.facts) for g in guards]

    def one_k() -> None:
        zero = Const(0.0, p.dtype)
        start = const(0) if guards else p.width(panel)
        if start != const(p.panel):
            low.loop("c", start, const(p.panel), lambda: put(zero, sym("c")), vector=True)
        _over_columns(low, p, panel, element, guards_at)

    with low.part(low.group.packs[ref], {}):
        low.loop("k", const(0), piece.length, one_k)


def _unfold(
    low: Lowering, p: _Product, scratch: str, panel: Expr, place: Expr, piece: _Depth
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


def _is_tail(guard: Expr, view: View, p: _Product) -> bool:
    """Whether a guard of a packing says no more than that the column is one of the product's."""
    panel, column = sym(view.symbols[-3]), sym(view.symbols[-1])
    if p.panels.as_int() == 1:
        panel = const(0)
    return guard == p.columns - 1 - (panel * p.panel + column)


def _over_columns(
    low: Lowering,
    p: _Product,
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


def _emit_product(
    low: Lowering,
    p: _Product,
    target: tuple[str, Expr, Expr],
    matrix: _Matrix,
    panels: _Panels,
    start: Expr,
    count: Expr,
    panel: str = "p",
    piece: _Depth | None = None,
) -> None:
    """One TileProduct: `count` rows from `start`, into a target of (name, offset, row)."""
    name, offset, row = target
    piece = piece or p.all_of_it
    skip = const(0) if piece.packed else piece.begin * p.panel
    low.emit(
        TileProduct(
            name, offset, row, matrix.name,
            matrix.start + start * matrix.step + piece.begin, matrix.step, const(1),
            panels.name, (panels.first + sym(panel)) * p.depth * p.panel + skip, count,
            piece.length, p.row_tile, p.panel, piece.adds, p.width(sym(panel)),
        )
    )  # fmt: skip


def _finish(
    low: Lowering, p: _Product, tile: str, place: Expr, start: Expr, count: Expr, panel: Expr
) -> None:
    """What the kernel stores of a tile of `count` rows from `start`, in scratch at `place`."""

    def one_row() -> None:
        low.facts = low.facts.with_ranges({"r": (0, p.row_tile - 1)})
        _over_columns(low, p, panel, element)

    def element(column: Expr) -> None:
        inside = Load(tile, (Index(place), Index(sym("r")), Index(column)), p.dtype)
        with low.part(low.group, {p.ref: lambda _: inside}):
            low.store(p.place(low, start + sym("r"), panel * p.panel + column))

    low.loop("r", const(0), count, one_row)
