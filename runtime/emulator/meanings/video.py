"""Arithmetic on the parts of a word, and on words with a second operation after it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.compiler.ptx.table import Match
from stagefuse.runtime.emulator.values import DTYPES

from . import pure

_COMPARISONS: dict[str, Callable[[Any, Any], Any]] = {
    "eq": np.equal, "ne": np.not_equal, "lt": np.less, "le": np.less_equal, "gt": np.greater,
    "ge": np.greater_equal,
}  # fmt: skip
_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "vadd": np.add,
    "vsub": np.subtract,
    "vavrg": lambda a, b: np.where(a + b < 0, a + b, a + b + 1) >> 1,
    "vabsdiff": lambda a, b: np.abs(a - b),
    "vmin": np.minimum,
    "vmax": np.maximum,
    "vshl": np.left_shift,
    "vshr": np.right_shift,
}
_SECOND: dict[str, Callable[[Any, Any], Any]] = {
    "add": np.add, "min": np.minimum, "max": np.maximum
}  # fmt: skip


def _operation(match: Match) -> Callable[[Any, Any], Any]:
    """The first operation, on integers of 64 bits."""
    opcode = match.form.opcode.rstrip("24")
    if opcode == "vset":
        compare = _COMPARISONS[match.get("V")]
        return lambda a, b: compare(a, b).astype(np.int64)
    op, mode = _OPERATIONS[opcode], match.get("mode")
    if not mode:
        return op

    def shift(a: Any, b: Any) -> Any:
        b = b & 31 if mode == "wrap" else np.minimum(b, 32)
        if opcode == "vshl" and "sat" in match:  # what is clamped for sure must not overflow here
            a = np.where(b < 2, a, np.clip(a, -(1 << 30), 1 << 30))
        return op(a, b)

    return shift


def _range(kind: str, bits: int) -> tuple[int, int]:
    return (-(1 << bits - 1), (1 << bits - 1) - 1) if kind[0] == "s" else (0, (1 << bits) - 1)


@pure("video.simd")
def simd(match: Match) -> Callable[..., Any]:
    op, bits = _operation(match), 32 // int(match.form.opcode[-1])
    result_kind = match.get("D", "u32")

    def parts(x: Any, kind: str) -> Any:
        dtype = f"{'i' if kind[0] == 's' else 'u'}{bits // 8}"
        return np.atleast_1d(x).view(dtype).reshape(-1, 32 // bits).astype(np.int64)

    low, high = _range(result_kind, bits)

    def run(a: Any, b: Any, c: Any) -> Any:
        result = op(parts(a, match.get("A")), parts(b, match.get("B")))
        dtype = DTYPES[result_kind]
        if "add" in match.slots:
            total = result.sum(axis=1) + np.asarray(c).astype(np.int64)
            return (total & 0xFFFFFFFF).astype(np.uint32).view(dtype)
        if "sat" in match:
            result = np.clip(result, low, high)
        cut = (result & ((1 << bits) - 1)).astype(f"u{bits // 8}")
        return np.ascontiguousarray(cut).view(dtype).reshape(-1)

    return run


def _cut(match: Match, wide: Any, kind: str) -> NDArray[Any]:
    """A result of 64 bits as the 32 of the instruction; `sat` clamps it to those of `kind`."""
    if "sat" in match:
        wide = np.clip(wide, *_range(kind, 32))
    cut: NDArray[Any] = (np.atleast_1d(wide) & wide.dtype.type(0xFFFFFFFF)).astype(np.uint32)
    return cut.view(DTYPES[match.get("D", "u32")])


@pure("video.scalar")
def scalar(match: Match) -> Callable[..., Any]:
    op, second = _operation(match), _SECOND.get(match.get("op2"))
    kind = match.get("D", "u32")

    def run(a: Any, b: Any, c: Any = None) -> Any:
        first = _cut(match, op(np.asarray(a, np.int64), np.asarray(b, np.int64)), kind)
        return first if second is None else second(first, c)

    return run


@pure("video.mad")
def mad(match: Match) -> Callable[..., Any]:
    """In 64 bits, signed where a factor is; a third of two unsigned words fits in, too."""
    signed = "s32" in (match.get("A"), match.get("B"))
    wide = np.int64 if signed else np.uint64
    shift = wide(int(match.get("scale", "shr0")[3:]))
    more = wide("po" in match)

    def run(a: Any, b: Any, c: Any) -> Any:
        c = np.asarray(c).view(np.int32 if signed else np.uint32)
        total = np.asarray(a).astype(wide) * np.asarray(b).astype(wide) + c.astype(wide) + more
        return _cut(match, total >> shift, "s32" if signed else "u32")

    return run
