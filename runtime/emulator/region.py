"""Places in memory that asynchronous work reads or writes at once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.dsl.frozen import frozen

from .errors import Stop
from .memory import Arena

if TYPE_CHECKING:
    from .machine import Machine

Array = NDArray[Any]


@frozen
class Region:
    """Units of `unit` bytes (1, 2, 4 or 8) of an arena, at byte positions that are multiples."""

    arena: Arena
    index: Array
    unit: int

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.index.size * self.unit

    def read(self) -> Array:
        """Its units as unsigned integers, in its order and shape."""
        at = self.index >> (self.unit.bit_length() - 1)
        found: Array = self.arena.view(np.dtype(f"u{self.unit}"))[at]
        return found

    def write(self, values: Array, thread: int) -> None:
        """Writes its units.

        Raises: Stop where they may not be written, or an mbarrier lies.
        """
        if self.arena.constant:
            raise Stop("out-of-bounds", f"{self.arena.name} cannot be written", thread)
        self._check_free(thread)
        self.arena.store(self.index, values.view(f"u{self.unit}"))

    def check_written(self, thread: int) -> None:
        """Raises: Stop where nothing wrote some of its bytes, or an mbarrier lies."""
        self._check_free(thread)
        missing = self.arena.unwritten(self.index, self.unit)
        if missing is not None:
            at = int(self.index.reshape(-1)[int(np.argmax(missing))])
            raise Stop("uninitialised", f"nothing wrote {self.arena.place(at)}", thread)

    def _check_free(self, thread: int) -> None:
        """Raises: Stop where an mbarrier lies there."""
        held, index = self.arena.held, self.index.reshape(-1)
        if held is not None and held[index // 8].any():
            self.arena.check_free(index, self.unit, np.full(index.size, thread))

    def granules(self, granule: int) -> Array:
        """The numbers of the granules that it touches; some may come more than once."""
        first: Array = self.index.reshape(-1) >> (granule.bit_length() - 1)  # a power of two
        if self.unit <= granule:
            return first
        steps = np.arange(self.unit // granule)
        spread: Array = (first[:, None] + steps).reshape(-1)
        return spread


def count(machine: Machine, space: str, what: str, size: int) -> None:
    """Adds to the bytes that a launch moved, by space and by `read`, `written` or `atomic`."""
    machine.traffic[space, what] = machine.traffic.get((space, what), 0) + size


def span(arena: Arena, start: int, size: int) -> Region:
    """Bytes one after the other, in units as large as they can be."""
    unit = next(u for u in (8, 4, 2, 1) if start % u == 0 and size % u == 0)
    return Region(arena, np.arange(start, start + size, unit), unit)
