"""What a call costs beyond the GPU's work: `python -m benchmarks.gpu.overhead`.

A pipeline of one small kernel, called with arrays of this machine, with tensors of the GPU, and on
a stream, where a call returns as soon as it is under way.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

import stagefuse as sf

SOURCE = "pipeline p(x: f32[N]) -> f32[N]:\n    x * 2.0 + 1.0\n"


def main() -> None:
    import torch

    with sf.compile(SOURCE, device="cuda:0") as pipe:
        here = np.ones(1024, np.float32)
        there = torch.ones(1024, device="cuda")
        out, stream = torch.empty_like(there), torch.cuda.Stream()
        on = pipe.on(stream)
        cases: dict[str, Callable[[], Any]] = {
            "arrays of this machine": lambda: pipe(x=here),
            "tensors, new results": lambda: pipe(x=there),
            "tensors, out=": lambda: pipe(x=there, out=out),
            "tensors, out=, on a stream": lambda: on(x=there, out=out),
        }
        for name, call in cases.items():
            call()
            times = []
            for _ in range(300):
                begin = time.perf_counter()
                call()
                times.append(time.perf_counter() - begin)
            stream.synchronize()
            print(f"{name}: {median(times) * 1e6:.1f} us a call")


if __name__ == "__main__":
    main()
