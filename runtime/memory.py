"""Memory of results and intermediates: aligned, and kept for the next call when let go.

Fresh memory costs more than most kernels (the kernel zeroes each page on first touch), so blocks
of large results return to a pool when the last array that uses them dies.
"""

from __future__ import annotations

import ctypes
import mmap
import threading
from typing import Any

import numpy as np

from .errors import OutOfMemory

ALIGNMENT = 64
LARGE_PAGE = 2 << 20
_HUGE_PAGES, _COLLAPSE = 14, 25
"""Advice to Linux: MADV_HUGEPAGE, and from 6.1 on MADV_COLLAPSE, for what has its pages already."""
POOLED_BYTES = 128 * 1024  # results from this size on come from a pool
MAX_BYTES = 1 << 46

_LIBC = ctypes.CDLL(None)
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_WORDS = (ctypes.c_uint64 * ((1 << 60) - 1)).from_address(0)
"""All of this process's memory as words of 8 bytes."""
_DATA = object.__basicsize__
"""Where an array's object holds the address of its elements: behind what any object begins with.

Source: `PyArrayObject_fields` of NumPy's `ndarraytypes.h`, which its C API compiles into others."""


def pointer_to(array: np.ndarray[Any, Any]) -> int:
    """The address of an array's first element."""
    return _WORDS[(id(array) + _DATA) >> 3]


def overlaps_itself(array: np.ndarray[Any, Any]) -> bool:
    """Whether two elements of an array share a byte. Where strides do not tell, all are looked at.
    """
    if array.flags.c_contiguous or array.size == 0:
        return False
    axes = sorted((abs(s), n) for s, n in zip(array.strides, array.shape, strict=True) if n > 1)
    span = array.itemsize
    for stride, size in axes:
        if stride < span:
            break
        span += stride * (size - 1)
    else:
        return False
    places = np.zeros(1, np.int64)
    for stride, size in axes:
        if stride < 1:
            return True
        places = (places[:, None] + stride * np.arange(size)).reshape(-1)
    return bool((np.diff(np.sort(places)) < array.itemsize).any())


def _ask(array: np.ndarray[Any, Any]) -> int:
    """The same as NumPy says it, which takes ten times as long."""
    return int(array.ctypes.data)


if any(pointer_to(x) != _ask(x) for x in (np.empty(3), np.empty((2, 2), np.int8)[1:, 1:])):
    pointer_to = _ask


def allocate(size: int, purpose: str) -> np.ndarray[Any, Any]:
    """Bytes at an address that is a multiple of 64. Raises OutOfMemory."""
    if not 0 <= size <= MAX_BYTES:
        raise OutOfMemory(f"{_readable(size)} for {purpose} is more than any machine has")
    try:
        raw = np.empty(size + ALIGNMENT, np.uint8)
    except MemoryError:
        raise OutOfMemory(f"no memory for {purpose}: {_readable(size)}") from None
    start = -pointer_to(raw) % ALIGNMENT
    return raw[start : start + size]


def use_large_pages(array: np.ndarray[Any, Any]) -> None:
    """Puts what of an array is whole pages of 2 MB there, where the system allows that.

    One core of Zen 4 reads 17 GB/s from pages of 4 KB, and 28 from these. What is mapped from a
    file stays so, since all of it would be read at once. Source: madvise(2).
    """
    owner: Any = array
    while isinstance(owner, np.ndarray) and owner.base is not None:
        owner = owner.base
    if isinstance(owner.obj if isinstance(owner, memoryview) else owner, mmap.mmap):
        return
    start = pointer_to(array)
    first, end = -(-start // LARGE_PAGE), (start + array.nbytes) // LARGE_PAGE
    if end > first:
        for advice in (_HUGE_PAGES, _COLLAPSE):
            _LIBC.madvise(first * LARGE_PAGE, (end - first) * LARGE_PAGE, advice)


def _readable(size: int) -> str:
    if size < 10_000:
        return f"{size} bytes"
    return f"{size / 1e6:,.1f} MB"


class _Memory(np.ndarray):
    """A class of its own: NumPy makes no array a view of what lies behind a view of these."""


class _Block(np.ndarray):
    """Memory of one result; its death is the death of the last array that views it."""

    home: ResultPool | None = None
    memory: np.ndarray[Any, Any] | None = None

    def __del__(self) -> None:
        if self.home is not None and self.memory is not None:
            self.home.take_back(self.memory)


class ResultPool:
    """Blocks of memory for results, by size. At most `limit` bytes wait to be used again."""

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self._waiting: dict[int, list[np.ndarray[Any, Any]]] = {}
        self._waiting_bytes = 0
        # Re-entrant: a garbage collection inside may free a block of this very pool.
        self._lock = threading.RLock()

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> Any:
        """An array with arbitrary contents that owns its memory alone."""
        with self._lock:
            waiting = self._waiting.get(size)
            memory = waiting.pop() if waiting else None
            if memory is not None:
                self._waiting_bytes -= size
        if memory is None:
            memory = allocate(size, "a result").view(_Memory)
        block = memory.view(_Block)
        block.home, block.memory = self, memory
        return np.ndarray(shape, dtype, buffer=block)

    def take_back(self, memory: np.ndarray[Any, Any]) -> None:
        size = memory.nbytes
        with self._lock:
            if size <= self.limit:
                while self._waiting_bytes + size > self.limit:
                    self._drop_one()
                self._waiting.setdefault(size, []).append(memory)
                self._waiting_bytes += size

    def _drop_one(self) -> None:
        size = next(iter(self._waiting))
        self._waiting[size].pop()
        self._waiting_bytes -= size
        if not self._waiting[size]:
            del self._waiting[size]

    def clear(self) -> None:
        """Free what waits, and keep nothing from now on."""
        with self._lock:
            self.limit = -1
            self._waiting.clear()
            self._waiting_bytes = 0
