"""The handmade GPU kernels in NumPy, behind the emulator's interface, to test what drives them.

Sizes and order of the arguments are checked against the PTX's parameters as a launch would use
them.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np

PARAMETER = re.compile(r"\.param \.(u64|s64) (\w+)")


class Module:
    def __init__(self, text: str) -> None:
        parts = re.split(r"\.visible \.entry (\w+)\(", text)[1:]
        self.entries = {
            name: [kind for kind, _ in PARAMETER.findall(body.partition("{")[0])]
            for name, body in zip(parts[::2], parts[1::2], strict=True)
        }

    def launch(
        self,
        name: str,
        *,
        grid: tuple[int, int, int],
        block: tuple[int, int, int],
        cluster: tuple[int, int, int] = (1, 1, 1),
        shared_bytes: int = 0,
        args: list[Any],
    ) -> None:
        kinds = self.entries[name]
        assert len(args) == len(kinds)
        for kind, arg in zip(kinds, args, strict=True):
            assert isinstance(arg, np.ndarray if kind == "u64" else np.int64), (name, kind, arg)
        assert grid[0] * block[0] >= int(args[kinds.index("s64")])
        getattr(self, name)(*args)

    def add(self, x: Any, w: Any, t: Any, count: int, status: Any) -> None:
        weights = np.resize(w.view(np.float32), count)
        t.view(np.float32)[:count] = x.view(np.float32)[:count] + weights

    def scale(self, x: Any, y: Any, count: int, n: int, status: Any) -> None:
        y.view(np.float32)[:count] = x.view(np.float32)[:count] * np.float32(n)

    def take(self, table: Any, ids: Any, y: Any, count: int, n: int, status: Any) -> None:
        for i, at in enumerate(ids.view(np.int64)[:count]):
            if 0 <= at < n:
                y.view(np.float32)[i] = table.view(np.float32)[at]
            elif status.view(np.int64)[0] == 0:
                status.view(np.int64)[:] = (1, at)


def load(text: str) -> Module:
    return Module(text)


# For each kernel, from its dims: bytes behind each pointer but the status, and how it is used.
FOOTPRINTS: dict[str, Callable[..., list[tuple[int, str]]]] = {
    "add": lambda count: [(4 * count, "read"), (12, "read"), (4 * count, "write")],
    "scale": lambda count, n: [(4 * count, "read"), (4 * count, "write")],
    "take": lambda count, n: [(4 * n, "read"), (8 * count, "read"), (4 * count, "write")],
}


def uninitialised(shape: tuple[int, ...], dtype: Any) -> np.ndarray[Any, Any]:
    return np.full(shape, 0xCD, dtype)
