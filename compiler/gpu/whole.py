"""Reductions of a whole tensor on a GPU: blocks reduce parts of it, a second kernel the parts.

The parts are cut along the longest axis, where the order of the result is fixed by sizes alone.
"""

from __future__ import annotations

from stagefuse.compiler.fuse_rules import ROW_LIMIT
from stagefuse.compiler.graph import Graph, Reduce, Ref
from stagefuse.compiler.groups import Group
from stagefuse.compiler.kernel_ir import Buffer, Fold, Index, Load, Local, Store
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.expressions import as_dtype
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.lower.rows import lower_row
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym

from .few_tiles import parts_of

PARTS = 256


def whole(graph: Graph, group: Group) -> bool:
    """Whether a group is nothing but a reduction of many elements into one."""
    if group.kind != "row" or len(group.roots) != 1:
        return False
    node = graph.nodes[group.roots[0].node]
    if not isinstance(node.primitive, Reduce) or node.primitive.kind.startswith("arg"):
        return False
    shape = graph.type(node.operands[0]).shape
    most = graph.facts.bounds(size_of(shape))[1]
    many = most is None or most > ROW_LIMIT
    return many and not node.type.shape and len(node.primitive.axes) == len(shape)


def _reduce(low: Lowering) -> tuple[Ref, Reduce, tuple[Expr, ...], int]:
    """The reduction, the shape of its operand, and the axis that is cut."""
    (ref,) = low.group.roots
    node = low.graph.nodes[ref.node]
    assert isinstance(node.primitive, Reduce)
    shape = low.graph.type(node.operands[0]).shape
    most = [low.graph.facts.bounds(e)[1] for e in shape]
    longest = max(range(len(shape)), key=lambda a: (most[a] is None, most[a] or 0))
    return ref, node.primitive, shape, longest


def _parts(low: Lowering, ref: Ref, mode: str) -> Buffer:
    dtype = low.graph.type(ref).dtype.compute
    name = f"b{len(low.buffers)}"
    return low.buffers.setdefault(parts_of(ref), Buffer(name, dtype, (const(PARTS),), mode))


def lower_whole_parts(low: Lowering) -> Parallel:
    """A part of the longest axis for each block."""
    ref, primitive, shape, longest = _reduce(low)
    dtype = low.graph.type(ref).dtype.compute
    parallel = [("ks", const(PARTS))]
    low.bind(parallel)
    length = floordiv(shape[longest] + (PARTS - 1), PARTS)
    begin = sym("ks") * length
    loops = [(f"f{a}", e) for a, e in enumerate(shape)]
    loops[longest] = (f"f{longest}", minimum(shape[longest] - begin, length))
    place = [Index(sym(name)) for name, _ in loops]
    place[longest] = Index(begin + sym(f"f{longest}"))
    before = low.facts
    low.facts = before.with_ranges({n: (0, e - 1) for n, e in loops})
    value = low.value(low.graph.nodes[ref.node].operands[0], tuple(place), ())
    low.facts = before
    name = low.name("part")
    low.emit(Fold(name, primitive.kind, tuple(loops), as_dtype(value, dtype), dtype))
    parts = _parts(low, ref, "out")
    low.emit(Store(parts.name, (Index(sym("ks")),), Local(name, dtype)))
    return parallel, size_of([e for _, e in loops])


def lower_whole_rest(low: Lowering) -> Parallel:
    """The reduction of the parts."""
    ref, primitive, _, _ = _reduce(low)
    dtype = low.graph.type(ref).dtype.compute
    parts = _parts(low, ref, "in")
    name = low.name("whole")
    value = Load(parts.name, (Index(sym("k")),), parts.dtype)
    low.emit(Fold(name, primitive.kind, (("k", const(PARTS)),), value, dtype))
    low.scopes[0].known[(ref, ())] = Local(name, dtype)
    return lower_row(low)
