"""Products of many rows by codes on Hopper: a kernel stores the matrix in the rows' 16 bits, or in
f32 for rows of f32, and the product of two such matrices follows, whose operands tensor copies
bring.

Where lanes compute panels on their way into shared memory they do so anew for every tile below
another. The matrix is computed once here, written and read again, mostly out of the L2 cache. Which
of the two takes less `_clocks_of_codes` and `_clocks` predict; constants of tiles are fitted to an
H200 (benchmarks/results/gpu-nvidia-h200-20261127-products.md), where 4096 x 4096 in four bits took
316 microseconds for 4096 rows, at about 1.75 GHz, before lanes read a stage ahead.
"""

from __future__ import annotations

from dataclasses import replace

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.gpu.emit import KernelWriter
from stagefuse.compiler.gpu.packing import rows_of_panels
from stagefuse.compiler.gpu.teams import WARP
from stagefuse.compiler.graph import Constant, Contract, Graph, Node, Ref, View
from stagefuse.compiler.kernel_ir import Buffer, Index, Op, Store
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.lower.panels import TOGETHER
from stagefuse.compiler.lower.values import Lowering
from stagefuse.compiler.patterns.steps import CHUNK
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.dtypes import DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.types import TensorType

from .deep_split import ALL_DRAWN, START, SUMMED, fewest_clocks
from .lowering import PANELS
from .operands import gathered_in, holds_codes, operands_of, stored_of
from .split_depth import FULL, parts_of_computed
from .tf32_shapes import CLOCKS_PER_FLOP, choices

MOST_BYTES = 1 << 28
"""Of an unfolded matrix: it needs memory while a call has so many rows."""
GAIN = 0.9
"""The part of the time at which another kernel and the memory are worth it."""
COMPUTED = 0.6e-3
"""Clocks of all multiprocessors to compute an element, and to multiply 64 rows by it, in parts of
the depth: 16 warps of a multiprocessor issue 223 instructions each for 64 x 128 elements of two
blocks, by nvdisasm, and wait some 300 clocks. It has not been measured."""
TILE, STAGE = 128, 1080
"""Rows and columns of a tile of one kernel, and clocks for 64 of its depth, by 4096 rows."""
DEEP = 64
"""Of the depth."""
ELEMENTS_CLOCKS = (STAGE - 512) / DEEP
"""Of that what computing elements takes, for each of the depth: the rest is what products take."""
F32_CLOCKS = 2 * TILE * TILE * CLOCKS_PER_FLOP
"""What three products of tf32 take, for each of the depth."""
COLUMNS = 8
"""That a lane takes of a row when it unfolds: 16 bytes of the result."""
SPLIT_ROWS = 64
STEP, MOST_ROWS = 64, 8192
"""Rows at which the two are compared."""


@frozen
class Unfolded:
    """A product whose matrix is unfolded for some sizes: an expression that is 1 there and else 0,
    why, the same product by what is stored, over a graph in which that is a value, and what is
    known of sizes for which it is not. `panels`: what is computed, of `dtype`."""

    share: Expr
    why: str
    graph: Graph
    group: Group
    below: Facts
    panels: Ref
    dtype: DType

    @property
    def matrix(self) -> Ref:
        """Stands for the unfolded matrix, which is no value of the program."""
        return Ref(-1 - self.panels.node)


def unfolded_of(graph: Graph, group: Group) -> Unfolded | None:
    """How to unfold what a product computes of codes, if that is worth it."""
    if not holds_codes(graph, group) or group.nest:
        return None
    assert group.anchor is not None
    node = graph.nodes[group.anchor]
    product, panels = node.primitive, node.operands[1]
    assert isinstance(product, Contract)
    narrow = operands_of(graph, group) is not None
    if gathered_in(graph, group, node.id) is not None or not narrow and not choices(graph, group):
        return None
    dtype = graph.type(stored_of(graph, group, node.operands[0])).dtype
    rows, columns = (
        size_of([node.type.shape[a] for a in axes]) for axes in (product.rows, product.columns)
    )
    across, depth = columns.as_int(), product.depth.as_int()
    if product.batch or across is None or depth is None or across % CHUNK:
        return None
    if _padded(graph, panels) * depth * dtype.itemsize > MOST_BYTES:
        return None
    least = _least_rows(rows, (across, depth, product.panel), dtype.itemsize)
    if least is None:
        return None
    share = graph.facts.simplify(minimum(floordiv(rows, least), const(1)))
    if share == const(0):
        return None
    below, above = _ranges(graph.facts, rows, least)
    made = Unfolded(share, _why(rows, least), graph, group, below, panels, dtype)
    own = group.packs[panels]
    changed = replace(
        group,
        members=group.members - own.members | {panels.node},
        packs={**group.packs, panels: replace(own, members={panels.node}, accesses={})},
    )
    nodes = {**graph.nodes, **_stored(made, columns)}
    return replace(made, graph=replace(graph, nodes=nodes, facts=above, made=None), group=changed)


def _padded(graph: Graph, panels: Ref) -> int:
    """The columns of all panels, those behind the last one of the product too."""
    count, _, width = (e.as_int() for e in graph.type(panels).shape)
    assert count is not None and width is not None
    return count * width


def _stored(own: Unfolded, columns: Expr) -> dict[int, Node]:
    """The unfolded matrix as a value, rows of its depth, and panels as a view of it."""
    node = own.graph.nodes[own.panels.node]
    count, depth, width = node.type.shape
    wide = const(_padded(own.graph, own.panels))
    place = sym("c") if count == const(1) else sym("p") * width + sym("c")
    guard = () if columns == wide else (columns - 1 - place,)
    view = View(("p", "k", "c"), (sym("k"), place), guard, 0.0)
    panels = replace(
        node, primitive=view, operands=(own.matrix,), types=(node.type.with_dtype(own.dtype),)
    )
    matrix = TensorType(own.dtype, (depth, wide))
    number = own.matrix.node
    return {number: Node(number, Constant(b""), (), (matrix,)), own.panels.node: panels}


def lower_unfolded(low: Lowering, own: Unfolded) -> Parallel:
    """Stores the matrix: a lane some rows of its depth by a few adjacent columns."""
    _, depth, width = low.group.domain
    shape = (depth, const(_padded(low.graph, own.panels)))
    to = low.buffers.setdefault(own.matrix, Buffer("unfolded", own.dtype, shape, "out"))

    def put(panel: Expr, k: Expr, column: Expr) -> None:
        value = low.value(own.panels, (Index(panel), Index(k), Index(column)), ())
        if isinstance(value, Op) and value.fn == "round_to":
            (value,) = value.args  # the store rounds
        low.emit(Store(to.name, (Index(k), Index(panel * width + column)), value))

    rows = next(n for n in TOGETHER if low.facts.divides(depth, n))
    return rows_of_panels(low, rows, put, WARP * COLUMNS)


class UnfoldedWriter(KernelWriter):
    """Writes the entry of a kernel that unfolds: lanes read and write whole vectors, and rows
    share bytes of codes and scales."""

    def _plan_scratch(self) -> None:
        super()._plan_scratch()
        self.width, self.together = COLUMNS, TOGETHER[0]


# When


def _least_rows(rows: Expr, sizes: tuple[int, int, int], size: int = 2) -> int | None:
    """The number of rows from which on unfolding is predicted to take less, if there is one; 1 for
    all. `sizes`: columns, depth, and the width of a panel; `size`: bytes of an element."""
    ways = (_clocks, _clocks_of_codes) if size == 2 else (_clocks_of_f32, _clocks_of_f32_by_codes)

    def gains(count: int) -> bool:
        if size != 2 and -(-count // TILE) * -(-sizes[0] // TILE) < FULL:
            return False  # blocks share the depth of these
        unfolded, codes = (clocks(count, sizes) for clocks in ways)
        return unfolded < GAIN * codes

    known = rows.as_int()
    if known is not None:
        return 1 if gains(known) else None
    least = next((n for n in range(MOST_ROWS, 0, -STEP) if not gains(n)), 0) + 1
    return least if least <= MOST_ROWS else None


def _why(rows: Expr, least: int) -> str:
    when = "" if rows.as_int() is not None else f", from {least} rows on"
    return f"its panels are stored once{when}: that takes less than computing them for every tile"


def _ranges(facts: Facts, rows: Expr, least: int) -> tuple[Facts, Facts]:
    """What is known of sizes where there are fewer rows, and where there are not."""
    name = rows.as_symbol()
    if name is None:
        return facts, facts
    low, high = facts.ranges.get(name, (0, None))
    most = facts.bounds(rows)[1]
    end = least - 1 if most is None else min(least - 1, most)
    start = max(least, facts.bounds(rows)[0] or 0)
    return facts.with_ranges({name: (low, end)}), facts.with_ranges({name: (start, high)})


def _clocks(rows: int, sizes: tuple[int, int, int]) -> float:
    """What a kernel takes that unfolds a matrix to 16 bits, codes being 8, and the product of such
    a matrix."""
    columns, depth, _ = sizes
    return START + 3 * columns * depth / ALL_DRAWN + fewest_clocks(rows, columns, depth, 2)


def _clocks_of_codes(rows: int, sizes: tuple[int, int, int]) -> float:
    """What a product takes that computes its panels: in parts of the depth, as `split_depth` has
    it, or as one kernel."""
    columns, depth, panel = sizes
    across = -(-columns // (PANELS[panel] * panel))
    if -(-rows // SPLIT_ROWS) * across <= FULL:
        parts = parts_of_computed(columns, depth, panel)[1]
        each = COMPUTED * columns * depth
        if parts > 1:
            each += 2 * parts * SPLIT_ROWS * columns * 4 / SUMMED
        return min(parts, 2) * START + -(-rows // SPLIT_ROWS) * each
    return START + _tiles(rows, columns) * -(-depth // DEEP) * STAGE


def _clocks_of_f32(rows: int, sizes: tuple[int, int, int]) -> float:
    """The same where rows and the unfolded matrix are f32."""
    columns, depth, _ = sizes
    return START + 5 * columns * depth / ALL_DRAWN + _tiles(rows, columns) * depth * F32_CLOCKS


def _clocks_of_f32_by_codes(rows: int, sizes: tuple[int, int, int]) -> float:
    columns, depth, _ = sizes
    return _tiles(rows, columns) * depth * (F32_CLOCKS + ELEMENTS_CLOCKS)


def _tiles(rows: int, columns: int) -> int:
    """Tiles that a multiprocessor computes one after the other."""
    return -(-(-(-rows // TILE) * -(-columns // TILE)) // FULL)
