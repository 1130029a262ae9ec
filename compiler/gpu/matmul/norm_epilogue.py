"""Products whose rows are normalised where their tiles are, which have whole rows.

A warp takes a row of a tile in shared memory and computes there what a kernel of row reductions
would of the row in memory: norms, softmax and whatever is around them.
"""

from __future__ import annotations

from dataclasses import replace

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.graph import Contract, Graph
from stagefuse.compiler.kernel_ir import Index, Load, Value
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.product import Product, product_of_group
from stagefuse.compiler.lower.values import Lowering
from stagefuse.compiler.schedule import GPU_WGMMA, Schedule
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.dtypes import F32, I32

from .deep_split import deeps_of
from .lowering import RowOfTile, lower_contract, tile_of
from .operands import moves_in_chunks, operands_of
from .persistent import Whole
from .split_depth import FULL, enough_tiles, thin
from .tf32_shapes import Shape

DEEPEST = 512
"""Depth up to which rows of 16 and 8 bits are finished on warpgroups. Products whose operands
tensor copies bring reach 700 TFLOP/s there, those that `cp.async` feeds 400, so that an element of
one that is 512 deep takes 1.1 ps more; to store and read it takes 0.9 ps of memory in 16 bits."""
STEP = 16
"""Columns of which tiles on warpgroups have a multiple."""
LOW_ROWS, LOW_STEP = 64, 32
"""Rows of tiles of more than 128 columns by warps, and the columns of which they have a multiple:
an A100's multiprocessor holds two such tiles of 256."""


def not_split(graph: Graph, group: Group, copied: Whole | None, narrow: bool) -> Expr:
    """1 at sizes at which a product has tiles enough not to be split along its depth, else 0.
    `narrow`: whether it is one of few bits on warpgroups, of matrices that are `copied`."""
    product, _ = group.apart
    split = thin(graph, product, enough_tiles(graph, product, copied) if narrow else FULL)
    few = const(0) if split is None else split.few
    for deep in deeps_of(graph, product) if narrow and copied is not None else ():
        few = few + (1 - few) * deep.split.few
    return graph.facts.simplify(1 - few)


def tile_for(low: Lowering, groups: bool) -> tuple[Schedule, Shape | None] | None:
    """How a tile has whole rows of a product, but of those of f32 on warpgroups; None if none has,
    or products are faster otherwise. `groups`: whether there are warpgroups."""
    graph, kind = low.graph, operands_of(low.graph, low.group)
    node = graph.nodes[-1 if low.group.anchor is None else low.group.anchor]
    product, columns = node.primitive, node.type.shape[-1].as_int()
    assert isinstance(product, Contract) and columns is not None
    if groups and kind is not None:
        if kind.is_rough or (product.depth.as_int() or DEEPEST + 1) > DEEPEST:
            return None
        return replace(GPU_WGMMA, tile_columns=-(-columns // STEP) * STEP), None
    p = product_of_group(low, low.group.anchor)
    found, group = tile_of(low, p)
    known = found.panels.as_int()
    if known is not None and known <= group:
        return low.schedule, None
    lies = node.operands[1] in low.group.packs and moves_in_chunks(low, p)
    if groups or not lies or node.type.dtype not in (F32, I32):
        return None
    return low.schedule, Shape(LOW_ROWS, -(-columns // LOW_STEP) * LOW_STEP, 1)


def lower_finished(low: Lowering, shape: Shape | None = None) -> Parallel:
    """Tiles of a product, each of whose rows is finished and stored."""
    return lower_contract(low, shape, _finish_row)


def _finish_row(low: Lowering, p: Product, tile: RowOfTile) -> None:
    rows = low.group.rows
    assert rows is not None
    column = f"d{len(rows.domain) - 1}"
    at = p.place(low, tile.row, sym(column))

    def inside(place: tuple[Value, ...]) -> Value:
        return Load(tile.name, (Index(sym("r")), place[-1]), p.dtype)

    def store() -> None:
        for ref in rows.roots:
            low.store_root(ref, at)

    with low.part(rows, {p.ref: inside}):
        low.nest([(column, rows.domain[-1])], store)
