"""Kernels for tests: PTX text with the usual frame around it, and launches of it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.runtime import emulator

Array = NDArray[Any]

HEAD = ".version 8.8\n.target sm_90a\n.address_size 64\n"
REGISTERS = """\
    .reg .pred %p<16>;
    .reg .b16 %h<16>;
    .reg .b32 %r<64>;
    .reg .b64 %d<32>;
    .reg .f32 %f<64>;
    .reg .f64 %g<8>;
"""


def kernel(body: str, params: int = 1, before: str = "", shared: str = "") -> str:
    """A module with a kernel `k` whose parameters are pointers, loaded to %d0, %d1, ..., with
    the thread in %r0, the block in %r1 and the address of the thread's word of p0 in %d20."""
    names = ", ".join(f".param .u64 p{i}" for i in range(params))
    loads = "".join(f"    ld.param.u64 %d{i}, [p{i}];\n" for i in range(params))
    return (
        f"{HEAD}{before}\n.visible .entry k({names})\n{{\n{REGISTERS}{shared}\n{loads}"
        "    mov.u32 %r0, %tid.x;\n    mov.u32 %r1, %ctaid.x;\n    mov.u32 %r2, %ntid.x;\n"
        "    mad.lo.u32 %r3, %r1, %r2, %r0;\n    mul.wide.u32 %d21, %r3, 4;\n"
        f"    add.u64 %d20, %d0, %d21;\n{body}\n    ret;\n}}\n"
    )


def run(
    text: str, *arrays: Any, grid: Any = 1, block: Any = 32, shared_bytes: int = 0, **options: Any
) -> emulator.Record:
    """Launches the kernel `k`."""
    return emulator.load(text).launch(
        "k", grid=grid, block=block, shared_bytes=shared_bytes, args=list(arrays), **options
    )


def words(n: int) -> Array:
    return np.zeros(n, np.uint32)


def fault(text: str, *arrays: Any, **options: Any) -> emulator.Fault:
    """The fault of a kernel that has one."""
    try:
        run(text, *arrays, **options)
    except emulator.Fault as found:
        return found
    raise AssertionError("no fault")


def line_of(text: str, start: str) -> int:
    """The line of the first instruction that begins so."""
    lines: Sequence[str] = text.splitlines()
    return next(i for i, line in enumerate(lines, 1) if line.strip().startswith(start))
