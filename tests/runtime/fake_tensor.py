"""Arrays of another library in the fake GPU's memory."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from .fake_cuda import FakeCuda


class FakeTensor:
    """An array of another library on the GPU."""

    def __init__(
        self,
        cuda: FakeCuda,
        address: int,
        shape: tuple[int, ...],
        dtype: Any,
        stream: int | None,
    ) -> None:
        self.cuda, self.address, self.shape = cuda, address, shape
        self.dtype, self.stream = np.dtype(dtype), stream
        self.strides: tuple[int, ...] | None = None
        self.owner: Any = None

    def __dlpack_device__(self) -> tuple[int, int]:
        return (2, 0)

    def __dlpack__(self, **_: Any) -> FakeTensor:
        return self

    def numpy(self, stream: int | None = None) -> Any:
        at = self.cuda.foreign_stream() if stream is None else stream
        return self.cuda.read(self.address, self.shape, self.dtype, at)

    def release(self) -> None:
        """Free it, as its library would."""
        block = self.cuda.blocks.pop(self.address)
        self.cuda._retire(block)
        self.cuda.used -= block.bytes.nbytes
