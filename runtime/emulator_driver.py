"""The driver that runs a plan's PTX in the emulator: any machine, no GPU, and every access checked.

Each buffer is an allocation of its own with exact bounds, also in the arena, and what a call has
not written yet counts as unwritten. Work is done when it is put on a stream, so streams and events
have nothing to do.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from threading import RLock
from typing import Any

import numpy as np

from stagefuse.compiler.plan import Plan
from stagefuse.dsl.dtypes import DTYPES

from .drivers import MAP_BYTES, Launch, Memory, Region, TensorMap
from .errors import DeviceError, InputError, OutOfMemory
from .memory import MAX_BYTES, allocate

_ORDER = ("sm_90a", "sm_89", "sm_80")  # the newest code first


class _Buffers:
    """The buffers in a piece of memory, by place: what copies filled, and what kernels write."""

    def __init__(self) -> None:
        self.filled: dict[tuple[int, int], np.ndarray[Any, Any]] = {}
        self.written: dict[tuple[int, int], np.ndarray[Any, Any]] = {}

    def fill(self, region: Region, content: np.ndarray[Any, Any]) -> None:
        place = (region.offset, region.size)
        if place in self.filled:
            self.filled[place][:] = content
        else:
            self.filled[place] = content.copy()

    def find(self, region: Region) -> np.ndarray[Any, Any] | None:
        place = (region.offset, region.size)
        found = self.filled.get(place)
        return self.written.get(place) if found is None else found


class EmulatorDriver:
    """A driver of the emulator; `device` is "emulator", or "emulator:sm_80" for code of an arch.

    `records` are the launches of the latest replay with what the emulator says of each.
    """

    def __init__(self, plan: Plan, device: str = "emulator") -> None:
        self.device = device
        _, colon, wanted = device.partition(":")
        usable = [a for a in _ORDER if a in plan.ptx and (not colon or a == wanted)]
        if not usable:
            holds = ", ".join(plan.ptx) or "none"
            raise DeviceError(
                f"{device} runs GPU code{f' for {wanted}' if colon else ''}, and of that the plan "
                f"holds {holds}\n  = help: compile it again, such as with target=\"h100\", or "
                "`--target h100`"
            )
        self.arch = usable[0]
        self.multiprocessors: int | None = None
        self._text = plan.ptx[self.arch]
        self._module: Any = None
        self._new: Any = None
        self._lock = RLock()  # one launch at a time, and what a collection in it calls
        self.records: list[tuple[Launch, Any]] = []

    def is_active(self) -> bool:
        return True

    def active(self) -> AbstractContextManager[Any]:
        return nullcontext()

    def load(self, kernels: Mapping[str, Sequence[int]]) -> None:
        from . import emulator

        self._module, self._new = emulator.load(self._text), emulator.uninitialised

    def allocate(self, size: int, purpose: str) -> Memory:
        if not 0 <= size <= MAX_BYTES:
            raise OutOfMemory(f"{size} bytes for {purpose} are more than any machine has")
        return Memory(_Buffers(), size)

    def free(self, memory: Memory) -> None:
        pass

    def trim(self) -> None:
        pass

    def pin(self, size: int, purpose: str) -> np.ndarray[Any, Any]:
        return allocate(size, purpose)

    def seen(self, array: np.ndarray[Any, Any]) -> Memory:
        buffers = _Buffers()
        buffers.filled[(0, array.nbytes)] = array
        return Memory(buffers, array.nbytes)

    def unpin(self, array: np.ndarray[Any, Any]) -> None:
        pass

    def stream(self) -> Any:
        return None

    def close_stream(self, stream: Any) -> None:
        pass

    def adopt(self, stream: Any) -> Any:
        raise InputError("the emulator has no streams: call the pipeline itself")

    def event(self) -> Any:
        return None

    def timer(self) -> Any:
        return None

    def elapsed(self, first: Any, then: Any) -> float:
        return 0.0  # it has no clock

    def close_event(self, event: Any) -> None:
        pass

    def record(self, event: Any, stream: Any) -> None:
        pass

    def wait(self, stream: Any, event: Any) -> None:
        pass

    def reached(self, event: Any) -> bool:
        return True

    def finish(self, stream: Any) -> None:
        pass

    def finish_event(self, event: Any) -> None:
        pass

    def copy_in(self, target: Region, source: np.ndarray[Any, Any], stream: Any) -> None:
        buffers: _Buffers = target.memory.handle
        buffers.written.clear()  # a new call begins
        buffers.fill(target, source.reshape(-1).view(np.uint8))

    def copy_out(self, target: np.ndarray[Any, Any], source: Region, stream: Any) -> None:
        target.reshape(-1).view(np.uint8)[:] = self._buffer(source)

    def copy(self, target: Region, source: Region, stream: Any) -> None:
        self._buffer(target)[:] = self._buffer(source)

    def clear(self, target: Region, stream: Any) -> None:
        target.memory.handle.fill(target, np.zeros(target.size, np.uint8))

    def _buffer(self, region: Region) -> np.ndarray[Any, Any]:
        buffers: _Buffers = region.memory.handle
        found = buffers.find(region)
        if found is None:
            found = self._new((region.size,), np.uint8)
            buffers.written[(region.offset, region.size)] = found
        return found

    def graph(self, launches: Sequence[Launch]) -> list[Launch]:
        return list(launches)

    def update(self, graph: list[Launch], number: int, regions: Mapping[int, Region]) -> None:
        launch = graph[number]
        now = tuple(regions.get(i, old) for i, old in enumerate(launch.regions))
        graph[number] = replace(launch, regions=now)

    def launcher(self, graph: list[Launch]) -> Callable[[Any], None]:
        def launch(stream: Any) -> None:
            with self._lock:
                self.records = [(one, self._run(one)) for one in graph]

        return launch

    def _run(self, launch: Launch) -> Any:
        buffers = [self._buffer(r) for r in (*launch.regions, launch.status)]
        dims = [np.int64(d) for d in launch.dims]
        return self._module.launch(
            launch.kernel, grid=launch.grid, block=launch.block, cluster=launch.cluster,
            shared_bytes=launch.shared_bytes,
            args=[*buffers[:-1], *dims, buffers[-1], *(_map(m, buffers) for m in launch.maps)],
        )  # fmt: skip

    def close_graph(self, graph: Any) -> None:
        pass

    def view(self, value: Any, name: str, stream: Any) -> Any:
        return None

    def alike(self, values: Sequence[Any]) -> None:
        return None

    def order(self, first: Any, then: Any) -> None:
        pass

    def empty(self, model: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        return None

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any], size: int, stream: Any) -> Any:
        raise DeviceError("the emulator has no device memory to put results into")

    def close(self) -> None:
        self._module = None


def _map(map: TensorMap, buffers: Sequence[np.ndarray[Any, Any]]) -> Any:
    """A tensor map of one of a launch's buffers, which are bytes."""
    from . import emulator

    if map.is_empty:
        return bytes(MAP_BYTES)
    part = buffers[map.region], map.offset, DTYPES[map.dtype].numpy, map.sizes, map.strides, map.box
    if map.steps:
        return emulator.Im2colMap.of_part(*part, map.swizzle, map.lower, map.upper, map.steps)
    return emulator.TensorMap.of_part(*part, map.swizzle)
