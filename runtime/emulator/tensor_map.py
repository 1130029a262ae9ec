"""Tensor maps: what a tensor copy knows of the array in global memory and of the box it moves.

A map is made as `cuTensorMapEncodeTiled` makes one (CUDA driver API, "Tensor Map Object
Management"), with its limits; sizes are given outermost first, as an array's shape, where the
driver wants them innermost first.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

from .swizzle import WIDTHS

MOST_PER_BOX = 256
MOST_RANK = 5
MOST_ELEMENT_STRIDE = 8


@dataclass(frozen=True, eq=False)
class TensorMap:
    """A tensor copy's view of `array`: boxes of `box` elements, outermost dimension first.

    `fill` is what elements beyond the array read as. `element_strides` takes every s-th element of
    a dimension, so that a box delivers `ceil(box / s)` of them.

    Raises: ValueError where the driver would refuse the map, saying which rule.
    """

    array: npt.NDArray[Any]
    box: tuple[int, ...]
    swizzle: int = 0
    element_strides: tuple[int, ...] | None = None
    interleave: int = 0
    fill: str = "zero"

    def __post_init__(self) -> None:
        object.__setattr__(self, "box", tuple(int(b) for b in self.box))
        strides = self.element_strides or (1,) * len(self.box)
        object.__setattr__(self, "element_strides", tuple(int(s) for s in strides))
        for holds, rule in self._rules():
            if not holds:
                raise ValueError(f"tensor map: {rule}")

    def _rules(self) -> list[tuple[bool, str]]:
        a, size = self.array, self.array.itemsize
        strides = self.element_strides or ()
        inner = self.box[-1] * size if self.box else 0
        return [
            (1 <= a.ndim <= MOST_RANK, f"the array has {a.ndim} dimensions, not 1 to {MOST_RANK}"),
            (len(self.box) == a.ndim, f"box {self.box} of an array with {a.ndim} dimensions"),
            (len(strides) == a.ndim, f"element strides {strides} of {a.ndim} dimensions"),
            (size in (1, 2, 4, 8), f"elements of {size} bytes"),
            (all(n >= 1 for n in a.shape), f"a dimension of {a.shape} is empty"),
            (all(1 <= b <= MOST_PER_BOX for b in self.box),
             f"box {self.box} is not 1 to {MOST_PER_BOX} in each dimension"),
            (all(1 <= s <= MOST_ELEMENT_STRIDE for s in strides),
             f"element strides {strides} are not 1 to {MOST_ELEMENT_STRIDE}"),
            (self.swizzle in WIDTHS, f"no swizzle of {self.swizzle} bytes"),
            (self.interleave == 0, f"interleave {self.interleave} is not supported"),
            (self.fill in ("zero", "nan"), f"no fill {self.fill!r}"),
            (self.fill == "zero" or a.dtype.kind not in "iub", f"fill 'nan' of {a.dtype} elements"),
            (a.ndim == 0 or a.strides[-1] == size or a.shape[-1] == 1,
             "the last dimension is not contiguous"),
            (all(s % 16 == 0 and 0 <= s < 2**40 for s in a.strides[:-1]),
             f"strides of {a.strides[:-1]} bytes are not multiples of 16"),
            (inner % 16 == 0, f"the box's rows of {inner} bytes are not a multiple of 16"),
            (not self.swizzle or inner <= self.swizzle,
             f"the box's rows of {inner} bytes are longer than the swizzle's {self.swizzle}"),
        ]  # fmt: skip

    @property
    def rank(self) -> int:
        return self.array.ndim

    @cached_property
    def steps(self) -> tuple[npt.NDArray[np.int64], ...]:
        """For each dimension the elements of a box, from its start."""
        strides = self.element_strides or ()
        return tuple(
            np.arange(0, b, s, dtype=np.int64) for b, s in zip(self.box, strides, strict=True)
        )

    @cached_property
    def box_bytes(self) -> int:
        """The bytes that a copy of one box delivers, in bounds or not."""
        return int(np.prod([len(s) for s in self.steps])) * self.array.itemsize

    def elements(
        self, start: tuple[int, ...]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Byte offsets in the array of a box's elements, row-major, and which are inside it.

        `start` is outermost first, and may be negative.
        """
        offset = np.zeros((), np.int64)
        inside = np.ones((), np.bool_)
        for step, first, size, stride in zip(
            self.steps, start, self.array.shape, self.array.strides, strict=True
        ):
            at = step + first
            offset = offset[..., None] + at * stride
            inside = inside[..., None] & ((at >= 0) & (at < size))
        return offset.reshape(-1), inside.reshape(-1)

    def fill_bytes(self) -> npt.NDArray[np.uint8]:
        """The bytes of one element beyond the array."""
        value = np.zeros(1, self.array.dtype)
        if self.fill == "nan":
            value[0] = np.nan
        return value.view(np.uint8)
