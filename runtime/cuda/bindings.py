"""How functions of cuda.bindings are called: what fails is raised, with what was being done."""

from __future__ import annotations

import functools
from typing import Any

from stagefuse.runtime.errors import DeviceError, OutOfMemory

HELP = '  = help: python -m pip install "stagefuse[gpu]"'


@functools.cache
def cuda() -> Any:
    """The bindings' driver module, initialised. Raises DeviceError."""
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise DeviceError(f"cuda-bindings is not there: {error}\n{HELP}") from None
    try:
        code = driver.cuInit(0)[0]
        if code == driver.CUresult.CUDA_ERROR_NO_DEVICE:
            raise DeviceError(
                "CUDA sees no GPU on this machine\n  = help: is CUDA_VISIBLE_DEVICES set?"
            )
        raise_for(driver, code, "starting CUDA")
    except DeviceError:
        raise
    except Exception as error:  # the bindings' own kinds
        missing = type(error).__name__ == "DynamicLibNotFoundError"
        why = "it has no libcuda" if missing else f"{type(error).__name__}: {error}"
        raise DeviceError(
            f"this machine has no NVIDIA driver that works: {why}\n"
            f"  = help: install the driver, or run on the CPU, or in the emulator: "
            f'device="emulator"'
        ) from None
    return driver


def raise_for(driver: Any, code: Any, doing: str) -> None:
    """Raises DeviceError, or OutOfMemory, unless the code is that of success."""
    if int(code) == 0:
        return
    name = driver.cuGetErrorName(code)[1]
    text = driver.cuGetErrorString(code)[1]
    shown = f"{doing}: {text_of(name)}: {text_of(text)}"
    if code == driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY:
        raise OutOfMemory(shown)
    raise DeviceError(shown)


def text_of(value: Any) -> str:
    return value.decode() if isinstance(value, bytes) else str(value)


def call(name: str, doing: str, *arguments: Any) -> Any:
    """What a function of the driver gives. Raises DeviceError, OutOfMemory."""
    driver = cuda()
    try:
        code, *values = getattr(driver, name)(*arguments)
    except RuntimeError as error:  # the bindings' own, where the driver lacks a function
        raise DeviceError(f"{doing}: {error}") from None
    raise_for(driver, code, doing)
    if not values:
        return None
    return values[0] if len(values) == 1 else values


def check(code: Any, doing: str) -> None:
    """`raise_for` for what every call does, where each tenth of a microsecond counts."""
    if code:
        raise_for(cuda(), code, doing)
