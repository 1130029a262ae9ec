"""Row kernels for a GPU: as the CPU's, but where memory runs along the result and not along what
is reduced, a block takes some columns of the result.

Lanes take adjacent columns, and the rest of the block shares the rows. A block has 128 bytes of a
row, or 64 where there would be fewer blocks than multiprocessors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.graph import Gather, Graph, Reduce, Ref, flatten_index
from stagefuse.compiler.kernel_ir import Value
from stagefuse.compiler.lower.blocks import Parallel, Sites
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.lower.rows import lower_row, places_read
from stagefuse.compiler.lower.values import Lowering
from stagefuse.compiler.schedule import Schedule
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, sym

from .small_windows import are_small, is_written_out, lower_windows, move_along, written_out


class Written(Lowering):
    """A lowering that may write reductions out, or combine what parts of some left, by `parts`."""

    writes_out = False

    def __init__(self, graph: Graph, group: Group, sites: Sites, schedule: Schedule) -> None:
        self.parts: dict[Ref, Callable[[tuple[Value, ...]], Value]] = {}
        super().__init__(graph, group, sites, schedule)

    def reduce(self, ref: Ref, at: tuple[Value, ...]) -> Value:
        if self.writes_out and is_written_out(self, ref):
            return written_out(self, ref, at)
        return super().reduce(ref, at)

    def folded(self, ref: Ref, at: tuple[Value, ...]) -> Value:
        if self.writes_out:
            return written_out(self, ref, at)
        return self.parts[ref](at) if ref in self.parts else super().folded(ref, at)


ROW_BYTES = (128, 64)
LEAST_BLOCKS = 128
LEAST_COLUMNS = 8


def lower_rows(low: Lowering) -> Parallel:
    """Rows, or blocks of columns whose reductions are folds of their own."""
    domain = low.group.domain
    long = [a for a, size in enumerate(domain) if size.as_int() != 1]
    if any(a in (low.group.row_axes or ()) for a in long):
        return lower_row(low)
    position = [sym(f"d{a}") if a in long else const(0) for a in range(len(domain))]
    read = _read_across(low, long)
    if read is None or move_along(low):
        parallel = low.axes(long)
        low.bind(parallel)
        _store(low, position)
        return parallel, const(1)
    if are_small(low) and isinstance(low, Written):
        low.writes_out = True
        return lower_windows(low, lambda at: _store(low, at))
    *outer, last = long
    width = column_width(low)
    blocks = floordiv(domain[last] + (width - 1), width, low.facts)
    parallel = [*low.axes(outer), ("block", blocks)]
    low.bind(parallel)
    lo = sym("block") * width
    hi = minimum(lo + width, domain[last])
    low.loop(f"d{last}", lo, hi, lambda: _store(low, position), vector=True)
    return parallel, const(width * 16)


def reads_across(low: Lowering) -> bool:
    """Whether memory runs along the result of reductions."""
    long = [a for a, e in enumerate(low.group.domain) if e.as_int() != 1]
    return _read_across(low, long) is not None


def column_blocks(low: Lowering) -> Expr:
    """The blocks of such reductions."""
    *outer, last = [e for e in low.group.domain if e.as_int() != 1]
    width = column_width(low)
    return size_of(outer) * floordiv(last + (width - 1), width)


def column_width(low: Lowering) -> int:
    """The columns of a block of such reductions."""
    long = [a for a, e in enumerate(low.group.domain) if e.as_int() != 1]
    read = _read_across(low, long)
    assert read is not None
    return _width(low, read, low.group.domain[long[-1]])


def _read_across(low: Lowering, long: Sequence[int]) -> Ref | None:
    """The tensor that is read along the last of the axes `long` of the result, if it is."""
    read = _greatest(low)
    if not long or read is None or not _runs_along(low, read, f"d{long[-1]}"):
        return None
    return read


def _width(low: Lowering, read: Ref, columns: Expr) -> int:
    """The columns of a block, of a tensor of which it reads most."""
    wide, narrow = (size // low.graph.type(read).dtype.itemsize for size in ROW_BYTES)
    known = columns.as_int()
    return narrow if known is not None and known < wide * LEAST_BLOCKS else wide


def _store(low: Lowering, position: Sequence[Expr]) -> None:
    """Stores every root at a position of the domain, or where its own axes say."""
    for ref in low.group.roots:
        source = low.group.source(ref)
        whole = low.graph.type(source).shape == low.group.domain
        low.store_root(ref, position if whole else low.group.accesses[source.node][0] or ())


def _greatest(low: Lowering) -> Ref | None:
    """The greatest tensor that is read; a size without a bound counts as the greatest, and of such
    tensors a table at positions from data."""
    facts, graph = low.graph.facts, low.graph
    nodes = [graph.nodes[member] for member in low.group.members]
    tables = {node.operands[0] for node in nodes if isinstance(node.primitive, Gather)}

    def size(ref: Ref) -> tuple[bool, int, bool, int]:
        most = facts.bounds(size_of(graph.type(ref).shape))[1]
        return most is None, most or 0, ref in tables, -ref.node

    return max(low.group.loads(graph), key=size, default=None)


def _runs_along(low: Lowering, read: Ref, name: str) -> bool:
    """Whether adjacent places along an axis of the result, of which there are some, are adjacent
    in a tensor."""
    most = low.graph.facts.bounds(low.group.domain[int(name[1:])])[1]
    if most is not None and most < LEAST_COLUMNS:
        return False
    for member in low.group.members:
        primitive = low.graph.nodes[member].primitive
        if isinstance(primitive, Reduce) and primitive.kind.startswith("arg"):
            return False
    shape = low.graph.type(read).shape
    places = places_read(low, read)
    return any(flatten_index(a, shape).coefficient(name) == const(1) for a in places)
