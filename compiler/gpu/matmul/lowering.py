"""Matrix products for a GPU: a block computes a tile of rows by a few adjacent panels.

The tile goes to scratch, where all lanes take its elements in the order of the result and finish
them with what follows the product. Products of few tiles are in `split_depth`; where sizes decide,
both ways are in the plan, and the grid of one of them is empty.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.graph import Contract, Graph
from stagefuse.compiler.kernel_ir import Alloc, Index, Load
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.lower.product import Product, product_of_group
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.frozen import frozen

from .clusters import in_cluster
from .epilogue import ROWS
from .im2col_loads import pixels_of
from .operands import (
    Left,
    gathered_in,
    holds_codes,
    left_of,
    matrices_chosen,
    moves_in_chunks,
    multiply,
    operands_of,
    right_of,
)
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


