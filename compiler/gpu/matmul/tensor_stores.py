"""Results of a product's tiles on their way to memory: tensor copies out of shared memory.

What a warp computes of a piece of its tile goes to one of two places that it has in shared memory,
and from there by a copy that one lane starts, while the warp goes on: stores would wait for memory,
as all multiprocessors finish tiles at about the same time. On an H200, products of bf16 took 0.96
to 0.99 of the time so; those that read more than the sums, or compute much of them, took no less,
and lanes store theirs. Copies leave out what is beyond a matrix. PTX ISA 9.7.9.27.1,
"cp.async.bulk.tensor", and 9.7.9.25.3.2, "bulk async groups".
"""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.cpu.values import post_order
from stagefuse.compiler.gpu.ir import Code, Value
from stagefuse.compiler.gpu.tensor_maps import Loops, TensorMap, in_steps, start_of
from stagefuse.compiler.kernel_ir import Buffer, Index, Let, Load, Statement, Store
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.dtypes import DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen

PLACES = 2
"""Of pieces that may be under way for each warp."""
BOX_BYTES = 128
"""Of a swizzled row."""
SIZES = (2, 4)
"""Bytes of elements of results that copies store."""
STEP_BYTES = 16
"""What rows and starts of a matrix are multiples of."""


@frozen
class Outgoing:
    """A result whose rows by columns are a product's: elements of batches begin at `offset`, rows
    are `pitch` apart."""

    buffer: str
    dtype: DType
    offset: Expr
    pitch: Expr

    def map(
        self, batch: Loops, rows: Expr, columns: Expr, box: tuple[int, int], swizzle: int
    ) -> TensorMap:
        """The map by which boxes of so many rows and columns are stored."""
        steps = in_steps(self.offset, batch) or []
        sizes = (*(extent for _, extent, _ in steps), rows, columns)
        strides = (*(step for _, _, step in steps), self.pitch)
        start = start_of(self.offset, batch)
        return TensorMap(self.buffer, start, sizes, strides, (*(1 for _ in steps), *box), swizzle)

    def boxes(self, wide: int) -> list[tuple[int, int, int]]:
        """The boxes of a piece that lanes fill as they hold its sums: first column, columns and
        swizzle of each. Rows of 128 bytes are swizzled, so that they lie in different banks."""
        most = BOX_BYTES // self.dtype.itemsize
        return [
            (n, min(most, wide - n), BOX_BYTES if wide - n >= most else 0)
            for n in range(0, wide, most)
        ]

    def box_at(self, column: int, wide: int) -> tuple[int, int, int]:
        """The box of a piece that has a column."""
        return next(b for b in reversed(self.boxes(wide)) if b[0] <= column)

    def outer(self, batch: Loops) -> list[str]:
        """The loops that are a map's outer dimensions, the innermost of them first."""
        return [name for name, _, _ in reversed(in_steps(self.offset, batch) or [])]


def outgoing_of(
    stores: Sequence[Statement], buffers: Sequence[Buffer], batch: Loops,
    tile: tuple[Expr, Expr], facts: Facts,
) -> tuple[Outgoing, ...]:  # fmt: skip
    """The results of a tile, whose element (`r`, `c`) is that of its first row and column, `tile`,
    so much on; none if copies cannot store them all, or if more than the sums is read."""
    known = {b.name: b for b in buffers}
    found = []
    values = (part for s in stores if isinstance(s, Let | Store) for part in post_order(s.value))
    if any(isinstance(part, Load) and part.buffer in known for part in values):
        return ()
    for s in stores:
        if isinstance(s, Let):
            continue
        assert isinstance(s, Store)
        one = _outgoing(s, known[s.buffer], batch, tile, facts)
        if one is None:
            return ()
        found.append(one)
    return tuple(found)


def _outgoing(
    s: Store, buffer: Buffer, batch: Loops, tile: tuple[Expr, Expr], facts: Facts
) -> Outgoing | None:
    flat, step = const(0), const(1)
    for index, extent in reversed(list(zip(s.indices, buffer.shape, strict=True))):
        if not isinstance(index, Index) or buffer.dtype.itemsize not in SIZES:
            return None
        flat, step = flat + index.expr * step, step * extent
    flat = facts.simplify(flat)
    pitch = flat.coefficient("r")
    if pitch is None or flat.coefficient("c") != const(1):
        return None
    row, column = tile
    offset = facts.simplify(flat - (sym("r") + row) * pitch - sym("c") - column)
    names = {"r", "c", *row.symbols(), *column.symbols()}
    loops = {name for name, _ in batch}
    steps = in_steps(offset, batch)
    if offset.symbols() & (names - loops) or steps is None or len(steps) > 3:
        return None
    if pitch.symbols() & (names | loops):
        return None
    unit = STEP_BYTES // buffer.dtype.itemsize
    ends = (pitch, start_of(offset, batch), *(step for _, _, step in steps))
    if not all(facts.divides(e, unit) for e in ends):
        return None
    return Outgoing(s.buffer, buffer.dtype, offset, pitch)


def store_box(code: Code, map: Value, start: Sequence[Value], source: Value, guard: Value) -> None:
    """Starts to copy a box from shared memory, by a lane for which `guard` holds; `start` is its
    first element, innermost first."""
    at = ", ".join(v.text for v in start)
    code.line(
        f"{code.guarded(guard)}cp.async.bulk.tensor.{len(start)}d.global.shared::cta.tile."
        f"bulk_group [{map.text}, {{{at}}}], [{source.text}];"
    )


def commit(code: Code, guard: Value) -> None:
    """Closes the lane's group of copies."""
    code.line(f"{code.guarded(guard)}cp.async.bulk.commit_group;")


def await_copies(code: Code, pending: int, guard: Value, read: bool) -> None:
    """Waits for all groups but the last few: until they are whole, or only their sources `read`."""
    kind = ".read" if read else ""
    code.line(f"{code.guarded(guard)}cp.async.bulk.wait_group{kind} {pending};")
