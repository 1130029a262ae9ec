"""Products whose rows are reduced where their tiles are, and never stored.

A warp reduces a row of a tile in shared memory and leaves what its part of the row comes to, of
`argmax` and `argmin` also where the extreme is; a second kernel reduces the parts in the order of
the tiles, as it would those of a long row (`split_reductions`).
"""

from __future__ import annotations

from functools import partial

from stagefuse.compiler.fusion.join_reduced import reduction_of, rows_reduced
from stagefuse.compiler.gpu.reductions.columns import Written, lower_rows
from stagefuse.compiler.gpu.reductions.split_reductions import Cut, fold_part, of_parts, part_buffer
from stagefuse.compiler.graph import Ref
from stagefuse.compiler.kernel_ir import Index, Load, Store
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.product import Product, product_of_group
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import const, floordiv, minimum, sym

from .lowering import RowOfTile, lower_contract, tile_of
from .tf32_shapes import Shape


def cut_of(low: Lowering, shape: Shape | None, variant: int) -> Cut:
    """How the tiles of a product cut its rows; `variant` numbers the kernels that do so."""
    graph, rows = low.graph, rows_reduced(low.group)
    found = None if rows is None else reduction_of(graph, rows)
    assert found is not None
    node, reduce = found
    p, group = tile_of(low, product_of_group(low, low.group.anchor), shape)
    width, extents = group * p.panel, graph.type(node.operands[0]).shape
    (axis,) = reduce.axes
    count = floordiv(extents[axis] + (width - 1), width, graph.facts)
    return Cut(Ref(node.id), reduce, extents, axis, const(width), count, variant)


def lower_tiles(low: Lowering, cut: Cut, shape: Shape | None = None) -> Parallel:
    """Tiles of a product, of each of whose rows what it comes to is stored."""
    return lower_contract(low, shape, partial(_reduce_row, cut))


def lower_rest(low: Lowering, cut: Cut) -> Parallel:
    """The reduction of what tiles left, and what follows."""
    assert isinstance(low, Written)
    low.parts[cut.ref] = lambda at: of_parts(low, cut, at)
    return lower_rows(low)


def _reduce_row(cut: Cut, low: Lowering, p: Product, tile: RowOfTile) -> None:
    name = f"f{cut.axis}"
    extent = minimum(cut.shape[cut.axis] - tile.first, cut.length, low.facts)
    at = p.place(low, tile.row, tile.first + sym(name))
    inside = Load(tile.name, (Index(sym("r")), Index(sym(name))), p.dtype)
    operand, before = low.graph.nodes[cut.ref.node].operands[0], low.facts
    low.facts = before.with_ranges({name: (0, extent - 1)})
    with low.part(low.group, {p.ref: lambda _: inside}):
        value = low.value(operand, tuple(map(Index, at)), ())
    low.facts = before
    found = fold_part(low, cut, [(name, extent)], value, tile.first)
    place = (*(Index(at[a]) for a in cut.kept), Index(tile.number))

    def store() -> None:
        for number, part in found:
            low.emit(Store(part_buffer(low, cut, number, "out").name, place, part))

    low.loop("n", const(0), const(1), store, vector=True)
