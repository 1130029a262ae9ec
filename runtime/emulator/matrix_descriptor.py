"""Matrices in shared memory as wgmma finds them through a 64-bit descriptor.

PTX ISA, "Asynchronous Warpgroup Level Matrix Shared Memory Layout" and "Matrix Descriptor".
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from stagefuse.dsl.frozen import frozen

from .swizzle import swizzle

_WIDTH_OF_MODE = (0, 128, 64, 32)
K_BYTES = 32
"""The bytes of K that one instruction consumes, of every type; of a sparse product's B twice."""


@frozen
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

    def k_major(self, rows: int, deep: int) -> npt.NDArray[np.int64]:
        """Addresses of the 8-byte units of an operand with contiguous K: `[rows][deep / 8]`."""
        row, byte = np.arange(rows)[:, None], np.arange(0, deep, 8)[None, :]
        group = self.start + row // 8 * self.stride
        if self.width == 0:
            return (group + row % 8 * 16 + byte // 16 * self.leading + byte % 16).astype(np.int64)
        at = row % 8 * self.width + byte // self.width * self.leading + byte % self.width
        return swizzle(group + at, self.width, self.base_offset)

    def mn_major(self, rows: int, deep: int) -> npt.NDArray[np.int64]:
        """Addresses of the 2-byte elements where rows are contiguous: `[rows][deep / 2]`."""
        row, k = np.arange(rows)[:, None], np.arange(deep // 2)[None, :]
        if self.width == 0:
            at = row % 8 * 2 + row // 8 * self.stride + k % 8 * 16 + k // 8 * self.leading
            return (self.start + at).astype(np.int64)
        panel = self.width // 2
        at = row % panel * 2 + row // panel * self.leading
        at = at + k % 8 * self.width + k // 8 * self.stride
        return swizzle(self.start + at, self.width, self.base_offset)


@lru_cache(maxsize=1024)
def operand_addresses(
    bits: int, rows: int, mn_major: bool, deep: int = K_BYTES
) -> npt.NDArray[np.int64]:
    """The addresses of an operand's units by its descriptor; they are not to be changed."""
    matrix = MatrixDescriptor.decode(bits)
    found = matrix.mn_major(rows, deep) if mn_major else matrix.k_major(rows, deep)
    found.flags.writeable = False
    return found


@lru_cache(maxsize=1024)
def operand_words(
    bits: int, rows: int, mn_major: bool, deep: int = K_BYTES
) -> npt.NDArray[np.int64]:
    """The addresses of the words of 8 bytes that hold an operand, which fill these wholly: eight
    rows, or eight bytes of K, are one after the other."""
    at = operand_addresses(bits, rows, mn_major, deep)
    return np.unique(at >> 3) << 3 if mn_major else at
