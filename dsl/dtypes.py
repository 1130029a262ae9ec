"""The element types of the language, as one table."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class DType:
    """An element type: `kind` is float, int, uint or bool; `bits` the size in memory."""

    name: str
    kind: str
    bits: int

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
    def compute(self) -> DType:
        """The dtype in which arithmetic on this one is done."""
        return F32 if self.is_small_float else self

    @cached_property
    def numpy(self) -> np.dtype[Any]:
        """The NumPy dtype; bf16 and f8 are those of `ml_dtypes`."""
        import numpy as np

        if self.name in _NUMPY:
            return np.dtype(_NUMPY[self.name])
        import ml_dtypes

        small: np.dtype[Any] = np.dtype(getattr(ml_dtypes, _ML_DTYPES[self.name]))
        return small


_NUMPY = {
    "f64": "float64", "f32": "float32", "f16": "float16", "i64": "int64", "i32": "int32",
    "i16": "int16", "i8": "int8", "u8": "uint8", "bool": "bool",
}  # fmt: skip
_ML_DTYPES = {"bf16": "bfloat16", "f8e4m3": "float8_e4m3fn", "f8e5m2": "float8_e5m2"}

F64 = DType("f64", "float", 64)
F32 = DType("f32", "float", 32)
F16 = DType("f16", "float", 16)
BF16 = DType("bf16", "float", 16)
F8E4M3 = DType("f8e4m3", "float", 8)
F8E5M2 = DType("f8e5m2", "float", 8)
I64 = DType("i64", "int", 64)
I32 = DType("i32", "int", 32)
I16 = DType("i16", "int", 16)
I8 = DType("i8", "int", 8)
U8 = DType("u8", "uint", 8)
BOOL = DType("bool", "bool", 8)

DTYPES: dict[str, DType] = {
    d.name: d for d in (F64, F32, F16, BF16, F8E4M3, F8E5M2, I64, I32, I16, I8, U8, BOOL)
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


def from_numpy(dtype: Any) -> DType | None:
    """The element type of a NumPy dtype in native byte order, or None if there is none."""
    import numpy as np

    wanted = np.dtype(dtype)
    if not wanted.isnative:
        return None
    name = wanted.name
    for ours, theirs in (*_NUMPY.items(), *_ML_DTYPES.items()):
        if theirs == name:
            return DTYPES[ours]
    return None
