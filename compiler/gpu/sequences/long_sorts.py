"""Sorts on a GPU by digits of eight bits, the lowest first; each goes through the elements once.

A row that a block's shared memory holds is sorted there by all digits (`lower_short`). Of longer
rows, for each digit, blocks sort tiles by it and count (`lower_tiles`); the counts are added up
along the tiles (`lower_running`) and over the digits (`lower_starts`); and blocks move the elements
of each digit, which lie together in their tile, to where they go in the row (`lower_moved`).
Results are the same in every run, and no size decides how many kernels there are. Places and counts
are unsigned numbers of 32 bits: of a row of 2^32 elements all buffers together are larger than a
device's memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

from stagefuse.compiler.fusion.groups import Group, Partition
from stagefuse.compiler.gpu.matmul.split_depth import parts_of
from stagefuse.compiler.graph import Graph, Ref, Scatter, Sort
from stagefuse.compiler.kernel_ir import (
    Alloc,
    Buffer,
    Checked,
    Const,
    Fold,
    Index,
    Let,
    Load,
    Local,
    Op,
    SortDigit,
    Store,
)
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.sequences import lower_sort, position_of
from stagefuse.compiler.lower.values import Lowering
from stagefuse.compiler.sort_order import DIGITS
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, sym
from stagefuse.dsl.dtypes import BOOL, I64, U8, U32, DType
from stagefuse.dsl.facts import Facts

from .digits import room_for
from .row_runs import ordered
from .runs import FROM, SORTED
from .scatter import lower_ranges
from .unordered import FEW as FEW_ELEMENTS
from .unordered import unordered

TILE = 4096
"""Elements that a block sorts in shared memory."""
NETWORK = 256
"""Elements up to which a network of comparisons is as quick."""
FEW = 1024
"""Elements of rows that half as many lanes sort."""
FEW_TILES = 128
"""Tiles up to which each block adds up all their counts, 132 KB, in place of two kernels more."""
WORK = 64
"""Operations that an element costs at each digit, with what counts cost."""
MANY = 4096
"""Updates of a scatter up to which every range reads all positions, which takes some 8 us for 1000
of them; the kernels that sort them take about 35 at least."""
KEYS, ORDER, DIGIT, BEFORE, RUNNING, STARTS = range(6)
"""The buffers between the kernels: elements of tiles, and their order and digits; counts. `SORTED`
and `FROM` are elements sorted by the digits so far, and where they came from."""
BY_TILE = 9
"""The number of the buffer with counts as `BEFORE` has them, a tile's beside each other."""
TOGETHER = 16
"""Tiles whose counts a lane has on the way together."""


class Form(NamedTuple):
    """A kernel of a sort: how it is lowered, 1 for sizes at which it runs and else 0, what part of
    the sort it is, and what is known of sizes."""

    lower: Callable[[Lowering], Parallel]
    share: Expr
    part: str
    facts: Facts


def sort_forms(graph: Graph, group: Group) -> Iterator[Form]:
    """The kernels of a sort, by how long its rows are."""
    node = graph.nodes[group.roots[0].node]
    assert isinstance(node.primitive, Sort)
    size, bits = group.domain[node.primitive.axis], node.type.dtype.bits
    least, most = graph.facts.bounds(size)
    long = graph.facts.simplify(minimum(floordiv(size, TILE + 1), const(1)))
    if long != const(0):
        for shift in range(0, bits, 8):
            yield from _by_digit(shift, shift + 8 >= bits, size, long, graph.facts)
    for limit, facts, share in _short(size, graph.facts):
        if limit is None or limit <= NETWORK:
            yield Form(lower_sort, share, "", facts)
        else:
            yield Form(partial(lower_short, most=limit), share, f"to {limit}", facts)


def _by_digit(
    shift: int, last: bool, size: Expr, share: Expr, facts: Facts
) -> Iterator[Form]:
    """The kernels that sort long rows by a digit; counts of few tiles are added up where
    elements are moved."""
    number = shift // 8
    many = minimum(floordiv(size, FEW_TILES * TILE + 1), const(1))
    few, many = (facts.simplify(share * s) for s in (1 - many, many))
    tiles = partial(lower_tiles, shift=shift, few=few != const(0), many=many != const(0))
    yield Form(tiles, share, f"digit {number} of tiles", facts)
    moved, part = partial(lower_moved, last=last), f"moved by digit {number}"
    if few != const(0):
        yield Form(partial(moved, counted=False), few, f"counted and {part}", facts)
    if many != const(0):
        yield Form(lower_running, many, "running counts", facts)
        yield Form(lower_starts, many, "starts", facts)
        yield Form(partial(moved, counted=True), many, part, facts)


def scatter_forms(graph: Graph, group: Group) -> Iterator[Form]:
    """The kernels of a scatter. Where the order of updates matters and they are many, positions are
    sorted by as many digits as the axis needs; a position's updates then lie together, in the order
    that they had."""
    node = graph.nodes[group.roots[0].node]
    assert isinstance(node.primitive, Scatter)
    size, (count,) = group.domain[node.primitive.axis], graph.type(node.operands[1]).shape
    facts = graph.facts
    many, widest = minimum(floordiv(count, MANY + 1), const(1)), 32
    free = list(unordered(graph, group))
    if free:  # but into few elements
        many, widest = many * (1 - minimum(floordiv(size, FEW_ELEMENTS + 1), const(1))), 8
    many = facts.simplify(many)
    if many != const(0):
        for shift in range(0, widest, 8):
            wide = minimum(floordiv(size, (1 << shift) + 1), const(1)) if shift else const(1)
            share = facts.simplify(many * wide)
            if share != const(0):
                yield from _by_digit(shift, False, count, share, facts)
        for lower, part, these in ordered(group, node.primitive.axis):
            share = facts.simplify(many * these)
            if share != const(0):
                yield Form(lower, share, part, facts)
    others = facts.simplify(1 - many)
    for lower, part, these in free or [(lower_ranges, "", const(1))]:
        share = facts.simplify(others * these)
        if share != const(0):
            yield Form(lower, share, part, facts)


def _short(size: Expr, facts: Facts) -> Iterator[tuple[int | None, Facts, Expr]]:
    """How long rows of no more than a tile may be in each kernel for them, what is known of sizes
    there, and 1 for those that it is for, else 0."""
    least, most = facts.bounds(size)
    name = size.as_symbol()
    if name is None:
        known = most is not None and most <= TILE
        beyond = facts.simplify(minimum(floordiv(size, TILE + 1), const(1)))
        if beyond != const(1):
            yield most if known else None, facts, 1 - beyond
        return
    low, above = facts.ranges.get(name, (0, None))[0], const(1)
    for limit in (NETWORK, FEW, TILE):
        if (least or 0) > limit or above == const(0):
            continue
        beyond = facts.simplify(minimum(floordiv(size, limit + 1), const(1)))
        yield limit, facts.with_ranges({name: (low, limit)}), above - beyond
        low, above = limit + 1, beyond


class Rows(NamedTuple):
    """What is sorted: for which value, the dtype of its keys, the axes that rows lie across, how
    long they are, and whether they fall."""

    ref: Ref
    dtype: DType
    others: list[int]
    size: Expr
    descending: bool


def _of(low: Lowering) -> Rows:
    """A sort's rows, or the positions of a scatter."""
    ref = low.group.roots[0]
    node = low.graph.nodes[ref.node]
    if isinstance(node.primitive, Scatter):
        return Rows(ref, U32, [], low.graph.type(node.operands[1]).shape[0], False)
    assert isinstance(node.primitive, Sort)
    axis = node.primitive.axis
    others = [a for a in range(len(low.group.domain)) if a != axis]
    return Rows(ref, node.type.dtype, others, low.group.domain[axis], node.primitive.descending)


def has_order(low: Lowering) -> bool:
    """Whether it is wanted where elements come from."""
    scatter = isinstance(low.graph.nodes[low.group.roots[0].node].primitive, Scatter)
    return scatter or len(low.group.roots) > 1


def without_orders(graph: Graph, found: Partition) -> Partition:
    """The kernels, of which sorts do not say where elements come from if nobody wants that."""
    uses = graph.uses()

    def wanted(group: Group) -> Group:
        if group.kind != "sort":
            return group
        first, *others = group.roots
        kept = [r for r in others if uses.get(r) or r in graph.results]
        return replace(group, roots=[first, *kept])

    return Partition([wanted(g) for g in found.groups], found.decisions)


def _axis(low: Lowering) -> int:
    primitive = low.graph.nodes[low.group.roots[0].node].primitive
    assert isinstance(primitive, Sort)
    return primitive.axis


def _key(low: Lowering, at: Expr) -> KernelValue:
    """What is sorted, as it is given."""
    node = low.graph.nodes[low.group.roots[0].node]
    if isinstance(node.primitive, Scatter):
        return Op("cast", (position_of(low, at),), U32)
    places = [Index(sym(f"d{a}")) for a in range(len(low.group.domain))]
    places[_axis(low)] = Index(at)
    return low.value(node.operands[0], tuple(places), ())


def _buffer(low: Lowering, number: int, dtype: DType, across: Sequence[Expr], mode: str) -> str:
    """The name of a buffer between the kernels, with so many elements for each row."""
    rows = _of(low)
    ref = rows.ref
    shape = (*(low.group.domain[a] for a in rows.others), *across)
    made = Buffer(f"b{len(low.buffers)}", dtype, shape, mode)
    return low.buffers.setdefault(parts_of(ref, number), made).name


def _row(low: Lowering, *places: KernelValue) -> tuple[KernelValue, ...]:
    """A place in such a buffer, in this step's row."""
    return (*(Index(sym(f"d{a}")) for a in _of(low).others), *places)


def _at(name: str) -> Index:
    return Index(sym(name))


def lower_short(low: Lowering, most: int) -> Parallel:
    """Rows of up to so many elements that are sorted in shared memory by all digits."""
    _, dtype, others, size, descending = _of(low)
    axis = _axis(low)
    parallel = low.axes(others)
    low.bind(parallel)
    keys, order = _scratch(low, dtype, maximum(size, const(room_for(most))))
    places = tuple(Index(sym(f"d{a}")) for a in range(len(low.group.domain)))

    def fill() -> None:
        low.emit(Store(keys, (places[axis],), _key(low, sym(f"d{axis}"))))
        if order:
            low.emit(Store(order, (places[axis],), Op("cast", (places[axis],), U32)))

    def by_digit() -> None:
        low.emit(SortDigit(keys, order, size, sym("n") * 8, descending))

    def spill() -> None:
        number = Load(order, (places[axis],), U32) if order else Const(0, U32)
        _store(low, places, Load(keys, (places[axis],), dtype), number)

    low.loop(f"d{axis}", const(0), size, fill, vector=True)
    low.loop("n", const(0), const(dtype.bits // 8), by_digit)
    low.loop(f"d{axis}", const(0), size, spill, vector=True)
    return parallel, size * WORK


def _scratch(low: Lowering, dtype: DType, size: Expr) -> tuple[str, str]:
    """Scratch for elements, and for where they come from if that is wanted."""
    keys, order = low.name("keys"), low.name("order") if has_order(low) else ""
    low.emit(Alloc(keys, dtype, (size,)))
    if order:
        low.emit(Alloc(order, U32, (size,)))
    return keys, order


def _store(
    low: Lowering, places: tuple[KernelValue, ...], key: KernelValue, order: KernelValue
) -> None:
    """Stores an element of both results, or of the first if nobody wants the other."""
    for ref, value in zip(low.group.roots, (key, Op("cast", (order,), I64)), strict=False):
        low.emit(Store(low.buffer(ref, "out").name, places, value))


def lower_tiles(low: Lowering, shift: int, few: bool, many: bool) -> Parallel:
    """Tiles sorted by a digit, and their counts, for rows of `few` tiles, of `many`, or both."""
    _, dtype, _, size, descending = _of(low)
    parallel, tiles, begin, count = _tiles(low)
    keys, order = _scratch(low, dtype, const(TILE))
    digits, before = low.name("digits"), low.name("before")
    low.emit(Alloc(digits, U8, (const(TILE),)))
    low.emit(Alloc(before, U32, (const(DIGITS + 1),)))

    def fill() -> None:
        here, at = _at("i"), Index(begin + sym("i"))
        if shift == 0:
            key = _key(low, at.expr)
            number: KernelValue = Op("cast", (at,), U32)
        else:
            key = Load(_buffer(low, SORTED, dtype, [size], "in"), _row(low, at), dtype)
        low.emit(Store(keys, (here,), key))
        if order and shift:
            number = Load(_buffer(low, FROM, U32, [size], "in"), _row(low, at), U32)
        if order:
            low.emit(Store(order, (here,), number))

    def spill() -> None:
        here, at = (_at("i"),), _row(low, Index(begin + sym("i")))
        orders = [(ORDER, order, U32)] if order else []
        for number, name, kind in [(KEYS, keys, dtype), *orders, (DIGIT, digits, U8)]:
            into = _buffer(low, number, kind, [size], "out")
            low.emit(Store(into, at, Load(name, here, kind)))

    def counts() -> None:
        count = Load(before, (_at("digit"),), U32)
        across, along = (const(DIGITS + 1), _at("digit")), (tiles, _at("tile"))
        for number, wanted, (a, b) in (
            (BEFORE, many, (across, along)), (BY_TILE, few, (along, across))
        ):  # fmt: skip
            if wanted:
                into = _buffer(low, number, U32, [a[0], b[0]], "out")
                low.emit(Store(into, _row(low, a[1], b[1]), count))

    low.loop("i", const(0), count, fill, vector=True)
    low.emit(SortDigit(keys, order, count, const(shift), descending, digits, before))
    low.loop("i", const(0), count, spill, vector=True)
    low.loop("digit", const(0), const(DIGITS + 1), counts, vector=True)
    return parallel, const(TILE * WORK)


def _tiles(low: Lowering) -> tuple[list[tuple[str, Expr]], Expr, Expr, Expr]:
    """The parallel axes, the tiles of a row, and where this step's begins and how long it is."""
    _, _, others, size, _ = _of(low)
    tiles = _count_of(low)
    parallel = [*low.axes(others), ("tile", tiles)]
    low.bind(parallel)
    begin = sym("tile") * TILE
    return parallel, tiles, begin, minimum(size - begin, const(TILE))


def _count_of(low: Lowering) -> Expr:
    return floordiv(_of(low).size + (TILE - 1), TILE)


def _running(low: Lowering, index: str, count: Expr, value: KernelValue, out: Store) -> None:
    """The running sum of a value; `out` has another value than that."""
    total, name = low.name("total"), low.name("v")
    low.emit(Alloc(total, U32, ()))
    low.emit(Store(total, (), Const(0, U32)))

    def step() -> None:
        low.emit(Let(name, Op("add", (Load(total, (), U32), value), U32)))
        low.emit(Store(total, (), Local(name, U32)))
        low.emit(Store(out.buffer, out.indices, Local(name, U32)))

    low.loop(index, const(0), count, step)


def lower_running(low: Lowering) -> Parallel:
    """How many elements of each digit there are up to each tile."""
    tiles = _count_of(low)
    parallel = [*low.axes(_of(low).others), ("digit", const(DIGITS))]
    low.bind(parallel)
    before = _buffer(low, BEFORE, U32, [const(DIGITS + 1), tiles], "in")
    ends = [Load(before, _row(low, Index(sym("digit") + n), _at("tile")), U32) for n in (1, 0)]
    out = _buffer(low, RUNNING, U32, [const(DIGITS), tiles], "out")
    place = _row(low, _at("digit"), _at("tile"))
    _running(low, "tile", tiles, Op("sub", tuple(ends), U32), Store(out, place, ends[0]))
    return parallel, tiles


def lower_starts(low: Lowering) -> Parallel:
    """How many elements of a row have each digit or a lower one."""
    tiles = _count_of(low)
    parallel = low.axes(_of(low).others)
    low.bind(parallel)
    running = _buffer(low, RUNNING, U32, [const(DIGITS), tiles], "in")
    some = Op("ge", (Index(tiles - 1), Const(0, I64)), BOOL)
    value = Load(running, _row(low, _at("digit"), Index(tiles - 1)), U32, (some,))
    out = _buffer(low, STARTS, U32, [const(DIGITS)], "out")
    place = _row(low, _at("digit"))
    _running(low, "digit", const(DIGITS), value, Store(out, place, value))
    return parallel, const(DIGITS)


def _before_of_all(low: Lowering, tiles: Expr) -> KernelValue:
    """Where a digit's elements of this tile go in the row: behind those of lower digits in all
    tiles, and of this one in the tiles before. Those up to this one in tiles before and of lower
    ones in others are as many; they are added up some tiles at a time."""
    at = _buffer(low, BY_TILE, U32, [tiles, const(DIGITS + 1)], "in")
    groups = floordiv(tiles + (TOGETHER - 1), TOGETHER)
    low.facts = low.facts.with_ranges({"group": (0, groups - 1)})
    found: KernelValue | None = None
    for n in range(TOGETHER):
        tile = sym("group") * TOGETHER + n
        inside = Op("ge", (Index(tiles - 1 - tile), Const(0, I64)), BOOL)
        digit = sym("digit") + maximum(minimum(sym("tile") - tile, 1), 0)
        count = Load(at, _row(low, Index(tile), Index(digit)), U32, (inside,))
        found = count if found is None else Op("add", (found, count), U32)
    assert found is not None
    total = low.name("total")
    low.emit(Fold(total, "sum", (("group", groups),), found, U32))
    return Local(total, U32)


def lower_moved(low: Lowering, last: bool, counted: bool) -> Parallel:
    """The elements of tiles where they go in their row; `counted`: counts are added up already."""
    _, dtype, _, size, _ = _of(low)
    parallel, tiles, begin, count = _tiles(low)
    offsets = low.name("offsets")
    low.emit(Alloc(offsets, U32, (const(DIGITS),)))

    def offset() -> None:
        """Where a digit's elements go, less where they lie in the tile."""
        if not counted:
            at = _buffer(low, BY_TILE, U32, [tiles, const(DIGITS + 1)], "in")
            lower = Load(at, _row(low, _at("tile"), _at("digit")), U32)
            value = Op("sub", (_before_of_all(low, tiles), lower), U32)
        else:
            running = _buffer(low, RUNNING, U32, [const(DIGITS), tiles], "in")
            before = _buffer(low, BEFORE, U32, [const(DIGITS + 1), tiles], "in")
            starts = _buffer(low, STARTS, U32, [const(DIGITS)], "in")
            some = Op("gt", (_at("digit"), Const(0, I64)), BOOL)
            up_to = Load(running, _row(low, _at("digit"), _at("tile")), U32)
            end = Load(before, _row(low, Index(sym("digit") + 1), _at("tile")), U32)
            lower = Load(starts, _row(low, Index(sym("digit") - 1)), U32, (some,))
            value = Op("add", (Op("sub", (up_to, end), U32), lower), U32)
        low.emit(Store(offsets, (_at("digit"),), value))

    def move() -> None:
        at = _row(low, Index(begin + sym("i")))
        digit = Load(_buffer(low, DIGIT, U8, [size], "in"), at, U8)
        offset = Load(offsets, (_inside(digit, const(DIGITS)),), U32)
        place = _inside(Op("add", (offset, Op("cast", (_at("i"),), U32)), U32), size)
        key = Load(_buffer(low, KEYS, dtype, [size], "in"), at, dtype)
        order: KernelValue = Const(0, U32)
        if has_order(low):
            order = Load(_buffer(low, ORDER, U32, [size], "in"), at, U32)
        if last:
            places: list[KernelValue] = [Index(sym(f"d{a}")) for a in range(len(low.group.domain))]
            places[_axis(low)] = place
            return _store(low, tuple(places), key, order)
        low.emit(Store(_buffer(low, SORTED, dtype, [size], "out"), _row(low, place), key))
        if has_order(low):
            low.emit(Store(_buffer(low, FROM, U32, [size], "out"), _row(low, place), order))

    low.loop("digit", const(0), const(DIGITS), offset, vector=True)
    low.loop("i", const(0), count, move, vector=True)
    return parallel, const(TILE)


def _inside(value: KernelValue, extent: Expr) -> Checked:
    """A position that is known to be in an axis."""
    return Checked(Op("cast", (value,), I64), extent, 0, proved=True)
