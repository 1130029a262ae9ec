"""How much private memory a kernel needs, and in what pieces."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from stagefuse.compiler.kernel_ir import (
    Alloc,
    Buffer,
    Kernel,
    SortRow,
    Statement,
    TileProduct,
)
from stagefuse.compiler.patterns.byte_operands import is_byte
from stagefuse.compiler.plan import CUT_ROWS
from stagefuse.dsl.dims import Expr, as_expr, const, floordiv, maximum
from stagefuse.dsl.dtypes import F32, DType
from stagefuse.dsl.frozen import frozen

from . import byte_tiles, cutting, pieces
from .bodies import walk, written_buffers

SCRATCH_ALIGN = 64
ROW_ELEMENTS = pieces.ROWS * cutting.STEP
CUT_BYTES = 1_200_000
"""Of rows cut into pieces that stay in the second-level cache."""


def scratch_bytes(kernel: Kernel) -> Expr:
    """The private memory a thread needs for a kernel."""
    total = const(SCRATCH_ALIGN if keeps(kernel) else 0)
    for cache in caches_of(kernel).values():
        total = total + cache.size
    if columns := byte_columns(kernel):
        total = total + padded(const(byte_tiles.room(columns)))
    for size in _scratch_sizes(kernel.body):
        total = total + size
    return total


def byte_columns(kernel: Kernel) -> int:
    """The columns of the widest panel of products of bytes, 0 if there are none."""
    dtypes = {b.name: b.dtype for b in kernel.buffers}
    dtypes.update((s.name, s.dtype) for s in walk(kernel.body) if isinstance(s, Alloc))
    products = (s for s in walk(kernel.body) if isinstance(s, TileProduct))
    return max((s.nr for s in products if is_byte(dtypes[s.a])), default=0)


def keeps(kernel: Kernel) -> bool:
    """Whether a thread keeps something from one range of a step to the next. It has a word of its
    own then that says so."""
    return bool(caches_of(kernel)) or any(places_of(kernel.body))


def padded(size: Expr) -> Expr:
    known = size.as_int()
    if known is not None:
        return const(-(-known // SCRATCH_ALIGN) * SCRATCH_ALIGN)
    return floordiv(size + (SCRATCH_ALIGN - 1), SCRATCH_ALIGN) * SCRATCH_ALIGN


def alloc_size(statement: Alloc) -> Expr:
    size = const(statement.dtype.itemsize)
    for extent in statement.shape:
        size = size * extent
    return padded(size)


@frozen
class Cache:
    """Rows and a panel cut into pieces, of at most `most` steps of a sum; see `pieces`.

    `rows`: of the matrix that the panels are multiplied by, if they may be cut beforehand.
    `down`: the same if they are cut when they are needed, but are an input.
    `across`: the columns of all its panels, where that is known.
    """

    columns: int
    depth: Expr
    entries: int
    rows: Expr | None
    down: Expr | None
    across: Expr | None

    @property
    def most(self) -> Expr:
        return floordiv(self.depth + (cutting.STEP - 1), cutting.STEP) * cutting.STEP

    @property
    def size(self) -> Expr:
        steps = floordiv(self.most, cutting.STEP)
        each = self.entries * cutting.row_bytes(3) + cutting.panel_bytes(self.columns)
        return padded(const(pieces.HEADER) + steps * each)


Source = tuple[str, str, int]
"""What a product's pieces are of: a buffer of rows, panels, and how wide they are."""


def source_of(s: TileProduct) -> Source:
    return s.a, s.panel, s.nr


def caches_of(kernel: Kernel) -> dict[Source, Cache]:
    """The caches of products that may be of pieces: rows of an f32 input, and panels that are
    packed or, for a matrix that stays in the cache, placed."""
    scratch = {s.name: s for s in walk(kernel.body) if isinstance(s, Alloc)}
    inputs = {b.name: b for b in kernel.buffers if b.mode == "in"}
    written = written_buffers(kernel.body)
    found: dict[Source, Cache] = {}
    products = [s for s in walk(kernel.body) if isinstance(s, TileProduct)]
    deep = {source_of(s) for s in products if s.accumulate}
    for s in products:
        if (
            s.panel_row is not None
            or s.a not in inputs
            or inputs[s.a].dtype != F32
            or s.a in written
            or s.a_col != const(1)
            or (s.mr, s.nr % 16) != (pieces.ROWS, 0)
            or (s.dst not in scratch and s.rows != const(pieces.ROWS))
            or (s.dst in scratch and len(scratch[s.dst].shape) != 3)
            or (s.panel_place is not None and not _pays(inputs[s.a], s.depth))
            or ((across := _across(s, inputs, scratch, kernel)) and _is_narrow(across))
        ):
            continue
        if source_of(s) not in found:
            known, entries, rows, down = s.depth.as_int(), pieces.ENTRIES, None, None
            if known is not None and source_of(s) not in deep:
                fits = CUT_BYTES // max(1, known * cutting.row_bytes(3) // cutting.STEP)
                entries = min(max(1, fits), entries)
            panels = inputs[s.panel].shape if s.panel in inputs and s.panel_place is None else ()
            if len(panels) > 2 and panels[-1] == const(s.nr):
                *batch, _, whole, _ = panels
                if whole.as_int():
                    rows = floordiv(_count(inputs[s.a].shape), whole)
                else:
                    each = maximum(_count([*batch, whole]), const(1))
                    down = floordiv(_count(inputs[s.a].shape), each)
            found[source_of(s)] = Cache(s.nr, s.depth, entries, rows, down, across)
    return found


def _across(
    s: TileProduct, inputs: Mapping[str, Buffer], scratch: Mapping[str, Alloc], kernel: Kernel
) -> Expr | None:
    """The columns of all packed panels that rows are multiplied by; where a kernel packs some at a
    time, those of all its groups of them."""
    memory = inputs.get(s.panel) or scratch.get(s.panel)
    if memory is None or s.panel_place is not None or len(memory.shape) < 3:
        return None
    groups = dict(kernel.parallel).get("nb", const(1)) if s.panel in scratch else const(1)
    return memory.shape[-3] * s.nr * groups


def _is_narrow(across: Expr) -> bool:
    known = across.as_int()
    return known is not None and known < pieces.LEAST_COLUMNS


def _pays(matrix: Buffer, depth: Expr) -> bool:
    """Whether all of a matrix stays in the cache in pieces, and has rows enough for the panels
    that are cut for them."""
    size, known = _count(matrix.shape).as_int(), depth.as_int()
    if size is None or size * cutting.row_bytes(3) > CUT_BYTES * ROW_ELEMENTS:
        return False
    return known is None or size >= CUT_ROWS * known


def _count(shape: Sequence[Expr]) -> Expr:
    total = const(1)
    for extent in shape:
        total = total * extent
    return total


def places_of(body: Sequence[Statement]) -> Iterator[tuple[Expr, Expr]]:
    """The rows of panels that a table places, each once: where they begin, and their number."""
    products = (s for s in walk(body) if isinstance(s, TileProduct))
    found = ((s.panel_place, s.depth) for s in products if s.panel_place is not None)
    yield from dict.fromkeys(found)


def _scratch_sizes(body: Sequence[Statement]) -> Iterator[Expr]:
    dtypes: dict[str, DType] = {}
    for s in walk(body):
        if isinstance(s, Alloc):
            dtypes[s.name] = s.dtype
            yield alloc_size(s)
        elif isinstance(s, SortRow):
            yield padded(as_expr(s.count) * dtypes[s.keys].itemsize)
            yield padded(as_expr(s.count) * 8)
    for _, count in places_of(body):
        yield padded(count * 8)
