"""Tensors of PyTorch on a GPU, read directly: by DLPack each costs a call some 30 us.

The meaning is DLPack's: what comes next on the pipeline's stream waits for what is on PyTorch's
current one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from stagefuse.dsl.dtypes import DTYPES
from stagefuse.dsl.frozen import frozen
from stagefuse.runtime.errors import InputError, OutOfMemory

from .dlpack import dense_strides

_NAMES = {d.array: d.name for d in DTYPES.values()}
_QUICK = "_cuda_getCurrentRawStream"  # for generated code; what is public takes 1.5 us more
_dtypes: dict[Any, np.dtype[Any] | None] = {}  # PyTorch's own objects to NumPy's


@frozen
class Tensor:
    """Where a tensor lies, and the stream on which PyTorch works now."""

    address: int
    device: int
    shape: tuple[int, ...]
    strides: tuple[int, ...] | None  # in elements; None if dense
    dtype: np.dtype[Any]
    stream: int


def read(value: Any) -> Tensor | None:
    """A tensor in a GPU's memory; None for anything else. Raises InputError."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor) or not value.is_cuda:
        return None
    if value.layout is not torch.strided:
        return None
    if value.requires_grad:
        raise InputError("this tensor requires a gradient, which would be lost: `.detach()` it")
    dtype = _dtype(value.dtype)
    if dtype is None:
        raise InputError(f"{value.dtype} is no dtype of stagefuse")
    device = value.device.index
    return Tensor(
        value.data_ptr(), device, tuple(value.shape),
        None if value.is_contiguous() else tuple(value.stride()), dtype, current_stream(device),
    )  # fmt: skip


def current_stream(device: int) -> int:
    """The stream on which PyTorch works now. Raises KeyError without PyTorch."""
    torch = sys.modules["torch"]
    quick = getattr(torch._C, _QUICK, None)
    return int(torch.cuda.current_stream(device).cuda_stream if quick is None else quick(device))


class Alike:
    """Tensors like those that were read, each of the type, dtype, shape and GPU of its place,
    dense, without gradient.

    It asks for no more than can be another tensor's by then: 0.4 us each.
    """

    def __init__(self, values: Sequence[Any], number: int) -> None:
        self._empty, self._number = sys.modules["torch"].empty_strided, number
        self._shapes, self._dtypes = [x.shape for x in values], [x.dtype for x in values]
        self._facts = [type(x) for x in values], self._dtypes, self._shapes
        self._device = values[0].device
        self._latest: list[int] = []

    def addresses(self, values: Sequence[Any]) -> list[int] | None:
        """Where such tensors lie; None if one is another value, or without elements."""
        found = []
        try:
            for value, kind, dtype, shape in zip(values, *self._facts):  # noqa: B905 (its price)
                if (
                    type(value) is not kind
                    or value.dtype is not dtype
                    or value.shape != shape
                    or value.requires_grad
                    or not value.is_contiguous()
                ):
                    return None
                found.append(value.data_ptr())
        except RuntimeError:  # a layout that has no address, such as a sparse one
            return None
        if found == self._latest:  # the same addresses are on the same GPU
            return self._latest
        if 0 in found or any(value.get_device() != self._number for value in values):
            return None
        self._latest = found
        return found

    def new(self, place: int) -> Any:
        """A tensor for a place, with arbitrary contents; `torch.empty` would take twice as long.

        Raises OutOfMemory."""
        shape = self._shapes[place]
        steps = dense_strides(shape)
        try:
            return self._empty(shape, steps, dtype=self._dtypes[place], device=self._device)
        except sys.modules["torch"].cuda.OutOfMemoryError as error:
            raise _out_of_memory(error) from None

    def stream(self) -> Callable[[], int]:
        """What asks for the stream on which PyTorch works now."""
        quick = getattr(sys.modules["torch"]._C, _QUICK, None)
        return partial(quick or current_stream, self._number)


def alike(values: Sequence[Any], number: int) -> Alike | None:
    """What is like tensors that were read on a GPU; None where others are among them."""
    torch = sys.modules.get("torch")
    if torch is None or not all(isinstance(value, torch.Tensor) for value in values):
        return None
    return Alike(values, number)


def empty(value: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A new tensor on the GPU of a tensor; None for another value, or a dtype PyTorch lacks.

    Raises OutOfMemory.
    """
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return None
    theirs = getattr(torch, dtype.name, None)
    try:
        return None if theirs is None else torch.empty(shape, dtype=theirs, device=value.device)
    except torch.cuda.OutOfMemoryError as error:
        raise _out_of_memory(error) from None


def _out_of_memory(error: Exception) -> OutOfMemory:
    said = str(error).partition(" GPU ")[0]  # and on it goes about processes and their megabytes
    return OutOfMemory(f"PyTorch has no memory for a result: {said}")


def _dtype(theirs: Any) -> np.dtype[Any] | None:
    if theirs not in _dtypes:
        ours = _NAMES.get(str(theirs).removeprefix("torch."))
        _dtypes[theirs] = None if ours is None else DTYPES[ours].numpy
    return _dtypes[theirs]
