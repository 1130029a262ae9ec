"""What the header of a weights file says of one tensor."""

from __future__ import annotations

from .dtypes import DType
from .frozen import frozen

MAX_RANK = 64
MAX_BYTES = 1 << 62


@frozen
class TensorHeader:
    """One tensor of a file: what it is and, unless compressed, where its bytes lie.

    A part of blocks has `block`: the bytes from one block to the next, and those of the part.
    """

    key: str
    dtype: DType | None
    stored_dtype: str
    shape: tuple[int, ...]
    offset: int | None
    size_bytes: int
    fortran: bool = False
    big_endian: bool = False
    block: tuple[int, int] | None = None


def checked_size(key: str, shape: tuple[int, ...], itemsize: int) -> int:
    """The bytes that `shape` takes; never a number that overflows 64 bits. Raises ValueError."""
    if len(shape) > MAX_RANK:
        raise ValueError(f"`{key}` has {len(shape)} dimensions")
    size = itemsize
    for extent in shape:
        if type(extent) is not int or not 0 <= extent < MAX_BYTES:
            raise ValueError(f"`{key}` has an invalid shape")
        size *= extent
        if size > MAX_BYTES:
            raise ValueError(f"`{key}` has an impossible size")
    return size
