"""Tensors of PyTorch on a GPU, read directly: by DLPack each costs a call some 30 us.

The meaning is DLPack's: what comes next on the pipeline's stream waits for what is on PyTorch's
current one.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from stagefuse.dsl.dtypes import DTYPES

from ..errors import InputError

_NAMES = {d.array: d.name for d in DTYPES.values()}
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
        None if value.is_contiguous() else tuple(value.stride()), dtype,
        torch.cuda.current_stream(device).cuda_stream,
    )  # fmt: skip


def _dtype(theirs: Any) -> np.dtype[Any] | None:
    if theirs not in _dtypes:
        ours = _NAMES.get(str(theirs).removeprefix("torch."))
        _dtypes[theirs] = None if ours is None else DTYPES[ours].numpy
    return _dtypes[theirs]
