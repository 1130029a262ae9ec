"""The arithmetic of one wgmma instruction, on the bits of operands and accumulators.

Fragments are as in PTX ISA, "Register Fragments for wgmma.mma_async": thread `t` of the warpgroup
holds rows `16 (t / 32) + (t % 32) / 4` and that plus 8. Products are exact; sums are of doubles,
rounded once to the accumulator's type (the ISA leaves the order and the extra precision open).
"""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

Bits = npt.NDArray[np.uint32]
Floats = npt.NDArray[np.float64]

THREADS, WARPS, ROWS = 128, 4, 64

_TYPES: dict[str, Any] = {
    "f16": np.float16,
    "bf16": ml_dtypes.bfloat16,
    "tf32": np.float32,
    "e4m3": ml_dtypes.float8_e4m3fn,
    "e5m2": ml_dtypes.float8_e5m2,
    "s8": np.int8,
    "u8": np.uint8,
}


def bytes_of(type_: str) -> int:
    """The size of one element of an operand."""
    return int(np.dtype(_TYPES[type_]).itemsize)


def decode(raw: npt.NDArray[np.uint8], type_: str) -> Floats:
    """Elements from their bytes, which are the last axis; tf32 loses its 13 low bits."""
    raw = np.ascontiguousarray(raw)
    if type_ == "tf32":
        raw = (raw.view(np.uint32) & np.uint32(0xFFFFE000)).view(np.uint8)
    elements: Floats = raw.view(_TYPES[type_]).astype(np.float64)
    return elements


def operand_from_registers(registers: Bits, type_: str) -> Floats:
    """A `[64][K]` from the four registers of each thread, `[128][4]`.

    A register is 4 bytes along K. Registers 0 and 1 are 8 rows apart, 2 and 3 are 16 bytes along K
    from them: of every element size.
    """
    words = np.ascontiguousarray(registers).reshape(WARPS, 8, 4, 2, 2)  # row, word, half of K, rows
    return decode(words.transpose(0, 4, 1, 3, 2).reshape(ROWS, 8).view(np.uint8), type_)


def accumulate(
    before: Bits | None, a: Floats, b: Floats, dtype: str, saturate: bool = False
) -> Bits:
    """The registers of D after `a @ b.T`, added to `before` unless that is `None`.

    `a` is `[64][K]`, `b` `[N][K]`; registers are `[128][N / 2]`, or `[128][N / 4]` of two f16.
    """
    with np.errstate(all="ignore"):
        tiles = (a @ b.T).reshape(WARPS, 2, 8, -1, 4, 2)  # rows, row, columns, pair, column
        total = tiles.transpose(0, 2, 4, 3, 1, 5).reshape(THREADS, -1)
        if dtype == "s32":
            exact = total.astype(np.int64)
            if before is not None:
                exact = exact + before.view(np.int32)
            if saturate:
                exact = np.clip(exact, -(2**31), 2**31 - 1)
            return exact.astype(np.int32).view(np.uint32)
        kind = np.float16 if dtype == "f16" else np.float32
        if before is not None:
            total = total + np.ascontiguousarray(before).view(kind)
        return np.ascontiguousarray(total.astype(kind)).view(np.uint32)
