"""Memory of results and intermediates: aligned, and kept for the next call when let go.

Fresh memory costs more than most kernels (the kernel zeroes each page on first touch), so blocks
of large results are used again once no array does.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
from collections import deque
from collections.abc import Sequence
from typing import Any, NamedTuple, TypeAlias

import numpy as np

from . import forks
from .errors import OutOfMemory

ALIGNMENT = 64
LARGE_PAGE = 2 << 20
_HUGE_PAGES, _COLLAPSE = 14, 25
"""Advice to Linux: MADV_HUGEPAGE, and from 6.1 on MADV_COLLAPSE, for what has its pages already."""
POOLED_BYTES = 128 * 1024  # results from this size on come from a pool
MAX_BYTES = 1 << 46
LOOKS = 4  # at blocks that may be in use, before there is another
KEYS = 64
"""Combinations of shape and dtype asked for last whose blocks a pool keeps, and up to as many more.
"""

_LIBC = ctypes.CDLL(None)
_LIBC.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
_DATA = object.__basicsize__
"""Where an array's object holds the address of its elements: behind what any object begins with.

Source: `PyArrayObject_fields` of NumPy's `ndarraytypes.h`, which its C API compiles into others."""
_WORDS = (ctypes.c_uint64 * ((1 << 60) - 8)).from_address(_DATA)
"""This process's memory from there on, as words of 8 bytes."""


def pointer_to(array: np.ndarray[Any, Any]) -> int:
    """The address of an array's first element."""
    return _WORDS[id(array) >> 3]


def point_to(
    slots: memoryview, places: Sequence[tuple[int, int]], arrays: Sequence[np.ndarray[Any, Any]]
) -> None:
    """Writes to slots the addresses of arrays, given the number of an array and of a slot each."""
    for number, slot in places:  # without a call for each, which would take twice as long
        slots[slot] = _WORDS[id(arrays[number]) >> 3]


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


def _ask_all(
    slots: memoryview, places: Sequence[tuple[int, int]], arrays: Sequence[np.ndarray[Any, Any]]
) -> None:
    for number, slot in places:
        slots[slot] = _ask(arrays[number])


if any(pointer_to(x) != _ask(x) for x in (np.empty(3), np.empty((2, 2), np.int8)[1:, 1:])):
    pointer_to, point_to = _ask, _ask_all


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


class _Block(NamedTuple):
    """An array, and the one that owns its elements."""

    whole: np.ndarray[Any, Any]
    memory: np.ndarray[Any, Any]


def _block(shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> _Block:
    """Memory for an array of `size` bytes. Raises OutOfMemory."""
    whole = allocate(size, "a result").view(dtype).reshape(shape)
    assert isinstance(whole.base, np.ndarray)
    return _Block(whole, whole.base)


def _uses(block: _Block) -> int:
    """References to a block's memory. A view of an array, or of a view of it, refers to what owns
    the elements (`PyArray_SetBaseObject` of NumPy's C API)."""
    return sys.getrefcount(block.memory)


def _uses_of_a_free_one() -> int:
    """How many there are where nothing else refers to a block; 0 where they do not tell."""
    block = _block((4,), np.dtype(np.float32), 16)
    before = _uses(block)
    view = block.whole.view()[1:]
    while_seen = _uses(block)
    del view
    counted = (before, while_seen, _uses(block)) == (before, before + 1, before)
    return before if counted and getattr(sys, "_is_gil_enabled", lambda: True)() else 0


_FREE = _uses_of_a_free_one()


_Key: TypeAlias = tuple[tuple[int, ...], np.dtype[Any]]


class ResultPool:
    """Blocks of memory for results, by shape and dtype. At most `limit` bytes are kept, in use or
    not, of the combinations that were asked for lately.

    They are in two generations, so that asking again for what is in the younger one costs nothing
    more. When that has KEYS combinations it becomes the older one, whose blocks go.
    """

    def __init__(self, limit: int = 1 << 30) -> None:
        self.limit = limit
        self._younger: dict[_Key, deque[_Block]] = {}
        self._older: dict[_Key, deque[_Block]] = {}
        self._bytes = 0
        self._lock = forks.lock()

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> Any:
        """An array with arbitrary contents that owns its memory alone."""
        with self._lock:
            blocks = self._younger.get((shape, dtype))
            if blocks is None:
                blocks = self._blocks((shape, dtype))
            for _ in range(min(len(blocks), LOOKS)):
                block = blocks.popleft()
                result = block.whole.view() if _uses(block) == _FREE else None
                blocks.append(block)
                if result is not None:
                    return result
        return self._another(shape, dtype, size)

    def _blocks(self, key: _Key) -> deque[_Block]:
        """The blocks of a combination, which is in the younger generation from then on."""
        blocks = self._younger.get(key)
        if blocks is None:
            blocks = self._older.pop(key, None) or deque()
            if len(self._younger) >= KEYS:
                self._bytes -= sum(b.whole.nbytes for x in self._older.values() for b in x)
                self._older, self._younger = self._younger, {}
            self._younger[key] = blocks
        return blocks

    def _another(self, shape: tuple[int, ...], dtype: np.dtype[Any], size: int) -> Any:
        """The same, of a new block."""
        block = _block(shape, dtype, size)
        result = block.whole.view()  # before anyone else may see the block
        with self._lock:
            if self._bytes + size > self.limit:
                self._let_go(self._bytes + size - self.limit)
            if _FREE and self._bytes + size <= self.limit:
                self._blocks((shape, dtype)).append(block)
                self._bytes += size
        return result

    def _let_go(self, excess: int) -> None:
        """Frees blocks that nothing uses, up to so many bytes."""
        for generation in (self._older, self._younger):
            for key, blocks in list(generation.items()):
                for _ in range(len(blocks)):
                    block = blocks.popleft()
                    if excess > 0 and _uses(block) == _FREE:
                        excess -= block.whole.nbytes
                        self._bytes -= block.whole.nbytes
                    else:
                        blocks.append(block)
                if not blocks:
                    del generation[key]

    def clear(self) -> None:
        """Free what waits, and keep nothing from now on."""
        with self._lock:
            self.limit = -1
            self._younger, self._older = {}, {}
            self._bytes = 0
