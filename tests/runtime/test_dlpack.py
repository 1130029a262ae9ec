"""DLPack capsules: NumPy reads what it knows; of other dtypes the structure is looked at."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.lib import NumpyVersion

from stagefuse.runtime.cuda import dlpack

CPU = (1, 0)
NEWEST = (1, 0)


class Exported:
    """Memory of an array as another library would offer it."""

    def __init__(self, array: np.ndarray[Any, Any], **options: Any) -> None:
        self.array, self.options = array, options

    def __dlpack_device__(self) -> tuple[int, int]:
        return CPU

    def __dlpack__(self, *, stream: Any = None, max_version: Any = None, **rest: Any) -> Any:
        return dlpack.capsule(
            self.array.ctypes.data, self.array.shape, self.array.dtype, CPU, self.array,
            max_version=max_version, **self.options,
        )  # fmt: skip


@pytest.mark.parametrize("shape", [(), (0,), (3,), (2, 0, 5), (3, 1, 4), (7, 11)])
@pytest.mark.parametrize(
    "dtype", ["f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?"]
)
def test_numpy_reads_them(shape: tuple[int, ...], dtype: str, rng: np.random.Generator) -> None:
    array = rng.integers(0, 2, shape).astype(dtype)
    found = np.from_dlpack(Exported(array))
    assert found.dtype == array.dtype and found.shape == shape
    np.testing.assert_array_equal(found, array)
    if array.size:
        assert np.shares_memory(found, array)


@pytest.mark.parametrize("max_version", [None, (0, 8), NEWEST])
def test_memory_lives_as_long_as_it_is_read(max_version: Any) -> None:
    before = len(dlpack._held)
    array = np.arange(12.0).reshape(3, 4)
    gone = weakref.ref(array)
    found = np.from_dlpack(Exported(array))
    kept = dlpack.capsule(array.ctypes.data, (12,), array.dtype, CPU, array,
                          max_version=max_version)  # fmt: skip
    del array
    gc.collect()
    assert gone() is not None and found[2, 3] == 11
    del found, kept
    gc.collect()
    assert gone() is None and len(dlpack._held) == before


@pytest.mark.parametrize(
    "dtype, code, bits",
    [(ml_dtypes.bfloat16, 4, 16), (ml_dtypes.float8_e4m3fn, 10, 8), (ml_dtypes.float8_e5m2, 12, 8)],
)
def test_dtypes_that_numpy_lacks(dtype: type, code: int, bits: int) -> None:
    array = np.zeros((2, 3), dtype)
    made = dlpack.capsule(array.ctypes.data, (2, 3), array.dtype, (2, 1), array)
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = dlpack._Managed.from_address(get(made, b"dltensor")).tensor
    assert (tensor.code, tensor.bits, tensor.lanes) == (code, bits, 1)
    assert (tensor.data, tensor.device_type, tensor.device_id) == (array.ctypes.data, 2, 1)
    assert tensor.shape[: tensor.ndim] == [2, 3] and tensor.strides[: tensor.ndim] == [3, 1]


def test_strides(rng: np.random.Generator) -> None:
    array = rng.standard_normal((5, 6))
    part = array[1:4, ::2]
    steps = tuple(n // 8 for n in part.strides)
    made = Exported(part, strides=steps)
    np.testing.assert_array_equal(np.from_dlpack(made), part)


def test_what_can_not_be_offered() -> None:
    array = np.zeros(3, np.complex64)
    with pytest.raises(BufferError, match="complex64"):
        dlpack.capsule(array.ctypes.data, (3,), array.dtype, CPU, array)
    array = np.zeros(3, np.float32)
    with pytest.raises(BufferError, match="read-only"):
        dlpack.capsule(array.ctypes.data, (3,), array.dtype, CPU, array, readonly=True)


@pytest.mark.skipif(NumpyVersion(np.__version__) < "2.1.0", reason="NumPy knew DLPack 0 alone")
def test_what_is_read_only_stays_so() -> None:
    found = np.from_dlpack(Exported(np.zeros(3, np.float32), readonly=True))
    assert not found.flags.writeable
