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
from .bodies import walk

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
    products = [s for s in walk(kernel.body) if isinstance(s, TileProduct)]
    deep = {source_of(s) for s in products if s.accumulate}
    found: dict[Source, Cache] = {}
    for s in products:
        if source_of(s) in found or not _is_of_pieces(s, inputs, scratch):
            continue
        across = _across(s, inputs, scratch, kernel)
        if across is None or not _is_narrow(across):
            rows, down = _rows_of(s, inputs)
            entries = _entries(s, source_of(s) in deep)
            found[source_of(s)] = Cache(s.nr, s.depth, entries, rows, down, across)
    return found


def _is_of_pieces(
    s: TileProduct, inputs: Mapping[str, Buffer], scratch: Mapping[str, Alloc]
) -> bool:
    """Whether a product is of rows of an f32 input by whole tiles."""
    matrix, to = inputs.get(s.a), scratch.get(s.dst)
    if matrix is None or matrix.dtype != F32 or s.a_col != const(1) or s.panel_row is not None:
        return False
    if (s.mr, s.nr % 16) != (pieces.ROWS, 0):
        return False
    if to is None and s.rows != const(pieces.ROWS) or to is not None and len(to.shape) != 3:
        return False
    return s.panel_place is None or _pays(matrix, s.depth)


def _entries(s: TileProduct, is_deep: bool) -> int:
    """How many tiles of rows a cache holds; `is_deep`: of parts of the depth."""
    known = s.depth.as_int()
    if known is None or is_deep:
        return pieces.ENTRIES
    fits = CUT_BYTES // max(1, known * cutting.row_bytes(3) // cutting.STEP)
    return min(max(1, fits), pieces.ENTRIES)


def _rows_of(
    s: TileProduct, inputs: Mapping[str, Buffer]
) -> tuple[Expr | None, Expr | None]:
    """What `rows` and `down` of a product's cache are: one of them, where its panels are an input
    that is packed for it; they are cut beforehand if their depth is known."""
    panels = inputs[s.panel].shape if s.panel in inputs and s.panel_place is None else ()
    if len(panels) < 3 or panels[-1] != const(s.nr):
        return None, None
    *batch, _, whole, _ = panels
    count = _count(inputs[s.a].shape)
    if whole.as_int():
        return floordiv(count, whole), None
    return None, floordiv(count, maximum(_count([*batch, whole]), const(1)))


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
