"""GGUF files: tensors as they are, and quantised ones as the parts that their blocks are made of.

A tensor `t` quantised as Q4_0 is a scope: `t.q4_0` holds the codes of every block, `t.d` the
scales. The library's module `gguf` makes numbers of them. Files may be hostile: counts and lengths
are checked against the file before anything is read or kept.

Source: the GGUF specification and `ggml-common.h` of ggml, which has the layouts of blocks.
"""

from __future__ import annotations

import mmap
import struct
from typing import IO

from . import dtypes
from .frozen import frozen
from .tensor_header import TensorHeader, checked_size

MAX_DIMENSIONS = 4
"""Source: `GGML_MAX_DIMS`."""
_ALIGNMENT = "general.alignment"
_STRING, _ARRAY = 8, 9
_VALUE_BYTES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}
"""Bytes of the metadata's plain values by their type."""
_PLAIN = {0: "f32", 1: "f16", 24: "i8", 25: "i16", 26: "i32", 27: "i64", 28: "f64", 30: "bf16"}

Part = tuple[str, str, int, tuple[int, ...]]
"""What a part of a block is called, its dtype, where in the block it begins, its shape."""


@frozen
class Blocks:
    """How a quantised type lays out `values` numbers in `size` bytes."""

    name: str
    values: int
    size: int
    parts: tuple[Part, ...]


_D: Part = ("d", "f16", 0, ())
_M: Part = ("m", "f16", 2, ())
_QUANTISED = {
    2: Blocks("Q4_0", 32, 18, (("q4_0", "u8", 2, (16,)), _D)),
    3: Blocks("Q4_1", 32, 20, (("q4_1", "u8", 4, (16,)), _D, _M)),
    6: Blocks("Q5_0", 32, 22, (("q5_0", "u8", 6, (16,)), ("high", "u8", 2, (4,)), _D)),
    7: Blocks("Q5_1", 32, 24, (("q5_1", "u8", 8, (16,)), ("high", "u8", 4, (4,)), _D, _M)),
    8: Blocks("Q8_0", 32, 34, (("q8_0", "i8", 2, (32,)), _D)),
    10: Blocks("Q2_K", 256, 84, (("q2_k", "u8", 16, (64,)), ("scales", "u8", 0, (16,)),
                                 ("d", "f16", 80, ()), ("m", "f16", 82, ()))),
    11: Blocks("Q3_K", 256, 110, (("q3_k", "u8", 32, (64,)), ("high", "u8", 0, (32,)),
                                  ("scales", "u8", 96, (12,)), ("d", "f16", 108, ()))),
    12: Blocks("Q4_K", 256, 144, (("q4_k", "u8", 16, (128,)), ("scales", "u8", 4, (12,)), _D, _M)),
    13: Blocks("Q5_K", 256, 176, (("q5_k", "u8", 48, (128,)), ("high", "u8", 16, (32,)),
                                  ("scales", "u8", 4, (12,)), _D, _M)),
    14: Blocks("Q6_K", 256, 210, (("q6_k", "u8", 0, (128,)), ("high", "u8", 128, (64,)),
                                  ("scales", "i8", 192, (16,)), ("d", "f16", 208, ()))),
    20: Blocks("IQ4_NL", 32, 18, (("iq4_nl", "u8", 2, (16,)), _D)),
    23: Blocks("IQ4_XS", 256, 136, (("iq4_xs", "u8", 8, (128,)), ("high", "u8", 2, (2,)),
                                    ("scales", "u8", 4, (4,)), _D)),
    34: Blocks("TQ1_0", 256, 54, (("tq1_0", "u8", 0, (48,)), ("last", "u8", 48, (4,)),
                                  ("d", "f16", 52, ()))),
    35: Blocks("TQ2_0", 256, 66, (("tq2_0", "u8", 0, (64,)), ("d", "f16", 64, ()))),
    39: Blocks("MXFP4", 32, 17, (("mxfp4", "u8", 1, (16,)), ("e", "u8", 0, ()))),
}  # fmt: skip
_UNREAD = {
    9: "Q8_1", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S", 21: "IQ3_S",
    22: "IQ2_S", 29: "IQ1_M", 40: "NVFP4",
}  # fmt: skip
"""Types whose blocks are not taken apart: a tensor of one is named, and cannot be used."""


def read_gguf(file: IO[bytes], size_bytes: int) -> list[TensorHeader]:
    """The tensors of a file. Raises ValueError for one that is damaged."""
    if size_bytes < 24:
        raise ValueError("it is shorter than a header")
    with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        return _Reader(data, size_bytes).tensors()


class _Reader:
    """A place in a file; nothing beyond its end is read."""

    def __init__(self, data: mmap.mmap, size: int) -> None:
        self.data, self.size, self.at = data, size, 0

    def skip(self, count: int) -> None:
        if not 0 <= count <= self.size - self.at:
            raise ValueError("it ends in the middle of its header")
        self.at += count

    def number(self, code: str) -> int:
        start = self.at
        self.skip(struct.calcsize(code))
        (found,) = struct.unpack_from(f"<{code}", self.data, start)
        return int(found)

    def text(self) -> str:
        length = self.number("Q")
        start = self.at
        self.skip(length)
        return self.data[start : start + length].decode("utf-8")

    def count(self, least: int) -> int:
        """A number of things that take at least so many bytes each."""
        found = self.number("Q")
        if found > (self.size - self.at) // least:
            raise ValueError(f"its header claims {found} entries")
        return found

    def tensors(self) -> list[TensorHeader]:
        if self.data[:4] != b"GGUF":
            raise ValueError("it does not begin with `GGUF`")
        self.at = 4
        version = self.number("I")
        if version not in (2, 3):
            raise ValueError(f"it is of version {version}; known are 2 and 3, little-endian")
        count = self.count(24)
        alignment = self._metadata(self.count(13))
        entries = [self._entry() for _ in range(count)]
        names = [name for name, *_ in entries]
        if len(set(names)) != len(names):
            raise ValueError("the header names a tensor twice")
        start = -(-self.at // alignment) * alignment
        found: list[TensorHeader] = []
        ranges: list[tuple[int, int, str]] = []
        for name, shape, kind, offset in entries:
            if offset % alignment:
                raise ValueError(f"`{name}` does not begin at a multiple of {alignment} bytes")
            parts, size = _headers(name, shape, kind, start + offset, self.size)
            found += parts
            ranges.append((start + offset, start + offset + size, name))
        ranges.sort()
        for (_, end, _), (begin, _, name) in zip(ranges, ranges[1:], strict=False):
            if begin < end:
                raise ValueError(f"`{name}` overlaps another tensor")
        return found

    def _metadata(self, count: int) -> int:
        """Passes over what a file says of its model; gives the alignment of tensors."""
        alignment = 32
        for _ in range(count):
            key, kind = self.text(), self.number("I")
            if key == _ALIGNMENT and kind == 4:
                alignment = self.number("I")
                if not 1 <= alignment <= 1 << 20:
                    raise ValueError(f"its tensors are aligned to {alignment} bytes")
            else:
                self._value(kind)
        return alignment

    def _value(self, kind: int) -> None:
        if kind in _VALUE_BYTES:
            self.skip(_VALUE_BYTES[kind])
        elif kind == _STRING:
            self.skip(self.number("Q"))
        elif kind == _ARRAY:
            item = self.number("I")
            if item == _STRING:
                for _ in range(self.count(8)):
                    self.skip(self.number("Q"))
            elif item in _VALUE_BYTES:
                self.skip(self.number("Q") * _VALUE_BYTES[item])
            else:
                raise ValueError(f"its metadata have an array of the kind {item}")
        else:
            raise ValueError(f"its metadata have a value of the kind {kind}")

    def _entry(self) -> tuple[str, tuple[int, ...], int, int]:
        """A tensor's name, its shape, outermost first, its type and where it begins."""
        name, rank = self.text(), self.number("I")
        if not name or rank > MAX_DIMENSIONS:
            raise ValueError(f"`{name}` has {rank} dimensions")
        shape = tuple(self.number("Q") for _ in range(rank))[::-1]
        return name, shape, self.number("I"), self.number("Q")


def _headers(
    name: str, shape: tuple[int, ...], kind: int, start: int, size_bytes: int
) -> tuple[list[TensorHeader], int]:
    """The tensor, or the parts of its blocks, and the bytes that it takes."""
    if kind in _PLAIN:
        dtype = dtypes.DTYPES[_PLAIN[kind]]
        size = checked_size(name, shape, dtype.itemsize)
        found = [TensorHeader(name, dtype, dtype.name, shape, start, size)]
    elif kind in _QUANTISED:
        blocks = _QUANTISED[kind]
        if not shape or shape[-1] % blocks.values:
            raise ValueError(f"`{name}` has rows that are no whole blocks of {blocks.name}")
        outer = (*shape[:-1], shape[-1] // blocks.values)
        size = checked_size(name, outer, blocks.size)
        found = []
        for part, kept, at, inner in blocks.parts:
            dtype = dtypes.DTYPES[kept]
            own = checked_size(name, inner, dtype.itemsize)
            taken = checked_size(name, outer, own)
            found.append(TensorHeader(f"{name}.{part}", dtype, blocks.name, (*outer, *inner),
                                      start + at, taken, block=(blocks.size, own)))  # fmt: skip
    else:
        stored = _UNREAD.get(kind, f"number {kind}")
        return [TensorHeader(name, None, stored, shape, start, 0)], 0
    if start + size > size_bytes:
        raise ValueError(f"`{name}` leaves the file")
    return found, size
