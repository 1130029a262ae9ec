"""What an access writes: whether it changes memory, whether threads disagree."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from .memory import Arena

Array = NDArray[Any]


class Written:
    """What an access writes, to tell whether it changes anything."""

    def __init__(self, arena: Arena, index: Array, values: list[Array], n: int) -> None:
        self.arena, self.index, self.values, self.n = arena, index, values, n
        self._changed: Array | None = None

    @property
    def changed(self) -> Array:
        """Whether each thread's values differ from what memory holds."""
        if self._changed is None:
            changed = np.zeros(self.n, np.bool_)
            for j, value in enumerate(self.values):
                item = value.dtype.itemsize
                changed |= self.arena.load(self.index + j * item, value.dtype) != value
            self._changed = changed
        return self._changed

    def differ(self, a: Array, b: Array) -> Array:
        """Whether threads a and b write different values, position by position.

        Not where they may be roundings of one number: sums over lanes differ so when a product is
        contracted into the first addition, and Triton lets every lane store its own.
        """
        result = np.zeros(len(a), np.bool_)
        for value in self.values:
            whole = np.ascontiguousarray(np.broadcast_to(value, (self.n,)))
            unlike = whole[a] != whole[b]
            if unlike.any():
                unlike &= ~_alike(whole[a], whole[b])
            result |= unlike
        return result


_ALIKE = 1 / 16
"""How far apart roundings of a sum may be, of their size: much of it may have cancelled."""


def _alike(a: Array, b: Array) -> Array:
    """Which bits, read as normal numbers of their size, are nearly the same number."""
    if a.dtype.itemsize not in _SMALLEST:
        return np.zeros(len(a), np.bool_)
    x, y = (v.view(f"f{v.dtype.itemsize}").astype(np.float64) for v in (a, b))
    least = np.minimum(np.abs(x), np.abs(y))
    near: Array = np.abs(x - y) <= _ALIKE * least
    return near & (least >= _SMALLEST[a.dtype.itemsize])


_SMALLEST = {2: 2.0**-14, 4: 2.0**-126, 8: 2.0**-1022}
"""The smallest normal number of a float of so many bytes."""
