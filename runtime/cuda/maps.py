"""Tensor maps as the CUDA driver encodes them: what a copy knows of a buffer, in 128 bytes.

Source: CUDA driver API, cuTensorMapEncodeTiled and cuTensorMapEncodeIm2col.
"""

from __future__ import annotations

import ctypes
import functools
from typing import Any

import numpy as np

from stagefuse.runtime.drivers import MAP_BYTES
from stagefuse.runtime.errors import DeviceError

from .bindings import call, cuda, raise_for

_TYPES = {  # CUtensorMapDataType; types that it lacks are moved as plain bytes
    "bool": 0, "u8": 0, "i8": 0, "f8e4m3": 0, "f8e5m2": 0, "u16": 1, "i16": 1, "u32": 2, "i32": 3,
    "u64": 4, "i64": 5, "f16": 6, "f32": 7, "f64": 8, "bf16": 9,
}  # fmt: skip
_SWIZZLES = {0: 0, 32: 1, 64: 2, 128: 3}  # CUtensorMapSwizzle
_PROMOTION = 2  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B


@functools.lru_cache(maxsize=1024)
def tensor_map(
    dtype: str,
    address: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    box: tuple[int, ...],
    swizzle: int,
    steps: tuple[int, ...] | None = None,
    fills_nan: bool = False,
) -> np.ndarray[Any, Any]:
    """The 128 bytes of a tensor map, aligned as the driver wants them; innermost dimension first,
    `strides` in bytes, of all dimensions but the innermost. Of every dimension it takes each
    `steps`-th element, 1 without; what lies beyond is 0, or NaN.

    The bindings' own object is not aligned, and so their function for it is not called.
    """
    rank = len(sizes)
    every = (1,) * rank if steps is None else steps
    lists: list[np.ndarray[Any, Any]] = [
        np.array(sizes, np.uint64), np.array([*strides, 0], np.uint64),
        np.array(box, np.uint32), np.array(every, np.uint32),
    ]  # fmt: skip
    return _encoded(
        _encode("cuTensorMapEncodeTiled", 4), dtype, rank, address, *lists, 0,
        _SWIZZLES[swizzle], _PROMOTION, int(fills_nan),
    )  # fmt: skip


@functools.lru_cache(maxsize=1024)
def pixel_map(
    dtype: str,
    address: int,
    sizes: tuple[int, ...],
    strides: tuple[int, ...],
    column: tuple[int, int],
    swizzle: int,
    lower: tuple[int, ...],
    upper: tuple[int, ...],
    steps: tuple[int, ...],
    fills_nan: bool = False,
) -> np.ndarray[Any, Any]:
    """The same of a map whose copies take a `column` of so many pixels and channels, in a bounding
    box between the corners `lower` and `upper` of the axes between channel and image."""
    lists: list[np.ndarray[Any, Any]] = [
        np.array(sizes, np.uint64), np.array([*strides, 0], np.uint64),
        np.array(lower, np.int32), np.array(upper, np.int32),
    ]  # fmt: skip
    pixels, channels = column
    return _encoded(
        _encode("cuTensorMapEncodeIm2col", 4, 2, 1), dtype, len(sizes), address, *lists, channels,
        pixels, np.array(steps, np.uint32), 0, _SWIZZLES[swizzle], _PROMOTION, int(fills_nan),
    )  # fmt: skip


def _encoded(
    encode: Any, dtype: str, rank: int, address: int, *rest: Any
) -> np.ndarray[Any, Any]:
    """The 128 bytes that an encoder of the driver makes of its arguments."""
    room = np.zeros(MAP_BYTES + 64, np.uint8)
    made: np.ndarray[Any, Any] = room[-room.ctypes.data % 64 :][:MAP_BYTES]
    given = (a.ctypes.data if isinstance(a, np.ndarray) else a for a in rest)
    code = encode(made.ctypes.data, _TYPES[dtype], rank, address, *given)
    driver = cuda()
    raise_for(driver, driver.CUresult(code), "making a tensor map")
    made.setflags(write=False)  # the next caller gets the same
    return made


@functools.cache
def _encode(name: str, lists: int, numbers: int = 0, more: int = 0) -> Any:
    """The driver's encoder of a kind of tensor maps, which takes so many lists, then numbers, then
    lists again. Raises DeviceError where it has none."""
    address, _ = call("cuGetProcAddress", "looking for tensor maps", name.encode(), 12000, 0)
    address = int(address)
    if not address:
        raise DeviceError("this NVIDIA driver has no tensor maps\n  = help: CUDA 12 brought them")
    pointer, number = ctypes.c_void_p, ctypes.c_uint32
    return ctypes.CFUNCTYPE(
        ctypes.c_int, pointer, number, number, pointer, *(pointer,) * lists, *(number,) * numbers,
        *(pointer,) * more, *(number,) * 4,
    )(address)  # fmt: skip
