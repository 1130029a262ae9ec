"""Long scans on a GPU: blocks reduce stretches of the axis, a second kernel scans each stretch.

A stretch begins with what the reductions of those before it give, in their order, so that results
are the same in every run. Both ways, split and in one go, are in the plan, and the sizes of a call
make the grids of one of them empty.
"""

from __future__ import annotations

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.gpu.matmul.split_depth import parts_of
from stagefuse.compiler.graph import Graph, Ref, Scan
from stagefuse.compiler.kernel_ir import Alloc, Buffer, Fold, Index, Let, Load, Local, Op, Store
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.expressions import COMBINE, as_dtype, start_of
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.lower.sequences import scan_along
from stagefuse.compiler.lower.values import Lowering
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym

ALONG_ROWS, ALONG_COLUMNS = 4096, 64
"""Stretches are whole numbers of so many elements."""
MOST_PARTS = {ALONG_ROWS: 1024, ALONG_COLUMNS: 256}
FULL = 512
"""Rows from which on there are enough without splitting them, and 32 times as many columns."""


def splits(graph: Graph, group: Group) -> Expr | None:
    """1 where a scan is split, else 0; None if it never is."""
    if group.kind != "scan" or len(group.roots) != 1:
        return None
    scan = graph.nodes[group.roots[0].node].primitive
    assert isinstance(scan, Scan)
    length, unit = group.domain[scan.axis], _unit(group, scan)
    most = graph.facts.bounds(length)[1]
    if most is not None and most < 4 * unit:
        return None
    others = size_of([e for a, e in enumerate(group.domain) if a != scan.axis])
    few = 1 - minimum(floordiv(others, FULL if unit == ALONG_ROWS else 32 * FULL), const(1))
    return few * minimum(floordiv(length, 4 * unit), const(1))


def _unit(group: Group, scan: Scan) -> int:
    return ALONG_ROWS if scan.axis == len(group.domain) - 1 else ALONG_COLUMNS


def _stretches(low: Lowering) -> tuple[Ref, Scan, Expr, Expr]:
    """The scan, and the stretches' number and length."""
    (ref,) = low.group.roots
    scan = low.graph.nodes[ref.node].primitive
    assert isinstance(scan, Scan)
    size, unit = low.group.domain[scan.axis], _unit(low.group, scan)
    most = MOST_PARTS[unit]
    length = floordiv(size + (most * unit - 1), most * unit) * unit
    return ref, scan, floordiv(size + length - 1, length), length


def _axes(low: Lowering, axis: int, count: Expr) -> Parallel:
    """Stretches within the axes before the one that is split, so that lanes lie side by side."""
    rank = len(low.group.domain)
    parallel = [*low.axes(range(axis)), ("ks", count), *low.axes(range(axis + 1, rank))]
    low.bind(parallel)
    return parallel, const(1)


def _parts(low: Lowering, ref: Ref, axis: int, count: Expr, mode: str) -> Buffer:
    shape = list(low.group.domain)
    shape[axis] = count
    dtype = low.graph.type(ref).dtype.compute
    name = f"b{len(low.buffers)}"
    return low.buffers.setdefault(parts_of(ref), Buffer(name, dtype, tuple(shape), mode))


def _place(low: Lowering, axis: int, at: str) -> tuple[KernelValue, ...]:
    names = [f"d{a}" if a != axis else at for a in range(len(low.group.domain))]
    return tuple(Index(sym(n)) for n in names)


def lower_stretches(low: Lowering) -> Parallel:
    """The reduction of each stretch."""
    ref, scan, count, length = _stretches(low)
    axis, size = scan.axis, low.group.domain[scan.axis]
    dtype = low.graph.type(ref).dtype.compute
    parallel, _ = _axes(low, axis, count)
    begin = sym("ks") * length
    extent = minimum(size - begin, length)
    low.facts = low.facts.with_ranges({"f": (0, extent - 1)})
    here = list(_place(low, axis, "f"))
    here[axis] = Index(begin + sym("f"))
    value = as_dtype(low.value(low.graph.nodes[ref.node].operands[0], tuple(here), ()), dtype)
    found = _total(low, scan, "f", extent, value)
    low.emit(Store(_parts(low, ref, axis, count, "out").name, _place(low, axis, "ks"), found))
    return parallel, length


def lower_stretch_scans(low: Lowering) -> Parallel:
    """Each stretch scanned, from what those before it add up to."""
    ref, scan, count, length = _stretches(low)
    axis, size = scan.axis, low.group.domain[scan.axis]
    parallel, _ = _axes(low, axis, count)
    begin = sym("ks") * length
    parts = _parts(low, ref, axis, count, "in")
    before = Load(parts.name, _place(low, axis, "k"), parts.dtype)
    start = _total(low, scan, "k", sym("ks"), before)
    scan_along(low, begin, minimum(begin + length, size), start)
    return parallel, length


def _total(low: Lowering, scan: Scan, index: str, extent: Expr, value: KernelValue) -> KernelValue:
    """A reduction: by a team along rows, step by step where each lane has a column."""
    dtype = value.dtype
    if _unit(low.group, scan) == ALONG_ROWS:
        name = low.name("part")
        low.emit(Fold(name, scan.kind, ((index, extent),), value, dtype))
        return Local(name, dtype)
    total = low.name("part")
    low.emit(Alloc(total, dtype, ()))
    low.emit(Store(total, (), start_of(scan.kind, dtype)))

    def step() -> None:
        name = low.name("v")
        low.emit(Let(name, Op(COMBINE[scan.kind], (Load(total, (), dtype), value), dtype)))
        low.emit(Store(total, (), Local(name, dtype)))

    low.loop(index, const(0), extent, step)
    return Load(total, (), dtype)
