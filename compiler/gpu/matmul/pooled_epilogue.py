"""Products of windows that others pool, where their tiles are, and never stored.

A tile has the places of each pooling window in adjacent rows (`window_rows`). It lies in shared
memory, as those of other products do, and lanes take from there, for each window, the elements that
follow the product, reduce them and go on to what is stored.
"""

from __future__ import annotations

from functools import partial

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.fusion.join_pooled import Pooled, pooled_of
from stagefuse.compiler.gpu.reductions.columns import Written
from stagefuse.compiler.graph import Graph, flatten_index
from stagefuse.compiler.kernel_ir import Index, Load, Value
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.product import Product, product_of_group
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, sym

from .epilogue import ROWS
from .lowering import RowOfTile, lower_contract
from .tf32_shapes import Shape
from .window_rows import Windows

STEP, WIDEST = 16, 128
"""Columns of which tiles on warpgroups have a multiple, and at most: an SM then holds two blocks,
of which one multiplies while the other pools."""


def even_width(columns: int | None) -> int:
    """The columns of tiles on warpgroups, of which there are as few as may be, and alike."""
    count = -(-(columns or WIDEST) // WIDEST)
    return -(-(columns or WIDEST) // (count * STEP)) * STEP


def pooling_of(graph: Graph, group: Group) -> Pooled | None:
    """How a product's kernel pools what it computes, if it does."""
    if group.kind != "contract" or group.rows is None or len(group.apart) != 2:
        return None
    product, rows = group.apart
    return pooled_of(graph, rows, product.roots[0].node)


def windows_of(low: Lowering, found: Pooled) -> Windows:
    """The windows of a kernel's product, in the order in which its operands come."""
    p = product_of_group(low, low.group.anchor)
    return Windows.of(found, p, ROWS if low.schedule.tensor_copies else 0)


def lower_pooled(low: Lowering, shape: Shape | None = None) -> Parallel:
    """Tiles of a product, of whose windows the reductions, and what follows, are stored."""
    found = pooling_of(low.graph, low.group)
    assert found is not None
    windows = windows_of(low, found)
    return lower_contract(low, shape, partial(_pool_window, found, windows), windows)


def _pool_window(
    found: Pooled, windows: Windows, low: Lowering, p: Product, tile: RowOfTile
) -> None:
    """What there is to store of a window, in every column of a tile."""
    rows, place = low.group.rows, windows.place(tile.row, low.facts)
    assert rows is not None and isinstance(low, Written)
    own = p.primitive.rows

    def inside(at: tuple[Value, ...]) -> Value:
        """An element of the product by its place, which is one of the window's."""
        within = []
        for axis, first, size in zip(own, place, windows.places, strict=True):
            index = at[axis]
            assert isinstance(index, Index)
            within.append(low.facts.simplify(index.expr - first * size))
        number = flatten_index(within, [const(n) for n in windows.places])
        row = windows.row_in_tile(sym("r"), number)
        return Load(tile.name, (Index(row), Index(sym("c"))), p.dtype)

    def element(column: Expr) -> None:
        (last,) = p.primitive.columns
        at = [const(0)] * len(rows.domain)
        for axis, e in zip((*own, last), (*place, column), strict=True):
            to = found.axes[axis]
            if to is not None:
                at[to] = e
        low.writes_out = True
        with low.part(rows, {p.ref: inside}):
            for ref in rows.roots:
                low.store_root(ref, at)
        low.writes_out = False

    def store() -> None:
        column = tile.first + sym("c")
        low.facts = low.facts.with_ranges({"r": (0, p.row_tile // windows.size - 1)})
        low.when([p.columns - 1 - column], lambda: element(column))

    low.loop("c", const(0), const(tile.width), store, vector=True)
