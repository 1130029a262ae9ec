"""Products of few tiles and a great depth on Hopper: blocks whose operands tensor copies bring take
stretches of the depth, and a second kernel sums what they found.

The number of stretches and the width of tiles are those of which the clocks that `clocks` predicts
are fewest; its constants are of an H200. 64 x 4096 x 14336 of bf16 took 72 microseconds there in 64
tiles, where all multiprocessors together could have read the matrix in 30.
"""

from __future__ import annotations

from typing import NamedTuple

from stagefuse.compiler.graph import Contract, Graph
from stagefuse.compiler.groups import Group
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.dsl.dims import const, floordiv, minimum
from stagefuse.dsl.dtypes import F32, I32

from .contract import operands_of
from .few_tiles import MOST_SPLITS, Thin
from .persistent import BLOCKS
from .pieces import ROWS
from .wgmma import ROW_BYTES

WIDTHS = (64, 128)
"""Columns of tiles."""
WIDE = 256
"""The same of tiles whose depth is not split."""
GAIN = 0.85
"""The part of the time at which stretches are worth a second kernel."""
DRAWN = 15.3
"""Bytes that a multiprocessor draws from memory in a clock, when many do."""
ALL_DRAWN = 2300
"""The same of all of them."""
START = 3000
"""Clocks of a kernel's start and end."""
SUMMED = 2500
"""Bytes of parts that are stored or read again in a clock."""


class Deep(NamedTuple):
    """Tiles of so many columns, and how the depth is split; `split.few` is 1 for sizes at which it
    is."""

    width: int
    split: Thin


def deep_of(graph: Graph, group: Group) -> Deep | None:
    """How to split a product's depth, where that is predicted to be worth it."""
    kind = operands_of(graph, group)
    assert group.anchor is not None and kind is not None
    node = graph.nodes[group.anchor]
    product, shape = node.primitive, node.type.shape
    assert isinstance(product, Contract)
    rows, columns = (size_of([shape[a] for a in x]) for x in (product.rows, product.columns))
    depth, across = product.depth.as_int(), columns.as_int()
    stage = ROW_BYTES // kind.size
    if depth is None or across is None or depth % stage or product.batch:
        return None
    if node.type.dtype not in (F32, I32):
        return None
    known = rows.as_int()
    most = ROWS if known is None else known
    stages = depth // stage
    ways = {
        (width, count): clocks(most, across, stages, width, count)
        for width in WIDTHS
        for count in range(1, MOST_SPLITS + 1)
        if stages % count == 0
    }
    width, count = min(ways, key=lambda way: ways[way])
    single = min(clocks for (_, n), clocks in ways.items() if n == 1)
    if count == 1 or ways[width, count] > GAIN * single:
        return None
    few = const(1) if known is not None else 1 - minimum(floordiv(rows, ROWS + 1), const(1))
    few = graph.facts.simplify(few)
    split = Thin(few, const(0), depth // count, count, count)
    return None if few == const(0) else Deep(width, split)


def clocks(rows: int, columns: int, stages: int, width: int, count: int) -> float:
    """What a product takes in tiles of a width, of a depth of so many stages in `count` parts."""
    down, across = -(-rows // ROWS), -(-columns // width)
    rounds = -(-down * across * count // BLOCKS)
    stage = max(4 * width, width * ROW_BYTES / DRAWN / down)
    read = (rows + columns) * stages * ROW_BYTES / ALL_DRAWN
    time = START + max(rounds * (stages // count) * stage, read)
    if count > 1:
        time += START + 2 * count * rows * columns * 4 / SUMMED
    return time


def fewest_clocks(rows: int, columns: int, depth: int, size: int) -> float:
    """What a product of elements of so many bytes takes in the best tiles, split or not."""
    stages = -(-depth * size // ROW_BYTES)
    return min(
        clocks(rows, columns, stages, width, count)
        for width in (*WIDTHS, WIDE)
        for count in range(1, MOST_SPLITS + 1)
        if stages % count == 0
    )
