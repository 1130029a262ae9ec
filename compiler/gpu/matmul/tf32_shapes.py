"""Which tiles compute an f32 product on warpgroups, by what they are predicted to take.

A tile has some rows and columns of the result, and a cluster of blocks may share its depth, so that
products of any size fill the device. Sizes that are not known while compiling get a few kernels,
and those of a call choose one: the grids of the others are empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from itertools import combinations

from stagefuse.compiler.fusion.groups import Group, flops
from stagefuse.compiler.fusion.join_narrow import is_coded
from stagefuse.compiler.gpu.attention.forms import GROUP_ROWS
from stagefuse.compiler.graph import Contract, Graph, Node, View
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.patterns.chosen import chooses, steps_taken
from stagefuse.compiler.patterns.gathered import gathered_of, turned_of
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, mod
from stagefuse.dsl.dtypes import F32
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen

from .tf32_split import AT_ONCE, CHUNK, DEPTH
from .tf32_tiles import GROUP_LANES, WIDEST

FULL = {1: 132, 2: 128, 4: 112, 8: 96}
"""Multiprocessors that clusters of so many blocks fill: each lies in one of the device's parts, of
14 to 18 of them."""
CLOCKS_PER_FLOP = 3 / 2048
"""Of a multiprocessor's tensor cores: three products of tf32 for one of f32."""
STAGE = 430, 1.02
"""Clocks of a stage that nothing hides, and what its products take for each clock of theirs."""
LAUNCH = 1500
"""Clocks until a kernel is there and gone."""
BLOCK = 2500
"""Clocks of a block to its first product and from the last one on."""
MEETING = 4000
"""Clocks that the blocks of a cluster take to exchange their sums."""
FINISH = 16, 128
"""Operations of an element from the sums to memory, and how many a clock a multiprocessor does."""
ROWS = (GROUP_ROWS, 2 * GROUP_ROWS)
COLUMNS = (32, 64, 96, 128)
LEAST_COLUMNS = 32
SAMPLES = (64, 128, 256, 512, 1024, 2048, 4096)
"""Rows for which kernels are chosen where they are not known."""
UNKNOWN = 1024
MOST_KERNELS = 3
LOSS = 0.08
"""Of time, for having fewer kernels."""

Sizes = tuple[int, int, int, int, int]
"""Batch, rows, columns and depth of a product, and operations on each element that follow."""


@frozen
class Shape:
    """A tile of a product, in elements, and into how many stretches its depth is cut."""

    rows: int
    columns: int
    split: int

    def clocks(self, sizes: Sizes) -> float:
        """About what a product takes."""
        batch, rows, columns, depth, work = sizes
        blocks = batch * -(-rows // self.rows) * -(-columns // self.columns) * self.split
        stages = -(-depth // (DEPTH * self.split))
        together = 2 if self.rows == GROUP_ROWS and self.columns <= AT_ONCE else 1
        turns, rest = divmod(-(-blocks // FULL[self.split]), together)
        return LAUNCH + turns * self._turn(together, stages, work) + self._turn(rest, stages, work)

    def _turn(self, blocks: int, stages: int, work: int) -> float:
        """What so many blocks take that a multiprocessor has at a time."""
        if not blocks:
            return 0
        products = 2 * self.rows * self.columns * DEPTH * CLOCKS_PER_FLOP
        waits, share = STAGE
        most, rate = FINISH
        finish = self.rows // self.split * self.columns * (most + work) / rate
        meeting = MEETING if self.split > 1 else 0
        return BLOCK + meeting + stages * (waits + blocks * share * products) + blocks * finish


@frozen
class Choice:
    """A kernel's tile, an expression that is 1 where the kernel runs, else 0, and what is known of
    sizes there."""

    shape: Shape
    holds: Expr
    facts: Facts


def shapes_of(graph: Graph, group: Group) -> tuple[Choice, ...]:
    """Every kernel that an f32 product on warpgroups may have, and the sizes that it can run for;
    none where it is no work for them."""
    if not choices(graph, group) or group.anchor is None:
        return ()
    node = graph.nodes[group.anchor]
    product, found = node.primitive, _in_chunks(graph, group, node)
    assert isinstance(product, Contract) and found is not None
    facts, aligned = found
    return tuple(Choice(s, aligned, facts) for s in _shapes(product, _lies(graph, group, node)))


def choices(graph: Graph, group: Group, least: int = 0) -> tuple[Choice, ...]:
    """The kernels of an f32 product on warpgroups, of tiles with so many columns at least; none
    where it is no work for them."""
    if group.kind != "contract" or group.anchor is None:
        return ()
    node = graph.nodes[group.anchor]
    product = node.primitive
    assert isinstance(product, Contract)
    batch, rows, columns = (
        size_of([node.type.shape[a] for a in axes])
        for axes in (product.batch, product.rows, product.columns)
    )
    if node.type.dtype != F32 or (columns.as_int() or LEAST_COLUMNS) < LEAST_COLUMNS:
        return ()
    found = _in_chunks(graph, group, node)
    if found is None:
        return ()
    facts, aligned = found
    wide = columns.as_int()
    measure = rows if wide is not None else rows * columns
    unit = 1 if wide is not None else UNKNOWN
    low, high = facts.bounds(measure)
    samples = [s for s in SAMPLES if (low or 0) <= s * unit and (high is None or s * unit <= high)]
    if measure.as_int() is not None or not samples:
        samples = [max(1, (measure.as_int() or low or 1) // unit)]
    others = wide or UNKNOWN, product.depth.as_int() or UNKNOWN
    work = sum(flops(graph.nodes[m]) for m in group.members)
    sizes = [(batch.as_int() or 1, s, *others, work) for s in samples]
    limits = [_at_most(measure, s * unit) for s in samples]
    shapes = [s for s in _shapes(product, _lies(graph, group, node)) if s.columns >= least]
    if not shapes:
        return ()
    return tuple(
        Choice(shape, holds * aligned, facts)
        for shape, holds in _pick(shapes, sizes, limits).items()
    )


def _pick(
    shapes: Sequence[Shape], sizes: Sequence[Sizes], limits: Sequence[Expr]
) -> dict[Shape, Expr]:
    """A few shapes that together are about the best for all sizes, which increase, and for which of
    them each is; `limits` are 1 for sizes up to one of them."""
    wanted = _few(tuple(shapes), tuple(sizes))
    found: dict[Shape, Expr] = {}
    before = const(0)
    for n, shape in enumerate(wanted):
        last = n + 1 == len(wanted)
        if not last and wanted[n + 1] == shape:
            continue
        now = const(1) if last else limits[n]
        found[shape] = found.get(shape, const(0)) + now - before
        before = now
    return found


@lru_cache(maxsize=1024)
def _few(shapes: tuple[Shape, ...], sizes: tuple[Sizes, ...]) -> list[Shape]:
    """For each size the best of a few shapes."""
    best = {size: _quickest(shapes, size) for size in sizes}
    good = sorted(set(best.values()), key=repr)

    def loss(chosen: tuple[Shape, ...]) -> float:
        return sum(_quickest(chosen, z).clocks(z) / b.clocks(z) for z, b in best.items()) / len(
            best
        )

    for count in range(1, len(good) + 1):
        chosen = min(combinations(good, count), key=loss)
        if count == MOST_KERNELS or loss(chosen) <= 1 + LOSS:
            break
    return [_quickest(chosen, size) for size in sizes]


def _quickest(shapes: Sequence[Shape], sizes: Sizes) -> Shape:
    return min(shapes, key=lambda shape: shape.clocks(sizes))


def _at_most(size: Expr, most: int) -> Expr:
    """1 where a size is no more, else 0."""
    return 1 - minimum(floordiv(size, most + 1), const(1))


def _shapes(product: Contract, direct: bool) -> list[Shape]:
    """The tiles that a product can have. Panels that lie in steps may have any width."""
    most = -(-(product.depth.as_int() or UNKNOWN) // DEPTH)
    found = []
    for rows in ROWS:
        lanes = rows // GROUP_ROWS * GROUP_LANES
        widths = COLUMNS if direct else range(product.panel, WIDEST + 1, product.panel)
        for columns in widths:
            if columns * DEPTH // CHUNK % lanes or columns % 16:
                continue
            if rows == GROUP_ROWS and columns > AT_ONCE:
                continue  # one warpgroup does not hide what it waits for
            found += [Shape(rows, columns, n) for n in FULL if n == 1 or n <= most]
    return found


def _lies(graph: Graph, group: Group, node: Node) -> bool:
    """Whether a product takes its right operand where it lies, unpacked."""
    right = node.operands[1]
    return right in group.packs and not is_coded(graph, right)


def gathers_rows(graph: Graph, group: Group, node: Node) -> bool:
    """Whether the rows of a product are windows, or chosen by indices: gathered on their way into
    shared memory."""
    left = node.operands[0]
    if chooses(graph, group, left):
        return True
    packed = left in group.packs and isinstance(graph.nodes[left.node].primitive, View)
    return packed and gathered_of(graph, node) is not None


def _in_chunks(graph: Graph, group: Group, node: Node) -> tuple[Facts, Expr] | None:
    """What must be known of sizes for 16 bytes of either operand to be adjacent and aligned, and an
    expression that is 1 where it is so; None where that does not depend on sizes alone."""
    product = node.primitive
    assert isinstance(product, Contract)
    left, right = node.operands
    gathers = gathers_rows(graph, group, node)
    turned = turned_of(graph, node) if left in group.packs and not gathers else None
    if left in group.packs and not gathers and turned is None:
        return None
    ends = [] if gathers else [product.base, product.row_stride]
    if turned is not None:
        rows = size_of([node.type.shape[a] for a in product.rows])
        ends = [turned.first, turned.along, rows]
    if _lies(graph, group, node):
        steps = steps_taken(graph, group, node)
        if steps is None or const(1) not in steps[1:]:
            return None
        first, along, across = steps
        ends += [first, across if along == const(1) else along]
        if along != const(1):
            ends.append(size_of([node.type.shape[a] for a in product.columns]))
    shapes = [node.type.shape, *(graph.type(ref).shape for ref in node.operands)]
    sizes = {name for shape in shapes for size in shape for name in size.symbols()}
    facts, aligned = graph.facts, const(1)
    for end in ends:
        if not facts.divides(end, CHUNK) and end.symbols() <= sizes:
            if end.as_int() is not None:
                return None
            facts = replace(facts, divisible=(*facts.divisible, (end, CHUNK)))
            aligned = aligned * (1 - minimum(mod(end, CHUNK), const(1)))
    return (facts, aligned) if all(facts.divides(e, CHUNK) for e in ends) else None
