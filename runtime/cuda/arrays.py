"""Arrays in a GPU's memory for other libraries: DLPack and the CUDA array interface.

Source: "Python specification for DLPack" (semantics of `stream`), "CUDA Array Interface" version 3
(Numba).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from stagefuse.runtime.device_arrays import DeviceArray
from stagefuse.runtime.drivers import Region

from . import calls
from .results import Users

if TYPE_CHECKING:
    from .driver import CudaDriver

_LEGACY_STREAM = 1
_CUDA = 2  # kDLCUDA
# What the array interface can't name is not offered by it.
_PLAIN_KINDS = "fiub"


class CudaArray(DeviceArray):
    """A result or an input in a GPU's memory."""

    def __init__(
        self,
        region: Region,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
        strides: tuple[int, ...] | None = None,
        readonly: bool = False,
        *,
        driver: CudaDriver,
        number: int,
        users: Users | None = None,
    ) -> None:
        super().__init__(region, shape, dtype, strides, readonly)
        self.driver, self.number, self.users = driver, number, users

    @property
    def address(self) -> int:
        return int(self.region.memory.handle) + self.region.offset

    def is_made_on(self, stream: Any) -> None:
        super().is_made_on(stream)
        if self.users is not None:
            self.users.streams.add(stream)

    def order_before(self, stream: int) -> None:
        """Let what comes next on the stream wait until the array is whole."""
        if self.users is not None:
            self.users.streams.add(stream)
        if self.made_on is None or self.made_on == stream:
            return
        with self.driver.active():
            event = calls.event()
            try:
                calls.record(event, self.made_on)
                calls.wait(stream, event)
            finally:
                calls.close_event(event)

    def __dlpack_device__(self) -> tuple[int, int]:
        return (_CUDA, self.number)

    def __dlpack__(
        self,
        *,
        stream: int | None = None,
        max_version: tuple[int, int] | None = None,
        dl_device: tuple[int, int] | None = None,
        copy: bool | None = None,
    ) -> Any:
        if dl_device not in (None, self.__dlpack_device__()) or copy:
            raise BufferError("an array of a pipeline is handed on where it is, without a copy")
        if stream != -1:
            self.order_before(_LEGACY_STREAM if stream is None else stream)
        elif self.users is not None:
            self.users.unknown = True
        size = self.dtype.itemsize
        steps = None if self.strides is None else tuple(n // size for n in self.strides)
        return calls.export(
            self.address, self.shape, steps, self.dtype, self.number, self.region.memory.owner,
            max_version,
        )  # fmt: skip

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        if self.dtype.kind not in _PLAIN_KINDS:
            raise AttributeError(f"the CUDA array interface has no {self.dtype.name}")
        if self.users is not None:
            self.users.unknown = True
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.address, self.readonly),
            "strides": self.strides,
            "stream": self.made_on,
            "version": 3,
        }
