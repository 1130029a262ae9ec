"""f32 as two tf32 values each, for products on warpgroups: tiles, and how elements are split."""

from __future__ import annotations

from stagefuse.compiler.gpu.ir import Code, Value

from .async_copies import Tile

DEPTH = 32  # of a stage: rows of 128 bytes
STEP = 8  # of an instruction
CHUNK = 4  # elements in 16 bytes
ROW_BYTES = 128
AT_ONCE = 64  # columns of an instruction whose sums a lane has twice
PRODUCTS = ((1, 0), (0, 1), (0, 0))
"""Parts of the left and of the right operand that are multiplied; the small products first."""


class SplitTile(Tile):
    """A tile whose right operand lies in shared memory as it came, and split."""

    @property
    def part_bytes(self) -> int:
        """The higher or the lower parts of a stage's columns."""
        return self.columns * ROW_BYTES

    @property
    def halves(self) -> int:
        """Instructions that the columns take."""
        return 1 if self.columns <= AT_ONCE else 2

    @property
    def skips(self) -> bool:
        """Whether of eight elements of the depth the even ones are multiplied before the odd."""
        return False

    @property
    def ring_bytes(self) -> int:
        return 4 * self.part_bytes + super().ring_bytes


class BoxTile(SplitTile):
    """One whose operands come by tensor copies: rows along the depth are swizzled, and so are those
    of a turned left operand, 128 bytes of adjacent rows each."""

    @property
    def left_pitch(self) -> int:
        return DEPTH

    @property
    def left_bytes(self) -> int:
        return self.rows * ROW_BYTES

    @property
    def pitch(self) -> int:
        return DEPTH if self.is_deep else self.columns

    @property
    def skips(self) -> bool:
        """So lanes read a turned left operand from different banks; a right one that lies along the
        depth would not be read as fast."""
        return self.is_turned and not self.is_deep


def parts_of(code: Code, value: Value) -> tuple[Value, Value]:
    """An f32 as two tf32 values: rounded to nearest, and the rest, which tensor cores cut."""
    high = code.emit("cvt.rn.tf32.f32", "i32", value)
    rest = code.emit("sub.rn.f32", "float", value, high.as_float("float"))
    return high, rest.bits()


def split_column(
    code: Code, tile: SplitTile, source: Value, target: Value, offset: int = 0
) -> None:
    """Splits four elements of a column along the depth; the lower parts go behind all higher."""
    along = tile.right_steps[0] * (2 if tile.skips else 1)
    values = [code.fresh("float") for _ in range(CHUNK)]
    if along == 1:
        listed = ", ".join(v.text for v in values)
        code.line(f"ld.shared.v4.f32 {{{listed}}}, [{source.text}];")
    else:
        for n, value in enumerate(values):
            code.line(f"ld.shared.f32 {value.text}, [{source.text}+{n * along * 4}];")
    for number, parts in enumerate(zip(*(parts_of(code, v) for v in values), strict=True)):
        listed = ", ".join(v.text for v in parts)
        at = offset + number * tile.part_bytes
        code.line(f"st.shared.v4.b32 [{target.text}+{at}], {{{listed}}};")
