"""Long reductions on a GPU whose results are few: blocks reduce parts of them, a second kernel the
parts.

The parts are cut along one axis, or along several that lie one after the other as if they were one,
so that the order of the result is fixed by sizes alone. Where memory runs along the result, as it
does in sums of few columns, blocks have parts of the rows by some columns. Of
positions (`argmax`, `argmin`) a part leaves its extreme and where that is: among equal ones the
first is that of the first part. Both ways, split and in one go, are in the plan, and the sizes of a
call make the grids of one of them empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial

from stagefuse.compiler.fusion.fuse_rules import ROW_LIMIT
from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.fusion.join_reduced import reductions_of
from stagefuse.compiler.gpu.matmul.deep_split import DRAWN, SECOND
from stagefuse.compiler.gpu.matmul.persistent import BLOCKS
from stagefuse.compiler.gpu.matmul.split_depth import parts_of
from stagefuse.compiler.graph import Graph, Map, Reduce, Ref, Scalar, View
from stagefuse.compiler.kernel_ir import Buffer, Const, Fold, Index, Load, Local, Op, Store, Value
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.expressions import as_dtype
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, mod, sym
from stagefuse.dsl.dtypes import BOOL, I64
from stagefuse.dsl.frozen import frozen

from .columns import Written, column_blocks, column_width, lower_rows, reads_across

PARTS = 256
"""Parts of what is reduced along several axes that are not taken as one, at most."""
PART = 4096
"""Elements of a part of a row: lanes have all their loads of it under way at once."""
FULL = 128
"""Rows from which on there are enough without cutting them."""
LEAST = 4 * PART
"""Elements of a row from which on a second launch costs less than one block takes for it."""
LEAST_ROWS = 8 * 1024
"""The same of columns, which few blocks have."""
PART_ROWS = 1024
"""Rows of a part where columns are reduced: a block has several loads of each lane under way."""


def whole(graph: Graph, group: Group) -> bool:
    """Whether a group is nothing but reductions of many elements into one."""
    found = reductions_of(graph, group)
    if not found or any(node.type.shape for node, _ in found):
        return False
    most = graph.facts.bounds(size_of(graph.type(found[0][0].operands[0]).shape))[1]
    return most is None or most > ROW_LIMIT


def by_need(graph: Graph, group: Group) -> list[list[Ref]]:
    """The reductions of a group by how many others they need, one after the other."""
    depth: dict[int, int] = {}
    found: list[list[Ref]] = []
    for member in sorted(group.members):
        node = graph.nodes[member]
        depth[member] = max((depth.get(r.node, 0) for r in node.operands), default=0)
        if isinstance(node.primitive, Reduce):
            found += [[]] if depth[member] == len(found) else []
            found[depth[member]].append(Ref(member))
            depth[member] += 1
    return found


def share_of(low: Lowering) -> Expr:
    """1 for the sizes at which a group's reductions are split, else 0."""
    graph, group = low.graph, low.group
    found = reductions_of(graph, group)
    if not found:
        return const(0)
    if whole(graph, group):
        return const(1)
    if any(n.type.shape != group.domain for n, _ in found) or not group.domain:
        return const(0)
    node, reduce = found[0]
    extents = [graph.type(node.operands[0]).shape[a] for a in reduce.axes]
    blocks, least = size_of(group.domain), LEAST
    if reads_across(low):
        blocks, least = column_blocks(low), LEAST_ROWS
        row = column_width(low) * graph.type(node.operands[0]).dtype.itemsize
        if _evens_out(blocks.as_int(), size_of(extents).as_int(), row):
            return const(1)
    few = 1 - minimum(floordiv(blocks, FULL), const(1))
    long = minimum(floordiv(size_of(extents), least), const(1))
    return graph.facts.simplify(few * long)


def _evens_out(blocks: int | None, rows: int | None, row: int) -> bool:
    """Whether some multiprocessors have a block of columns more than others, and that takes much
    more than a second kernel: parts of blocks are as many for each. `row`: bytes of a block's."""
    if blocks is None or rows is None or not blocks or rows % PART_ROWS:
        return False
    parts = rows // PART_ROWS
    most, even = -(-blocks // BLOCKS) * parts, -(-blocks * parts // BLOCKS)
    spared = (most - even) * PART_ROWS * row / DRAWN
    return spared > 2 * SECOND


@frozen
class Cut:
    """How a reduction is cut: `count` parts of `length` along `axis`, the others whole; where all
    axes are taken as one (`flat`) that is along the first of them. Of columns (`across`) parts
    follow each other, of others those of an element. `variant` numbers the ways in which a plan
    cuts it."""

    ref: Ref
    reduce: Reduce
    shape: tuple[Expr, ...]
    axis: int
    length: Expr
    count: Expr
    variant: int = 0
    flat: bool = False
    across: bool = False

    @property
    def kept(self) -> list[int]:
        return [a for a in range(len(self.shape)) if a not in self.reduce.axes]

    @property
    def gives_places(self) -> bool:
        return self.reduce.kind.startswith("arg")

    @property
    def size(self) -> Expr:
        """Of what is cut."""
        axes = self.reduce.axes if self.flat else (self.axis,)
        return size_of([self.shape[a] for a in axes])

    def at(self, part: Expr, kept: Sequence[Value]) -> tuple[Value, ...]:
        """Where a part's result lies, of an element of the results."""
        return (Index(part), *kept) if self.across else (*kept, Index(part))


def _cuts(low: Lowering) -> list[Cut]:
    """How the reductions of a group are cut, all alike."""
    graph = low.graph
    found = reductions_of(graph, low.group)
    node, reduce = found[0]
    shape, axes = graph.type(node.operands[0]).shape, reduce.axes
    most = {a: graph.facts.bounds(shape[a])[1] for a in axes}
    axis = max(axes, key=lambda a: (most[a] is None, most[a] or 0))
    flat = len(axes) > 1 and all(_runs_on(low, n.operands[0], axes) for n, _ in found)
    if flat or any(r.kind.startswith("arg") for _, r in found):
        axis = min(axes)  # places are counted along it
    across = bool(low.group.domain) and reads_across(low)
    cut = Cut(Ref(node.id), reduce, shape, axis, const(1), const(1), 0, flat, across)
    length = const(PART_ROWS if across else PART)
    if len(axes) > 1 and not flat:
        length = floordiv(cut.size, PARTS) + 1
    count = floordiv(cut.size + length - 1, length)
    return [replace(cut, ref=Ref(n.id), reduce=r, length=length, count=count) for n, r in found]


def _runs_on(low: Lowering, ref: Ref, axes: Sequence[int]) -> bool:
    """Whether some axes of a tensor follow each other, and all that it is computed of either is
    read element by element or does not change along them: then they may be taken as one."""
    if list(axes) != list(range(min(axes), max(axes) + 1)):
        return False
    node, shape = low.graph.nodes[ref.node], low.graph.type(ref).shape
    if ref.node not in low.group.members or isinstance(node.primitive, Scalar):
        return True
    if isinstance(node.primitive, View):
        view = node.primitive
        names = {view.symbols[a] for a in axes}
        if not any(names & e.symbols() for e in (*view.indices, *view.guard)):
            return True
        same = [e.as_symbol() for e in view.indices] == list(view.symbols) and not view.guard
        own = low.graph.type(node.operands[0]).shape
        return same and own == shape and _runs_on(low, node.operands[0], axes)
    if not isinstance(node.primitive, Map):
        return False
    return all(
        low.graph.type(x).shape in (shape, ()) and _runs_on(low, x, axes) for x in node.operands
    )


def lower_whole_parts(low: Lowering, level: int = 0) -> Parallel:
    """A part of an element of the results, or of some columns of them, for each block or warp; of
    the reductions that need those of the levels before, of which it combines the parts."""
    assert isinstance(low, Written)
    needed = [ref for refs in by_need(low.graph, low.group)[:level] for ref in refs]
    own = by_need(low.graph, low.group)[level]
    low.parts.update({c.ref: partial(of_parts, low, c) for c in _cuts(low) if c.ref in needed})
    cuts = [c for c in _cuts(low) if c.ref in own]
    cut = cuts[0]
    begin = sym("ks") * cut.length
    long = [(f"d{n}", cut.shape[a]) for n, a in enumerate(cut.kept) if cut.shape[a] != const(1)]
    kept = [const(0) if cut.shape[a] == const(1) else sym(f"d{n}") for n, a in enumerate(cut.kept)]
    if not cut.across:
        parallel = [*long, ("ks", cut.count)]
        low.bind(parallel)
        return parallel, _store_parts(low, cuts, kept, begin)
    *outer, (name, columns) = long
    width = column_width(low)
    parallel = [("ks", cut.count), *outer, ("block", floordiv(columns + (width - 1), width))]
    low.bind(parallel)
    lo, work = sym("block") * width, [const(1)]

    def column() -> None:
        work.append(_store_parts(low, cuts, kept, begin) * width)

    low.loop(name, lo, minimum(lo + width, columns), column, vector=True)
    return parallel, work[-1]


def _store_parts(low: Lowering, cuts: Sequence[Cut], kept: Sequence[Expr], begin: Expr) -> Expr:
    """Folds a part that begins at a place, and stores what it comes to; gives its elements."""
    cut = cuts[0]
    stretch = minimum(cut.size - begin, cut.length)
    axes = (cut.axis,) if cut.flat else cut.reduce.axes
    loops = [(f"f{a}", stretch if a == cut.axis else cut.shape[a]) for a in axes]
    place = [sym(f"f{a}") for a in range(len(cut.shape))]
    for n, a in enumerate(cut.kept):
        place[a] = kept[n]
    place[cut.axis] = begin + place[cut.axis]
    if cut.flat:
        place = _unfolded(low, cut, place)
    for cut in cuts:
        before = low.facts
        low.facts = before.with_ranges({n: (0, e - 1) for n, e in loops})
        operand = low.graph.nodes[cut.ref.node].operands[0]
        value = low.value(operand, tuple(map(Index, place)), ())
        low.facts = before
        for number, part in fold_part(low, cut, loops, value, begin):
            at = cut.at(sym("ks"), [Index(e) for e in kept])
            low.emit(Store(part_buffer(low, cut, number, "out").name, at, part))
    return size_of([e for _, e in loops])


def _unfolded(low: Lowering, cut: Cut, place: Sequence[Expr]) -> list[Expr]:
    """The places along axes that are taken as one, of which the first has that of all."""
    found, rest = list(place), place[cut.axis]
    for a in reversed(cut.reduce.axes[1:]):
        found[a] = mod(rest, cut.shape[a], low.facts)
        rest = floordiv(rest, cut.shape[a], low.facts)
    found[cut.axis] = rest
    return found


def fold_part(
    low: Lowering, cut: Cut, loops: Sequence[tuple[str, Expr]], value: Value, begin: Expr
) -> list[tuple[int, Value]]:
    """Folds a value over a part that begins at a place of the axis: what it comes to, numbered 0,
    and 1 where the extreme is."""
    kind, dtype = cut.reduce.kind, low.graph.type(cut.ref).dtype.compute
    found: list[tuple[int, Value]] = []
    if cut.gives_places:
        where = low.name("place")
        low.emit(Fold(where, kind, tuple(loops), value, I64))
        inner = size_of([e for name, e in loops if name != f"f{cut.axis}"])
        found.append((1, Op("add", (Local(where, I64), Index(begin * inner)), I64)))
        kind, dtype = kind.removeprefix("arg"), value.dtype
    name = low.name("part")
    low.emit(Fold(name, kind, tuple(loops), as_dtype(value, dtype), dtype))
    return [*found, (0, Local(name, dtype))]


def lower_whole_rest(low: Lowering) -> Parallel:
    """The reductions of the parts, and what follows."""
    assert isinstance(low, Written)
    low.parts.update({cut.ref: partial(of_parts, low, cut) for cut in _cuts(low)})
    return lower_rows(low)


def of_parts(low: Lowering, cut: Cut, at: tuple[Value, ...]) -> Value:
    """What the parts of an element of the result come to."""
    dtype = low.graph.type(cut.ref).dtype.compute
    loops = (("k", cut.count),)
    name = low.name("whole")
    found = _load(low, cut, 0, at)
    low.emit(Fold(name, cut.reduce.kind, loops, found, dtype))
    if not cut.gives_places:
        return Local(name, dtype)
    where = low.name("place")
    here = Op("eq", (Index(sym("k")), Local(name, I64)), BOOL)
    place = Op("select", (here, _load(low, cut, 1, at), Const(2**63 - 1, I64)), I64)
    low.emit(Fold(where, "min", loops, place, I64))
    return Local(where, I64)


def part_buffer(low: Lowering, cut: Cut, number: int, mode: str) -> Buffer:
    """The parts of all elements; number 1 has the places of extremes."""
    dtype = low.graph.type(cut.ref).dtype.compute
    if cut.gives_places and number == 0:
        dtype = low.graph.type(low.graph.nodes[cut.ref.node].operands[0]).dtype.compute
    kept = tuple(cut.shape[a] for a in cut.kept)
    shape = (cut.count, *kept) if cut.across else (*kept, cut.count)
    name = f"b{len(low.buffers)}"
    return low.buffers.setdefault(
        parts_of(cut.ref, 2 * cut.variant + number), Buffer(name, dtype, shape, mode)
    )


def _load(low: Lowering, cut: Cut, number: int, at: Sequence[Value]) -> Value:
    buffer = part_buffer(low, cut, number, "in")
    return Load(buffer.name, cut.at(sym("k"), at), buffer.dtype)
