"""Arithmetic on the parts of a word."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np

from stagefuse.compiler.ptx.table import Match

from . import pure

_OPERATIONS: dict[str, Callable[[Any, Any], Any]] = {
    "vadd": np.add,
    "vsub": np.subtract,
    "vavrg": lambda a, b: np.where(a + b < 0, a + b, a + b + 1) >> 1,
    "vabsdiff": lambda a, b: np.abs(a - b),
    "vmin": np.minimum,
    "vmax": np.maximum,
}


@pure("video.simd")
def simd(match: Match) -> Callable[..., Any]:
    opcode = match.form.opcode
    op, bits = _OPERATIONS[opcode[:-1]], 32 // int(opcode[-1])

    def parts(x: Any, kind: str) -> Any:
        dtype = f"{'i' if kind[0] == 's' else 'u'}{bits // 8}"
        return np.atleast_1d(x).view(dtype).reshape(-1, 32 // bits).astype(np.int64)

    signed = match.get("D")[0] == "s"
    low, high = (-(1 << bits - 1), (1 << bits - 1) - 1) if signed else (0, (1 << bits) - 1)

    def run(a: Any, b: Any, c: Any) -> Any:
        result = op(parts(a, match.get("A")), parts(b, match.get("B")))
        dtype = np.int32 if signed else np.uint32
        if "add" in match.slots:
            total = result.sum(axis=1) + np.asarray(c).astype(np.int64)
            return (total & 0xFFFFFFFF).astype(np.uint32).view(dtype)
        if "sat" in match:
            result = np.clip(result, low, high)
        cut = (result & ((1 << bits) - 1)).astype(f"u{bits // 8}")
        return np.ascontiguousarray(cut).view(dtype).reshape(-1)

    return run
