"""Norms and softmax on a GPU of rows that are few and long: blocks have parts of the rows.

Reductions are made level by level: a kernel reduces parts of those that need no others than the
levels before give, of which it combines the parts first, in their order. The last kernel does so
for all of them and stores the elements. Both ways, so and with a block for each row, are in the
plan, and the sizes of a call make the grids of one of them empty.
"""

from __future__ import annotations

from functools import partial

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.gpu.matmul.split_depth import parts_of
from stagefuse.compiler.graph import Graph, Reduce, Ref
from stagefuse.compiler.kernel_ir import Buffer, Const, Fold, Index, Load, Local, Op, Store, Value
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.expressions import as_dtype, product_of
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym
from stagefuse.dsl.dtypes import BOOL, I64

from .columns import Written
from .split_reductions import PART, by_need

FEW = 64
"""Rows from which on a block for each reads about as quickly as the memory gives."""
LEAST = 32768
"""Elements of rows that a block's registers hold; it reads longer ones once for each reduction."""


def levels(graph: Graph, group: Group) -> list[list[Ref]]:
    """The reductions of a group of rows, by what they need of each other; nothing if there are
    others than of whole rows as they lie in memory."""
    axis = len(group.domain) - 1
    if group.kind != "row" or tuple(group.row_axes or ()) != (axis,):
        return []
    found = by_need(graph, group)
    for ref in (r for refs in found for r in refs):
        node = graph.nodes[ref.node]
        assert isinstance(node.primitive, Reduce)
        whole = graph.type(node.operands[0]).shape == group.domain
        if not whole or node.primitive.axes != (axis,) or node.primitive.kind.startswith("arg"):
            return []
    return found


def share_of_rows(graph: Graph, group: Group) -> Expr:
    """1 for the sizes at which a group's rows are cut, else 0."""
    if not levels(graph, group):
        return const(0)
    *others, length = group.domain
    few = 1 - minimum(floordiv(product_of(others), FEW), const(1))
    return graph.facts.simplify(few * minimum(floordiv(length, LEAST + 1), const(1)))


def lower_level(low: Lowering, level: int) -> Parallel:
    """Parts of the reductions of a level."""
    parallel, begin, end = _parts(low, level)
    axis = len(low.group.domain) - 1
    before = low.facts
    for ref in levels(low.graph, low.group)[level]:
        node = low.graph.nodes[ref.node]
        assert isinstance(node.primitive, Reduce)
        place = (*_row(low), Index(begin + sym(f"f{axis}")))
        low.facts = before.with_ranges({f"f{axis}": (0, end - begin - 1)})
        dtype, name = low.graph.type(ref).dtype.compute, low.name("part")
        value = as_dtype(low.value(node.operands[0], place, ()), dtype)
        low.facts = before
        low.emit(Fold(name, node.primitive.kind, ((f"f{axis}", end - begin),), value, dtype))
        buffer = _buffer(low, ref, "out")
        low.emit(Store(buffer.name, (*_row(low), Index(sym("ks"))), Local(name, dtype)))
    return parallel, const(PART * max(1, low.cost()))


def lower_rest_of_rows(low: Lowering) -> Parallel:
    """The elements of the parts, and what there is one of for a row."""
    parallel, begin, end = _parts(low, len(levels(low.graph, low.group)))
    domain, group = low.group.domain, low.group
    sources = {r: group.source(r) for r in group.roots}
    full = [r for r, source in sources.items() if low.graph.type(source).shape == domain]
    position = [const(0) if e.as_int() == 1 else sym(f"d{a}") for a, e in enumerate(domain)]

    def of_row() -> None:
        for ref, source in sources.items():
            if ref not in full:
                low.store_root(ref, group.accesses[source.node][0] or ())

    def of_elements() -> None:
        for ref in full:
            low.store_root(ref, position)

    if len(full) < len(sources):
        low.branch(Op("eq", (Index(sym("ks")), Const(0, I64)), BOOL), of_row)
    low.loop(f"d{len(domain) - 1}", begin, end, of_elements, vector=True)
    return parallel, const(PART * max(1, low.cost()))


def _parts(low: Lowering, level: int) -> tuple[list[tuple[str, Expr]], Expr, Expr]:
    """The parallel axes, and the ends of this step's part, where reductions of the levels before
    are what their parts give."""
    assert isinstance(low, Written)
    *others, length = low.group.domain
    parallel = [*low.axes(range(len(others))), ("ks", _count(length))]
    low.bind(parallel)
    low.staged = set()  # no row is in one block
    for refs in levels(low.graph, low.group)[:level]:
        low.parts.update({ref: partial(_combined, low, ref) for ref in refs})
    begin = sym("ks") * PART
    return parallel, begin, minimum(begin + PART, length)


def _count(length: Expr) -> Expr:
    return floordiv(length + (PART - 1), PART)


def _row(low: Lowering) -> tuple[Value, ...]:
    return tuple(Index(sym(f"d{a}")) for a in range(len(low.group.domain) - 1))


def _combined(low: Lowering, ref: Ref, at: tuple[Value, ...]) -> Value:
    """What the parts of a reduction come to."""
    node, buffer = low.graph.nodes[ref.node], _buffer(low, ref, "in")
    assert isinstance(node.primitive, Reduce)
    name = low.name("whole")
    found = Load(buffer.name, (*at, Index(sym("k"))), buffer.dtype)
    loops = (("k", _count(low.group.domain[-1])),)
    low.emit(Fold(name, node.primitive.kind, loops, found, buffer.dtype))
    return Local(name, buffer.dtype)


def _buffer(low: Lowering, ref: Ref, mode: str) -> Buffer:
    """The parts of a reduction."""
    *others, length = low.group.domain
    dtype = low.graph.type(ref).dtype.compute
    made = Buffer(f"b{len(low.buffers)}", dtype, (*others, _count(length)), mode)
    return low.buffers.setdefault(parts_of(ref), made)
