"""The three swizzles of shared memory, which tensor copies and wgmma apply to addresses."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.int64]

WIDTHS = (0, 32, 64, 128)
"""Bytes of a row that a swizzle permutes; 0 is none."""

ALIGNMENT = {0: 128, 32: 256, 64: 512, 128: 1024}
"""The bytes after which a pattern repeats."""


def swizzle(address: npt.NDArray[Any], width: int, base_offset: int = 0) -> Array:
    """Where the byte at `address` of shared memory lies.

    The number of the 16-byte chunk (bits 4-6) is xored with bits 7-9, of which 128, 64 and 32
    use three, two and one (PTX ISA, "Swizzling modes"). `base_offset` is the number, mod 8, of the
    128-byte line in which the pattern starts.
    """
    if width == 0:
        return address.astype(np.int64)
    at: Array = address.astype(np.int64)
    line = ((at >> 7) - base_offset) & (width // 16 - 1)
    return at ^ (line << 4)
