"""What a call costs beyond the GPU's work: `python -m benchmarks.gpu.overhead`.

Pipelines of one small kernel and of several, called with arrays of this machine, with tensors of
the GPU, and on a stream, where a call returns as soon as it is under way. An operation of PyTorch's
stands beside them.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from statistics import median
from typing import Any

import numpy as np

import stagefuse as sf

ONE = "pipeline p(x: f32[N]) -> f32[N]:\n    x * 2.0 + 1.0\n"
SEVERAL = """import nn

pipeline p(x: f32[B, 64], v: f32[64, 64], w: f32[64, 64]) -> f32[B, 64] where B in 1..=64:
    nn.softmax(nn.softmax(nn.softmax(x @ v) @ w) @ v)
"""
_ROUNDS, _CALLS = 20, 50  # fewer than fill the queue of a stream


def main() -> None:
    import torch

    one, stream = torch.ones(1024, device="cuda"), torch.cuda.Stream()
    x, v, w = (torch.ones(n, 64, device="cuda") for n in (8, 64, 64))
    print(f"PyTorch, one operation: {_time(lambda: one.mul_(1.0), stream):.1f} us a call")
    with sf.compile(ONE, device="cuda:0") as pipe:
        here = np.ones(1024, np.float32)
        print(f"arrays of this machine: {_time(lambda: pipe(x=here), stream):.1f} us a call")
        for name, call in _cases(pipe, stream, {"x": one}).items():
            print(f"{name}: {call:.1f} us a call")
    with sf.compile(SEVERAL, device="cuda:0") as pipe:
        kernels = len(pipe.report().kernels)
        for name, call in _cases(pipe, stream, {"x": x, "v": v, "w": w}).items():
            print(f"{kernels} kernels, {name}: {call:.1f} us a call")


def _cases(pipe: Any, stream: Any, given: dict[str, Any]) -> dict[str, float]:
    import torch

    on, outs = pipe.on(stream), [pipe(**given) for _ in range(2)]
    others = [given, {name: x.clone() for name, x in given.items()}]
    turn = iter(range(1 << 30))

    def alternating() -> Any:
        number = next(turn) % 2
        return on(out=outs[number], **others[number])

    found = {
        "tensors, new results": _time(lambda: pipe(**given), stream),
        "tensors, out=": _time(lambda: pipe(out=outs[0], **given), stream),
        "on another stream, out=": _time(lambda: on(out=outs[0], **given), stream),
    }
    with torch.cuda.stream(stream):
        found["on a stream, out="] = _time(lambda: on(out=outs[0], **given), stream)
        found["on a stream, two sets of tensors"] = _time(alternating, stream)
        found["on a stream, new results"] = _time(lambda: on(**given), stream)
    return found


def _time(call: Callable[[], Any], stream: Any) -> float:
    """Microseconds of a call, the median of rounds of calls one after the other."""
    call()
    times = []
    for _ in range(_ROUNDS):
        stream.synchronize()
        begin = time.perf_counter()
        for _ in range(_CALLS):
            call()
        times.append((time.perf_counter() - begin) / _CALLS)
    return median(times) * 1e6


if __name__ == "__main__":
    main()
