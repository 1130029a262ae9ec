"""Long reductions on a GPU whose results are few: blocks reduce parts of them, a second kernel the
parts.

The parts are cut along one axis, where the order of the result is fixed by sizes alone. Of
positions (`argmax`, `argmin`) a part leaves its extreme and where that is: among equal ones the
first is that of the first part. Both ways, split and in one go, are in the plan, and the sizes of a
call make the grids of one of them empty.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from stagefuse.compiler.fusion.fuse_rules import ROW_LIMIT
from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.fusion.join_reduced import reductions_of
from stagefuse.compiler.gpu.matmul.split_depth import parts_of
from stagefuse.compiler.graph import Graph, Reduce, Ref
from stagefuse.compiler.kernel_ir import Buffer, Const, Fold, Index, Load, Local, Op, Store, Value
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.expressions import as_dtype
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.dtypes import BOOL, I64
from stagefuse.dsl.frozen import frozen

from .columns import Written, lower_rows, reads_across

PARTS = 256
"""Parts of what is reduced along several axes, at most."""
PART = 4096
"""Elements of a part of a row: lanes have all their loads of it under way at once."""
FULL = 128
"""Rows from which on there are enough without cutting them."""
LEAST = 4 * PART
"""Elements of a row from which on a second launch costs less than one block takes for it."""


def whole(graph: Graph, group: Group) -> bool:
    """Whether a group is nothing but reductions of many elements into one."""
    found = reductions_of(graph, group)
    if not found or any(node.type.shape for node, _ in found):
        return False
    most = graph.facts.bounds(size_of(graph.type(found[0][0].operands[0]).shape))[1]
    return most is None or most > ROW_LIMIT


def share_of(low: Lowering) -> Expr:
    """1 for the sizes at which a group's reductions are split, else 0."""
    graph, group = low.graph, low.group
    found = reductions_of(graph, group)
    if not found:
        return const(0)
    if whole(graph, group):
        return const(1)
    if any(n.type.shape != group.domain for n, _ in found) or not group.domain or reads_across(low):
        return const(0)
    node, reduce = found[0]
    extents = [graph.type(node.operands[0]).shape[a] for a in reduce.axes]
    few = 1 - minimum(floordiv(size_of(group.domain), FULL), const(1))
    long = minimum(floordiv(size_of(extents), LEAST), const(1))
    return graph.facts.simplify(few * long)


@frozen
class Cut:
    """How a reduction is cut: `count` parts of `length` along `axis`, the others whole. `variant`
    numbers the ways in which a plan cuts it."""

    ref: Ref
    reduce: Reduce
    shape: tuple[Expr, ...]
    axis: int
    length: Expr
    count: Expr
    variant: int = 0

    @property
    def kept(self) -> list[int]:
        return [a for a in range(len(self.shape)) if a not in self.reduce.axes]

    @property
    def gives_places(self) -> bool:
        return self.reduce.kind.startswith("arg")


def _cuts(low: Lowering) -> list[Cut]:
    """How the reductions of a group are cut, all alike."""
    graph = low.graph
    found = reductions_of(graph, low.group)
    node, reduce = found[0]
    shape, axes = graph.type(node.operands[0]).shape, reduce.axes
    most = {a: graph.facts.bounds(shape[a])[1] for a in axes}
    axis = max(axes, key=lambda a: (most[a] is None, most[a] or 0))
    if any(r.kind.startswith("arg") for _, r in found):  # places are counted along the first
        axis = min(axes)
    size = shape[axis]
    length = const(PART) if len(axes) == 1 else floordiv(size, PARTS) + 1
    count = floordiv(size + length - 1, length)
    return [Cut(Ref(n.id), r, shape, axis, length, count) for n, r in found]


def lower_whole_parts(low: Lowering) -> Parallel:
    """A part of an element of the results for each block or warp."""
    cuts = _cuts(low)
    cut = cuts[0]
    parallel = [*((f"d{n}", cut.shape[a]) for n, a in enumerate(cut.kept)), ("ks", cut.count)]
    low.bind(parallel)
    begin = sym("ks") * cut.length
    loops = [(f"f{a}", cut.shape[a]) for a in cut.reduce.axes]
    loops[cut.reduce.axes.index(cut.axis)] = (
        f"f{cut.axis}", minimum(cut.shape[cut.axis] - begin, cut.length)
    )  # fmt: skip
    names = {a: f"d{n}" for n, a in enumerate(cut.kept)}
    place = [Index(sym(names.get(a, f"f{a}"))) for a in range(len(cut.shape))]
    place[cut.axis] = Index(begin + sym(f"f{cut.axis}"))
    for cut in cuts:
        before = low.facts
        low.facts = before.with_ranges({n: (0, e - 1) for n, e in loops})
        value = low.value(low.graph.nodes[cut.ref.node].operands[0], tuple(place), ())
        low.facts = before
        for number, part in fold_part(low, cut, loops, value, begin):
            _store(low, cut, number, part)
    return parallel, size_of([e for _, e in loops])


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
    shape = (*(cut.shape[a] for a in cut.kept), cut.count)
    name = f"b{len(low.buffers)}"
    return low.buffers.setdefault(
        parts_of(cut.ref, 2 * cut.variant + number), Buffer(name, dtype, shape, mode)
    )


def _store(low: Lowering, cut: Cut, number: int, value: Value) -> None:
    place = (*(Index(sym(f"d{n}")) for n in range(len(cut.kept))), Index(sym("ks")))
    low.emit(Store(part_buffer(low, cut, number, "out").name, place, value))


def _load(low: Lowering, cut: Cut, number: int, at: Sequence[Value]) -> Value:
    buffer = part_buffer(low, cut, number, "in")
    return Load(buffer.name, (*at, Index(sym("k"))), buffer.dtype)
