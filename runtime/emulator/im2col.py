"""Tensor maps whose copies take columns of pixels, as convolutions read them.

As `cuTensorMapEncodeIm2col` makes them (CUDA driver API, "Tensor Map Object Management"; PTX ISA,
"Tensors: im2col mode"). A copy starts at a pixel and goes on through a bounding box, along the
innermost axis first and by the element strides, for as many pixels as a column has; each of them
is moved by the offsets of the instruction, and read as the fill where it is outside the array.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from .memory import Pointer
from .swizzle import WIDTHS
from .tensor_map import (
    MOST_ELEMENT_STRIDE,
    MOST_PER_BOX,
    MOST_RANK,
    EncodedMap,
    TensorMap,
    address_in,
    pack,
)

if TYPE_CHECKING:
    from .memory import Heap

MOST_PIXELS = 1024
_CORNERS = {3: 1 << 15, 4: 1 << 7, 5: 1 << 4}
"""Corners are at least minus this, and less than this, by rank."""


@dataclass(frozen=True, eq=False)
class Im2colMap:
    """A view of `array`, `[N][D][H][W][C]` or without D or D and H, for columns of pixels.

    `lower` and `upper` are the corners of the bounding box, outermost axis first: it begins `lower`
    beyond the first pixel and ends `upper` beyond the last. A copy takes `channels` of `pixels`.

    Raises: ValueError where the driver would refuse the map, saying which rule.
    """

    array: npt.NDArray[Any]
    lower: tuple[int, ...]
    upper: tuple[int, ...]
    channels: int
    pixels: int
    swizzle: int = 0
    element_strides: tuple[int, ...] | None = None
    fill: str = "zero"
    within: Pointer | None = None

    @classmethod
    def of_part(
        cls, memory: npt.NDArray[np.uint8], offset: int, dtype: npt.DTypeLike,
        sizes: Sequence[int], strides: Sequence[int], column: tuple[int, ...], swizzle: int,
        lower: tuple[int, ...], upper: tuple[int, ...], steps: tuple[int, ...],
    ) -> Im2colMap:  # fmt: skip
        """The map of an array that begins `offset` bytes into the bytes of a buffer, as
        `TensorMap.of_part` has it; `column` is its pixels and channels."""
        pixels, channels = column
        box = (*(1 for _ in sizes[1:]), channels)
        part = TensorMap.of_part(memory, offset, dtype, sizes, strides, box)
        return cls(part.array, lower, upper, channels, pixels, swizzle, steps, within=part.within)

    def __post_init__(self) -> None:
        for holds, rule in self._rules():
            if not holds:
                raise ValueError(f"im2col map: {rule}")

    def _rules(self) -> list[tuple[bool, str]]:
        a, size, strides = self.array, self.array.itemsize, self._strides
        inner = self.channels * size
        if a.ndim not in _CORNERS:
            return [(False, f"the array has {a.ndim} dimensions, not 3 to {MOST_RANK}")]
        most = _CORNERS[a.ndim]
        corners = (*self.lower, *self.upper)
        return [
            (len(self.lower) == len(self.upper) == a.ndim - 2,
             f"corners {self.lower} and {self.upper} of {a.ndim - 2} axes"),
            (all(-most <= c < most for c in corners),
             f"corners {self.lower} and {self.upper} are not in {-most}..{most}"),
            (all(n + u > low for n, low, u in zip(a.shape[1:-1], self.lower, self.upper,
                                                  strict=False)), "the bounding box is empty"),
            (1 <= self.channels <= MOST_PER_BOX, f"{self.channels} channels"),
            (1 <= self.pixels <= MOST_PIXELS, f"{self.pixels} pixels in a column"),
            (len(strides) == a.ndim and all(1 <= s <= MOST_ELEMENT_STRIDE for s in strides),
             f"element strides {strides} are not 1 to {MOST_ELEMENT_STRIDE} of each axis"),
            (self.swizzle in WIDTHS, f"no swizzle of {self.swizzle} bytes"),
            (self.fill in ("zero", "nan"), f"no fill {self.fill!r}"),
            (size in (1, 2, 4, 8), f"elements of {size} bytes"),
            (a.strides[-1] == size, "the last dimension is not contiguous"),
            (all(s % 16 == 0 for s in a.strides[:-1]),
             f"strides of {a.strides[:-1]} bytes are not multiples of 16"),
            (inner % 16 == 0, f"channels of {inner} bytes are not a multiple of 16"),
            (not self.swizzle or inner <= self.swizzle,
             f"channels of {inner} bytes are longer than the swizzle's {self.swizzle}"),
        ]  # fmt: skip

    @property
    def _strides(self) -> tuple[int, ...]:
        return self.element_strides or (1,) * self.array.ndim

    def parameter_bytes(self, heap: Heap) -> bytes:
        """The map as a kernel's argument, with its array in the launch's memory."""
        return pack(
            address_in(heap, self.array, self.within), self.array, (self.pixels, self.channels),
            self._strides, self.swizzle, self.fill, (self.lower, self.upper),
        )  # fmt: skip


def column(
    tensor: EncodedMap, start: tuple[int, ...], moves: tuple[int, ...]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
    """Byte offsets of a column's elements, pixel by pixel, and which are inside the array.

    `start` and `moves` are innermost first, `start` with the channel and the image.
    """
    channels, pixels = tensor.counts
    axes = range(1, tensor.rank - 1)
    ends = {d: tensor.shape[d] - 1 + tensor.upper[d - 1] for d in axes}
    at, found, count = list(start), list[npt.NDArray[np.int64]](), 0
    while count < pixels:
        row = np.arange(at[1], ends[1] + 1, tensor.steps[1])[: pixels - count]
        line = np.tile(np.array(at, np.int64), (len(row), 1))
        line[:, 1] = row
        found.append(line)
        count += len(row)
        at[1] = tensor.lower[0]
        for d in range(2, tensor.rank):
            at[d] += tensor.steps[d] if d in axes else 1
            if d not in axes or at[d] <= ends[d]:
                break
            at[d] = tensor.lower[d - 1]
    place = np.concatenate(found)
    place[:, 1:-1] += np.array(moves, np.int64)
    shape, strides = np.array(tensor.shape), np.array(tensor.strides)
    pixel = place[:, 1:]
    inside: npt.NDArray[np.bool_] = np.all((pixel >= 0) & (pixel < shape[1:]), axis=1)
    channel = start[0] + np.arange(channels)
    offset = (pixel * strides[1:]).sum(1)[:, None] + channel * strides[0]
    held = inside[:, None] & ((channel >= 0) & (channel < shape[0]))
    return offset.reshape(-1), held.reshape(-1)
