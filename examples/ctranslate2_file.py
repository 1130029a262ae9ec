"""Reads the tensors of a CTranslate2 model, `model.bin` of version 6, without CTranslate2.

The file is the version, the name and the revision of the model's kind, then a row of variables
(name, shape, dtype, bytes) and a row of second names. Numbers are little-endian, a text has its
length before it and a zero at its end.
Source: ctranslate2/specs/model_spec.py, `_serialize`.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

VERSION = 6
DTYPES = ("<f4", "<i1", "<i2", "<i4", "<f2")
Array = np.ndarray[Any, Any]


def load(parts: Sequence[str | Path]) -> dict[str, Array]:
    """The tensors by name of a model, whose file may be in parts; second names have theirs too.

    Raises ValueError for any other file, OSError.
    """
    data = b"".join(Path(part).read_bytes() for part in parts)
    try:
        return _tensors(_Reader(data))
    except (ValueError, KeyError, IndexError, struct.error) as error:
        names = ", ".join(map(str, parts))
        raise ValueError(f"{names}: no model of CTranslate2, version {VERSION}: {error}") from error


def _tensors(file: _Reader) -> dict[str, Array]:
    version = file.number("I")
    if version != VERSION:
        raise ValueError(f"it begins as version {version}")
    file.text(), file.number("I")  # the kind of model and its revision
    found = dict(file.tensor() for _ in range(file.number("I")))
    for _ in range(file.number("I")):
        name = file.text()
        found[name] = found[file.text()]
    return found


class _Reader:
    """Bytes, and how many of them have been read."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def bytes(self, count: int) -> memoryview:
        begin, self.at = self.at, self.at + count
        if self.at > len(self.data):
            raise ValueError(f"it ends at {len(self.data)} bytes")
        return memoryview(self.data)[begin : self.at]

    def number(self, kind: str) -> int:
        (value,) = struct.unpack(f"<{kind}", self.bytes(struct.calcsize(kind)))
        return int(value)

    def text(self) -> str:
        return str(self.bytes(self.number("H"))[:-1], "utf-8")

    def tensor(self) -> tuple[str, Array]:
        """A variable: its name and its numbers."""
        name = self.text()
        shape = [self.number("I") for _ in range(self.number("B"))]
        dtype, size = np.dtype(DTYPES[self.number("B")]), self.number("I")
        if size != math.prod(shape) * dtype.itemsize:
            raise ValueError(f"{name} has {size} bytes, which its shape {shape} does not")
        return name, np.frombuffer(self.bytes(size), dtype).reshape(shape)
