"""Which devices and targets there are, and a plan opened on one of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stagefuse.compiler.plan import TARGETS, Plan

from .errors import DeviceError, InputError

if TYPE_CHECKING:
    from .pipeline import Pipeline

_GPU_TARGET = "h100"  # what to make for a GPU that is not here: the newest


def open_plan(
    plan: Plan, pipeline: str | None, device: str | None = None, threads: int | None = None
) -> Pipeline:
    """The pipeline of a plan on a device. Raises DeviceError, InputError, PlanError."""
    device = check_device(device)
    if device is None:
        device = _own_device(plan) if threads is None else "cpu"
    if device == "cpu":
        from .cpu_pipeline import CpuPipeline

        return CpuPipeline(plan, pipeline, threads=threads)
    if threads is not None:
        raise InputError(f"threads= is for the CPU, and this is {device}")
    from .device_pipeline import DevicePipeline

    if device.startswith("emulator"):
        from .emulator_driver import EmulatorDriver

        return DevicePipeline(plan, pipeline, EmulatorDriver(plan, device))
    from .cuda.driver import CudaDriver

    return DevicePipeline(plan, pipeline, CudaDriver(plan, device))


def wants_gpu(device: str | None, threads: int | None) -> bool:
    """Whether a plan on this device may need its code for GPUs."""
    if device is None and threads is None:
        from .cuda import found

        return found.has_driver()
    return device not in (None, "cpu")


def _own_device(plan: Plan) -> str:
    """This machine's first GPU if the plan has code for it, else its CPU."""
    if not plan.ptx:
        return "cpu"
    from .cuda import found

    return found.usable_device(plan) or "cpu"


def check_device(device: str | None) -> str | None:
    """The device's full name: "cpu", "emulator", "emulator:ARCH" or "cuda:NUMBER"; None for None.

    Raises DeviceError for a name that no device has.
    """
    if device is None:
        return None
    kind, colon, rest = str(device).partition(":")
    if kind == "cpu" and not colon:
        return kind
    if kind == "emulator" and (not colon or rest in TARGETS.values() and rest != "cpu"):
        return str(device)
    if kind in ("cuda", "gpu") and (not colon or (rest.isascii() and rest.isdigit())):
        return f"cuda:{int(rest or 0)}"
    raise DeviceError(
        f"no device is called {str(device)!r}\n"
        f"  = help: there is cpu, emulator, and cuda:0 and on"
    )


def check_target(target: str | None) -> tuple[str, ...]:
    """What code to make for a comma-separated list of targets: "cpu" and arches, each once.

    Raises DeviceError for a target that is not there.
    """
    if target is not None and not isinstance(target, str):
        raise TypeError(f"target is a text such as \"h200,cpu\", not a {type(target).__name__}")
    names = [t.strip() for t in (target or "cpu").split(",") if t.strip()]
    for name in names:
        if name not in TARGETS and name not in TARGETS.values():
            known = ", ".join(TARGETS)
            raise DeviceError(f"no target is called {name!r}\n  = help: there is {known}")
    return tuple(dict.fromkeys(TARGETS.get(n, n) for n in names)) or ("cpu",)


def targets_for(target: str | None, device: str | None) -> tuple[str, ...]:
    """What code to make for a target, or without one for the device that will run it."""
    device = check_device(device)
    if target is not None or device == "cpu":
        return check_target(target)
    if device is None:
        return _own_targets()
    kind, _, rest = str(device).partition(":")
    if kind == "emulator":
        return check_target(rest or _GPU_TARGET)
    from .cuda import found

    return (found.arch_of(int(rest)),)


def _own_targets() -> tuple[str, ...]:
    """The CPU, and this machine's first GPU where there is one that code can be made for."""
    from .cuda import found

    arch = found.first_arch()
    return ("cpu",) if arch is None else ("cpu", arch)


def require_code(plan: Plan, targets: Sequence[str]) -> None:
    """Raise DeviceError where the compiler made no code for a target."""
    for target in targets:
        if target != "cpu" and target not in plan.ptx:
            raise DeviceError(f"this version makes no code for {target}")
