"""Matrices in shared memory as wgmma finds them through a 64-bit descriptor.

PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout" and "Matrix Descriptor".
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from .swizzle import swizzle

_WIDTH_OF_MODE = (0, 128, 64, 32)
K_BYTES = 32
"""The bytes of K that one instruction consumes, of every type."""


@dataclass(frozen=True)
class MatrixDescriptor:
    """The fields of a descriptor, in bytes. `width` is the swizzle's."""

    start: int
    leading: int
    stride: int
    base_offset: int
    width: int

    @classmethod
    def decode(cls, bits: int) -> MatrixDescriptor:
        """Bits 0-13 start, 16-29 leading and 32-45 stride offset, all over 16; 49-51; 62-63."""

        def field(low: int) -> int:
            return (bits >> low & 0x3FFF) << 4

        return cls(field(0), field(16), field(32), bits >> 49 & 7, _WIDTH_OF_MODE[bits >> 62 & 3])

    def k_major(self, rows: int) -> npt.NDArray[np.int64]:
        """Addresses of the 8-byte units of an operand with contiguous K: `[rows][4]`."""
        row, byte = np.arange(rows)[:, None], np.arange(0, K_BYTES, 8)[None, :]
        group = self.start + row // 8 * self.stride
        if self.width == 0:
            return (group + row % 8 * 16 + byte // 16 * self.leading + byte % 16).astype(np.int64)
        return swizzle(group + row % 8 * self.width + byte, self.width, self.base_offset)

    def mn_major(self, rows: int) -> npt.NDArray[np.int64]:
        """Addresses of the 2-byte elements of an operand with contiguous rows: `[rows][16]`."""
        row, k = np.arange(rows)[:, None], np.arange(K_BYTES // 2)[None, :]
        if self.width == 0:
            at = row % 8 * 2 + row // 8 * self.stride + k % 8 * 16 + k // 8 * self.leading
            return (self.start + at).astype(np.int64)
        panel = self.width // 2
        at = row % panel * 2 + row // panel * self.leading
        at = at + k % 8 * self.width + k // 8 * self.stride
        return swizzle(self.start + at, self.width, self.base_offset)


@lru_cache(maxsize=1024)
def operand_addresses(bits: int, rows: int, mn_major: bool) -> npt.NDArray[np.int64]:
    """The addresses of an operand's units by its descriptor; they are not to be changed."""
    matrix = MatrixDescriptor.decode(bits)
    found = matrix.mn_major(rows) if mn_major else matrix.k_major(rows)
    found.flags.writeable = False
    return found
