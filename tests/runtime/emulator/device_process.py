"""A GPU in a process of its own, so that what breaks it costs one launch and is named.

A kernel that writes where it must not leaves a context that nothing can use any more, one that
hangs never comes back, and the driver's compiler has been seen to crash on PTX that it does not
like. `DeviceProcess` passes calls on to a `Device` in a child, and starts a new one after a loss.
"""

from __future__ import annotations

import multiprocessing
import signal
from collections.abc import Callable, Sequence
from dataclasses import replace
from multiprocessing.connection import Connection
from typing import Any

import numpy as np

from stagefuse.compiler.gpu.assemble import AssemblerMissing, assemble
from stagefuse.compiler.ptx import print_module, read_module
from stagefuse.runtime.cuda import bindings, calls

PATIENCE = 120.0
"""Seconds until a call counts as one that hangs."""
Dim = tuple[int, int, int]


class DeviceLost(Exception):
    """The process of the GPU ended, or hangs: what it was doing, and how it ended."""


class Device:
    """GPU 0. Memory is named by addresses, modules by numbers."""

    def __init__(self) -> None:
        calls.enter(calls.open_context(0))
        self._libraries: list[Any] = []
        device = bindings.call("cuDeviceGet", "a test", 0)
        kinds = bindings.cuda().CUdevice_attribute
        major, minor = (
            int(bindings.call("cuDeviceGetAttribute", "a test", kind, device))
            for kind in (kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                         kinds.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)
        )  # fmt: skip
        self.arch = f"sm_{major}{minor}" + ("a" if major >= 9 else "")

    def allocate(self, size: int) -> int:
        return calls.allocate(max(size, 16), "a test")

    def free(self, address: int) -> None:
        calls.free(address)

    def put(self, address: int, data: bytes) -> None:
        if data:
            raw = np.frombuffer(data, np.uint8)
            bindings.call("cuMemcpyHtoD", "copying in", address, raw.ctypes.data, len(raw))

    def fetch(self, address: int, size: int) -> bytes:
        found = np.empty(size, np.uint8)
        if size:
            bindings.call("cuMemcpyDtoH", "copying out", found.ctypes.data, address, size)
        return found.tobytes()

    def load(self, text: str) -> int:
        """A module, assembled here where there is an assembler, else by the driver.

        It says no newer version of PTX than the driver's, which the assembler beside it may not
        know either: what a compiler writes on top is its own, not what the kernel needs.
        """
        syntax, (major, minor) = read_module(text), calls.driver_version()
        if major == 13:  # which knows PTX 9 up to the same number
            syntax = replace(syntax, version=min(syntax.version, (9, minor)))
        try:
            code = assemble(self.arch, print_module(syntax)).cubin
        except AssemblerMissing:
            code = print_module(syntax).encode() + b"\0"
        self._libraries.append(calls.load(code))
        return len(self._libraries) - 1

    def variable(self, module: int, name: str) -> int:
        library = self._libraries[module]
        address, _ = bindings.call("cuLibraryGetGlobal", name, library, name.encode())
        return int(address)

    def tensor_map(self, *fields: Any) -> bytes:
        made = calls.tensor_map(*fields)
        return bytes(made.tobytes())

    def im2col_map(
        self, dtype: str, address: int, sizes: Sequence[int], strides: Sequence[int],
        lower: Sequence[int], upper: Sequence[int], counts: tuple[int, int], swizzle: int,
        steps: Sequence[int], fills_nan: bool,
    ) -> bytes:  # fmt: skip
        """A map for columns of pixels, innermost dimension first; `counts`: channels and pixels."""
        channels, pixels = counts
        made = calls.pixel_map(
            dtype, address, tuple(sizes), tuple(strides), (pixels, channels), swizzle,
            tuple(lower), tuple(upper), tuple(steps), fills_nan,
        )  # fmt: skip
        return bytes(made.tobytes())

    def launch(
        self, module: int, name: str, grid: Dim, block: Dim, cluster: Dim | None, shared: int,
        parameters: bytes, offsets: Sequence[int],
    ) -> None:  # fmt: skip
        driver = bindings.cuda()
        kernel = calls.kernel(self._libraries[module], name)
        kinds = driver.CUfunction_attribute
        device = bindings.call("cuDeviceGet", name, 0)
        for kind, value in (
            (kinds.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, shared),
            (kinds.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED, 1),
        ):
            bindings.call("cuKernelSetAttribute", name, kind, value, kernel, device)
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = grid
        config.blockDimX, config.blockDimY, config.blockDimZ = block
        config.sharedMemBytes = shared
        if cluster is not None:
            attribute = driver.CUlaunchAttribute()
            attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
            dim = attribute.value.clusterDim
            dim.x, dim.y, dim.z = cluster
            config.attrs, config.numAttrs = [attribute], 1
        data = np.frombuffer(parameters, np.uint8).copy()
        places = np.array([data.ctypes.data + o for o in offsets], np.uint64)
        function = bindings.call("cuKernelGetFunction", name, kernel)
        bindings.call("cuLaunchKernelEx", name, config, function, int(places.ctypes.data), 0)
        calls.finish(0)


def _serve(channel: Connection, make: Callable[[], Any]) -> None:
    """The child: makes calls on a device until the channel closes."""
    device = make()
    while True:
        try:
            method, arguments = channel.recv()
        except EOFError:
            return
        try:
            channel.send((True, getattr(device, method)(*arguments)))
        except Exception as error:
            channel.send((False, f"{type(error).__name__}: {error}"))


class DeviceProcess:
    """Calls of `Device`'s methods, in a process that is started when first needed, and again after
    it was lost. `life` counts those processes: addresses and modules belong to one."""

    def __init__(self, make: Callable[[], Any] = Device, patience: float = PATIENCE) -> None:
        self.make, self.patience, self.life = make, patience, 0
        self._child: Any = None
        self._channel: Connection | None = None

    def call(self, method: str, *arguments: Any) -> Any:
        """What the device's method gives.

        Raises: DeviceLost where the process ended or hangs; AssertionError with what else went
        wrong there. After a failed launch the process is given up, too: its context may be broken.
        """
        channel = self._started()
        doing = f"{method} {arguments[1] if method == 'launch' else ''}".strip()
        try:
            channel.send((method, arguments))
            if not channel.poll(self.patience):
                raise DeviceLost(f"the GPU's process hangs in {doing}")
            fine, found = channel.recv()
        except DeviceLost:
            self.stop()
            raise
        except (EOFError, OSError):
            self._child.join(5)
            code = self._child.exitcode
            name = signal.Signals(-code).name if code is not None and code < 0 else f"code {code}"
            self.stop()
            raise DeviceLost(f"the GPU's process ended with {name} in {doing}") from None
        if not fine:
            if method == "launch":
                self.stop()
            raise AssertionError(f"on the GPU, {doing}: {found}")
        return found

    def _started(self) -> Connection:
        if self._channel is None:
            context = multiprocessing.get_context("spawn")
            self._channel, theirs = context.Pipe()
            self._child = context.Process(target=_serve, args=(theirs, self.make), daemon=True)
            self._child.start()
            theirs.close()
            self.life += 1
        return self._channel

    @property
    def is_running(self) -> bool:
        """Whether there is a process now."""
        return self._channel is not None

    def stop(self) -> None:
        """Ends the process, if there is one."""
        if self._channel is not None:
            self._channel.close()
            self._channel = None
            self._child.kill()
            self._child.join()
