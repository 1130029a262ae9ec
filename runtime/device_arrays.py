"""Arrays in a device's memory, as pipelines take and give them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from .binding import Binder
from .drivers import Region
from .errors import InputError

if TYPE_CHECKING:
    from stagefuse.compiler.plan import ArgumentPlan


class DeviceArray:
    """An array in a device's memory. `strides` are in bytes; None is dense, row-major.

    Drivers subclass it to hand it to other libraries.
    """

    def __init__(
        self,
        region: Region,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        strides: tuple[int, ...] | None = None,
        readonly: bool = False,
    ) -> None:
        self.region, self.shape, self.dtype = region, shape, dtype
        self.strides, self.readonly = strides, readonly
        self.made_on: Any = None  # the stream that still writes it

    def is_made_on(self, stream: Any) -> None:
        """Say that what is on the stream now still writes it."""
        self.made_on = stream

    @property
    def ndim(self) -> int:
        return len(self.shape)

    @property
    def dense(self) -> bool:
        """Whether it is row-major without gaps; the strides of axes of one element don't matter."""
        expected = self.dtype.itemsize
        if self.strides is None or 0 in self.shape:
            return True
        for extent, stride in zip(reversed(self.shape), reversed(self.strides), strict=True):
            if extent != 1 and stride != expected:
                return False
            expected *= extent
        return True

    def __repr__(self) -> str:
        return f"<{self.dtype.name}{list(self.shape)} in the memory of a device>"


class DeviceBinder(Binder):
    """A binder that takes device arrays too, as they are."""

    def _as_array(self, name: str, argument: ArgumentPlan, value: Any) -> Any:
        return value if isinstance(value, DeviceArray) else super()._as_array(name, argument, value)

    def _dense(self, name: str, value: Any) -> Any:
        if not isinstance(value, DeviceArray):
            return super()._dense(name, value)
        if not value.dense:
            raise InputError(
                f"input `{name}` has gaps or another order in memory than row-major\n"
                f"  = help: make it dense on the device first, such as with `.contiguous()`"
            )
        return value
