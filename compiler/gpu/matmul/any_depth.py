"""Products of few tiles in a batch, or of a depth that is not known: in stretches of their depth.

The stretches are all as long, the last one but for what is left, and there are as many as the depth
of a call takes. Their length is that of the least time which a model predicts, for few tiles and a
great depth where these are not known; products of more tiles or less depth than is worth it at a
call go another way.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stagefuse.compiler.graph import Contract, Graph, Node
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.dsl.dims import Expr, const, floordiv, minimum
from stagefuse.dsl.frozen import frozen

TILES = (96, 64, 48, 32, 24, 16, 8, 4, 2, 1)
"""Numbers of tiles up to which depths may be cut, where they are not known; or else `MANY`."""
MANY = 256
FEW = 8
"""Tiles, and the depth, that lengths are chosen for where these are not known."""
DEEP = 8192
LENGTHS = (128, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096)
"""Multiples of what a stage has of the depth, of bytes too: tensor copies bring whole stages, and
what they brought of the next stretch would be added twice."""
DEPTHS = tuple(n << m for m in range(8, 16) for n in (2, 3))
GAIN = 0.85
"""The part of the time at which stretches are worth a second kernel."""
ALONE = {1: 0.7e-3, 2: 1.4e-3, 4: 8.3e-3}
"""Nanoseconds that a sum takes for an element of the depth in a tile of `mma.sync` whose block has
a multiprocessor of an A100 to itself, which is half of the rate; by the bytes of an element."""
TWICE = 264
"""Blocks that compute at all of it."""
STORED = 5.2e-3
"""Nanoseconds to store a sum and to read it again."""
SECOND = 2000.0
"""Nanoseconds of a second kernel."""
SHARED = 0.17
"""Nanoseconds that a sum takes there if lanes share its parts, which they do of more than
`SEQUENCE`, or of any number."""
SEQUENCE = 32

Time = Callable[[int, int, int], float]
"""What a product of some tiles takes, and some depth, in stretches of a length; 0: in one."""


@frozen
class Cut:
    """Stretches of the depth, so long and so many, and 1 for sizes at which they are, else 0."""

    length: int
    count: Expr
    holds: Expr


def by_warps(size: int, whole: int, part: int, known: bool) -> Time:
    """The time of tiles by `mma.sync` of so many sums, `part` where the depth is cut, and of
    elements of so many bytes. `known`: whether the depth is."""

    def time(tiles: int, depth: int, length: int) -> float:
        if not length:
            return ALONE[size] * whole * depth
        count = -(-depth // length)
        alone = ALONE[size] * part * length * max(1, tiles * count / TWICE)
        return alone + STORED * part * tiles * count + SECOND + shared(tiles * part, count, known)

    return time


def shared(sums: int, count: int, known: bool) -> float:
    """Nanoseconds that lanes take for sharing the parts of so many sums."""
    return 0 if known and count <= SEQUENCE else SHARED * sums


def cut_of(graph: Graph, node: Node, tile: tuple[int, int], time: Time) -> Cut | None:
    """How the depth of a product in tiles of some rows and columns is cut, if it is worth it."""
    product, shape = node.primitive, node.type.shape
    assert isinstance(product, Contract)
    tiles = size_of([shape[a] for a in product.batch])
    for axes, side in ((product.rows, tile[0]), (product.columns, tile[1])):
        tiles = tiles * floordiv(size_of([shape[a] for a in axes]) + (side - 1), side)
    known, depth = tiles.as_int(), product.depth.as_int()
    if known is not None and known > MANY:
        return None
    deep = depth or DEEP
    lengths = [n for n in LENGTHS if 2 * n <= deep]
    if not lengths:
        return None
    length = min(lengths, key=lambda n: time(known or FEW, deep, n))
    found = _worth([known] if known else TILES, [depth] if depth else DEPTHS, length, time)
    if found is None:
        return None
    most, least = found
    holds = 1 - minimum(floordiv(tiles, most + 1), const(1))
    holds = graph.facts.simplify(holds * minimum(floordiv(product.depth, least), const(1)))
    count = floordiv(product.depth + (length - 1), length)
    return None if holds == const(0) else Cut(length, count, holds)


def _worth(
    tiles: Sequence[int], depths: Sequence[int], length: int, time: Time
) -> tuple[int, int] | None:
    """The most tiles for which stretches of a length are worth it from some depth on, and that
    depth; where neither is known, one of a few stretches."""
    for most in tiles:
        few = len(tiles) > 1 and len(depths) > 1
        for depth in [d for d in depths if d <= 8 * length] if few else depths:
            if depth >= 2 * length and time(most, depth, length) <= GAIN * time(most, depth, 0):
                return most, depth
    return None
