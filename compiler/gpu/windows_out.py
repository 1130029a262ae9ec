"""Reductions of small windows for a GPU, such as pooling and depthwise convolutions: written out.

Where memory runs along the last axis of the result, which no window moves along, lanes take
adjacent elements of it, and read each place of the window as vectors. A block has some places of
the result, each with all of that axis.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import product

from stagefuse.compiler.graph import Reduce, Ref, split_index
from stagefuse.compiler.kernel_ir import Index, Op, Value
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.expressions import as_dtype
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym

WINDOW = 32
"""Elements of a window, at most."""
ELEMENTS = 2048
"""Elements of the result that a block has, about."""
COMBINED = {"sum": "add", "prod": "mul", "max": "maximum", "min": "minimum"}


def are_small(low: Lowering) -> bool:
    """Whether all reductions of a group are of windows that can be written out."""
    nodes = (low.graph.nodes[m] for m in low.group.members)
    reduces = [(n, n.primitive) for n in nodes if isinstance(n.primitive, Reduce)]
    for node, primitive in reduces:
        shape = low.graph.type(node.operands[0]).shape
        sizes = [shape[a] for a in primitive.axes if shape[a].as_int() != 1]
        count = size_of(sizes).as_int()
        if len(sizes) < 2:
            return False  # of one axis there may be few, and long ones
        if primitive.kind not in COMBINED or count is None or not 0 < count <= WINDOW:
            return False
    return bool(reduces) and 1 < (low.group.domain[-1].as_int() or 0) <= ELEMENTS


def lower_windows(low: Lowering, store: Callable[[Sequence[Expr]], None]) -> Parallel:
    """Places of the result by all of its last axis; `store` stores all roots at a position."""
    *outer, last = low.group.domain
    wide = last.as_int() or 1
    group, places = max(ELEMENTS // wide, 1), size_of(outer)
    parallel = [("pb", floordiv(places + (group - 1), group, low.facts))]
    low.bind(parallel)
    first, axis = sym("pb") * group, f"d{len(outer)}"

    def one_place() -> None:
        position = split_index(sym("place"), outer, low.facts)
        low.loop(axis, const(0), last, lambda: store([*position, sym(axis)]), vector=True)

    low.loop("place", first, minimum(first + group, places), one_place, vector=True)
    return parallel, const(group * wide * max(1, low.cost()))


def written_out(low: Lowering, ref: Ref, at: tuple[Value, ...]) -> Value:
    """The value of a reduction at a position, from each element of its window in turn."""
    node = low.graph.nodes[ref.node]
    primitive, (operand,) = node.primitive, node.operands
    assert isinstance(primitive, Reduce)
    shape, dtype = low.graph.type(operand).shape, node.type.dtype.compute
    total: Value | None = None
    for window in product(*(range(shape[a].as_int() or 0) for a in primitive.axes)):
        inside, kept = iter(window), iter(at)
        place = tuple(
            Index(const(next(inside))) if a in primitive.axes else next(kept)
            for a in range(len(shape))
        )
        value = as_dtype(low.value(operand, place, ()), dtype)
        total = value if total is None else Op(COMBINED[primitive.kind], (total, value), dtype)
    assert total is not None
    return total
