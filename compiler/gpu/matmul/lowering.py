"""Matrix products for a GPU: a block computes a tile of rows by a few adjacent panels.

The tile goes to scratch, where all lanes take its elements in the order of the result and finish
them with what follows the product. Products of few tiles are in `split_depth`; where sizes decide,
both ways are in the plan, and the grid of one of them is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import field, replace
from functools import partial

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.fusion.join_narrow import is_coded
from stagefuse.compiler.graph import Contract, Gather, Graph, Ref, View
from stagefuse.compiler.kernel_ir import Alloc, Index, Load, Op, TileProduct, Value
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.expressions import as_dtype
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.lower.product import Depth, Product, product_of_group
from stagefuse.compiler.lower.products import stored_panels
from stagefuse.compiler.lower.values import Lowering
from stagefuse.compiler.patterns.chosen import (
    Position,
    chooses,
    chosen_matrices,
    chosen_rows,
    steps_taken,
)
from stagefuse.compiler.patterns.gathered import Gathered, Turned, gathered_of, turned_of
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.frozen import frozen

from .clusters import in_cluster
from .epilogue import ROWS
from .few_rows import MOST_ROWS
from .im2col_loads import pixels_of
from .mma import NAMES, Kind, kind_of
from .persistent import Whole, cluster_of, suits
from .tensor_loads import Matrices
from .tf32_shapes import Shape
from .tile_widths import widths
from .wgmma_tiles import MOST_ROUGH_COLUMNS, ROW_BYTES
from .window_rows import Windows

PANELS = {48: 2, 64: 2, 32: 2, 16: 4}
"""Panels of a width that make a tile."""
TOGETHER = 8
"""Blocks below each other that run together, so that they share what they read of the panels."""
BESIDE = 12
"""Tiles of a shape beside each other that run together, at most."""
PADDING = 8
"""Elements between the rows of a tile, so that eight rows lie in different banks."""
TURNED_PADDING = 2
"""The same of a tile whose columns are read: two lanes to a bank."""


@frozen
class Left:
    """The left operand in a buffer: row i begins at `start` + i * `step`, and its elements are
    `along` apart; or its element of row i and depth k is at `indices`, 0 unless every `guard` is at
    least 0."""

    name: str
    start: Expr
    step: Expr
    indices: tuple[Expr, ...] = ()
    guard: tuple[Expr, ...] = ()
    chosen: tuple[str, ...] = ()
    positions: Callable[[Expr], tuple[Value, ...]] | None = None
    """What the names `chosen` in indices stand for in a row."""
    along: Expr = field(default_factory=lambda: const(1))

    def rows(self, s: TileProduct, start: Expr, begin: Expr) -> TileProduct:
        """A product of the rows from `start` on, and of the depth from `begin` on."""
        if not self.indices:
            place = self.start + start * self.step + begin * self.along
            return replace(s, a_offset=place, a_row=self.step, a_col=self.along)
        here = {"i": start + sym("i"), "k": begin + sym("k")}
        indices, guard = (tuple(e.substitute(here) for e in x) for x in (self.indices, self.guard))
        if self.positions is None:
            return replace(s, a_indices=indices, a_guard=guard)
        positions = (*s.positions, *self.positions(here["i"]))
        chosen = (*s.chosen, *self.chosen)
        return replace(s, a_indices=indices, a_guard=guard, chosen=chosen, positions=positions)


def multiply(
    low: Lowering,
    p: Product,
    target: tuple[str, Expr, Expr],
    left: Left,
    start: Expr,
    count: Expr,
    piece: Depth | None = None,
) -> None:
    """The product of `count` rows from `start` by the panel p, into (name, offset, row)."""
    ref, zero = p.operands[1], const(0)
    piece = piece or p.all_of_it
    name, offset, row = target
    product = TileProduct(
        name, offset, row, left.name, zero, zero, const(1), "", zero, count, piece.length,
        p.row_tile, p.panel, False, p.width(sym("p")),
    )  # fmt: skip
    product = left.rows(product, start, piece.begin)
    if ref not in low.group.packs:
        panels = stored_panels(low, p)
        first = (panels.first + sym("p")) * p.depth * p.panel + piece.begin * p.panel
        return low.emit(replace(product, panel=panels.name, panel_offset=first))
    if holds_codes(low.graph, low.group, p.ref.node):
        element = _element_of(low, p, piece)
        return low.emit(replace(product, element=element, k="k", c="c"))
    first, along, across = right_of(low, p)
    source = low.buffer(stored_of(low.graph, low.group, ref), "in")
    first = first + sym("p") * p.panel * across + piece.begin * along
    matrices = matrices_chosen(low, p)
    chosen = (*product.chosen, *(name for name, _, _ in matrices))
    positions = (*product.positions, *(value for _, _, value in matrices))
    low.emit(
        replace(
            product, panel=source.name, panel_offset=first, panel_row=along, panel_col=across,
            chosen=chosen, positions=positions,
        )
    )  # fmt: skip


def stored_of(graph: Graph, group: Group, ref: Ref) -> Ref:
    """What a product reads in place of an operand."""
    if ref not in group.packs:
        return ref
    chosen, node = chooses(graph, group, ref), graph.nodes[ref.node]
    if isinstance(node.primitive, View):
        (ref,) = node.operands
        node = graph.nodes[ref.node]
    # a member of the kernel is not stored: it converts what is
    if ref.node in group.members and not isinstance(node.primitive, Gather):
        (ref,) = node.operands
        node = graph.nodes[ref.node]
        if isinstance(node.primitive, View) and ref.node in group.members:
            return node.operands[0]  # turned, and then converted
    return node.operands[0] if chosen else ref


def _element_of(low: Lowering, p: Product, piece: Depth) -> Value:
    """An element of the panel p that is computed, at row `k` of a stretch and column `c`."""
    ref, before = p.operands[1], low.facts
    low.facts = before.with_ranges({"k": (0, piece.length - 1), "c": (0, p.panel - 1)})
    lead = [*(sym(n) for n, _ in p.batch), sym("p")]
    with low.part(low.group.packs[ref], {}):
        value = low.value(ref, tuple(map(Index, (*lead, piece.begin + sym("k"), sym("c")))), ())
    low.facts = before
    narrow = operands_of(low.graph, low.group) is not None and p.row_tile > MOST_ROWS
    if isinstance(value, Op) and value.fn == "round_to" and narrow:
        (value,) = value.args  # tiles are stored in the 16 bits of the rows
    return as_dtype(value, p.dtype)


def right_of(low: Lowering, p: Product) -> tuple[Expr, Expr, Expr]:
    """Where the right operand's elements lie, which are in steps: the first one of the batch at
    hand, and the steps along the depth and along the columns."""
    steps = steps_taken(low.graph, low.group, low.graph.nodes[p.ref.node])
    assert steps is not None
    first, along, across = (e.substitute(_batch_of(low, p)) for e in steps)
    return first, along, across


def _batch_of(low: Lowering, p: Product) -> dict[str, Expr]:
    """The batch at hand by the symbols of the view that packs a product's panels."""
    view = low.graph.nodes[p.operands[1].node].primitive
    assert isinstance(view, View)
    return dict(zip(view.symbols, (sym(n) for n, _ in p.batch), strict=False))


def matrices_chosen(low: Lowering, p: Product) -> list[tuple[str, Expr, Value]]:
    """The names in where the right operand lies that stand for positions from data, with the
    extents of their axes and the positions in the batch at hand."""
    product, ref = low.graph.nodes[p.ref.node], p.operands[1]
    found = chosen_matrices(low.graph, product) if chooses(low.graph, low.group, ref) else None
    if found is None:
        return []
    values = _read(low, ref, found.positions, _batch_of(low, p))
    return [(x.name, x.extent, value) for x, value in zip(found.positions, values, strict=True)]


def _read(
    low: Lowering, operand: Ref, positions: Sequence[Position], here: dict[str, Expr]
) -> tuple[Value, ...]:
    """The positions by which an operand is chosen, at indices of the product."""
    at = {name: Index(e) for name, e in here.items()}
    with low.part(low.group.packs[operand], {}):
        return tuple(low.checked(low.graph.nodes[x.node], x.read, x.extent, at) for x in positions)


def moves_in_chunks(low: Lowering, p: Product) -> bool:
    """Whether panels are packed, or lie so that 16 bytes of them are adjacent and aligned."""
    ref = p.operands[1]
    if ref not in low.group.packs or is_coded(low.graph, ref):
        return True
    steps = steps_taken(low.graph, low.group, low.graph.nodes[p.ref.node])
    assert steps is not None
    first, along, across = steps
    if along != const(1) and across != const(1):
        return False
    ends = [first, across if along == const(1) else along]
    if along != const(1):
        ends.append(p.columns)
    return all(low.graph.facts.divides(e, 4) for e in ends)


def left_of(low: Lowering, p: Product, windows: Windows | None = None) -> Left:
    """The left operand where it is stored, its rows in the order of `windows` if they are given."""
    ref = p.operands[0]
    name = low.buffer(stored_of(low.graph, low.group, ref), "in").name
    turned = turned_in(low.graph, low.group, p.ref.node)
    if turned is not None:
        return Left(name, _in_batch(p, turned.first), const(1), along=turned.along)
    found = gathered_in(low.graph, low.group, p.ref.node)
    if found is None:
        return Left(name, p.base, p.primitive.row_stride)
    here = {name: sym(d) for name, (d, _) in zip(found.lead, p.batch, strict=True)}
    here |= {found.row: sym("i"), found.depth: sym("k")}
    indices, guard = (
        tuple(e.substitute(here) for e in exprs) for exprs in (found.indices, found.guard)
    )
    if windows is not None:
        indices, guard = (windows.in_order(x, low.facts) for x in (indices, guard))
        guard = (*guard, *windows.beyond(low.facts))
    if not chooses(low.graph, low.group, ref):
        return Left(name, const(0), const(0), indices, guard)
    rows = chosen_rows(low.graph, low.graph.nodes[p.ref.node])
    assert rows is not None
    positions = rows[1]

    def read(row: Expr) -> tuple[Value, ...]:
        return _read(low, ref, positions, {**here, found.row: row})

    names = tuple(x.name for x in positions)
    return Left(name, const(0), const(0), indices, guard, names, read)


def _in_batch(p: Product, place: Expr) -> Expr:
    """A place over the result's symbols, over those of a product's loops."""
    return place.substitute({f"i{x}": sym(f"d{x}") for x in p.primitive.batch})


def turned_in(graph: Graph, group: Group, anchor: int) -> Turned | None:
    """Where a group reads the left operand of a product, if that is turned there."""
    node = graph.nodes[anchor]
    found = turned_of(graph, node) if node.operands[0] in group.packs else None
    return found if found is not None and found.view.node in group.members else None


def gathered_in(graph: Graph, group: Group, anchor: int) -> Gathered | None:
    """How a group gathers the rows of a product, if it does."""
    node = graph.nodes[anchor]
    left = node.operands[0]
    if chooses(graph, group, left):
        rows = chosen_rows(graph, node)
        return None if rows is None else rows[0]
    if left not in group.packs or not isinstance(graph.nodes[left.node].primitive, View):
        return None
    return gathered_of(graph, node)


@frozen
class RowOfTile:
    """Row `r` of the tile `name` in scratch: the `row` of the product, from its column `first` on;
    or of windows of rows, each of which lie after each other. `number`: which tile of the row it
    is, `width`: its columns."""

    name: str
    row: Expr
    first: Expr
    number: Expr
    width: int


def lower_contract(
    low: Lowering,
    shape: Shape | None = None,
    by_row: Callable[[Lowering, Product, RowOfTile], None] | None = None,
    windows: Windows | None = None,
) -> Parallel:
    """Tiles of rows by panels: computed, then stored with what follows. In a given shape, whose
    depth a cluster of blocks may share, each of them stores some of its rows. If it is given,
    `by_row` does what there is to do with a row of a tile, or with each of the `windows` of rows
    that follow each other there."""
    p = product_of_group(low, low.group.anchor)
    p, group = tile_of(low, p if windows is None else windows.rows_of(p), shape)
    rows, order = p.row_tile, _order(low, p, group, shape)
    parallel, ends = in_cluster(order.loops, rows, 1 if shape is None else shape.split)
    low.bind(parallel)
    turned = by_row is None and not low.schedule.tensor_copies and shape is None
    turned = turned and _lies_along_rows(low, p)
    width = group * p.panel + (TURNED_PADDING if turned else PADDING)
    tile = low.name("tile")
    low.emit(Alloc(tile, p.dtype, (const(rows), const(width))))
    matrix = left_of(low, p, windows)
    each, total = (1, p.rows) if windows is None else (windows.size, windows.count)
    first, start = order.column * group, order.row * rows
    count = minimum(p.rows - start, const(rows))
    begin, last = (floordiv(end, each) for end in ends)
    stretch = begin, minimum(total - floordiv(start, each), last)

    def one_panel() -> None:
        target = (tile, (sym("p") - first) * p.panel, const(width))
        multiply(low, p, target, matrix, start, count)

    def finish() -> None:
        low.facts = low.facts.with_ranges({"r": (0, rows - 1)})
        low.loop("c", const(0), const(group * p.panel), column, vector=True)

    def column() -> None:
        at = first * p.panel + sym("c")
        low.facts = low.facts.with_ranges({"r": (0, rows - 1)})
        low.when([p.columns - 1 - at], lambda: element(at))

    def element(at: Expr) -> None:
        # only columns of the product get here, which split_index may use
        inside = Load(tile, (Index(sym("r")), Index(sym("c"))), p.dtype)
        with low.part(low.group, {p.ref: lambda _: inside}):
            low.store(p.place(low, start + sym("r"), at))

    def all_of_it() -> None:
        low.loop("p", first, minimum(first + group, p.panels), one_panel)
        if by_row is not None:
            row = floordiv(start, each) + sym("r")
            here = RowOfTile(tile, row, first * p.panel, order.column, group * p.panel)
            low.facts = low.facts.with_ranges({"r": (0, rows - 1)})
            return low.loop("r", *stretch, lambda: by_row(low, p, here), vector=True)
        if turned:
            down = partial(low.loop, "r", *stretch, column, vector=True)
            return low.loop("c", const(0), const(group * p.panel), down, vector=True)
        low.loop("r", *stretch, finish, vector=True)

    low.when([p.rows - start - 1] if order.goes_beyond else [], all_of_it)
    return parallel, p.depth * (rows * group * p.panel)


def tile_of(low: Lowering, p: Product, shape: Shape | None = None) -> tuple[Product, int]:
    """The product with as many rows as its tiles have, and the panels of a tile."""
    if low.schedule.tile_columns:
        p = _in_shape(low, p, Shape(ROWS, low.schedule.tile_columns, 1))
        group = low.schedule.tile_columns // p.panel
        return p, min(group, p.panels.as_int() or group)
    if shape is not None:
        p = _in_shape(low, p, shape)
        return p, shape.columns // p.panel
    if not moves_in_chunks(low, p):
        return p, 1  # a lane has few registers for the places of single elements
    known, most = p.panels.as_int(), PANELS[p.panel]
    return p, most if known is None else min(most, known)


@frozen
class _Order:
    """The tiles of a product as loops, and the row and the column of the one at hand; whether
    there are loops for rows of tiles beyond the last one."""

    loops: list[tuple[str, Expr]]
    row: Expr
    column: Expr
    goes_beyond: bool = False


def _order(low: Lowering, p: Product, group: int, shape: Shape | None) -> _Order:
    """An order in which tiles that share what they read run together: some below each other, or,
    in a shape, about a square of them."""
    blocks = floordiv(p.rows + (p.row_tile - 1), p.row_tile, low.facts)
    groups = floordiv(p.panels + (group - 1), group, low.facts)
    plain = _Order([*p.batch, ("mb", blocks), ("nb", groups)], sym("mb"), sym("nb"))
    if shape is not None:
        known = groups.as_int()
        if known is None or known == 1:
            return plain
        beside = max(n for n in range(1, BESIDE + 1) if known % n == 0)
        loops = [*p.batch, ("ng", const(known // beside)), ("mb", blocks), ("ni", const(beside))]
        return _Order(loops, sym("mb"), sym("ng") * beside + sym("ni"))
    single = p.rows.as_symbol() is not None or p.rows.as_int() is not None
    # of a product of sizes too much to prove; tensor copies have an order of their own
    if low.schedule.tensor_copies or not single or operands_of(low.graph, low.group) is None:
        return plain
    few = blocks.as_int()
    if few is not None and few <= TOGETHER:
        return _Order([*p.batch, ("nb", groups), ("mb", blocks)], sym("mb"), sym("nb"))
    high = floordiv(blocks + (TOGETHER - 1), TOGETHER)
    loops = [*p.batch, ("mg", high), ("nb", groups), ("mi", const(TOGETHER))]
    return _Order(loops, sym("mg") * TOGETHER + sym("mi"), sym("nb"), goes_beyond=True)


def _lies_along_rows(low: Lowering, p: Product) -> bool:
    """Whether results are placed so that those of adjacent rows are adjacent, not of columns."""
    rows = {f"d{a}" for a in p.primitive.rows}
    placed = [at[-1].as_symbol() for _, at in low.group.placed.values() if at]
    return len(placed) == len(low.group.roots) and all(name in rows for name in placed)


def part_of(low: Lowering, whole: Whole, part: str, depth: int) -> Whole:
    """The same matrices, of which a kernel takes a part of the depth, so many deep."""
    p, begin = product_of_group(low, low.group.anchor), sym(part) * depth
    return replace(whole, cluster=1, begin=begin, depth=p.depth)


def whole_of(low: Lowering, windows: Windows | None = None) -> Whole | None:
    """The matrices of a product of narrow operands, if tensor copies can bring them, in the order
    of `windows` if there are any; not where rows are adjacent in the result: that suits tiles."""
    p = product_of_group(low, low.group.anchor)
    if _lies_along_rows(low, p):
        return None
    first, along, across = right_of(low, p)
    kind = operands_of(low.graph, low.group)
    assert kind is not None
    if gathered_in(low.graph, low.group, p.ref.node) is not None:
        found = left_of(low, p)
        shape = next(b.shape for b in low.buffers.values() if b.name == found.name)
        stage = ROW_BYTES // kind.size
        pixels = pixels_of(low, shape, found.indices, found.guard, stage, windows)
        if pixels is None or across == const(1):
            return None
        rows = p.rows if windows is None else windows.rows_of(p).rows
        return Whole(rows, p.columns, const(0), first, 1, pixels)
    left = left_of(low, p)
    strides = _lines(left, along, across)
    cluster = cluster_of(p.rows, strides, kind.size, low.facts)
    whole = Whole(p.rows, p.columns, left.start, first, cluster)
    return whole if suits(whole, strides, loops_of(low, p), low.facts) else None


def _lines(left: Left, along: Expr, across: Expr) -> tuple[Expr, Expr]:
    """How far apart the lines of adjacent elements of both operands are."""
    lines = left.step if left.along == const(1) else left.along
    return lines, across if along == const(1) else along


def loops_of(low: Lowering, p: Product) -> list[tuple[str, Expr]]:
    """What the places of operands move with: the batch, and positions from data."""
    return [*p.batch, *((name, extent) for name, extent, _ in matrices_chosen(low, p))]


def _in_shape(low: Lowering, p: Product, shape: Shape) -> Product:
    """The product in tiles of a shape. Panels that lie in steps are as wide as the tile."""
    lies = p.operands[1] in low.group.packs and not holds_codes(low.graph, low.group)
    panel = shape.columns if lies else p.panel
    panels = floordiv(p.columns + (panel - 1), panel, low.facts)
    primitive = replace(p.primitive, panel=panel)
    return replace(p, primitive=primitive, panels=panels, row_tile=shape.rows)


def matrices_of(low: Lowering, shape: Shape) -> Matrices | None:
    """What the tiles of an f32 product in a shape are of, if tensor copies can bring them."""
    p = _in_shape(low, product_of_group(low, low.group.anchor), shape)
    if p.operands[1] not in low.group.packs or holds_codes(low.graph, low.group):
        return None
    if gathered_in(low.graph, low.group, p.ref.node) is not None:
        return None
    left, (first, along, across) = left_of(low, p), right_of(low, p)
    lines, whole = _lines(left, along, across), Whole(p.rows, p.columns, left.start, first, 1)
    if not suits(whole, lines, loops_of(low, p), low.facts):
        return None
    order = _order(low, p, shape.columns // p.panel, shape)
    row, column = order.row * shape.rows, order.column * shape.columns
    return Matrices(p.rows, p.columns, left.start, first, row, column, tuple(loops_of(low, p)))


def tile_widths(graph: Graph, group: Group, cluster: int) -> list[tuple[int, Expr]]:
    """The columns of the tiles of operands in few bits that warpgroups may compute."""
    kind = operands_of(graph, group)
    assert group.anchor is not None
    node = graph.nodes[group.anchor]
    product, shape = node.primitive, node.type.shape
    assert isinstance(product, Contract)
    rows, columns = (size_of([shape[a] for a in x]) for x in (product.rows, product.columns))
    batch = [shape[a] for a in product.batch]
    most = MOST_ROUGH_COLUMNS if kind is not None and kind.is_rough else None
    return widths(rows, columns, batch, cluster, graph.facts, most)


def operands_of(graph: Graph, group: Group) -> Kind | None:
    """What a group's product multiplies if it takes its operands as they are, in 16 or 8 bits."""
    if group.anchor is None or graph.nodes[group.anchor].operands[0] not in group.packs:
        return None
    stored = (stored_of(graph, group, ref) for ref in graph.nodes[group.anchor].operands)
    left, right = (graph.type(ref).dtype for ref in stored)
    return kind_of(left, right) if left.name in NAMES else None


def sums_roughly(graph: Graph, group: Group) -> bool:
    """Whether a group is a product of f8, for which every arch has other instructions."""
    kind = operands_of(graph, group) if group.kind == "contract" else None
    return kind is not None and kind.is_rough


def holds_codes(graph: Graph, group: Group, anchor: int | None = None) -> bool:
    """Whether a group computes the panels of its product, or of another one in it, of codes."""
    anchor = group.anchor if anchor is None else anchor
    if anchor is None:
        return False
    panels = graph.nodes[anchor].operands[1]
    return panels in group.packs and is_coded(graph, panels)
