"""Reductions of small windows for a GPU, such as pooling and depthwise convolutions: written out.

Where memory runs along the last axis of the result, which no window moves along, lanes take
adjacent elements of it, and read each place of the window as vectors. A block has some places of
the result, each with all of that axis. Of larger windows the last axes are written out, in a loop
over the others: all places at once would be more than registers hold.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import product

from stagefuse.compiler.gpu.teams import SLIDING
from stagefuse.compiler.graph import Map, Node, Reduce, Ref, View, split_index
from stagefuse.compiler.kernel_ir import Fold, Index, Local, Op, Value
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.expressions import as_dtype
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym

WINDOW, OVERLAPPING = 32, 256
"""Elements of a window, at most: of one that shares none with others, whose results may be few, and
of others."""
WRITTEN = 16
"""Elements that are written out, at most."""
ELEMENTS = 2048
"""Elements of the result that a block has, about."""
FEW, FEW_ELEMENTS = 132 * 2048, 512
"""Elements of the result that leave a device idle if blocks have so many; blocks of warps then have
fewer each."""
COMBINED = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum"}


def are_small(low: Lowering) -> bool:
    """Whether all reductions of a group are of windows that can be written out."""
    reduces = _reduces(low)
    for node, primitive in reduces:
        count, axes = _window(low, node, primitive)
        across = _moves(low, node.operands[0]) == "across"
        if axes < 2 and not across:
            return False  # of one axis there may be few, and long ones
        if primitive.kind not in COMBINED or not 0 < count <= (OVERLAPPING if across else WINDOW):
            return False
    return bool(reduces) and 1 < (low.group.domain[-1].as_int() or 0) <= ELEMENTS


def move_along(low: Lowering) -> bool:
    """Whether all reductions of a group are of windows that are not written out and move along
    memory: lanes then have adjacent ones, and read what is adjacent."""
    found = [(_moves(low, n.operands[0]), *_window(low, n, p)) for n, p in _reduces(low)]
    return bool(found) and all(
        moves == "along" and 0 < count <= SLIDING and (axes < 2 or count > WINDOW)
        for moves, count, axes in found
    )


def _reduces(low: Lowering) -> list[tuple[Node, Reduce]]:
    nodes = (low.graph.nodes[m] for m in low.group.members)
    return [(n, n.primitive) for n in nodes if isinstance(n.primitive, Reduce)]


def _window(low: Lowering, node: Node, primitive: Reduce) -> tuple[int, int]:
    """How many elements a reduction has, 0 if that is not known, and along how many axes."""
    shape = low.graph.type(node.operands[0]).shape
    sizes = [shape[a] for a in primitive.axes if shape[a].as_int() != 1]
    return size_of(sizes).as_int() or 0, len(sizes)


def _moves(low: Lowering, ref: Ref) -> str:
    """Whether what is reduced is computed from windows of a tensor that overlap, which move along
    its last axis or "across"; empty if it is not."""
    node = low.graph.nodes[ref.node]
    view = node.primitive
    if ref.node not in low.group.members or not isinstance(view, Map | View):
        return ""
    if isinstance(view, View):
        moving = [len(e.symbols() & set(view.symbols)) > 1 for e in view.indices]
        if any(moving):
            return "along" if moving[-1] else "across"
    return next((found for x in node.operands if (found := _moves(low, x))), "")


def lower_windows(low: Lowering, store: Callable[[Sequence[Expr]], None]) -> Parallel:
    """Places of the result by all of its last axis, or by a part of it where there are few; `store`
    stores all roots at a position."""
    *outer, last = low.group.domain
    wide, places = last.as_int() or 1, size_of(outer)
    known = places.as_int()
    elements = FEW_ELEMENTS if known is not None and known * wide <= FEW else ELEMENTS
    parts = (n for n in range(1, wide // 8 + 1) if wide % (n * 8) == 0 and wide // n <= elements)
    count = next(parts, 1)
    wide, group = wide // count, max(elements * count // wide, 1)
    parallel = [("pb", floordiv(places + (group - 1), group, low.facts))]
    if count > 1:
        parallel.append(("part", const(count)))
    low.bind(parallel)
    first, axis = sym("pb") * group, f"d{len(outer)}"
    begin = sym("part") * wide if count > 1 else const(0)

    def one_place() -> None:
        position = split_index(sym("place"), outer, low.facts)
        ends = begin, begin + wide
        low.loop(axis, *ends, lambda: store([*position, sym(axis)]), vector=True)

    low.loop("place", first, minimum(first + group, places), one_place, vector=True)
    return parallel, const(group * wide * max(1, low.cost()))


def is_written_out(low: Lowering, ref: Ref) -> bool:
    """Whether all places of a reduction's window are written out, none in a loop."""
    return not _in_loops(low, ref)


def _in_loops(low: Lowering, ref: Ref) -> tuple[int, ...]:
    """The first axes of a window, over which there is a loop: so many that what is written out of
    it is not too much."""
    node = low.graph.nodes[ref.node]
    primitive = node.primitive
    assert isinstance(primitive, Reduce)
    shape, axes = low.graph.type(node.operands[0]).shape, primitive.axes
    count = (size_of([shape[a] for a in axes[n:]]).as_int() or 0 for n in range(len(axes)))
    return axes[: next((n for n, size in enumerate(count) if size <= WRITTEN), len(axes))]


def written_out(low: Lowering, ref: Ref, at: tuple[Value, ...]) -> Value:
    """The value of a reduction at a position, from each element of its window in turn; the sums of
    what is written out in a loop, if there is one."""
    node = low.graph.nodes[ref.node]
    primitive, (operand,) = node.primitive, node.operands
    assert isinstance(primitive, Reduce)
    shape, dtype = low.graph.type(operand).shape, node.type.dtype.compute
    loops = tuple((f"f{a}", shape[a]) for a in _in_loops(low, ref))
    if not loops:
        return _each(low, ref, at, {})
    before = low.facts
    low.facts = before.with_ranges({n: (0, e - 1) for n, e in loops})
    with low.elsewhere():
        value = _each(low, ref, at, {a: sym(f"f{a}") for a in _in_loops(low, ref)})
    low.facts = before
    name = low.name("r")
    low.emit(Fold(name, primitive.kind, loops, value, dtype))
    return Local(name, dtype)


def _each(low: Lowering, ref: Ref, at: tuple[Value, ...], outer: Mapping[int, Expr]) -> Value:
    """Of the elements of a window, of which some axes are at places given."""
    node = low.graph.nodes[ref.node]
    primitive, (operand,) = node.primitive, node.operands
    assert isinstance(primitive, Reduce)
    shape, dtype = low.graph.type(operand).shape, node.type.dtype.compute
    axes = [a for a in primitive.axes if a not in outer]
    total: Value | None = None
    for window in product(*(range(shape[a].as_int() or 0) for a in axes)):
        places = {**outer, **{a: const(n) for a, n in zip(axes, window, strict=True)}}
        kept = iter(at)
        place = tuple(Index(places[a]) if a in places else next(kept) for a in range(len(shape)))
        value = as_dtype(low.value(operand, place, ()), dtype)
        total = value if total is None else Op(COMBINED[primitive.kind], (total, value), dtype)
    assert total is not None
    return total
