"""The states of a session in the memory of a device."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from contextlib import suppress
from math import prod
from typing import Any

import numpy as np

from .device_prepared import padded
from .drivers import Driver, Memory, Region, closing, quietly


class DeviceStates:
    """One piece of memory with a region for each state.

    Who puts work on them waits for it: nothing else needs to.
    """

    def __init__(
        self, driver: Driver, types: Sequence[tuple[np.dtype[Any], tuple[int, ...]]]
    ) -> None:
        self.driver, self.types = driver, tuple(types)
        self.memory: Memory | None = None
        self.stream: Any = None
        sizes = [prod(shape) * dtype.itemsize for dtype, shape in types]
        with driver.active():
            try:
                self.memory = driver.allocate(max(sum(map(padded, sizes)), 1), "states")
                self.stream = driver.stream()
            except BaseException:
                self._give_back()
                raise
        starts = [sum(map(padded, sizes[:i])) for i in range(len(sizes))]
        self.regions = [
            Region(self.memory, start, size) for start, size in zip(starts, sizes, strict=True)
        ]

    def read(self, number: int) -> np.ndarray[Any, Any]:
        dtype, shape = self.types[number]
        found = np.empty(shape, dtype)
        if found.nbytes:
            with self.driver.active():
                self.driver.copy_out(found, self.regions[number], self.stream)
                self.driver.finish(self.stream)
        return found

    def write(self, number: int, value: np.ndarray[Any, Any]) -> None:
        region = self.regions[number]
        if not region.size:
            return
        repeated = not any(value.strides) and value.size > 1
        is_zero = repeated and not any(value.reshape(-1)[:1].tobytes())
        with self.driver.active():
            if is_zero:  # nothing as large as the state is made here
                self.driver.clear(region, self.stream)
            else:
                dense = np.require(value, None, ["C", "A"])
                self.driver.copy_in(region, dense, self.stream)
            self.driver.finish(self.stream)

    def close(self) -> None:
        if self.memory is not None:
            with closing(self.driver):
                self._give_back()

    def _give_back(self) -> None:
        driver = self.driver
        memory, self.memory = self.memory, None
        if self.stream is not None:
            quietly((driver.finish, self.stream), (driver.close_stream, self.stream))
        if memory is not None:
            quietly((driver.free, memory))
        self.stream = None

    def __del__(self) -> None:
        if getattr(self, "memory", None) is not None and not sys.is_finalizing():
            with suppress(Exception):
                self.close()
