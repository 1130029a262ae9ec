"""Tensor maps: what a tensor copy knows of the array in global memory and of the box it moves.

A map is made as `cuTensorMapEncodeTiled` makes one (CUDA driver API, "Tensor Map Object
Management"), with its limits; sizes are given outermost first, as an array's shape, where the
driver wants them innermost first.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import ml_dtypes
import numpy as np
import numpy.typing as npt

from stagefuse.dsl.frozen import frozen

from .memory import Pointer
from .swizzle import WIDTHS

if TYPE_CHECKING:
    from collections.abc import Sequence

    from .memory import Heap

MOST_PER_BOX = 256
MOST_RANK = 5
MOST_ELEMENT_STRIDE = 8
OUT_OF_BOUNDS_NAN = 0x7FF7
"""What H100 fills 16 bits with beyond a map whose fill is NaN, whatever their type."""
SIZE = 128
"""The bytes of a tensor map in memory."""

_KINDS: tuple[np.dtype[Any], ...] = tuple(
    np.dtype(t) for t in ("u1", "u2", "u4", "i4", "u8", "i8", "f2", "f4", "f8", ml_dtypes.bfloat16)
)
_FIELDS = struct.Struct("<8sQ5Q4Q5H5B5BB3h3h")
_MAGIC = b"tensormp"


@dataclass(frozen=True, eq=False)
class TensorMap:
    """A tensor copy's view of `array`: boxes of `box` elements, outermost dimension first.

    `fill` is what elements beyond the array read as. `element_strides` takes every s-th element of
    a dimension, so that a box delivers `ceil(box / s)` of them. `within` is where the array begins
    in a larger one that is another argument.

    Raises: ValueError where the driver would refuse the map, saying which rule.
    """

    array: npt.NDArray[Any]
    box: tuple[int, ...]
    swizzle: int = 0
    element_strides: tuple[int, ...] | None = None
    interleave: int = 0
    fill: str = "zero"
    within: Pointer | None = None

    @classmethod
    def of_part(
        cls,
        memory: npt.NDArray[np.uint8],
        offset: int,
        dtype: npt.DTypeLike,
        sizes: Sequence[int],
        strides: Sequence[int],
        box: tuple[int, ...],
        swizzle: int = 0,
    ) -> TensorMap:
        """The map of an array that begins `offset` bytes into the bytes of a buffer; `strides` are
        bytes, of all dimensions but the last. Raises ValueError if it does not lie in there."""
        steps = (*strides, np.dtype(dtype).itemsize)
        plain = memory.view(np.ndarray)
        seen: npt.NDArray[Any] = np.ndarray(tuple(sizes), dtype, plain, offset, steps)
        return cls(seen, box, swizzle, within=Pointer(memory, offset))

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

    def parameter_bytes(self, heap: Heap) -> bytes:
        """The map as a kernel's argument, with its array in the launch's memory."""
        return self.encode(address_in(heap, self.array, self.within))

    def encode(self, address: int) -> bytes:
        """The map in memory, for an array at `address`: fields of our own, innermost first.

        The real encoding is not documented; programs only carry it.
        """
        steps = self.element_strides or ()
        return pack(address, self.array, self.box, steps, self.swizzle, self.fill)


def address_in(heap: Heap, array: npt.NDArray[Any], within: Pointer | None) -> int:
    """Where an array begins in the launch's memory, if it is part of another one `within` that."""
    if within is None:
        return heap.address_of_view(array)
    return heap.address_of(within.array, "array") + within.byte_offset


def pack(
    address: int, array: npt.NDArray[Any], box: tuple[int, ...], steps: tuple[int, ...],
    swizzle: int, fill: str, corners: tuple[tuple[int, ...], tuple[int, ...]] | None = None,
) -> bytes:  # fmt: skip
    """A map's fields in memory; `corners` are those of im2col, where `box` is a column."""
    rank = array.ndim

    def padded(values: Sequence[int], by: int, count: int = MOST_RANK) -> list[int]:
        return [*reversed(values)] + [by] * (count - len(values))

    flags = (rank, _kind_of(array.dtype), swizzle, fill == "nan", 0, corners is not None)
    lower, upper = corners or ((), ())
    packed = _FIELDS.pack(
        _MAGIC, address, *padded(array.shape, 1), *padded(array.strides[:-1], 0, 4),
        *padded(box, 1), *padded(steps, 1), *flags, *padded(lower, 0, 3), *padded(upper, 0, 3),
    )  # fmt: skip
    return packed.ljust(SIZE, b"\0")


def _kind_of(dtype: np.dtype[Any]) -> int:
    """The number of an element type; types that maps do not know are moved as plain bytes."""
    if dtype in _KINDS:
        return _KINDS.index(dtype)
    return _KINDS.index(np.dtype(f"u{dtype.itemsize}"))


@frozen
class EncodedMap:
    """A tensor map as an instruction finds it in memory; dimensions innermost first."""

    address: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    steps: tuple[int, ...]
    dtype: np.dtype[Any]
    swizzle: int
    fills_nan: bool
    lower: tuple[int, ...] = ()
    upper: tuple[int, ...] = ()
    """The corners of im2col, where `box` is the channels and the pixels of a column."""

    @property
    def rank(self) -> int:
        return len(self.shape)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """Elements that a box delivers in each dimension; channels and pixels of a column."""
        if self.lower:
            return self.box[0], self.box[1]
        return tuple(-(-b // s) for b, s in zip(self.box, self.steps, strict=True))

    @cached_property
    def box_bytes(self) -> int:
        """The bytes that a copy of one box delivers, in bounds or not."""
        return int(np.prod(self.counts)) * self.dtype.itemsize

    def elements(
        self, start: tuple[int, ...]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """Byte offsets from `address` of a box's elements, in its order, and which are inside.

        `start` is innermost first, and may be negative.
        """
        offset, inside = np.zeros((), np.int64), np.ones((), np.bool_)
        for d in reversed(range(self.rank)):
            at = np.arange(self.counts[d], dtype=np.int64) * self.steps[d] + start[d]
            offset = offset[..., None] + at * self.strides[d]
            inside = inside[..., None] & ((at >= 0) & (at < self.shape[d]))
        return offset.reshape(-1), inside.reshape(-1)

    @cached_property
    def fill(self) -> npt.NDArray[Any]:
        """One element beyond the array; NaN as H100 makes it, whatever the type."""
        words = np.full(4, OUT_OF_BOUNDS_NAN if self.fills_nan else 0, np.uint16)
        made: npt.NDArray[Any] = words.view(np.uint8)[: self.dtype.itemsize].view(self.dtype)
        return made

    @cached_property
    def wide(self) -> EncodedMap | None:
        """The same array and box in elements of 8 bytes, `None` where they do not add up."""
        per = 8 // self.dtype.itemsize
        if per == 1 or self.lower or self.fills_nan or self.shape[0] % per or self.steps[0] != 1:
            return None
        return EncodedMap(
            self.address,
            (self.shape[0] // per, *self.shape[1:]),
            (8, *self.strides[1:]),
            (self.box[0] // per, *self.box[1:]),
            self.steps,
            np.dtype(np.uint64),
            self.swizzle,
            False,
        )

    def widest(self, start: tuple[int, ...]) -> tuple[EncodedMap, tuple[int, ...]]:
        """This map and the start of a box, in the largest elements in which a copy is the same."""
        per = 8 // self.dtype.itemsize
        if self.wide is None or start[0] % per:
            return self, start
        return self.wide, (start[0] // per, *start[1:])


@lru_cache(maxsize=256)
def decode(encoded: bytes) -> EncodedMap | None:
    """The fields of a map in memory, or `None` where these bytes are none."""
    magic, address, *rest = _FIELDS.unpack(encoded[: _FIELDS.size])
    if magic != _MAGIC:
        return None
    sizes, strides, box, steps = rest[:5], rest[5:9], rest[9:14], rest[14:19]
    rank, kind, width, fills_nan, _, is_im2col = rest[19:25]
    axes = rank - 2 if is_im2col else 0
    dtype = _KINDS[kind]
    return EncodedMap(
        address,
        tuple(sizes[:rank]),
        (dtype.itemsize, *strides[: rank - 1]),
        tuple(box[:rank]),
        tuple(steps[:rank]),
        dtype,
        width,
        bool(fills_nan),
        tuple(rest[25 : 25 + axes]),
        tuple(rest[28 : 28 + axes]),
    )


_FIELD_STARTS = {
    "global_address": (8, "<Q"),
    "global_dim": (16, "<Q"),
    "global_stride": (56, "<Q"),
    "box_dim": (88, "<H"),
    "element_stride": (98, "<B"),
    "rank": (103, "<B"),
    "elemtype": (104, "<B"),
    "swizzle_mode": (105, "<B"),
    "fill_mode": (106, "<B"),
    "interleave_layout": (107, "<B"),
}
"""Where fields stand in `_FIELDS`, by the names of `tensormap.replace`."""

_ELEMENT_TYPES = ("u1", "u2", "u4", "i4", "u8", "i8", "f2", "f4", "f4", "f8", ml_dtypes.bfloat16,
                  "f4", "f4")  # fmt: skip
"""Element types as `tensormap.replace` numbers them (PTX ISA, its table of .elemtype)."""


def replace(encoded: bytes, field: str, ordinal: int, value: int) -> bytes:
    """A map with one field changed, as `tensormap.replace` gives its values.

    The rank is given less one; types and swizzles by their numbers in the PTX ISA.
    """
    start, code = _FIELD_STARTS[field]
    if field == "elemtype":
        value = _kind_of(np.dtype(_ELEMENT_TYPES[value]))
    if field == "swizzle_mode":
        value = WIDTHS[value]
    made = bytearray(encoded)
    made[: len(_MAGIC)] = _MAGIC
    struct.pack_into(code, made, start + ordinal * struct.calcsize(code), value + (field == "rank"))
    return bytes(made)
