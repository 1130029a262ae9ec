"""Small functions of arrays that NumPy does not have, or slowly."""

from __future__ import annotations

from collections.abc import Iterator
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


EVERY = np.arange(32)
"""All lanes of a warp."""


def lanes_by_warp(threads: Array) -> Iterator[tuple[int, Array]]:
    """Each warp of sorted threads, and which of its lanes are among them."""
    warps = threads >> 5
    ends = [*(np.flatnonzero(warps[1:] != warps[:-1]) + 1).tolist(), len(threads)]
    start = 0
    for end in ends if len(threads) else ():
        yield int(warps[start]), threads[start:end] & 31
        start = end
