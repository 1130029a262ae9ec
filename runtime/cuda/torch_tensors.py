"""Tensors of PyTorch on a GPU, read directly: by DLPack each costs a call some 30 us.

The meaning is DLPack's: what comes next on the pipeline's stream waits for what is on PyTorch's
current one.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from stagefuse.dsl.dtypes import DTYPES

from ..errors import InputError

_NAMES = {d.array: d.name for d in DTYPES.values()}
_QUICK = "_cuda_getCurrentRawStream"  # for generated code; what is public takes 1.5 us more
_dtypes: dict[Any, np.dtype[Any] | None] = {}  # PyTorch's own objects to NumPy's


@dataclass(frozen=True)
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


class Like:
    """Tensors like one that was read: of its type, dtype, shape and GPU, dense, without gradient.

    It asks for no more than can be another tensor's by then: half a microsecond.
    """

    __slots__ = ("_device", "_dtype", "_layout", "_number", "_shape", "_torch", "_type")

    def __init__(self, value: Any, number: int) -> None:
        self._torch, self._number = sys.modules["torch"], number
        self._type, self._dtype, self._shape = type(value), value.dtype, value.shape
        self._layout, self._device = value.layout, value.device

    def address(self, value: Any) -> int:
        """Where a tensor like it lies; 0 for another value, or for a tensor without elements."""
        if (
            type(value) is self._type
            and value.dtype is self._dtype
            and value.shape == self._shape
            and value.layout is self._layout
            and value.get_device() == self._number
            and not value.requires_grad
            and value.is_contiguous()
        ):
            return value.data_ptr()  # type: ignore[no-any-return]
        return 0

    def new(self) -> Any:
        """A tensor like it with arbitrary contents."""
        return self._torch.empty(self._shape, dtype=self._dtype, device=self._device)

    def stream(self) -> Callable[[], int]:
        """What asks for the stream on which PyTorch works now."""
        quick = getattr(self._torch._C, _QUICK, None)
        return partial(quick or current_stream, self._number)


def like(value: Any, number: int) -> Like | None:
    """What is like a tensor that was read on a GPU; None for what is no tensor of PyTorch's."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return None
    return Like(value, number)


def empty(value: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
    """A new tensor on the GPU of a tensor; None for another value, or a dtype PyTorch lacks."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return None
    theirs = getattr(torch, dtype.name, None)
    return None if theirs is None else torch.empty(shape, dtype=theirs, device=value.device)


def _dtype(theirs: Any) -> np.dtype[Any] | None:
    if theirs not in _dtypes:
        ours = _NAMES.get(str(theirs).removeprefix("torch."))
        _dtypes[theirs] = None if ours is None else DTYPES[ours].numpy
    return _dtypes[theirs]
