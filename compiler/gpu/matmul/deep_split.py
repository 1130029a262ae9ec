"""Products of few tiles and a great depth on Hopper: blocks whose operands tensor copies bring take
stretches of the depth, and a second kernel sums what they found.

The number of stretches and the width of tiles are those of which the clocks that `clocks` predicts
are fewest; its constants are of an H200. 64 x 4096 x 14336 of bf16 took 72 microseconds there in 64
tiles, where all multiprocessors together could have read the matrix in 30.
"""

from __future__ import annotations

from functools import partial
from typing import NamedTuple, TypeAlias

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.graph import Contract, Graph, Node
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.dsl.dims import Expr, const, floordiv, minimum
from stagefuse.dsl.dtypes import F32, I32
from stagefuse.dsl.facts import Facts

from .any_depth import DEEP, FEW, cut_of, shared
from .epilogue import ROWS
from .operands import operands_of
from .persistent import BLOCKS
from .split_depth import MOST_SPLITS, Thin
from .wgmma_tiles import ROW_BYTES

WIDTHS = (64, 128)
"""Columns of tiles."""
WIDE = 256
"""The same of tiles whose depth is not split."""
CLASSES = (ROWS, 2 * ROWS, 4 * ROWS, 8 * ROWS)
"""Rows up to which a width and a number of parts is chosen, where their number is not known."""
NEARLY = 1.1
"""The part of the best time at which there are no kernels of their own for a class."""
GAIN = 0.87
"""The part of the time at which stretches are worth a second kernel."""
DRAWN = 15.3
"""Bytes that a multiprocessor draws from memory in a clock, when many do."""
ALL_DRAWN = 2300
"""The same of all of them."""
START = 3000
"""Clocks of a kernel's start and end."""
SECOND = 2000
"""Clocks between a product and the kernel that sums its parts, and of its start and end: sums
of 2 MB take 1.5 to 2 microseconds in all, and blocks are there before the product is done."""
CLOCKS = 1.7
"""In a nanosecond."""
SUMMED = 2500
"""Bytes of parts that are stored or read again in a clock."""


Way: TypeAlias = tuple[int, int]
"""Columns of tiles, and parts of the depth."""


class Deep(NamedTuple):
    """Tiles of so many columns, and how the depth is split; `split.few` is 1 for sizes at which it
    is."""

    width: int
    split: Thin


def deeps_of(graph: Graph, group: Group) -> list[Deep]:
    """How to split a product's depth for the sizes for which that is predicted to be worth it."""
    kind = operands_of(graph, group)
    assert group.anchor is not None and kind is not None
    node = graph.nodes[group.anchor]
    product, shape = node.primitive, node.type.shape
    assert isinstance(product, Contract)
    rows, columns = (size_of([shape[a] for a in x]) for x in (product.rows, product.columns))
    depth, across = product.depth.as_int(), columns.as_int()
    stage = ROW_BYTES // kind.size
    if node.type.dtype not in (F32, I32):
        return []
    if depth is None or product.batch:
        return [] if group.apart or group.nest else _of_any_depth(graph, node, stage)
    if across is None or depth % stage:
        return []
    found, below = list[Deep](), const(0)
    for most, (width, count) in _ways(rows, across, depth // stage, graph.facts):
        within = const(1)
        if rows.as_int() is None:
            within = 1 - minimum(floordiv(rows, most + 1), const(1))
        few = graph.facts.simplify(within - below)
        if few != const(0):
            split = Thin(few, const(0), depth // count, count, count)
            found.append(Deep(width, split))
        below = within
    return found


def _of_any_depth(graph: Graph, node: Node, stage: int) -> list[Deep]:
    """How to split a product in a batch, or of any depth; `stage`: elements of its depth at a
    time."""
    product = node.primitive
    assert isinstance(product, Contract)
    known = product.depth.as_int() is not None
    times = {width: partial(_time, width, stage, known) for width in WIDTHS}
    cuts = {w: cut_of(graph, node, (ROWS, w), time) for w, time in times.items()}
    found = {w: cut for w, cut in cuts.items() if cut is not None}
    if not found:
        return []
    width = min(found, key=lambda w: times[w](FEW * WIDTHS[0] // w, DEEP, found[w].length))
    cut = found[width]
    return [Deep(width, Thin(cut.holds, const(0), cut.length, cut.count))]


def _time(width: int, stage: int, known: bool, tiles: int, depth: int, length: int) -> float:
    """The clocks of tiles of a width, of a depth in stretches of a length, or in one if that is 0;
    as `clocks`, but for operands that tiles share."""
    stages, long = -(-depth // stage), length // stage or -(-depth // stage)
    blocks = tiles * -(-stages // long)
    alone = long * max(4 * width, width * ROW_BYTES / DRAWN)
    read = tiles * (ROWS + width) * stages * ROW_BYTES / ALL_DRAWN
    time = START + max(-(-blocks // BLOCKS) * alone, read)
    if not length:
        return time
    sums = tiles * ROWS * width
    more = shared(sums, blocks // tiles, known) * CLOCKS
    return time + SECOND + 2 * blocks // tiles * sums * 4 / SUMMED + more


def _ways(rows: Expr, columns: int, stages: int, facts: Facts) -> list[tuple[int, Way]]:
    """Widths and numbers of parts, and the rows up to which each is: the best of those predicted
    for the most rows of a class, or the one before where that is nearly as good."""
    known, (least, most) = rows.as_int(), facts.bounds(rows)
    every = [(w, n) for w in WIDTHS for n in range(1, MOST_SPLITS + 1) if stages % n == 0]
    found: list[tuple[int, Way]] = []
    for limit in CLASSES if known is None else (known,):
        if known is None and limit < (least or 0):
            continue
        times = {way: clocks(limit, columns, stages, *way) for way in every}
        best = min(every, key=lambda way: times[way])
        single = min(times[way] for way in every if way[1] == 1)
        if best[1] == 1 or times[best] > GAIN * single:
            break
        if found and times[found[-1][1]] <= NEARLY * times[best]:
            best = found.pop()[1]
        found.append((limit, best))
        if most is not None and limit >= most:
            break
    return found


def clocks(rows: int, columns: int, stages: int, width: int, count: int) -> float:
    """What a product takes in tiles of a width, of a depth of so many stages in `count` parts."""
    down, across = -(-rows // ROWS), -(-columns // width)
    rounds = -(-down * across * count // BLOCKS)
    stage = max(4 * width, width * ROW_BYTES / DRAWN / down)
    read = (rows + columns) * stages * ROW_BYTES / ALL_DRAWN
    time = START + max(rounds * (stages // count) * stage, read)
    if count > 1:
        time += SECOND + 2 * count * rows * columns * 4 / SUMMED
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
