"""What tensor cores multiply: one table of dtypes, and the instructions made of it.

Every instruction takes 32 bytes of the depth. PTX ISA 9.7.14.5, "mma", and 9.7.15.5, "wgmma".
"""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.gpu.ir import Code, Value
from stagefuse.dsl.dtypes import DType
from stagefuse.dsl.frozen import frozen

BYTES = 32
"""Of the depth that an instruction takes."""
NAMES = {"f16": "f16", "bf16": "bf16", "f8e4m3": "e4m3", "f8e5m2": "e5m2", "i8": "s8", "u8": "u8"}
"""Dtypes whose elements are multiplied as they are, by PTX's names."""
EIGHTS = {"sm_80": "bits", "sm_89": "mma", "sm_90a": "cvt"}
"""How fragments of f8 are multiplied by warps: by `mma` of f8, or by that of f16 after they are
converted by `cvt` or by operations on bits, which is exact: every f8 is an f16. On `sm_90a` ptxas
would make the second of the first."""


@frozen
class Kind:
    """What a product multiplies, by PTX's names of its operands and of its sums."""

    left: str
    right: str
    size: int
    sums: str

    @property
    def depth(self) -> int:
        """Elements of the depth that an instruction takes."""
        return BYTES // self.size

    def __str__(self) -> str:
        return self.left if self.left == self.right else f"{self.left} and {self.right}"

    @property
    def register(self) -> str:
        """The type of a sum."""
        return "float" if self.sums == "f32" else "i32"

    @property
    def is_rough(self) -> bool:
        """Whether sums of f8 keep some 13 bits in tensor cores, so that they are soon added up
        outside; those of f16 keep f32's, those of integers are exact."""
        return self.size == 1 and self.sums == "f32"


def kind_of(left: DType, right: DType) -> Kind:
    """What a product of two dtypes of the table multiplies."""
    return Kind(
        NAMES[left.name], NAMES[right.name], left.itemsize, "f32" if left.is_float else "s32"
    )


HALVES = Kind("f16", "f16", 2, "f32")
SPLIT = "f32 as three products of tf32"
"""What is multiplied where elements are split in two (tf32_split)."""


def mma(
    code: Code, kind: Kind, sums: Sequence[Value], a: Sequence[Value], b: Sequence[Value]
) -> None:
    """Adds the product of two fragments of a warp, 16 rows and 8 columns, to its sums."""
    d = _listed(sums)
    code.line(
        f"mma.sync.aligned.m16n8k{kind.depth}.row.col.{kind.sums}.{kind.left}.{kind.right}."
        f"{kind.sums} {d}, {_listed(a)}, {_listed(b)}, {d};"
    )


def wgmma(
    code: Code, kind: Kind, columns: int, sums: Sequence[Value], a: Value, b: Value, adds: str,
    turned: tuple[bool, bool],
) -> None:  # fmt: skip
    """Starts the product of two matrices of a warpgroup, given by descriptors, 64 rows by so many
    columns; it is added to the sums where `adds` holds, a predicate or 1. `turned`: which of them
    do not lie along the depth, as only 16-bit elements may."""
    ways = ", ".join(str(int(t)) for t in turned)
    signs = {2: f", 1, 1, {ways}", 1: ", 1, 1" if kind.sums == "f32" else ""}
    code.line(
        f"wgmma.mma_async.sync.aligned.m64n{columns}k{kind.depth}.{kind.sums}.{kind.left}."
        f"{kind.right} {_listed(sums)}, {a.text}, {b.text}, {adds}{signs[kind.size]};"
    )


def _listed(values: Sequence[Value]) -> str:
    return f"{{{', '.join(v.text for v in values)}}}"


def halves_of(code: Code, word: Value, name: str, way: str) -> tuple[Value, Value]:
    """Four f8 of a register as two pairs of f16: the first two, the last two."""
    if way == "cvt":
        parts, found = [code.fresh("half") for _ in range(2)], [code.fresh("i32") for _ in range(2)]
        code.write("mov.b32", f"{{{parts[0].text}, {parts[1].text}}}", word)
        for part, pair in zip(parts, found, strict=True):
            code.write(f"cvt.rn.f16x2.{name}x2", pair, part)
        return found[0], found[1]
    low, high = (_spread(code, word, selector) for selector in (0x1404, 0x3424))
    if name == "e5m2":  # the upper half of an f16
        return low, high
    return _widened(code, low), _widened(code, high)


def _spread(code: Code, word: Value, selector: int) -> Value:
    """Two bytes of a word, each in the upper half of a half; zeros below."""
    zero = code.const(0, "i32")
    return code.emit("prmt.b32", "i32", word, zero, code.const(selector, "i32"))


def _widened(code: Code, pair: Value) -> Value:
    """Two e4m3 in the upper halves of an i32 as f16: their bits moved to f16's places have an
    exponent smaller by 8. What stands for NaN would be 480; it alone is infinite here when
    multiplied by another 136.5, and NaN times 0 more."""

    def pairs(bits: int) -> Value:
        return code.pure("mov.b32", "i32", code.const(bits, "i32"))

    moved = (pair & pairs(0x80008000)) | (pair.lshr(1) & 0x3F803F80)
    found = code.emit("mul.rn.f16x2", "i32", moved, pairs(0x5C005C00))
    great = code.emit("mul.rn.f16x2", "i32", moved, pairs(0x78447844))
    return code.emit("fma.rn.f16x2", "i32", great, pairs(0), found)
