"""Products of few tiles, which would leave most of a device idle: blocks share their depth, and a
second kernel sums the parts and finishes.
"""

from __future__ import annotations

from dataclasses import replace

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.graph import Contract, Graph, Node, Ref
from stagefuse.compiler.kernel_ir import Alloc, Buffer, Fold, Index, Load, Local, Store
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.lower.product import Depth, Product, product_of_group
from stagefuse.compiler.lower.values import Lowering
from stagefuse.compiler.schedule import GPU, GPU_HALF
from stagefuse.dsl.dims import Expr, as_expr, const, floordiv, minimum, sym
from stagefuse.dsl.dtypes import F32, I32
from stagefuse.dsl.frozen import frozen

from .any_depth import by_warps, cut_of
from .few_rows import MOST_ROWS
from .lowering import PADDING, PANELS, tile_of
from .operands import gathered_in, holds_codes, left_of, moves_in_chunks, multiply, operands_of
from .persistent import Whole

FULL = 132
"""Blocks that fill a device."""
BLOCKS = 8 * FULL
"""Blocks that a product of few rows should have: several for each multiprocessor."""
FEW_ROWS = 32
"""Rows of a tile for products of few rows."""
VERY_FEW = (1, MOST_ROWS)
"""Rows of tiles for products by codes, which lanes then multiply by what they compute; of 16 bits
only one: four take a lane 13 instructions for each element, by nvdisasm, and a tile of 32 rows by
`mma` six."""
FED = 16
"""Blocks that draw what memory gives, where tensor copies bring their operands."""
GATHERED_FED, GATHERED_DEEP = 40, 1024
"""The same where operands are gathered, and the depth from which on splitting it costs less than
one block takes for it. Both by the model, not measured."""
MOST_SPLIT_COLUMNS = 6144
"""Columns up to which few rows are split too where tensor copies could bring operands: of more
columns there are enough tiles of 64 to draw what memory gives."""
LEAST_DEPTH = 96
STAGE = 64
"""Of the depth: of 16 bits, where the right operand is computed."""
COMPUTED = 100
"""Tells the parts of such products from others of the same product."""
WORTH = 0.54
"""Tiles of 64 x 128 of 16 bits, for each element of a part's depth, up to which parts take less
than whole tiles on an A100 by the model: a tile takes 23 ns for each element of its depth, at half
the rate of a multiprocessor that has one block, and a part's tile 42 ns to store and to read."""
MOST_SPLITS = 16
RUN = 128
"""Adjacent elements of the result that a warp sums parts of."""


@frozen
class Thin:
    """How a product of few tiles or few rows is split: `count` parts, each `depth` deep. `few` is
    1 for the sizes at which it is, and else 0; `low` where it has few rows."""

    few: Expr
    low: Expr
    depth: int
    count: int | Expr
    number: int = 0
    """Tells the buffers of different splits of a product apart."""


def thin(graph: Graph, group: Group, enough: int | None = None) -> Thin | None:
    """How to split a group's product where that is worth it, if it may be: where its tiles are at
    most `enough` (`FULL`) and parts cost less to sum than they save, and where a matrix of known
    size has few rows, whose time is that of reading the other one. Of a known number of rows there
    are parts enough for two blocks on each multiprocessor."""
    if group.kind != "contract" or group.anchor is None:
        return None
    node = graph.nodes[group.anchor]
    product = node.primitive
    assert isinstance(product, Contract)
    depth = product.depth.as_int()
    if node.type.dtype not in (F32, I32):
        return None
    if depth is None or product.batch:
        return _of_any_depth(graph, group, node) if enough in (None, FULL) else None
    if depth < 2 * LEAST_DEPTH:
        return None
    rows, columns = (
        size_of([node.type.shape[a] for a in axes]) for axes in (product.rows, product.columns)
    )
    width = PANELS[product.panel] * product.panel
    down = GPU.row_tile[product.panel]
    across = floordiv(columns + (width - 1), width)
    known, count = across.as_int(), MOST_SPLITS
    if known is not None:
        count = min(-(-BLOCKS // max(known, 1)), MOST_SPLITS)
    most = floordiv(rows, FEW_ROWS + 1)
    enough = FULL if enough is None else enough
    tiles = floordiv(rows + (down - 1), down) * across
    high = tiles.as_int()
    if high is not None and (rows.as_int() or 0) > FEW_ROWS:
        count = min(count, max(-(-2 * FULL // high), 2))
    part = max(LEAST_DEPTH, -(-depth // (max(count, 2) * 16)) * 16)
    copied = enough != FULL and (columns.as_int() or 0) > MOST_SPLIT_COLUMNS
    if operands_of(graph, group) is not None and not holds_codes(graph, group):
        enough = min(enough, int(part * WORTH))
    many = floordiv(tiles, enough + 1)
    by_rows = known is not None and count > 1 and not copied
    if by_rows:
        many = minimum(many, most)
    elif known is not None and known > enough:
        return None
    few = graph.facts.simplify(1 - minimum(many, const(1)))
    if few == const(0):
        return None
    low = graph.facts.simplify(1 - minimum(most, const(1)))
    if not by_rows:
        low = few * low  # else all that are low are few
    return Thin(few, low, part, -(-depth // part))


def split_of_computed(graph: Graph, group: Group, split: Thin) -> Thin:
    """How a product by codes is split where tensor cores multiply what lanes compute, in 16 bits.
    Others are split as they are."""
    if not holds_codes(graph, group) or operands_of(graph, group) is None:
        return split
    assert group.anchor is not None
    node = graph.nodes[group.anchor]
    product = node.primitive
    assert isinstance(product, Contract)
    columns = size_of([node.type.shape[a] for a in product.columns]).as_int()
    depth = product.depth.as_int()
    if columns is None or depth is None:
        return split
    part, count = parts_of_computed(columns, depth, product.panel)
    return replace(split, depth=part, count=count, number=split.number + COMPUTED)


def parts_of_computed(columns: int, depth: int, panel: int) -> tuple[int, int]:
    """How deep parts of such a product are, and how many: whole stages, two of them at least, and
    all blocks fit the device at once, two on each multiprocessor."""
    across = -(-columns // (PANELS[panel] * panel))
    most = min(max(2 * FULL // across, 1), MOST_SPLITS)
    part = max(-(-depth // (most * STAGE)), 2) * STAGE
    return part, -(-depth // part)


def _of_any_depth(graph: Graph, group: Group, node: Node) -> Thin | None:
    """How to split a product in a batch, or of any depth, in tiles by `mma.sync`."""
    product, kind = node.primitive, operands_of(graph, group)
    assert isinstance(product, Contract)
    if group.apart or group.nest or holds_codes(graph, group):
        return None
    panel, schedule = product.panel, GPU if kind is None else GPU_HALF
    columns = size_of([node.type.shape[a] for a in product.columns]).as_int()
    most = PANELS[panel] if columns is None else min(PANELS[panel], -(-columns // panel))
    tile, size = (GPU.row_tile[panel], panel), 4 if kind is None else kind.size
    whole = schedule.row_tile[panel] * panel * most
    known = product.depth.as_int() is not None
    cut = cut_of(graph, node, tile, by_warps(size, whole, tile[0] * panel, known))
    return None if cut is None else Thin(cut.holds, const(0), cut.length, cut.count)


def in_parts(graph: Graph, group: Group, count: int) -> Thin | None:
    """A group's product in so many parts for all sizes, if it may be split so."""
    assert group.anchor is not None
    node = graph.nodes[group.anchor]
    product = node.primitive
    assert isinstance(product, Contract)
    depth = product.depth.as_int()
    if depth is None or product.batch or node.type.dtype not in (F32, I32):
        return None
    if depth < count * LEAST_DEPTH:
        return None
    part = -(-depth // (count * 16)) * 16
    return Thin(const(1), const(0), part, -(-depth // part), count)


def enough_tiles(graph: Graph, group: Group, whole: Whole | None) -> int:
    """Tiles up to which a product of operands in few bits on warpgroups is split, if it may be."""
    assert group.anchor is not None
    product = graph.nodes[group.anchor].primitive
    assert isinstance(product, Contract)
    if whole is not None:
        return FED
    return GATHERED_FED if (product.depth.as_int() or 0) >= GATHERED_DEEP else 0


def are_few(graph: Graph, group: Group, split: Thin) -> bool:
    """Whether the blocks of a product of few rows would leave multiprocessors idle."""
    assert group.anchor is not None
    node = graph.nodes[group.anchor]
    product = node.primitive
    assert isinstance(product, Contract)
    columns = size_of([node.type.shape[a] for a in product.columns]).as_int()
    width, count = PANELS[product.panel] * product.panel, as_expr(split.count).as_int()
    return columns is not None and count is not None and -(-columns // width) * count < FULL


def low_rows(graph: Graph, group: Group, split: Thin) -> list[tuple[int, Expr]]:
    """The rows of the tiles of a product where it has few rows, and for each number of them an
    expression that is 1 where tiles have so many, and else 0."""
    assert group.anchor is not None
    node = graph.nodes[group.anchor]
    product = node.primitive
    assert isinstance(product, Contract)
    if not holds_codes(graph, group) or gathered_in(graph, group, node.id) is not None:
        return [(FEW_ROWS, split.low)]
    rows = size_of([node.type.shape[a] for a in product.rows])
    found, below = [], const(0)
    very_few = VERY_FEW if operands_of(graph, group) is None else VERY_FEW[:1]
    for most in (*very_few, FEW_ROWS):
        within = 1 - minimum(floordiv(rows, most + 1), const(1))
        share = graph.facts.simplify(split.low * (within - below))
        below = within
        if share != const(0):
            found.append((most, share))
    return found


def parts_of(ref: Ref, number: int = 0) -> Ref:
    """Stands for a buffer with the parts of a product, which is no value of the graph."""
    return Ref(-1 - ref.node, number)


def _parts(low: Lowering, p: Product, split: Thin, mode: str) -> Buffer:
    shape = (as_expr(split.count), *(e for _, e in p.batch), p.rows, p.columns)
    name = f"b{len(low.buffers)}"
    return low.buffers.setdefault(parts_of(p.ref, split.number), Buffer(name, p.dtype, shape, mode))


def lower_parts(low: Lowering, split: Thin, tile_rows: int = 0) -> Parallel:
    """The products of the parts of the depth, a panel and 64 rows a block; of few rows, some
    panels by those, of very few one. Where tensor copies bring operands, in tiles of theirs."""
    p, group = product_of_group(low, low.group.anchor), 1
    copied = low.schedule.tensor_copies
    if copied:
        p, group = tile_of(low, p)
    elif tile_rows and moves_in_chunks(low, p):
        p = replace(p, row_tile=tile_rows)
        group = PANELS[p.panel] if tile_rows >= FEW_ROWS else 1
    rows, depth = p.row_tile, split.depth
    blocks = floordiv(p.rows + (rows - 1), rows, low.facts)
    groups = floordiv(p.panels + (group - 1), group, low.facts)
    parallel = [*p.batch, ("mb", blocks), ("nb", groups)]
    parallel.insert(0 if copied else len(parallel), ("ks", as_expr(split.count)))
    low.bind(parallel)
    width = group * p.panel + PADDING
    tile = low.name("tile")
    low.emit(Alloc(tile, p.dtype, (const(rows), const(width))))
    matrix = left_of(low, p)
    parts = _parts(low, p, split, "out")
    start = sym("mb") * rows
    count = minimum(p.rows - start, const(rows))
    begin = sym("ks") * depth
    even = p.depth.as_int() == split.count * depth
    piece = Depth(begin, const(depth) if even else minimum(p.depth - begin, const(depth)))
    first, lead = sym("nb") * group, [sym(name) for name, _ in p.batch]

    def one_panel() -> None:
        target = (tile, (sym("p") - first) * p.panel, const(width))
        multiply(low, p, target, matrix, start, count, piece)

    def column() -> None:
        at = first * p.panel + sym("c")
        places = (*map(Index, (sym("ks"), *lead, start + sym("r"), at)),)
        inside = Load(tile, (Index(sym("r")), Index(sym("c"))), p.dtype)
        low.when([p.columns - 1 - at], lambda: low.emit(Store(parts.name, places, inside)))

    def finish() -> None:
        low.loop("c", const(0), const(group * p.panel), column, vector=True)

    low.loop("p", first, minimum(first + group, p.panels, low.facts), one_panel)
    low.loop("r", const(0), count, finish, vector=True)
    return parallel, const(depth * rows * group * p.panel)


def lower_sum_of_parts(low: Lowering, split: Thin) -> Parallel:
    """The sum of the parts, and what follows the product; in the order in which parts lie."""
    p = product_of_group(low, low.group.anchor)
    parts = _parts(low, p, split, "in")
    runs = floordiv(p.columns + (RUN - 1), RUN, low.facts)
    parallel = [*p.batch, ("row", p.rows), ("run", runs)]
    low.bind(parallel)
    begin = sym("run") * RUN
    end = minimum(begin + RUN, p.columns)

    def element() -> None:
        lead = (sym(name) for name, _ in p.batch)
        place = (*map(Index, (sym("k"), *lead, sym("row"), sym("c"))),)
        name = low.name("total")
        value = Load(parts.name, place, p.dtype)
        low.emit(Fold(name, "sum", (("k", as_expr(split.count)),), value, p.dtype))
        with low.part(low.group, {p.ref: lambda _: Local(name, p.dtype)}):
            low.store(p.place(low, sym("row"), sym("c")))

    low.loop("c", begin, end, element, vector=True)
    return parallel, as_expr(split.count) * RUN
