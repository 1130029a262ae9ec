"""The process of the GPU: what breaks it is named, and the next launch has a new one. And the
comparison with a GPU, on a device that is the emulator again."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stagefuse.runtime import emulator

from .device_process import DeviceLost, DeviceProcess
from .hardware import Hardware
from .kernels import kernel, words


class Fragile:
    """A device that does what its calls say."""

    def where(self) -> int:
        return os.getpid()

    def crash(self) -> None:
        os.kill(os.getpid(), signal.SIGSEGV)

    def hang(self) -> None:
        time.sleep(60)

    def launch(self, module: int, name: str) -> None:
        raise ValueError("an illegal address was encountered")


def test_a_lost_process_is_named_and_replaced() -> None:
    device = DeviceProcess(Fragile, patience=20)
    first = device.call("where")
    with pytest.raises(DeviceLost, match="ended with SIGSEGV in crash"):
        device.call("crash")
    second = device.call("where")
    assert second != first != os.getpid() and device.life == 2
    with pytest.raises(AssertionError, match="launch k: ValueError: an illegal address"):
        device.call("launch", 0, "k")
    assert not device.is_running
    device.call("where")
    device.patience = 0.2
    with pytest.raises(DeviceLost, match="hangs in hang"):
        device.call("hang")
    assert not device.is_running


class Twin:
    """A device whose memory is host memory and whose kernels the emulator runs."""

    def __init__(self) -> None:
        self.buffers: dict[int, np.ndarray[Any, Any]] = {}
        self.modules: list[emulator.Module] = []

    def allocate(self, size: int) -> int:
        address = (len(self.buffers) + 1) << 32
        self.buffers[address] = np.zeros(max(size, 1), np.uint8)
        return address

    def free(self, address: int) -> None:
        del self.buffers[address]

    def put(self, address: int, data: bytes) -> None:
        self.buffers[address][: len(data)] = np.frombuffer(data, np.uint8)

    def fetch(self, address: int, size: int) -> bytes:
        return self.buffers[address][:size].tobytes()

    def load(self, text: str) -> int:
        self.modules.append(emulator.load(text))
        return len(self.modules) - 1

    def launch(self, module: int, name: str, grid: Any, block: Any, cluster: Any, shared: int,
               parameters: bytes, offsets: list[int]) -> None:  # fmt: skip
        at = [int.from_bytes(parameters[o : o + 8], "little") for o in offsets]
        self.modules[module].launch(name, grid=grid, block=block, shared_bytes=shared,
                                    args=[self.buffers[a] for a in at])  # fmt: skip


class WrongTwin(Twin):
    """One that leaves something else in memory."""

    def fetch(self, address: int, size: int) -> bytes:
        return bytes([super().fetch(address, size)[0] ^ 1]) + super().fetch(address, size)[1:]


def test_launches_are_compared(tmp_path: Path) -> None:
    module = emulator.load(kernel("st.global.u32 [%d20], %r0;"))
    report = tmp_path / "report"
    out = words(32)
    given = {"grid": 1, "block": 32, "args": [out]}
    Hardware(report, DeviceProcess(Twin)).wrap(emulator.Module.launch, "t", False)(
        module, "k", **given
    )
    assert (out == np.arange(32)).all() and '"different": 0' in report.read_text()
    wrong = Hardware(None, DeviceProcess(WrongTwin)).wrap(emulator.Module.launch, "t", False)
    with pytest.raises(AssertionError, match="1 elements differ on the GPU"):
        wrong(module, "k", **given)
