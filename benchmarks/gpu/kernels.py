"""Each kernel's time on the GPU, by CUPTI through PyTorch's profiler, beside its prediction."""

from __future__ import annotations

import re
from collections.abc import Mapping
from statistics import median
from typing import Any

from stagefuse.compiler.gpu.predict import devices_of, predict
from stagefuse.compiler.gpu.targets import Target
from stagefuse.runtime.binding import Binder
from stagefuse.runtime.devices import open_plan

from ..workload import Family
from .measure import Gpu
from .plans import plan_of

CALLS = 5
LONGEST_NAME = 64  # of what is compared: the profiler may cut a name


def described(name: str, arch: str) -> Target:
    """The device that predictions are for: that of the GPU's name, or else the arch's first."""
    devices = devices_of(arch)
    for device in devices:
        if re.search(rf"\b{device.name}S?\b", name, re.IGNORECASE):
            return device
    return devices[0]


def timed(family: Family, seed: int, gpu: Gpu, arch: str, device: Target) -> list[dict[str, Any]]:
    """A row for each kernel of a workload that ran, the longest first: launches in a call, the
    median time of one and the prediction in microseconds, what bounds it, and bytes and flops."""
    workload = family.workload(seed, None)
    plan = plan_of(workload, arch)
    (pipeline,) = (p for p in plan.pipelines)
    binder = Binder(pipeline)
    sizes = binder.sizes(binder.arrays(workload.inputs))
    with open_plan(plan, None, str(gpu.device)) as pipe:
        inputs = {name: gpu.tensor(array) for name, array in workload.inputs.items()}
        times = profiled(gpu, lambda: pipe(**inputs))
    (code,) = (g for g in pipeline.gpu if g.arch == arch)
    rows: dict[str, dict[str, Any]] = {}
    for launch in code.launches:
        found = times.get(launch.kernel[:LONGEST_NAME])
        said = predict(code, launch, sizes)
        if found is None or said is None or launch.kernel in rows:
            continue
        predicted, bound = said.devices[device.name]
        rows[launch.kernel] = {
            "kernel": launch.kernel, "launches": len(found) // CALLS, "measured": median(found),
            "predicted": predicted, "bound": bound, "bytes": said.bytes, "flops": said.flops,
        }  # fmt: skip
    return sorted(rows.values(), key=lambda row: -row["measured"] * row["launches"])


def profiled(gpu: Gpu, call: Any) -> Mapping[str, list[float]]:
    """Microseconds of each kernel of some calls, by name, the caches overwritten before each."""
    from torch.profiler import ProfilerActivity, profile

    for _ in range(2):
        call()
    gpu.torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CUDA], acc_events=True) as recorded:
        for _ in range(CALLS):
            gpu.flush()
            gpu.torch.cuda.synchronize()
            call()
            gpu.torch.cuda.synchronize()
    found: dict[str, list[float]] = {}
    for event in recorded.events():
        if event.device_type.name == "CUDA":
            found.setdefault(event.name[:LONGEST_NAME], []).append(event.device_time)
    return found
