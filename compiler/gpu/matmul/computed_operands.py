"""Right operands of products that are computed on their way into shared memory: of codes, say.

A lane computes some rows by a vector of adjacent columns of each stage. What it reads for the
next stage is under way while the tensor cores multiply, and what it computed is stored after, so
that a panel is never in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import ClassVar

from stagefuse.compiler.gpu.folds import FoldWriter
from stagefuse.compiler.gpu.ir import Code, Value
from stagefuse.compiler.gpu.memory import Memory, Slot
from stagefuse.compiler.kernel_ir import TileProduct
from stagefuse.compiler.kernel_ir import Value as KernelValue
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, mod, sym
from stagefuse.dsl.dtypes import F32, I32

from .async_copies import Copies, Copy, Tile

ROWS = 2
"""Rows that a lane computes together, which share bytes of codes and scales."""
WIDTHS = (8, 4)
"""Adjacent columns that it may take."""
STAGE = "stage'"


def vector(
    w: FoldWriter, value: KernelValue, slot: Slot, at: Mapping[str, Expr], mask: Value | None,
    any_outside: bool = False, together: int = 1,
) -> list[Value]:  # fmt: skip
    """A value at adjacent elements, other indices being at places; where a mask does not hold 0,
    or what it makes of zeros if `any_outside` will do. So many places from a multiple of their
    number on share what is the same for them."""
    before, w.together = w.together, together
    with w.slot_of(slot, mask), w.binding(**at):
        found = [w.value(value) for _ in w.elements()]
    w.together = before
    if mask is None or mask.known == 1 or any_outside:
        return found
    zero = w.code.const(0.0, "float")
    return [mask.select(value, zero) for value in found]


def row_of_panel(
    w: FoldWriter, s: TileProduct, k: Expr, column: Expr, width: int, mask: Value | None,
    together: int = 1,
) -> list[Value]:  # fmt: skip
    """Adjacent elements of a row of a panel that is computed, as `vector` has them."""
    assert s.element is not None
    slot = Slot(s.c, w.resolve(column), width)
    return vector(w, s.element, slot, {s.k: w.resolve(k)}, mask, together=together)


def rounded_pairs(code: Code, values: Sequence[Value], dtype: str) -> list[Value]:
    """Elements in f16 or bf16, two in a word."""
    form = f"cvt.rn.{dtype}x2.f32"  # the upper half comes first
    pairs = zip(values[1::2], values[::2], strict=True)
    return [code.pure(form, "i32", high, low) for high, low in pairs]


class Computed(Copies):
    """A lane's part of both operands: the left one copied, the right one computed. `begin`: the
    place in the depth where the tile's begins."""

    widths: ClassVar[tuple[int, ...]] = WIDTHS

    def __init__(
        self, writer: FoldWriter, tile: Tile, ring: Value, begin: Expr | None = None
    ) -> None:
        super().__init__(writer, tile, ring)
        self.ring, self.begin = ring, begin or const(0)
        self.width = min(self.widths, key=lambda width: self._turns(width) * width)
        self.pending = list[list[list[Value]]]()
        self.into = ring
        depth = writer.resolve(tile.s.depth)
        self.whole = writer.divides(tile.depth, depth)
        stages = floordiv(depth + (tile.depth - 1), tile.depth)
        self.last = writer.resolve(maximum(stages - 1, 0, writer.facts))
        self.some = None if writer.facts.is_positive(depth) else writer.holds("gt", depth, const(0))

    def _right(self, ring: Value) -> list[Copy]:
        return []

    def _turns(self, width: int) -> int:
        """How often all lanes compute some rows by so many columns for a stage."""
        units = self.tile.depth // ROWS * (self.tile.columns // width)
        return -(-units // self.writer.team.lanes)

    # Stages

    def issue(self, number: int, some: Value) -> None:
        super().issue(number, some)
        code = self.writer.code
        self.fill(code.const(number, "i32"), code.const(number * self.tile.stage_bytes, "i32"))

    def issue_next(self, some: Value, reading: Value, number: Value) -> None:
        super().issue_next(some, reading, number)
        with self.at_stage(number):
            turns = range(self._turns(self.width))
            self.pending = [self._values(turn) for turn in turns]
        self.into = self.before(reading)

    def finish(self) -> None:
        for turn, values in enumerate(self.pending):
            self._store(turn, values, self.into)

    def fill(self, number: Value, into: Value) -> None:
        """Computes this lane's elements of a stage and stores them at an offset."""
        for turn in range(self._turns(self.width)):
            with self.at_stage(number):
                found = self._values(turn)
            self._store(turn, found, into)

    @contextmanager
    def at_stage(self, number: Value) -> Iterator[None]:
        """Inside, the stage at hand is that of a number, or the last one before it."""
        w, known = self.writer, number.known
        if known is not None:
            with w.binding(**{STAGE: minimum(const(known), self.last, w.facts)}):
                yield
            return
        here = w.code.intrinsic("smin", number, w.index(self.last, "i32"))
        with w.named(**{STAGE: (here, const(0), self.last)}):
            yield

    # Elements

    def _place(self, turn: int) -> tuple[Expr, Expr, Value]:
        """The first row and column of a lane's elements in a stage, and whether it has them."""
        w, tile = self.writer, self.tile
        across = tile.columns // self.width
        flat = sym("lane") + turn * w.team.lanes
        row, column = floordiv(flat, across) * ROWS, mod(flat, across) * self.width
        return row, column, w.holds("lt", row, const(tile.depth))

    def _values(self, turn: int) -> list[list[Value]]:
        """Some of this lane's elements of the stage at hand, those of a row together."""
        w, tile, s = self.writer, self.tile, self.tile.s
        row, column, own = self._place(turn)
        panel, inside = floordiv(column, s.nr), mod(column, s.nr)
        # columns behind the last panel are never stored, whatever they are
        here = w.resolve(tile.lo + minimum(panel, tile.panels - 1))
        found = []
        with w.when(own), w.when(self.some), w.binding(**{tile.name: here}):
            for n in range(ROWS):
                k = sym(STAGE) * tile.depth + row + n
                mask = None if self.whole else w.holds("lt", k, s.depth)
                place = self.begin + k
                found.append(row_of_panel(w, s, place, inside, self.width, mask, ROWS))
        return found

    def _store(self, turn: int, rows: list[list[Value]], into: Value) -> None:
        """Stores elements at an offset; halves in pairs, which one instruction rounds."""
        w, tile = self.writer, self.tile
        dtype = w.memory[tile.s.a].dtype
        memory = Memory("stage", F32 if tile.size == 4 else I32, (), "shared", self.ring)
        row, column, own = self._place(turn)
        for n, values in enumerate(rows):
            if tile.size == 2:
                values = rounded_pairs(w.code, values, dtype.name)
            start, offset = self.target(row, column, n)
            start = start + into
            with w.when(own):
                for first in range(0, len(values), 4):
                    at = f"[{start.text}+{offset + first * 4}]"
                    w.write(memory, at, values[first : first + 4])

    def target(self, row: Expr, column: Expr, n: int) -> tuple[Value, int]:
        """Where in the first stage an element n rows below another lies: address and offset."""
        tile = self.tile
        start = self.ring + self.writer.index((row * tile.pitch + column) * tile.size, "i32")
        return start, tile.left_bytes + n * tile.pitch * tile.size
