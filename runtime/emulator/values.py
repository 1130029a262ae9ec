"""How registers and operands hold values: NumPy dtypes of PTX's types."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx.types import TYPES

Array = NDArray[Any]

DTYPES: dict[str, np.dtype[Any]] = {
    "pred": np.dtype(np.bool_),
    **{f"u{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)},
    **{f"b{n}": np.dtype(f"u{n // 8}") for n in (8, 16, 32, 64)},
    **{f"s{n}": np.dtype(f"i{n // 8}") for n in (8, 16, 32, 64)},
    "f16": np.dtype(np.float16),
    "f32": np.dtype(np.float32),
    "f64": np.dtype(np.float64),
    "tf32": np.dtype(np.float32),
    "bf16": np.dtype(np.uint16),
    **{name: np.dtype(np.uint32) for name in ("f16x2", "bf16x2", "u16x2", "s16x2")},
    **{name: np.dtype(np.uint16) for name in ("e4m3x2", "e5m2x2")},
    "b128": np.dtype([("low", np.uint64), ("high", np.uint64)]),
}
"""The dtype in which functions see a type; small floats without one as bits."""


@cache
def stored_dtype(register_type: str) -> np.dtype[Any]:
    """The dtype of a register's array when nothing was written to it yet."""
    bits = TYPES[register_type].bits
    if register_type == "pred":
        return DTYPES["pred"]
    return DTYPES["b128"] if bits == 128 else DTYPES[f"b{max(bits, 8)}"]


def immediate(value: int | float, type: str) -> Any:
    """A constant as a NumPy scalar of a type; integers wrap."""
    dtype = DTYPES[type]
    if dtype.kind == "b":
        return np.bool_(value)
    if dtype.kind in "ui":
        mask = (1 << dtype.itemsize * 8) - 1
        return np.array(int(value) & mask, dtype=f"u{dtype.itemsize}").view(dtype)[()]
    if isinstance(value, int) and type == "f16":
        return np.array(value & 0xFFFF, np.uint16).view(dtype)[()]
    return dtype.type(value)
