"""Reads the tensors of a PyTorch `.pth` file of the older format (before 1.6), without PyTorch.

Such a file is a row of pickles, the fourth of which is the state dict, followed by the numbers of
every storage. Only what rebuilds plain tensors is let through: any other class or function that
the pickle names is refused, so that nothing of the file is ever run.
Source: torch/serialization.py, `_legacy_save`.
"""

from __future__ import annotations

import pickle
from collections import OrderedDict
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

MAGIC = 0x1950A86A20F9469CFC6C
DTYPES = {"FloatStorage": "<f4", "DoubleStorage": "<f8", "HalfStorage": "<f2", "LongStorage": "<i8",
          "IntStorage": "<i4", "ShortStorage": "<i2", "CharStorage": "<i1", "ByteStorage": "<u1",
          "BoolStorage": "?"}  # fmt: skip


@dataclass(frozen=True)
class Storage:
    """Numbers in a row; they follow the pickles."""

    key: str
    dtype: np.dtype[Any]
    count: int


@dataclass(frozen=True)
class Placed:
    """A tensor: where its numbers lie in a storage. Offset and strides count elements."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]

    def array(self, numbers: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """The tensor, copied out of its storage. Raises ValueError if it does not lie inside."""
        last = self.offset + sum((n - 1) * s for n, s in zip(self.shape, self.strides, strict=True))
        if min(self.offset, *self.shape, *self.strides, 0) < 0 or last >= max(len(numbers), 1):
            raise ValueError("a tensor does not lie inside its storage")
        steps = [s * numbers.itemsize for s in self.strides]
        if 0 in self.shape:
            return np.zeros(self.shape, numbers.dtype)
        found = np.lib.stride_tricks.as_strided(numbers[self.offset :], self.shape, steps)
        return found.copy()


def load(path: str | Path) -> dict[str, np.ndarray[Any, Any]]:
    """The tensors of a state dict by name. Raises ValueError for any other file, OSError."""
    with open(path, "rb") as file:
        try:
            return _tensors(file)
        except OSError:
            raise
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{path} is no state dict of PyTorch before 1.6: {error}") from error


def _tensors(file: BinaryIO) -> dict[str, np.ndarray[Any, Any]]:
    if _Reader(file).load() != MAGIC:
        raise ValueError("it does not begin as one")
    _Reader(file).load(), _Reader(file).load()  # the version, and sizes of C's types
    named = {k: t for k, t in _Reader(file).load().items() if isinstance(t, Placed)}
    storages = {tensor.storage.key: tensor.storage for tensor in named.values()}
    numbers = {}
    for key in _Reader(file).load():
        storage, count = storages[key], int.from_bytes(file.read(8), "little")
        if count != storage.count:
            raise ValueError("a storage has another length than its tensors say")
        size = count * storage.dtype.itemsize
        numbers[key] = np.frombuffer(file.read(size), storage.dtype, count)
    return {name: tensor.array(numbers[tensor.storage.key]) for name, tensor in named.items()}


class _Reader(pickle.Unpickler):
    """One pickle that may name storages, tensors and ordered dicts, nothing else."""

    def __init__(self, file: BinaryIO) -> None:
        super().__init__(file)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _placed
        if module == "torch" and name in DTYPES:
            return np.dtype(DTYPES[name])
        raise ValueError(f"the file asks for {module}.{name}, which is no tensor")

    def persistent_load(self, pid: Any) -> Storage:
        kind, dtype, key, _device, count, view = pid
        if kind != "storage" or view is not None:
            raise ValueError("the file refers to something that is no storage")
        return Storage(key, dtype, count)


def _placed(
    storage: Storage, offset: int, shape: tuple[int, ...], strides: tuple[int, ...], *_: Any
) -> Placed:
    return Placed(storage, offset, tuple(shape), tuple(strides))
