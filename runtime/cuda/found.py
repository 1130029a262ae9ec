"""The GPUs of this machine, and which of a plan's code runs on them.

A cubin runs on the compute capability that it was made for and on later ones of the same major
version; code for an arch with the letter `a` only on exactly that one. PTX without the letter is
compiled by the driver for any later GPU. Source: CUDA C++ programming guide, "Application
compatibility" and "Architecture-specific features".
"""

from __future__ import annotations

import os

from stagefuse.compiler.plan import GPU_ARCHES, TARGETS, Plan
from stagefuse.dsl.frozen import frozen
from stagefuse.runtime.errors import DeviceError

from . import calls


@frozen
class Gpu:
    """A GPU: its number, name, compute capability and memory in bytes."""

    number: int
    name: str
    major: int
    minor: int
    memory: int

    def __str__(self) -> str:
        return f"{self.name} (compute capability {self.major}.{self.minor})"


@frozen
class Choice:
    """The code to load: of which arch, and whether its cubin or its PTX."""

    arch: str
    cubin: bool


def capability(arch: str) -> tuple[int, int, bool]:
    """Major and minor version of an arch, and whether its code runs on exactly that one."""
    digits = arch.removeprefix("sm_").rstrip("a")
    return int(digits[:-1]), int(digits[-1]), arch.endswith("a")


def choose(plan: Plan, gpu: Gpu) -> Choice | None:
    """The newest code of the plan that runs on the GPU: a cubin, else PTX; None if none does."""
    fitting = [a for a in reversed(GPU_ARCHES) if a in plan.ptx and _runs(a, gpu)]
    for arch in fitting:
        if arch in plan.cubins and _cubin_runs(arch, gpu):
            return Choice(arch, True)
    return Choice(fitting[0], False) if fitting else None


def _runs(arch: str, gpu: Gpu) -> bool:
    major, minor, exact = capability(arch)
    if exact:
        return (gpu.major, gpu.minor) == (major, minor)
    return (gpu.major, gpu.minor) >= (major, minor)


def _cubin_runs(arch: str, gpu: Gpu) -> bool:
    return _runs(arch, gpu) and gpu.major == capability(arch)[0]


def refusal(plan: Plan, gpu: Gpu, device: str) -> DeviceError:
    """What was found, what the plan holds, and what to compile."""
    holds = ", ".join(plan.ptx) or "no GPU code"
    arch = arch_for(gpu)
    names = ",".join(n for n, a in TARGETS.items() if a == arch) if arch else ""
    fix = (
        f'compile it again for this GPU, such as with target="{names.split(",")[0]}"'
        if arch
        else "this GPU is older than any that stagefuse makes code for"
    )
    return DeviceError(f"{device} is {gpu}; the plan holds {holds}\n  = help: {fix}")


def arch_for(gpu: Gpu) -> str | None:
    """The newest arch whose code runs on a GPU, of those that the compiler knows."""
    for arch in reversed(GPU_ARCHES):
        if _runs(arch, gpu):
            return arch
    return None


def target_of(gpu: Gpu) -> str | None:
    """The target that a GPU is, by its name."""
    words = gpu.name.lower().replace("-", " ").replace("l40s", "l40").split()
    return next((t for t in TARGETS if t != "cpu" and t in words), None)


def of_target(target: str) -> Gpu | None:
    """This machine's first GPU that is a target. Raises DeviceError."""
    return next((g for g in gpus() if target_of(g) == target), None)


def has_driver() -> bool:
    """Whether this machine has an NVIDIA driver at all, found without loading anything."""
    return os.path.exists("/proc/driver/nvidia/version") or os.path.exists("/dev/nvidiactl")


def gpus() -> list[Gpu]:
    """The GPUs in the driver's order. Raises DeviceError where that can't be asked."""
    return [Gpu(i, *calls.describe(i)) for i in range(calls.device_count())]


def gpu(number: int) -> Gpu:
    """A GPU by number. Raises DeviceError."""
    found = gpus()
    if number >= len(found):
        count = "no GPU" if not found else f"{len(found)} GPU" + "s" * (len(found) > 1)
        raise DeviceError(f"cuda:{number} is not there: this machine has {count}")
    return found[number]


def usable_device(plan: Plan) -> str | None:
    """The first GPU that runs some code of the plan; None without one."""
    if not has_driver():
        return None
    try:
        return next((f"cuda:{g.number}" for g in gpus() if choose(plan, g)), None)
    except DeviceError:
        return None


def first_arch() -> str | None:
    """The arch to make code of for this machine's first GPU; None without one."""
    if not has_driver():
        return None
    try:
        return arch_of(0)
    except DeviceError:
        return None


def arch_of(number: int) -> str:
    """The arch to make code of for a GPU. Raises DeviceError."""
    found = gpu(number)
    arch = arch_for(found)
    if arch is None:
        raise DeviceError(f"cuda:{number} is {found}, older than any that code is made for")
    return arch
