"""Attention of few queries (decoding): the keys are divided among blocks, and then among warps.

With a row or a few for each head, what takes time is to read keys and values once. A block takes a
piece of the keys, for the queries of all heads that share them, and stores sums over it with
their greatest score; a second kernel weighs the pieces, always in the same order, and finishes.
Both ways are in the plan, and the sizes of a call make the grid of one of them empty.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace

from stagefuse.compiler.fusion.join_decoded import WIDE
from stagefuse.compiler.gpu.matmul.split_depth import parts_of
from stagefuse.compiler.kernel_ir import (
    COMPUTED,
    Alloc,
    Attend,
    Buffer,
    Const,
    Fold,
    Index,
    Let,
    Load,
    Local,
    Op,
    Store,
    Value,
)
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.product import Product
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, mod, sym
from stagefuse.dsl.dtypes import BOOL, F32
from stagefuse.dsl.frozen import frozen

from .lowering import PADDING, Attention, attention_of
from .masks import kept
from .warpgroup_tiles import shared_by

ROWS = 16
"""Of a tile: the least that tensor cores multiply."""
MOST_ROWS = 64
LEAST_KEYS = 512
"""Where rows may be more than a tile's."""
CHUNK = 32
"""Columns of a row that the second kernel takes at a time."""
TOGETHER = (8, 12)
"""Pieces that a lane reads at a time, at least and at most: on an H200 a turn of 8 takes about a
microsecond, in which it waits; of 17 a lane holds 146 registers, of 11 it holds 48."""
PIECE = 256
"""Keys that a block has at least, where pieces are more than a lane of the second kernel reads at a
time: of fewer it does so in one turn. Of 256 keys, for 4 heads of 64 in f32, one piece for each
took 16.6 us on an H200, 16 keys a microsecond."""
WAYS = 4
BLOCKS = 264
"""Two for each multiprocessor of the largest devices."""


@frozen
class Split:
    """How a call is divided. `axis` of the batch: heads of queries, of which `together` share
    keys; a tile has `queries` of each. `pieces` of the keys, each of `length`, at most `most` of
    them; both kernels run where `few` is 1, and nothing does where it is 0."""

    axis: int | None
    together: int
    queries: int
    pieces: Expr
    length: Expr
    few: Expr
    ways: int
    most: int
    passes: int

    @property
    def at_once(self) -> int:
        """The pieces that a lane reads at a time: all, or the same number in each turn."""
        least, most = TOGETHER
        return max(-(-self.most // -(-self.most // most)), least)

    @property
    def head(self) -> Expr:
        """The head of a row r."""
        return sym("heads") * self.together + mod(sym("r"), self.together)


def split_of(low: Lowering, computes: bool = False) -> Split | None:
    """How to divide a group's attention among pieces of the keys, if sizes may be such that it
    is worth it; whether it `computes` keys or values. `low` is only asked."""
    a = attention_of(low)
    facts = low.facts
    axis, together = _sharing(a)
    queries = ROWS // together
    few = 1 - minimum(floordiv(a.first.rows * together, MOST_ROWS + 1), const(1))
    if not facts.prove_le(a.first.rows, const(queries)):
        few = few * minimum(floordiv(a.keys, LEAST_KEYS), const(1))
    most = facts.bounds(few)[1]
    if most is not None and most < 1 or facts.is_nonneg(a.first.rows - a.keys):
        return None
    ways = _ways(a)
    unit = math.lcm((16 if a.half else 8) * ways, a.keys_at.panel or 1)
    blocks = floordiv(a.first.rows + (queries - 1), queries, facts)
    for number, (_, extent) in zip(a.first.primitive.batch, a.first.batch, strict=True):
        blocks = blocks * (floordiv(extent, together, facts) if number == axis else extent)
    wanted = floordiv(const(BLOCKS), maximum(blocks, 1))
    short = minimum(floordiv(a.keys + (unit - 1), unit), const(TOGETHER[0]))
    pieces = maximum(minimum(wanted, maximum(floordiv(a.keys, PIECE), short)), 1)
    length = floordiv(a.keys + (pieces * unit - 1), pieces * unit) * unit
    once = blocks.evaluate(dict.fromkeys(blocks.symbols(), 1))  # of what may be many, one
    most = max(BLOCKS // max(once, 1), 1)
    passes = 2 if computes and a.columns > WIDE else 1
    return Split(axis, together, queries, pieces * few, length, few, ways, most, passes)


def _sharing(a: Attention) -> tuple[int | None, int]:
    """The axis of heads and how many neighbours of them, at most a tile's rows, read the same
    keys and values."""
    for axis in a.first.primitive.batch:
        name = f"d{axis}"
        step = a.queries.offset.coefficient(name)
        counts = {shared_by(e, name) for e in (a.keys_at.offset, a.values_at.offset)}
        (count, *others) = counts
        if step is None or others or not count:
            continue
        whole = [n for n in range(2, ROWS + 1) if count % n == 0]
        if whole:
            return axis, whole[-1]
    return None, 1


def _ways(a: Attention) -> int:
    """Warps that divide the keys of a block: each takes whole steps of its products."""
    unit = 16 if a.half else 8
    widest = max(a.depth, a.columns)
    ways = WAYS if widest <= WIDE else 2
    while any(x.panel % (unit * ways) for x in (a.keys_at, a.values_at)):
        ways //= 2
    return ways


def _parts(low: Lowering, p: Product, split: Split, last: Expr, mode: str) -> Buffer:
    """What pieces give: for each, and each row, so many numbers."""
    shape = (split.pieces, *(e for _, e in p.batch), p.rows, last)
    return low.buffers.setdefault(parts_of(p.ref), Buffer(f"b{len(low.buffers)}", F32, shape, mode))


def lower_pieces(low: Lowering, split: Split) -> Parallel:
    """Blocks of a piece of the keys by queries of all heads that share them."""
    a = attention_of(low)
    first, last = a.first, a.last
    together, queries = split.together, split.queries
    parallel = _pieces(low, first, split)
    low.bind(parallel)
    columns, number = a.columns // split.passes, sym("cb") if split.passes > 1 else const(0)
    name = f"d{split.axis}"
    begin_row = sym("mb") * queries
    rows = minimum(first.rows - begin_row, const(queries)) * together
    row, key = begin_row + floordiv(sym("r"), together, low.facts), sym("j")

    place_of_keys = {name: sym("heads") * together}
    q, keys_at, values_at = (
        x if x == COMPUTED else replace(x, offset=x.offset.substitute(place_of_keys, low.facts))
        for x in (a.queries, a.keys_at, a.values_at)
    )
    own = number * columns
    if values_at != COMPUTED:
        values_at = replace(values_at, offset=values_at.offset + own * values_at.across)

    def along(where: list[Expr]) -> list[Expr]:
        """A place of a row."""
        return [e.substitute({name: split.head}, low.facts) for e in where]

    made = [low.name(n) for n in ("totals", "most", "factors")]
    totals, most, factors = made
    tile, height = low.name("tile"), ROWS * split.ways
    pitch = const(-(-columns // 8) * 8 + PADDING)
    for scratch in made:
        low.emit(Alloc(scratch, F32, (const(height),)))
    low.emit(Alloc(tile, F32, (const(height), pitch)))
    score, keep = a.weights(along(first.place(low, row, key)), rows - 1)
    lo, hi = _ends(a, begin_row, queries)
    begin = sym("ks") * split.length
    lo, hi = maximum(lo, begin), minimum(hi, begin + split.length)
    step = a.queries.offset.coefficient(name) if split.axis is not None else None
    computed = a.elements(place_of_keys, own, columns)
    q = replace(q, offset=q.offset + begin_row * q.along)
    if step is not None:
        q = replace(q, step=step, run=together)
    low.emit(
        Attend(
            tile, pitch, totals, q, keys_at, values_at, rows, ROWS, lo, hi,
            a.depth, columns, "r", "j", "raw", score, keep, most, split.ways, None,
            "f" if any(computed) else "", *computed,
        )
    )  # fmt: skip
    figures = _parts(low, first, split, const(2), "out")
    sums = _parts(low, last, split, const(a.columns), "out")

    def place(of: Expr) -> tuple[Value, ...]:
        batch = along([sym(n) for n, _ in first.batch])
        return tuple(map(Index, (sym("ks"), *batch, row, of)))

    names = (tile, *made), (figures.name, sums.name)
    _ways_joined(low, split, rows, (own, columns), *names, place)
    return parallel, split.length * (ROWS * (a.depth + columns))


def _pieces(low: Lowering, first: Product, split: Split) -> list[tuple[str, Expr]]:
    """The loops over blocks: pieces of the keys, first, so that no index is a remainder of their
    number, heads, blocks of queries, and passes over the features."""
    together, queries = split.together, split.queries
    heads = [
        ("heads", floordiv(extent, together, low.facts)) if axis == split.axis else (name, extent)
        for axis, (name, extent) in zip(first.primitive.batch, first.batch, strict=True)
    ]
    blocks = floordiv(first.rows + (queries - 1), queries, low.facts)
    passes = [("cb", const(split.passes))] if split.passes > 1 else []
    return [("ks", split.pieces), *heads, ("mb", blocks), *passes]


def _ways_joined(
    low: Lowering,
    split: Split,
    rows: Expr,
    features: tuple[Expr, int],
    scratch: Sequence[str],
    results: tuple[str, str],
    place: Callable[[Expr], tuple[Value, ...]],
) -> None:
    """What the ways of a piece found together: greatest scores and totals, and sums, of all rows;
    sums of some features from a first one on, and the others with the first of all.

    `scratch` are the sums, totals, greatest scores and factors of each way; `results` the buffers
    of figures and sums, in which `place` finds a row's.
    """
    tile, totals, most, factors = scratch
    figures, sums = results
    first, columns = features

    def way(name: str, number: int) -> Value:
        return Load(name, (Index(sym("r") + number * ROWS),), F32)

    def weigh() -> None:
        greatest = way(most, 0)
        for n in range(1, split.ways):
            greatest = Op("maximum", (greatest, way(most, n)), F32)
        total: Value = Const(0.0, F32)
        for n in range(split.ways):
            factor = weight(way(most, n), greatest)
            low.emit(Store(factors, (Index(sym("r") + n * ROWS),), factor))
            total = Op("add", (total, Op("mul", (factor, way(totals, n)), F32)), F32)

        def store() -> None:
            low.emit(Store(figures, place(const(0)), greatest))
            low.emit(Store(figures, place(const(1)), total))

        low.when([-first] if first != const(0) else [], store)

    def element() -> None:
        total: Value | None = None
        for n in range(split.ways):
            at = (Index(sym("r") + n * ROWS), Index(sym("c")))
            part = Op("mul", (way(factors, n), Load(tile, at, F32)), F32)
            total = part if total is None else Op("add", (total, part), F32)
        assert total is not None
        low.emit(Store(sums, place(first + sym("c")), total))

    def elements() -> None:
        low.loop("c", const(0), const(columns), element, vector=True)

    low.loop("r", const(0), rows, weigh, vector=True)
    low.loop("r", const(0), rows, elements, vector=True)


def _ends(a: Attention, begin: Expr, queries: int) -> tuple[Expr, Expr]:
    """The keys that so many queries of any head may keep."""
    row, key = sym("t"), sym("j")
    _, keep = a.weights(a.first.place(a.low, begin + row, key), const(queries - 1), "t")
    ends = kept(keep, "t", "j").ends(queries, a.keys)
    heads = {f"d{axis}" for axis in a.first.primitive.batch}
    if any(e.symbols() & heads for e in ends):
        return const(0), a.keys
    return ends


def weight(most: Value, greatest: Value) -> Value:
    """What sums relative to `most` count for beside those relative to the greatest of all."""
    lowest = Const(-math.inf, F32)
    power = Op("exp", (Op("sub", (most, greatest), F32),), F32)
    return Op("select", (Op("eq", (most, lowest), BOOL), Const(0.0, F32), power), F32)


def lower_joined(low: Lowering, split: Split) -> Parallel:
    """The pieces of a row, weighed and summed, and what follows."""
    a = attention_of(low)
    first, last = a.first, a.last
    figures = _parts(low, first, split, const(2), "in")
    sums = _parts(low, last, split, const(a.columns), "in")
    across = -(-a.columns // CHUNK)
    parallel = [*last.batch, ("row", last.rows), ("cb", const(across))]
    low.bind(parallel)
    batch = [sym(n) for n, _ in first.batch]

    def part(buffer: Buffer, of: Expr, k: Expr | None = None, fill: float = 0) -> Value:
        """A number of the piece k, or of one that may be behind the last."""
        at = tuple(map(Index, (sym("k") if k is None else k, *batch, sym("row"), of)))
        if k is None:
            return Load(buffer.name, at, F32)
        inside = Op("lt", (Index(k), Index(split.pieces)), BOOL)
        return Load(buffer.name, at, F32, (inside,), fill)

    def folded(kind: str, value: Value, extent: Expr = split.pieces) -> Value:
        name = low.name(kind)
        low.emit(Fold(name, kind, (("k", extent),), value, F32))
        return Local(name, F32)

    greatest = folded("max", part(figures, const(0)))
    factor = weight(part(figures, const(0)), greatest)
    total = folded("sum", Op("mul", (factor, part(figures, const(1))), F32))
    if a.softmax.keep is None:  # rows without a score
        nothing = Op("eq", (greatest, Const(-math.inf, F32)), BOOL)
        total = Op("select", (nothing, Const(math.nan, F32), total), F32)

    name = low.name("factor")
    low.emit(Let(name, a.factor(total, sym("row"))))

    def weighed(k: Expr) -> Value:
        most = part(figures, const(0), k, -math.inf)
        return Op("mul", (weight(most, greatest), part(sums, sym("c"), k, 0.0)), F32)

    def element() -> None:
        count = split.at_once
        total = weighed(sym("k") * count)
        for n in range(1, count):
            total = Op("add", (total, weighed(sym("k") * count + n)), F32)
        own = folded("sum", total, floordiv(split.pieces + (count - 1), count))
        a.finish(own, Local(name, F32), sym("row"), sym("c"))

    begin = sym("cb") * CHUNK
    low.loop("c", begin, minimum(begin + CHUNK, a.columns), element, vector=True)
    return parallel, split.pieces * CHUNK


__all__ = ["Split", "lower_joined", "lower_pieces", "split_of"]
