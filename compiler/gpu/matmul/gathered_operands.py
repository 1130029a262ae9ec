"""Left operands that are gathered on their way into shared memory: the windows of a convolution, or
rows that indices choose, whose positions a lane reads when it begins.

Such an operand is no matrix in memory: where an element lies is a part that depends on its row plus
one that depends on its depth, and so is what decides whether it lies anywhere. A lane brings the
same rows and the same chunk of the depth in every stage, so that it knows the part of the rows from
the beginning, and computes that of the depth once a stage. What lies nowhere is filled with zeros
by the copies themselves, which then read nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from stagefuse.compiler.gpu.folds import FoldWriter
from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.graph import flatten_index
from stagefuse.compiler.kernel_ir import TileProduct
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.frozen import frozen

NOWHERE = -(1 << 30)
"""A position before any axis, also if the depth moves it; as an unsigned number beyond any."""
WIDTHS = (16, 8, 4)
"""Bytes that one copy may bring."""


@frozen
class Part:
    """An expression over the row `i` and the depth `k` as the sum of what each gives."""

    row: Expr
    depth: Expr

    @staticmethod
    def of(expr: Expr) -> Part:
        row = expr.substitute({"k": 0})
        return Part(row, expr - row)


@frozen
class End:
    """What must hold of an element that is there: a position that is at least 0, and less than
    `extent` if that is given."""

    position: Part
    extent: Expr | None


def ends_of(guards: Sequence[Expr]) -> list[End]:
    """Conditions that expressions are at least 0; two that are the ends of an axis are one."""
    found: list[End] = []
    left = list(guards)
    while left:
        guard = left.pop(0)
        other = next((g for g in left if not (g + guard).symbols() & {"i", "k"}), None)
        if other is not None:
            left.remove(other)
        found.append(End(Part.of(guard), None if other is None else guard + other + 1))
    return found


@dataclass
class Chunk:
    """Adjacent elements of a row: the address in the first stage, the chunk's place `k` in a
    stage, where its row lies, and what its row gives of each position."""

    target: Value
    k: Expr
    row: Value
    positions: list[Value]
    valid: Value


class Gather:
    """The copies of a lane's chunks of a left operand, stage after stage of `depth` elements."""

    def __init__(self, writer: FoldWriter, s: TileProduct, depth: int, size: int) -> None:
        self.w, self.s, self.depth, self.size = writer, s, depth, size
        self.place = flatten_index(s.a_indices, writer.memory[s.a].shape)
        self.whole = writer.divides(depth, writer.resolve(s.depth))
        tail = () if self.whole else (s.depth - 1 - sym("k"),)
        self.ends = ends_of((*s.a_guard, *tail))
        self.width = self._width()
        self.chunks: list[Chunk] = []
        self.at = writer.code.variable("i32", writer.code.const(0, "i32"))

    def _width(self) -> int:
        """Elements of a chunk, which are adjacent, aligned, and all there or all not."""
        for size in WIDTHS:
            width = size // self.size
            if width and all(self._is_even(e, width) for e in (self.place, *self.s.a_guard)):
                return width
        return 1

    def _is_even(self, expr: Expr, width: int) -> bool:
        """Whether a position is that of a chunk's first element plus what follows in the chunk;
        of a guard, whether it is the same for all of the chunk."""
        w = self.w
        first, last = (w.resolve(expr.substitute({"k": sym("k") * width + n})) for n in
                       (0, width - 1))  # fmt: skip
        follows = w.without_carry(last, width) - w.without_carry(first, width)
        if expr is not self.place:
            return follows == const(0)
        return follows == const(width - 1) and w.divides(width, first)

    def add(self, target: Value, row: Expr, k: Expr, valid: Value) -> None:
        """One more chunk that this lane brings, if its row is `valid`."""
        w, code = self.w, self.w.code
        with w.choosing(self.s, row), w.binding(**{**w.bound, "i": row}):
            start = self._address(Part.of(self.place).row)
            positions = [w.index(e.position.row, "i32") for e in self.ends]
        if positions:
            positions[0] = valid.select(positions[0], code.const(NOWHERE, "i32"))
        self.chunks.append(Chunk(target, k, start, positions, valid))

    def _address(self, place: Expr) -> Value:
        text = self.w.address(self.w.memory[self.s.a], (place, None))[1:-1]
        base, _, offset = text.partition("+")
        return Value(self.w.code, base, "i64", self.w.code.depth) + int(offset or 0)

    def start(self, stage: Value) -> None:
        """Starts the copies of the next stage, which lies at an offset."""
        code = self.w.code
        now = Value(code, self.at.text, "i32", code.depth)
        for k in dict.fromkeys(chunk.k for chunk in self.chunks):
            shift, moves, extents = self._moved(now, k)
            for chunk in self.chunks:
                if chunk.k == k:
                    self._copy(chunk, stage, shift, moves, extents)
        code.write("add.s32", self.at, self.at, code.const(self.depth, "i32"))

    def _moved(self, now: Value, k: Expr) -> tuple[Value, list[Value], list[Value | None]]:
        """What a place in the depth gives of the address and of each position."""
        w = self.w
        place = now + w.index(k, "i32")
        with w.named(k=(place, const(0), self.s.depth + self.depth)):
            shift = w.index(Part.of(self.place).depth * self.size, "i64")
            moves = [w.index(e.position.depth, "i32") for e in self.ends]
        extents = [None if e.extent is None else w.index(e.extent, "i32") for e in self.ends]
        return shift, moves, extents

    def _copy(
        self, chunk: Chunk, stage: Value, shift: Value, moves: Sequence[Value],
        extents: Sequence[Value | None],
    ) -> None:  # fmt: skip
        code = self.w.code
        there = chunk.valid
        for n, (own, move, extent) in enumerate(zip(chunk.positions, moves, extents, strict=True)):
            at = own + move
            inside = at.compare("ge", 0)
            if extent is not None:
                inside = at.compare("lt", extent, unsigned=True)
            there = inside if n == 0 else there & inside
        size = self.width * self.size
        found = there.select(code.const(size, "i32"), code.const(0, "i32"))
        way = "cg" if size == 16 else "ca"
        code.line(
            f"cp.async.{way}.shared.global [{(chunk.target + stage).text}], "
            f"[{(chunk.row + shift).text}], {size}, {found.text};"
        )
