"""What a call takes of this machine's processor, without a GPU: `python -m benchmarks.gpu.host`.

The driver is the stub of the tests, made to launch nothing, below the real cuda-bindings: what is
left is our Python, the bindings and PyTorch's accessors. Tensors of PyTorch's CPU build pose as a
GPU's. Forms of calls take turns round by round; the least and the median of the thread's time.
"""

from __future__ import annotations

import gc
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from .overhead import ONE

STUB = Path(__file__).resolve().parents[2] / "tests" / "runtime" / "stub_libcuda.c"
COUNT = """pipeline p(x: f32[D]) -> f32[D] where D in 1..=1024:
    state total: f32[D] = 0.0
    total = total + x
    total
"""
_ROUNDS, _CALLS = 20, 200


def main() -> None:
    if "STUB_CUDA" in os.environ:
        _measure()
        sys.stdout.flush()
        os._exit(0)  # the stub is not asked to end
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder, "libcuda.so.1")
        options = ["-O1", "-shared", "-fPIC", "-fvisibility=hidden", "-DSTUB_NOTHING"]
        subprocess.run(["cc", *options, "-o", target, STUB, "-ldl"], check=True)
        environment = os.environ | {"LD_LIBRARY_PATH": folder, "STUB_CUDA": "1"}
        command = [sys.executable, "-m", "benchmarks.gpu.host"]
        subprocess.run(command, env=environment, check=True)


def _measure() -> None:
    from stagefuse.runtime.cuda import calls

    forms = _forms(_opened(ONE), _opened(COUNT))
    calls.enter(calls.open_context(0))  # as PyTorch leaves it
    times: dict[str, list[float]] = {name: [] for name in forms}
    gc.disable()
    for _ in range(_ROUNDS):
        for name, call in forms.items():
            for _ in range(5):
                call()
            begin = time.thread_time()
            for _ in range(_CALLS):
                call()
            times[name].append((time.thread_time() - begin) / _CALLS * 1e6)
    print("| call | least, us | median, us |\n|---|---|---|")
    for name, listed in times.items():
        print(f"| {name} | {min(listed):.1f} | {median(listed):.1f} |")


def _opened(source: str) -> Any:
    from stagefuse.compiler.driver import compile_file
    from stagefuse.runtime.devices import open_plan

    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "p.pipe")
        path.write_text(source)
        plan = compile_file(path, targets=("h100",), levels=())
    return open_plan(replace(plan, cubins={}), None, "cuda:0")


def _forms(pipe: Any, kept: Any) -> dict[str, Callable[[], Any]]:
    from stagefuse.runtime.cuda import calls

    here, there = np.ones(1024, np.float32), np.empty(1024, np.float32)
    found: dict[str, Callable[[], Any]] = {
        "pipe(x=x), arrays of this machine": lambda: pipe(x=here),
        "pipe(x=x, out=y), arrays of this machine": lambda: pipe(x=here, out=there),
    }
    try:
        import torch
    except ImportError:
        return found
    with pipe.driver.active():
        stream, other = calls.stream(), calls.stream()
    _pose(torch, stream)
    x, y, x2, y2 = (torch.ones(1024) for _ in range(4))
    on, beside, session = pipe.on(stream), pipe.on(other), kept.session(D=1024)
    turn = iter(range(1 << 60))
    sets = [{"x": x, "out": y}, {"x": x2, "out": y2}]
    return found | {
        "on(x=x, out=y)": lambda: on(x=x, out=y),
        "on(x=x, out=y), PyTorch on another stream": lambda: beside(x=x, out=y),
        "on(x=x, out=y), two sets of tensors in turn": lambda: on(**sets[next(turn) % 2]),
        "on(x=x)": lambda: on(x=x),
        "pipe(x=x, out=y)": lambda: pipe(x=x, out=y),
        "pipe(x=x)": lambda: pipe(x=x),
        "session(x=x, out=y)": lambda: session(x=x, out=y),
    }


def _pose(torch: Any, stream: int) -> None:
    """Have tensors of this machine pass for a GPU's, made on a stream."""
    from stagefuse.runtime.cuda import torch_tensors

    def read(value: Any) -> torch_tensors.Tensor | None:
        if not isinstance(value, torch.Tensor):
            return None
        dtype = torch_tensors._dtype(value.dtype)
        assert dtype is not None and value.is_contiguous()
        return torch_tensors.Tensor(value.data_ptr(), 0, tuple(value.shape), None, dtype, stream)

    alike = torch_tensors.alike
    torch_tensors.read = read
    torch_tensors.alike = lambda values, number: alike(values, -1)
    torch._C._cuda_getCurrentRawStream = lambda device: stream


if __name__ == "__main__":
    main()
