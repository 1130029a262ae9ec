"""Tiles of products of 16- and 8-bit operands by warps, in fragments that come by ldmatrix.

An 8 x 8 matrix of 16-bit elements has, for ldmatrix, rows of 16 bytes: 16 elements of 8 bits. So
the fragments of `mma` lie the same way for both, 32 bytes of the depth at a time; only matrices of
16-bit elements can be transposed on the way. PTX ISA 9.7.14.5.15, "ldmatrix".
"""

from __future__ import annotations

from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.sequences.sort import SortWriter
from stagefuse.dsl.dims import Expr, floordiv, mod, sym
from stagefuse.dsl.dtypes import DType

from .async_copies import WARP_ROWS, Tile
from .mma import BYTES, HALVES, Kind, halves_of, kind_of, mma

Fragments = list[list[Value]]


class NarrowWriter(SortWriter):
    """The body of a kernel, as far as its products of narrow operands by tensor cores go."""

    eights = "bits"
    """How fragments of f8 are multiplied, as `mma.EIGHTS` has it."""

    def kind_in(self, tile: Tile) -> Kind:
        return kind_of(self.memory[tile.s.a].dtype, self.right_dtype(tile))

    def right_dtype(self, tile: Tile) -> DType:
        """What a panel is in: one that is computed is rounded to what the left operand is in."""
        return self.memory[tile.s.panel if tile.s.element is None else tile.s.a].dtype

    def lane_place(self, tile: Tile) -> tuple[Expr, Expr, Expr, Expr]:
        """The lane's row and column in a fragment (g, q), and its warp's place (down, across)."""
        lane = sym("lane")
        within, warp = mod(lane, 32), floordiv(lane, 32)
        return (
            floordiv(within, 4), mod(within, 4), floordiv(warp, tile.warps_across),
            mod(warp, tile.warps_across),
        )  # fmt: skip

    def narrow_stage(
        self, tile: Tile, ring: Value, at: Value, sums: list[Value], across: int
    ) -> None:
        """The products of a stage."""
        kind, steps = self.kind_in(tile), range(0, tile.depth * tile.size, BYTES)
        left, right = self._fragment_starts(tile, ring, at)
        if kind.is_rough and self.eights == "mma":
            return self._rough_stage(tile, left, right, sums, across)
        for begin in steps:
            a = [self._left_fragment(tile, left, m, begin) for m in range(2)]
            for n in range(0, across, 2):
                for j, b in enumerate(self._right_fragments(tile, right, n, begin, across)):
                    for m in range(2):
                        self._add(kind, sums[(m * across + n + j) * 4 :][:4], a[m], b)

    def _rough_stage(
        self, tile: Tile, left: Value, right: Value, sums: list[Value], across: int
    ) -> None:
        """The same where the sums of a stage are found by themselves and then added."""
        code, kind = self.code, self.kind_in(tile)
        steps = range(0, tile.depth * tile.size, BYTES)
        a = [[self._left_fragment(tile, left, m, begin) for begin in steps] for m in range(2)]
        for n in range(0, across, 2):
            b = [self._right_fragments(tile, right, n, begin, across) for begin in steps]
            for j in range(min(across - n, 2)):
                for m in range(2):
                    found = [code.variable("float", code.const(0.0, "float")) for _ in range(4)]
                    for k in range(len(steps)):
                        mma(code, kind, found, a[m][k], b[k][j])
                    for total, part in zip(sums[(m * across + n + j) * 4 :], found, strict=False):
                        code.write("add.rn.f32", total, total, part)

    def _add(self, kind: Kind, sums: list[Value], a: list[Value], b: list[Value]) -> None:
        """Adds a product of fragments; of f8 as f16 in two steps, which take the depth in another
        order, the same for both operands."""
        if not kind.is_rough:
            return mma(self.code, kind, sums, a, b)
        for n in range(2):
            mma(self.code, HALVES, sums, a[4 * n : 4 * n + 4], b[2 * n : 2 * n + 2])

    def _fragment_starts(self, tile: Tile, ring: Value, at: Value) -> tuple[Value, Value]:
        """Where this lane's rows of matrices begin in the left and right operand of a stage."""
        _, _, down, right = self.lane_place(tile)
        lane, size, chunk = mod(sym("lane"), 32), tile.size, 16 // tile.size
        row, high = mod(lane, 8), floordiv(lane, 16)
        middle = mod(floordiv(lane, 8), 2)
        first = (down * WARP_ROWS + mod(lane, 16)) * tile.left_pitch + high * chunk
        if tile.is_turned:
            first = (row + high * 8) * tile.left_pitch + down * WARP_ROWS + middle * 8
        column = right * (tile.columns // tile.warps_across)
        if tile.is_deep:
            start = (column + row + high * 8) * tile.pitch + middle * chunk
        else:
            start = (row + middle * 8) * tile.pitch + column + high * 8
        return (
            ring + self.index(first, "i32") * size + at,
            ring + self.index(start, "i32") * size + tile.left_bytes + at,
        )

    def _left_fragment(self, tile: Tile, start: Value, m: int, begin: int) -> list[Value]:
        """16 rows of the left operand, from a byte of the depth on."""
        along, apart = tile.left_steps
        offset = m * 16 * apart * tile.size + begin * along
        found = self.matrices(start, offset, 4, tile.is_turned)
        dtype = self.memory[tile.s.a].dtype
        if not self._converts(dtype.name):
            return found
        pairs = [
            halves_of(self.code, word, kind_of(dtype, dtype).left, self.eights) for word in found
        ]
        return [pairs[2 * n + row][k] for n in range(2) for k in range(2) for row in range(2)]

    def _right_fragments(
        self, tile: Tile, start: Value, n: int, begin: int, across: int
    ) -> Fragments:
        """One or two times 8 columns of the right operand, from a byte of the depth on."""
        along, apart = tile.right_steps
        count = min(across - n, 2)
        offset = n * 8 * apart * tile.size + begin * along
        found = self.matrices(start, offset, 2 * count, not tile.is_deep)
        dtype = self.right_dtype(tile)
        if self._converts(dtype.name):
            name = kind_of(dtype, dtype).left
            found = [h for word in found for h in halves_of(self.code, word, name, self.eights)]
        each = len(found) // count
        return [found[each * j : each * (j + 1)] for j in range(count)]

    def _converts(self, dtype: str) -> bool:
        return dtype.startswith("f8") and self.eights != "mma"

    def matrices(self, at: Value, offset: int, count: int, transposed: bool) -> list[Value]:
        """So many 8 x 8 matrices of 16-bit elements from shared memory, a register each."""
        found = [self.code.fresh("i32") for _ in range(count)]
        listed = ", ".join(v.text for v in found)
        way = ".trans" if transposed else ""
        self.code.line(
            f"ldmatrix.sync.aligned.m8n8.x{count}{way}.shared.b16 {{{listed}}}, "
            f"[{at.text}+{offset}];"
        )
        return found
