"""The driver that runs a plan on an NVIDIA GPU: its cubin where there is one, else its PTX."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from math import prod
from typing import Any

import numpy as np

from stagefuse.compiler.plan import Plan
from stagefuse.runtime.drivers import MAP_BYTES, Launch, Memory, Region, TensorMap, closing, quietly
from stagefuse.runtime.errors import InputError, PlanError
from stagefuse.runtime.memory import pointer_to

from . import calls, found, torch_tensors
from .arrays import CudaArray
from .results import ResultMemory

_CUDA_MEMORY = (2, 13)  # DLPack: kDLCUDA, kDLCUDAManaged


class _Active:
    """The driver's context as this thread's, for a while; nests."""

    def __init__(self, context: Any) -> None:
        self._context = context

    def __enter__(self) -> None:
        calls.enter(self._context)

    def __exit__(self, *_: object) -> None:
        calls.leave()


@dataclass(frozen=True, eq=False)
class _Graph:
    """A graph, and the tensor maps of its launches."""

    made: calls.Graph
    maps: tuple[tuple[TensorMap, ...], ...]


class CudaDriver:
    """A driver of one GPU, in the primary context, which it shares with other libraries."""

    def __init__(self, plan: Plan, device: str = "cuda:0") -> None:
        self.device = device
        self.number = int(device.partition(":")[2] or 0)
        gpu = found.gpu(self.number)
        choice = found.choose(plan, gpu)
        if choice is None:
            raise found.refusal(plan, gpu, device)
        self.gpu, self.arch, self.cubin = gpu, choice.arch, choice.cubin
        self._cubins = plan.cubins[choice.arch] if choice.cubin else ()
        self._ptx = plan.ptx[choice.arch]
        self.multiprocessors: int | None = calls.multiprocessors(self.number)
        self._libraries: list[Any] = []
        self._kernels: dict[str, Any] = {}
        self._context = calls.open_context(self.number)
        self.is_active = calls.current(self._context)
        self._active, self._nothing = _Active(self._context), nullcontext()
        self._events: list[int] = []  # to order streams by, as many as threads did so at once
        self.results = ResultMemory(self)
        self._closed = False

    def active(self) -> AbstractContextManager[Any]:
        return self._nothing if self.is_active() else self._active

    def load(self, kernels: Mapping[str, Sequence[int]]) -> None:
        libraries = self._loaded(kernels)
        for name, given in kernels.items():
            kernel = self._kernels[name] = calls.kernel(libraries[name], name)
            sizes = calls.parameter_sizes(kernel, len(given))
            if sizes is not None and sizes != list(given):
                raise PlanError(
                    f"the kernel {name} takes parameters of {sizes} bytes, but its launches give "
                    f"{list(given)}"
                )

    def _loaded(self, kernels: Collection[str]) -> dict[str, Any]:
        """The library that holds each of some kernels."""
        if not self.cubin:
            self._libraries.append(calls.load(self._ptx.encode() + b"\0"))
            return dict.fromkeys(kernels, self._libraries[-1])
        found: dict[str, Any] = {}
        for cubin in self._cubins:
            held = [name for name in cubin.kernels if name in kernels]
            if held:
                self._libraries.append(calls.load(cubin.code))
                found |= dict.fromkeys(held, self._libraries[-1])
        return found

    def allocate(self, size: int, purpose: str) -> Memory:
        return Memory(calls.allocate(size, purpose), size)

    def free(self, memory: Memory) -> None:
        calls.free(memory.handle)

    def trim(self) -> None:
        self.results.trim()

    def pin(self, size: int, purpose: str) -> np.ndarray[Any, Any]:
        address = calls.pin(size, purpose)
        return np.ctypeslib.as_array((ctypes.c_uint8 * size).from_address(address))

    def seen(self, array: np.ndarray[Any, Any]) -> Memory:
        return Memory(pointer_to(array), array.nbytes, array)  # by unified addressing

    def unpin(self, array: np.ndarray[Any, Any]) -> None:
        calls.unpin(pointer_to(array))

    def stream(self) -> int:
        return calls.stream()

    def close_stream(self, stream: int) -> None:
        calls.close_stream(stream)

    def adopt(self, stream: Any) -> int:
        protocol = getattr(stream, "__cuda_stream__", None)
        if protocol is not None:
            version, handle = protocol() if callable(protocol) else protocol
            if version == 0:
                return int(handle)
            raise InputError(f"the stream speaks version {version} of __cuda_stream__, not 0")
        handle = getattr(stream, "cuda_stream", stream)  # as PyTorch's streams have it
        if type(handle) is int:
            return handle
        raise InputError(f"a {type(stream).__name__} is not a stream: it has no __cuda_stream__")

    def event(self) -> int:
        return calls.event()

    def timer(self) -> int:
        return calls.timer()

    def elapsed(self, first: int, then: int) -> float:
        return calls.elapsed(first, then)

    def close_event(self, event: int) -> None:
        calls.close_event(event)

    def record(self, event: int, stream: int) -> None:
        calls.record(event, stream)

    def wait(self, stream: int, event: int) -> None:
        calls.wait(stream, event)

    def reached(self, event: int) -> bool:
        return calls.reached(event)

    def finish(self, stream: int) -> None:
        calls.finish(stream)

    def finish_event(self, event: int) -> None:
        calls.finish_event(event)

    def copy_in(self, target: Region, source: np.ndarray[Any, Any], stream: int) -> None:
        calls.copy_in(_address(target), pointer_to(source), target.size, stream)

    def copy_out(self, target: np.ndarray[Any, Any], source: Region, stream: int) -> None:
        calls.copy_out(pointer_to(target), _address(source), source.size, stream)

    def copy(self, target: Region, source: Region, stream: int) -> None:
        calls.copy(_address(target), _address(source), source.size, stream)

    def clear(self, target: Region, stream: int) -> None:
        calls.clear(_address(target), target.size, stream)

    def graph(self, launches: Sequence[Launch]) -> _Graph:
        nodes = [self._node(n) for n in launches]
        return _Graph(calls.graph(nodes, self.number), tuple(n.maps for n in launches))

    def update(self, graph: _Graph, number: int, regions: Mapping[int, Region]) -> None:
        arguments = {i: r.memory.handle + r.offset for i, r in regions.items()}
        maps = {
            i: _tensor_map(m, regions[m.region])
            for i, m in enumerate(graph.maps[number])
            if m.region in regions
        }
        calls.update(graph.made, number, arguments, maps)

    def launcher(self, graph: _Graph) -> Callable[[int], None]:
        return calls.launcher(graph.made)

    def close_graph(self, graph: _Graph) -> None:
        calls.close_graph(graph.made)

    def _node(self, launch: Launch) -> calls.Node:
        values = [
            *(_address(r) for r in launch.regions),
            *(d & 0xFFFFFFFFFFFFFFFF for d in launch.dims),
            _address(launch.status),
        ]
        return calls.Node(
            self._kernels[launch.kernel], launch.grid, launch.block, launch.cluster,
            launch.shared_bytes, np.array(values, np.uint64), launch.after,
            launch.label or launch.kernel,
            tuple(_tensor_map(m, launch.regions[m.region]) for m in launch.maps),
            launch.together,
        )  # fmt: skip

    def view(self, value: Any, name: str, stream: int) -> CudaArray | None:
        if isinstance(value, CudaArray):
            value.order_before(stream)
            array = value
            device = value.number
        else:
            viewed = self._view(value, name, stream)
            if viewed is None:
                return None
            array, device = viewed
        if device != self.number:
            raise InputError(
                f"input `{name}` is in the memory of cuda:{device}, but this pipeline runs on "
                f"{self.device}\n  = help: copy it there first"
            )
        return array

    def _view(self, value: Any, name: str, stream: int) -> tuple[CudaArray, int] | None:
        """An array of another library on a GPU, ready on the stream, and its GPU."""
        try:
            tensor = torch_tensors.read(value)
            if tensor is not None:
                if tensor.device == self.number:
                    self.order(tensor.stream, stream)
                return self._made(tensor, False, value), tensor.device
            if not _on_a_gpu(value):
                return None
            view = calls.view(value, stream or 1)
            return self._made(view, view.readonly, (view.owner, value)), view.device
        except InputError as error:
            raise InputError(f"input `{name}`: {error}") from None

    def alike(self, values: Sequence[Any]) -> torch_tensors.Alike | None:
        return torch_tensors.alike(values, self.number)

    def _made(self, view: Any, readonly: bool, owner: Any) -> CudaArray:
        size = view.dtype.itemsize * prod(view.shape)
        strides = view.strides and tuple(s * view.dtype.itemsize for s in view.strides)
        region = Region(Memory(view.address, size, owner), 0, size)
        return CudaArray(
            region, view.shape, view.dtype, strides, readonly, driver=self, number=view.device
        )

    def order(self, first: int, then: int) -> None:
        if first == then:
            return
        try:
            event = self._events.pop()
        except IndexError:
            event = calls.event()
        try:
            calls.record(event, first)
            calls.wait(then, event)
        finally:
            self._events.append(event)

    def empty(self, model: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        return torch_tensors.empty(model, shape, dtype)

    def array(
        self, shape: tuple[int, ...], dtype: np.dtype[Any], size: int, stream: int
    ) -> CudaArray:
        memory, users = self.results.take(size, stream)
        region = Region(memory, 0, size)
        return CudaArray(region, shape, dtype, driver=self, number=self.number, users=users)

    def close(self) -> None:
        if self._closed:
            return
        self._closed = True
        libraries, self._libraries = self._libraries, []
        events, self._events = self._events, []
        with closing(self):
            quietly(*((calls.close_event, event) for event in events))
            quietly(*((calls.unload, library) for library in libraries))
        self.results.close()

    def release(self) -> None:
        """Let go of the context, once it is closed and no result lives."""
        calls.close_context(self.number)


def _tensor_map(map: TensorMap, region: Region) -> Any:
    if map.is_empty:
        return np.zeros(MAP_BYTES, np.uint8)
    array = map.dtype, _address(region) + map.offset, map.sizes[::-1], map.strides[::-1]
    if map.steps:
        return calls.pixel_map(
            *array, map.box, map.swizzle, map.lower[::-1], map.upper[::-1], map.steps[::-1]
        )
    return calls.tensor_map(*array, map.box[::-1], map.swizzle)


def _address(region: Region) -> int:
    return int(region.memory.handle) + region.offset


def _on_a_gpu(value: Any) -> bool:
    """Whether a value says that it is in a GPU's memory."""
    device = getattr(value, "__dlpack_device__", None)
    if device is not None:
        return int(device()[0]) in _CUDA_MEMORY
    return hasattr(value, "__cuda_array_interface__")
