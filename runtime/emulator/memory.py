"""Memory: arenas of bytes that know what was written, and addresses that lead into them.

Addresses of 64 bits (*generic*): an allocation of global or constant memory begins every
2^33 bytes, so that an index that is wrong by a little, or by a lot, does not end in another one;
bits 48 to 50 say shared, local and parameter memory. An address of 32 bits in shared memory is
an offset in the block's own, or, from 2^24 on, one of the cluster: rank + 1, then the offset.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.dsl.frozen import frozen

from .errors import Stop

Array = NDArray[Any]

ALLOCATION_BITS = 33
SHARED_WINDOW = 1 << 48
LOCAL_WINDOW = 2 << 48
PARAM_WINDOW = 3 << 48
WINDOW_BITS = 48
CALL_PARAM = 1 << 46
"""A bit of addresses in param space of what calls pass; a kernel's own parameters lack it."""
RANK_BITS = 24

_ONES = {1: np.uint8(1), 2: np.uint16(0x0101), 4: np.uint32(0x01010101),
         8: np.uint64(0x0101010101010101)}  # fmt: skip
_UNSIGNED: dict[int, np.dtype[Any]] = {n: np.dtype(f"u{n}") for n in (1, 2, 4, 8)}


class Arena:
    """Bytes, and which of them were written.

    `valid` is `None` where all were; else a byte for each, 1 once it was written. `limit` is how
    many bytes each part has (a block's shared memory, a thread's local memory), `stride` how far
    parts lie apart.
    """

    def __init__(
        self, name: str, size: int, *, data: Array | None = None, valid: bool = True,
        limit: int | None = None, stride: int = 0,
    ) -> None:  # fmt: skip
        self.name = name
        self.bytes: Array = data if data is not None else _garbage(size)
        self.valid: Array | None = None if valid else np.zeros(size, np.uint8)
        self.limit = size if limit is None else limit
        self.stride = stride
        self.shadow: Any = None
        """What the race detector knows of these bytes."""
        self.maps: dict[int, int] = {}
        """How often this launch changed the tensor maps that begin at some bytes."""
        self.variable_at: Callable[[int], str] | None = None
        """What lies at an offset, in words, where parts have names."""
        self.constant = False
        self.held: Array | None = None
        """Which eight bytes are mbarriers, once there were any."""
        self._views: dict[Any, Array] = {}

    @property
    def title(self) -> str:
        """Its name in messages."""
        return f"{self.name} memory" if self.name in ("shared", "local") else self.name

    def place(self, index: int) -> str:
        """A position among its bytes in words."""
        offset = index % self.stride if self.stride else index
        variable = self.variable_at(offset) if self.variable_at else ""
        return f"offset {offset} of {self.title}" + (f" ({variable})" if variable else "")

    def view(self, dtype: np.dtype[Any]) -> Array:
        """The bytes as elements; a rest that is no whole element is left out."""
        found = self._views.get(dtype)
        if found is None:
            whole = self.bytes.size // dtype.itemsize * dtype.itemsize
            found = self._views[dtype] = self.bytes[:whole].view(dtype)
        return found

    def _valid_view(self, size: int) -> Array:
        found: Array | None = self._views.get(size)
        if found is None:
            assert self.valid is not None
            whole = self.valid.size // size * size
            found = self.valid[:whole].view(_UNSIGNED[size])
            self._views[size] = found
        return found

    def load(self, index: Array, dtype: np.dtype[Any]) -> Array:
        """Elements at byte positions, which are in bounds and aligned."""
        values: Array = self.view(dtype)[index // dtype.itemsize]
        return values

    def store(self, index: Array, values: Array) -> None:
        """Writes elements at byte positions, which are in bounds and aligned."""
        size = values.dtype.itemsize
        at = index // size
        self.view(values.dtype)[at] = values
        if self.valid is not None:
            self._valid_view(size)[at] = _ONES[size]

    def forget(self, index: Array, size: int) -> None:
        """Makes bytes count as unwritten: `size` of them, a multiple of 4 and aligned."""
        for j in range(0, size, 4):
            self._valid_view(4)[(index + j) // 4] = 0

    def hold(self, index: int, held: bool) -> None:
        """Notes that an mbarrier lies at a place, or no longer."""
        if self.held is None:
            self.held = np.zeros(-(-self.bytes.size // 8), np.bool_)
        self.held[index // 8] = held

    def check_free(self, index: Array, size: int, threads: Array) -> None:
        """Raises: Stop where an ordinary access touches an mbarrier.

        PTX ISA, "mbarrier": only its own operations may be done there until `mbarrier.inval`.
        """
        if self.held is None:
            return
        for offset in range(0, size, 8):
            touched = self.held[(index + offset) // 8]
            if touched.any():
                at = int(np.flatnonzero(touched)[0])
                where = int(index[at]) % self.stride + offset
                raise Stop("barrier", f"offset {where:#x} of shared memory is an mbarrier: no "
                           "other access may be made to it before `mbarrier.inval`",
                           int(threads[at]))  # fmt: skip

    def unwritten(self, index: Array, size: int) -> Array | None:
        """Which of these elements have bytes that nothing wrote, `None` if none has."""
        if self.valid is None:
            return None
        missing: Array = self._valid_view(size)[index // size] != _ONES[size]
        return missing if missing.any() else None

    def untouched(self, index: Array, size: int) -> Array | None:
        """Which of these elements have no byte that something wrote, `None` if none has."""
        if self.valid is None:
            return None
        missing: Array = self._valid_view(size)[index // size] == 0
        return missing if missing.any() else None


def _garbage(size: int) -> Array:
    """Bytes that are unlikely to look right."""
    return np.full(size, 0xCD, np.uint8)


@frozen
class Pointer:
    """A pointer argument: `byte_offset` bytes into an array that is a device buffer."""

    array: Array
    byte_offset: int = 0


class Uninitialised(np.ndarray[Any, Any]):
    """A buffer that nothing wrote yet; a view of one is an ordinary array."""

    written: Array | None = None
    """Which of its bytes were written."""


def uninitialised(shape: int | tuple[int, ...], dtype: Any) -> Uninitialised:
    """A buffer whose elements count as unwritten until a kernel writes them.

    It may be passed to several launches; what one writes is written for the next.
    """
    made = np.empty(shape, dtype).view(Uninitialised)
    made.view(np.ndarray).reshape(-1).view(np.uint8)[:] = 0xCD
    made.written = np.zeros(made.nbytes, np.uint8)
    return made


@dataclass
class Heap:
    """Global memory of a launch: allocations by number."""

    arenas: list[Arena] = field(default_factory=list)
    _known: dict[tuple[int, int], int] = field(default_factory=dict)
    _copies: list[tuple[Array, Array]] = field(default_factory=list)
    _kept: list[Any] = field(default_factory=list)

    def add(self, arena: Arena) -> int:
        """The address of an arena that becomes part of this memory."""
        self.arenas.append(arena)
        return len(self.arenas) << ALLOCATION_BITS

    def place(self, address: int) -> str:
        """What an address of an allocation is in words, "" for another one."""
        number, offset = address >> ALLOCATION_BITS, address & ((1 << ALLOCATION_BITS) - 1)
        return self.arenas[number - 1].place(offset) if 0 < number <= len(self.arenas) else ""

    def nearest(self, address: int) -> str:
        """How far an address that is in no allocation lies before the next one, in words."""
        number = (address >> ALLOCATION_BITS) + 1
        distance = (number << ALLOCATION_BITS) - address
        if not 0 < number <= len(self.arenas) or distance > 1 << (ALLOCATION_BITS - 1):
            return ""
        return f", {distance} bytes before {self.arenas[number - 1].title}"

    def address_of(self, array: Array, name: str) -> int:
        """The address of an array's first byte, which lies in an allocation of its own."""
        key = (array.__array_interface__["data"][0], array.nbytes)
        if key not in self._known:
            self._known[key] = self.add(self._arena(array, name))
            self._kept.append(array)
        return self._known[key]

    def address_of_view(self, array: Array) -> int:
        """The address of an array that may be a part of a larger one, with gaps.

        The bytes from its first element to its last belong to the allocation.
        """
        if array.flags.c_contiguous:
            return self.address_of(array, "array")
        low, high = np.lib.array_utils.byte_bounds(array)
        self._kept.append(array)
        raw = (ctypes.c_uint8 * (high - low)).from_address(low)
        return self.address_of(np.ctypeslib.as_array(raw), "array")

    def _arena(self, array: Array, name: str) -> Arena:
        data = array.view(np.ndarray)
        direct = data.flags.c_contiguous and data.flags.writeable
        flat = data if direct else np.ascontiguousarray(data).copy()
        if not direct and data.flags.writeable:
            self._copies.append((array, flat))
        arena = Arena(name, data.nbytes, data=flat.reshape(-1).view(np.uint8))
        if isinstance(array, Uninitialised) and array.written is not None:
            arena.valid = array.written
        return arena

    def copy_back(self) -> None:
        """Writes to arrays that are not contiguous what kernels wrote to their copies."""
        for array, flat in self._copies:
            array[...] = flat.reshape(array.shape)


def check_aligned(addresses: Array, size: int, threads: Array) -> None:
    """Raises: Stop where an address is no multiple of the size of an access."""
    if size > 1 and int(np.bitwise_or.reduce(addresses)) & (size - 1):
        at = int(np.flatnonzero(addresses & addresses.dtype.type(size - 1))[0])
        raise Stop("misaligned", f"address {int(addresses[at]):#x} is no multiple of {size}",
                   int(threads[at]))  # fmt: skip
