"""Runs hand-made kernels for the tests of the CPU back end."""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stagefuse.compiler.cpu.build import build
from stagefuse.compiler.cpu.pool import pack_steps
from stagefuse.compiler.cpu.scratch import scratch_bytes
from stagefuse.compiler.kernel_ir import Kernel
from stagefuse.runtime.native import NativeObject, detect_level

LEVELS = [level for level in ("v3", "v4") if level <= (detect_level() or "")]


class Compiled:
    """Kernels compiled and loaded, to be called with arrays."""

    def __init__(self, kernels: Sequence[Kernel], level: str) -> None:
        self.kernels = {k.name: k for k in kernels}
        self.native = NativeObject(build(kernels, level))
        self.run = self.native.function(
            "sf_run", ctypes.c_int64, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
        )

    def __call__(
        self,
        name: str,
        arrays: Sequence[np.ndarray[Any, Any]],
        dims: Mapping[str, int] | None = None,
        threads: int = 1,
        grain: int = 1 << 40,
    ) -> list[int]:
        """Runs one kernel on arrays in the order of its buffers; gives the status."""
        kernel, dims = self.kernels[name], dims or {}
        for array, buffer in zip(arrays, kernel.buffers, strict=True):
            assert array.dtype == buffer.dtype.numpy and array.flags.c_contiguous
            assert array.size == np.prod([e.evaluate(dims) for e in buffer.shape], dtype=int)
        slots = np.array(
            [a.ctypes.data for a in arrays] + [dims[d] for d in kernel.dims] + [0], np.int64
        )
        count = 1
        for _, extent in kernel.parallel:
            count *= extent.evaluate(dims)
        stride = scratch_bytes(kernel).evaluate(dims)
        scratch = np.zeros(stride * threads + 64, np.uint8)
        base = -(-scratch.ctypes.data // 64) * 64
        status = np.zeros(4, np.int64)
        steps = pack_steps(
            [(self.native.address(name), slots.ctypes.data, count, grain, base, stride,
              status.ctypes.data)]
        )  # fmt: skip
        self.run(steps, 1, threads)
        return [int(v) for v in status]
