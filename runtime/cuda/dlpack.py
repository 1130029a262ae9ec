"""Memory for other libraries as DLPack capsules, of every dtype that DLPack names.

Source: `dlpack.h` of DLPack 1.1 (structures and codes), "Python specification for DLPack" (names
of capsules, who calls the deleter).
"""

from __future__ import annotations

import ctypes
from typing import Any

import numpy as np

VERSION = (1, 1)
_READ_ONLY = 1  # DLPACK_FLAG_BITMASK_READ_ONLY
_CODES = {"i": 0, "u": 1, "f": 2, "b": 6}  # by NumPy's kind
_NAMED = {"bfloat16": 4, "float8_e4m3fn": 10, "float8_e5m2": 12}


class _Tensor(ctypes.Structure):
    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


class _Managed(ctypes.Structure):
    _fields_ = [
        ("tensor", _Tensor),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
    ]


class _Versioned(ctypes.Structure):
    _fields_ = [
        ("major", ctypes.c_uint32),
        ("minor", ctypes.c_uint32),
        ("context", ctypes.c_void_p),
        ("deleter", ctypes.c_void_p),
        ("flags", ctypes.c_uint64),
        ("tensor", _Tensor),
    ]


_held: dict[int, Any] = {}
"""What capsules refer to, by the address of their structure, until their deleter is called."""


def _delete(managed: int) -> None:
    _held.pop(managed, None)


_python = ctypes.PyDLL(None)  # functions of our own: their types are set here
_python.PyCapsule_New.restype = ctypes.py_object
_python.PyCapsule_New.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p]
_python.PyCapsule_IsValid.restype = ctypes.c_int
_python.PyCapsule_IsValid.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
_python.PyCapsule_GetPointer.restype = ctypes.c_void_p
_python.PyCapsule_GetPointer.argtypes = [ctypes.c_void_p, ctypes.c_char_p]
_NAMES = (b"dltensor", b"dltensor_versioned")


def _forget(capsule: int) -> None:
    """A capsule dies; one that was consumed has another name, and its consumer deletes."""
    for name in _NAMES:
        if _python.PyCapsule_IsValid(capsule, name):
            _held.pop(_python.PyCapsule_GetPointer(capsule, name), None)


_FUNCTION = ctypes.CFUNCTYPE(None, ctypes.c_void_p)
_DELETER, _DESTRUCTOR = _FUNCTION(_delete), _FUNCTION(_forget)


def capsule(
    address: int,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    device: tuple[int, int],
    owner: Any,
    *,
    strides: tuple[int, ...] | None = None,
    max_version: tuple[int, int] | None = None,
    readonly: bool = False,
) -> Any:
    """A capsule of the array at `address` on a DLPack device, which keeps `owner` alive; `strides`
    are in elements, without them it is dense.

    A consumer that knows version 1 or later gets a versioned one. Raises BufferError for a dtype
    that DLPack does not name, and for read-only memory to consumers that would not learn of it.
    """
    code = _NAMED.get(dtype.name, _CODES.get(dtype.kind))
    if code is None:
        raise BufferError(f"DLPack has no {dtype.name}")
    is_versioned = max_version is not None and max_version[0] >= 1
    if readonly and not is_versioned:
        raise BufferError("DLPack before version 1 can't say that an array is read-only")
    sizes = (ctypes.c_int64 * len(shape))(*shape)
    steps = (ctypes.c_int64 * len(shape))(*(dense_strides(shape) if strides is None else strides))
    made: Any = _Versioned() if is_versioned else _Managed()
    if is_versioned:
        (made.major, made.minor), made.flags = VERSION, _READ_ONLY * readonly
    made.deleter = ctypes.cast(_DELETER, ctypes.c_void_p)
    made.tensor = _Tensor(
        address, *device, len(shape), code, 8 * dtype.itemsize, 1, sizes, steps, 0
    )
    place = ctypes.addressof(made)
    _held[place] = (made, sizes, steps, owner)
    name = _NAMES[is_versioned]
    return _python.PyCapsule_New(place, name, ctypes.cast(_DESTRUCTOR, ctypes.c_void_p))


def dense_strides(shape: tuple[int, ...]) -> list[int]:
    """In elements, row-major."""
    steps = [1] * len(shape)
    for axis in range(len(shape) - 1, 0, -1):
        steps[axis - 1] = steps[axis] * max(shape[axis], 1)
    return steps
