"""The element types of the language, as one table."""

from __future__ import annotations

from functools import cached_property
from math import ldexp
from typing import TYPE_CHECKING, Any

from .frozen import frozen

if TYPE_CHECKING:
    import numpy as np


@frozen
class DType:
    """An element type: `kind` is float, int, uint or bool; `bits` the size in memory.

    `array` is the name of NumPy's dtype, or of that of `ml_dtypes` if NumPy has none; `stored`
    the name in safetensors files. `digits` are those of a float's significand, with the one that
    is not stored, and `exponent` the bits of its exponent.
    """

    name: str
    kind: str
    bits: int
    array: str
    stored: str
    digits: int = 0
    exponent: int = 0

    def __str__(self) -> str:
        return self.name

    def __repr__(self) -> str:
        return self.name

    @property
    def itemsize(self) -> int:
        """Size of one element in bytes."""
        return self.bits // 8

    @property
    def is_float(self) -> bool:
        return self.kind == "float"

    @property
    def is_int(self) -> bool:
        """Whether this is an integer, signed or not."""
        return self.kind in ("int", "uint")

    @property
    def is_bool(self) -> bool:
        return self.kind == "bool"

    @property
    def is_small_float(self) -> bool:
        """Whether this is stored in 16 or 8 bits and computed in f32."""
        return self.kind == "float" and self.bits < 32

    @property
    def largest(self) -> float:
        """The greatest finite value of a float."""
        steps = 2 if self.name == "f8e4m3" else 1  # below twice the top: it has a NaN there
        return self._top * (2.0 - steps * 2.0 ** (1 - self.digits))

    @property
    def _top(self) -> float:
        """The greatest power of two of a float; f8e4m3 spends one exponent less on infinities."""
        return ldexp(1.0, (1 << self.exponent - 1) - (0 if self.name == "f8e4m3" else 1))

    def overflows(self, value: float) -> bool:
        """Whether a finite number is nearer to infinity than to what a float dtype holds."""
        half = self._top * 2.0**-self.digits
        return abs(value) != float("inf") and abs(value) - self.largest >= half

    @property
    def compute(self) -> DType:
        """The dtype in which arithmetic on this one is done."""
        return F32 if self.is_small_float else self

    @cached_property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy dtype; bf16 and f8 are those of `ml_dtypes`."""
        import numpy as np

        if not self.is_extended:
            return np.dtype(self.array)
        import ml_dtypes

        small: np.dtype[Any] = np.dtype(getattr(ml_dtypes, self.array))
        return small

    @property
    def is_extended(self) -> bool:
        """Whether NumPy lacks this one and `ml_dtypes` has it."""
        return self.is_small_float and self.name != "f16"


F64 = DType("f64", "float", 64, "float64", "F64", 53, 11)
F32 = DType("f32", "float", 32, "float32", "F32", 24, 8)
F16 = DType("f16", "float", 16, "float16", "F16", 11, 5)
BF16 = DType("bf16", "float", 16, "bfloat16", "BF16", 8, 8)
F8E4M3 = DType("f8e4m3", "float", 8, "float8_e4m3fn", "F8_E4M3", 4, 4)
F8E5M2 = DType("f8e5m2", "float", 8, "float8_e5m2", "F8_E5M2", 3, 5)
I64 = DType("i64", "int", 64, "int64", "I64")
I32 = DType("i32", "int", 32, "int32", "I32")
I16 = DType("i16", "int", 16, "int16", "I16")
I8 = DType("i8", "int", 8, "int8", "I8")
U64 = DType("u64", "uint", 64, "uint64", "U64")
U32 = DType("u32", "uint", 32, "uint32", "U32")
U16 = DType("u16", "uint", 16, "uint16", "U16")
U8 = DType("u8", "uint", 8, "uint8", "U8")
BOOL = DType("bool", "bool", 8, "bool", "BOOL")

DTYPES: dict[str, DType] = {
    d.name: d
    for d in (F64, F32, F16, BF16, F8E4M3, F8E5M2, I64, I32, I16, I8, U64, U32, U16, U8, BOOL)
}
CLASSES = ("float", "int", "number", "any")


def in_class(dtype: DType, name: str) -> bool:
    """Whether `dtype` belongs to a generic class: float, int, number (not bool) or any."""
    if name == "float":
        return dtype.is_float
    if name == "int":
        return dtype.is_int
    if name == "number":
        return not dtype.is_bool
    return name == "any"


def dtype_named(name: str) -> str | None:
    """What a dtype is called here that other libraries call `name`, such as `float32`."""
    others = {"half": "f16", "double": "f64", "long": "i64"}
    return {**others, **{d.array: d.name for d in DTYPES.values()}}.get(name)


def from_numpy(dtype: Any) -> DType | None:
    """The element type of a NumPy dtype in native byte order, or None if there is none."""
    import numpy as np

    wanted = np.dtype(dtype)
    if not wanted.isnative:
        return None
    return next((d for d in DTYPES.values() if d.array == wanted.name), None)
