"""Times on the GPU: stagefuse, PyTorch eager, torch.compile(max-autotune), and a plain copy.

Inputs and results lie in the GPU's memory. Before each timed call the L2 cache is overwritten;
that takes longer than Python needs to start the call, so events around it time the GPU alone. Times
of whole calls, Python and the wait included, are taken apart. Engines take turns, round by round.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from stagefuse.runtime.devices import open_plan

from ..workload import Family, Workload
from .plans import plan_of

Run = Callable[[], Any]
_FLUSH_BYTES = 1 << 30  # many times any L2 cache, and a quarter of a millisecond
_COPY_BYTES = 1 << 30


@dataclass
class Timed:
    """An engine's times in seconds, a median of each round; `failure` says why there are none."""

    gpu: list[float] = field(default_factory=list)
    call: list[float] = field(default_factory=list)
    error: float = float("nan")
    prepare: float = float("nan")  # compile and first call
    failure: str = ""


class Gpu:
    """The GPU as PyTorch has it, with a stream of its own."""

    def __init__(self, device: str) -> None:
        import torch

        self.torch, self.device = torch, torch.device(device)
        torch.set_grad_enabled(False)
        torch.backends.cuda.matmul.allow_tf32 = False
        torch.backends.cudnn.allow_tf32 = False
        self.stream = torch.cuda.Stream(self.device)
        self._flush = torch.empty(_FLUSH_BYTES, dtype=torch.uint8, device=self.device)

    def tensor(self, array: Any) -> Any:
        return self.torch.from_numpy(array).to(self.device)

    def flush(self) -> None:
        """Overwrite the caches."""
        self._flush.zero_()

    def time(self, run: Run, calls: int) -> float:
        """The median time of a call on the GPU."""
        pairs = []
        with self.torch.cuda.stream(self.stream):
            for _ in range(calls):
                self.flush()
                start, end = (self.torch.cuda.Event(enable_timing=True) for _ in range(2))
                start.record(self.stream)
                run()
                end.record(self.stream)
                pairs.append((start, end))
        self.stream.synchronize()
        return float(median(start.elapsed_time(end) / 1e3 for start, end in pairs))

    def wall(self, run: Run, calls: int) -> float:
        """The median time of a call and the wait for it, as the caller sees it."""
        times = []
        with self.torch.cuda.stream(self.stream):
            for _ in range(calls):
                self.stream.synchronize()
                begin = time.perf_counter()
                run()
                self.stream.synchronize()
                times.append(time.perf_counter() - begin)
        return median(times)

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of copying a large block."""
        source = self.torch.empty(_COPY_BYTES // 2, dtype=self.torch.uint8, device=self.device)
        target = self.torch.empty_like(source)
        return _COPY_BYTES / self.time(lambda: target.copy_(source), 20)


def checked(
    gpu: Gpu, runs: Iterable[tuple[str, Run]], error: Callable[[Any], float], tolerance: float
) -> dict[str, Run]:
    """Engines whose results, made once, are near enough. Raises ValueError for one that is not."""
    found: dict[str, Run] = {}
    for name, run in runs:
        with gpu.torch.cuda.stream(gpu.stream):
            result = run()
        gpu.stream.synchronize()
        wrong = error(result)
        if not wrong <= tolerance:
            raise ValueError(f"{name} is wrong by {wrong:.2g}")
        found[name] = run
    return found


def in_turns(gpu: Gpu, runs: Mapping[str, Run], rounds: int, calls: int = 8) -> dict[str, float]:
    """Seconds of each engine on the GPU, the median of rounds in which they take turns."""
    times: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            times[name].append(gpu.time(run, calls))
    return {name: median(listed) for name, listed in times.items()}


def measured(
    family: Family,
    sizes: Any,
    seed: int,
    device: str,
    arch: str,
    rounds: int,
    calls: int,
    engines: Sequence[str],
) -> tuple[dict[str, Timed], int]:
    """Times by engine, and the bytes of a workload's inputs, weights and results."""
    gpu = Gpu(device)
    workload = family.workload(seed, sizes)
    reference = workload.reference()
    inputs = {name: gpu.tensor(array) for name, array in workload.inputs.items()}
    found: dict[str, Timed] = {}
    runs: dict[str, Run] = {}
    for name in engines:
        bind = _ENGINES[name]
        timed = found[name] = Timed()
        try:
            begin = time.perf_counter()
            with gpu.torch.cuda.stream(gpu.stream):
                run = bind(gpu, workload, inputs, arch)
                results = run()
            gpu.stream.synchronize()
            timed.prepare = time.perf_counter() - begin
            listed = list(results) if isinstance(results, (tuple, list)) else [results]
            timed.error = workload.error([r.cpu().numpy() for r in listed], reference)
            if timed.error <= family.tolerance:
                runs[name] = run
            else:
                timed.failure = f"error {timed.error:.2g}, more than {family.tolerance:.2g}"
        except Exception as error:
            timed.failure = f"{type(error).__name__}: {error}".partition("\n")[0]
    for number in range(rounds if runs else 0):
        order = list(runs.items())
        for name, run in order[number % len(order) :] + order[: number % len(order)]:
            found[name].gpu.append(gpu.time(run, calls))
            found[name].call.append(gpu.wall(run, calls))
    arrays = (*workload.inputs.values(), *workload.weights.values())
    moved = sum(a.nbytes for a in arrays) + sum(r.size * 4 for r in reference)
    return found, moved


def _stagefuse(gpu: Gpu, workload: Workload, inputs: dict[str, Any], arch: str) -> Run:
    pipe = open_plan(plan_of(workload, arch), None, str(gpu.device))
    first = pipe(**inputs)
    listed = list(first) if isinstance(first, tuple) else [first]
    out = [gpu.torch.empty_like(r) for r in listed]
    target = out if len(out) > 1 else out[0]
    on = pipe.on(gpu.stream, defer_errors=True)  # PyTorch does not wait either
    return lambda: on(out=target, **inputs)


def _eager(gpu: Gpu, workload: Workload, inputs: dict[str, Any], arch: str) -> Run:
    from ..torch_engines import Network

    network = Network(workload).eval().to(gpu.device)
    return lambda: network(inputs)


def _compiled(gpu: Gpu, workload: Workload, inputs: dict[str, Any], arch: str) -> Run:
    from ..torch_engines import Network

    gpu.torch._dynamo.reset()
    network = Network(workload).eval().to(gpu.device)
    fast = gpu.torch.compile(network, mode="max-autotune", dynamic=False)
    for _ in range(3):  # it records its CUDA graph only after a while
        fast(inputs)
    return lambda: fast(inputs)


_ENGINES: dict[str, Callable[[Gpu, Workload, dict[str, Any], str], Run]] = {
    "stagefuse": _stagefuse,
    "torch": _eager,
    "torch max-autotune": _compiled,
}


def engine_names() -> Sequence[str]:
    return tuple(_ENGINES)
