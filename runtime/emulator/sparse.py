"""Matrices of which half is zero: which elements the other half are.

PTX ISA, "Sparse matrix storage" and "Matrix Fragments for sparse mma": four bits tell of four
units of a row which two of them are there. A unit is an element of 16 or 8 bits, half an element
of tf32 (one of two elements is there), and two elements of 4 bits.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx.types import TYPES

from .errors import Stop

Array = NDArray[Any]


def indices_of_rows(words: Array, kind: str, columns: int, selector: int) -> Array:
    """What a warp's metadata says of 16 rows: 4-bit numbers `[warps][16][columns' units / 4]`.

    `words` is `[warps][32]`. A row's bits are together where units have 8 bits; halves of words
    tell of rows 8 apart where they have 16. The selector says which lanes of each four count.
    """
    bits = TYPES[kind].bits
    wide = bits >= 16
    quads = words.reshape(len(words), 8, 4)
    per_row = columns * bits // (64 if wide else 32)
    """Numbers for each row."""
    nibbles = (quads[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & np.uint32(15)
    if wide:  # a lane has four numbers of row g, then four of row g + 8
        lanes = per_row // 4
        mine = nibbles[:, :, selector * lanes : (selector + 1) * lanes]
        rows = mine.reshape(len(words), 8, lanes, 2, 4).transpose(0, 3, 1, 2, 4)
    else:  # two lanes have eight numbers of rows g and g + 8
        lanes = per_row // 4
        mine = nibbles[:, :, selector * lanes : (selector + 1) * lanes]
        rows = mine.reshape(len(words), 8, lanes // 2, 2, 8).transpose(0, 3, 1, 2, 4)
    found: Array = np.ascontiguousarray(rows).reshape(len(words), 16, per_row)
    return found


def spread(values: Array, numbers: Array, kind: str) -> Array:
    """A matrix `[...][rows][K]` from the half of it that is stored and where that belongs.

    Raises: Stop where numbers give elements no place of their own.
    """
    first, second = numbers & 3, numbers >> 2
    group = np.arange(numbers.shape[-1])
    bits = TYPES[kind].bits
    _check_numbers(values, numbers, bits)
    if bits == 32:
        columns = (2 * group + first // 2)[..., None]
    elif bits == 4:
        pairs = np.stack([first, second], -1)[..., None]
        columns = 8 * group[:, None] + (2 * pairs + np.arange(2)).reshape(*numbers.shape, 4)
    else:
        columns = 4 * group[:, None] + np.stack([first, second], -1)
    whole = np.zeros((*values.shape[:-1], 2 * values.shape[-1]))
    np.put_along_axis(whole, columns.reshape(values.shape), values, -1)
    return whole


def _check_numbers(values: Array, numbers: Array, bits: int) -> None:
    """Zeros may have any place: that of an empty group is often left as it is.

    Raises: Stop where two units would be at one place, or halves of tf32 are torn apart (there
    only 0b0100 and 0b1110 mean something).
    """
    wrong = (numbers & 3) == (numbers >> 2)
    if bits == 32:
        wrong = (numbers != 0b0100) & (numbers != 0b1110)
    if not wrong.any():
        return
    wrong = wrong & (values.reshape(*numbers.shape, -1) != 0).any(-1)
    if wrong.any():
        at = tuple(np.argwhere(wrong)[0])
        raise Stop("trap", f"metadata {int(numbers[at]):#06b} for group {at[-1]} of row {at[-2]} "
                   "of the sparse matrix gives its elements no place of their own")  # fmt: skip
