"""Small functions of arrays that NumPy does not have, or slowly."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


def distinct(values: Array) -> Array:
    """The different values, sorted. Quick where they are sorted already, as threads are."""
    if len(values) < 2:
        return values.copy()
    steps = values[1:] != values[:-1]
    if not (values[1:] >= values[:-1]).all():
        values = np.sort(values)
        steps = values[1:] != values[:-1]
    keep = np.empty(len(values), np.bool_)
    keep[0], keep[1:] = True, steps
    found: Array = values[keep]
    return found


def warps_of(threads: Array) -> Array:
    """The warps of threads."""
    return distinct(threads >> 5)
