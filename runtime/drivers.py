"""The protocol between a pipeline on a device and what runs it: CUDA, or the emulator.

Work is put on streams and runs in the order of its stream; events order streams among each other.
Launches are put together once as a graph, whose edges say what waits for what, and then replayed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from stagefuse.dsl.frozen import frozen

from .errors import DeviceError


@dataclass(frozen=True, eq=False)
class Memory:
    """Memory of a device: the driver's handle and its bytes; `owner` keeps foreign memory alive."""

    handle: Any
    size: int
    owner: Any = None


KERNEL_ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class Region:
    """A part of memory, in bytes."""

    memory: Memory
    offset: int
    size: int

    @property
    def place(self) -> tuple[Any, int]:
        """Where it is; keeps nothing alive."""
        return (self.memory.handle, self.offset)

    @property
    def is_aligned(self) -> bool:
        """Whether kernels, which move 16 bytes at a time, may work on it where it lies."""
        base = self.memory.handle if isinstance(self.memory.handle, int) else 0
        return (base + self.offset) % KERNEL_ALIGNMENT == 0

    def overlaps(self, other: Region) -> bool:
        """Whether both share a byte; memory of one handle only."""
        return (
            self.memory.handle is other.memory.handle
            and self.offset < other.offset + other.size
            and other.offset < self.offset + self.size
        )


MAP_BYTES = 128


@frozen
class TensorMap:
    """A tensor map of a launch with all numbers known: the elements of the region number `region`
    from `offset` on, in bytes, as an array of `sizes`, outermost dimension first, whose elements
    but for those of the last dimension are `strides` bytes apart. With `steps` copies move columns
    of pixels, as `TensorMapPlan` says."""

    region: int
    dtype: str
    offset: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int
    lower: tuple[int, ...] = ()
    upper: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to be copied by it; it is then 128 zeros."""
        return 0 in self.sizes


@dataclass(frozen=True, eq=False)
class Launch:
    """A launch with all numbers known. `after` are the launches of its graph that it waits for,
    `writes` says which of the regions it may write. All blocks of one that goes `together` are at
    work at once.

    The parameters are the regions' addresses, `dims` as s64, the address of `status`, and `maps`.
    """

    kernel: str
    grid: tuple[int, int, int]
    block: tuple[int, int, int]
    cluster: tuple[int, int, int]
    shared_bytes: int
    regions: tuple[Region, ...]
    writes: tuple[bool, ...]
    dims: tuple[int, ...]
    status: Region
    after: tuple[int, ...]
    label: str = ""
    maps: tuple[TensorMap, ...] = ()
    together: bool = False


def quietly(*steps: tuple[Any, ...]) -> None:
    """Run steps, each a function and its arguments, in spite of a device that fails.

    For giving things back: on a device that failed there is nothing left to give back, and the
    call that met the failure has carried it.
    """
    for function, *arguments in steps:
        with suppress(DeviceError):
            function(*arguments)


@contextmanager
def closing(driver: Driver) -> Iterator[None]:
    """As `driver.active()`, also with a device that fails: what is within gives things back."""
    with ExitStack() as stack:
        with suppress(DeviceError):
            stack.enter_context(driver.active())
        yield


class Alike(Protocol):
    """Arrays of another library, dense in a device's memory, one for each place of a call and each
    of that place's dtype and shape."""

    def addresses(self, values: Sequence[Any]) -> list[int] | None:
        """Where such arrays lie; None if one is another value, or without elements."""

    def new(self, place: int) -> Any:
        """A new one for a place, with arbitrary contents."""

    def stream(self) -> Callable[[], Any]:
        """What asks for the stream on which the library works now: arrays are whole behind it."""


class Driver(Protocol):
    """What a device does for a pipeline. Streams, events and graphs are the driver's own objects.

    Methods raise DeviceError, and those that allocate OutOfMemory, which leaves all as it was.
    """

    device: str  # as the caller writes it: "emulator", "cuda:0"
    arch: str  # of the code that it runs
    multiprocessors: int | None  # of the device, if it has any

    def active(self) -> AbstractContextManager[Any]:
        """Within it this thread may use the device; behind it all is as before."""

    def is_active(self) -> bool:
        """Whether this thread may use the device as it is."""

    def load(self, kernels: Mapping[str, Sequence[int]]) -> None:
        """Load the code; `kernels` are the entries that will be launched: the bytes of each of
        their parameters."""

    def allocate(self, size: int, purpose: str) -> Memory: ...
    def free(self, memory: Memory) -> None:
        """Free memory that nothing under way uses."""

    def trim(self) -> None:
        """Give back memory that is kept only to be used again."""

    def pin(self, size: int, purpose: str) -> np.ndarray[Any, Any]:
        """Bytes of this machine's memory that copies read and write while a stream goes on."""

    def seen(self, array: np.ndarray[Any, Any]) -> Memory:
        """Pinned bytes as kernels see them: what these write there, this machine reads."""

    def unpin(self, array: np.ndarray[Any, Any]) -> None: ...

    def stream(self) -> Any: ...
    def close_stream(self, stream: Any) -> None: ...
    def adopt(self, stream: Any) -> Any:
        """The driver's stream for a stream of the caller's. Raises InputError for anything else."""

    def event(self) -> Any: ...
    def timer(self) -> Any:
        """An event that also notes when it is reached."""

    def elapsed(self, first: Any, then: Any) -> float:
        """Microseconds between two of these that were reached, by the device's clock."""

    def close_event(self, event: Any) -> None: ...
    def record(self, event: Any, stream: Any) -> None: ...
    def wait(self, stream: Any, event: Any) -> None:
        """Let what comes next on the stream wait for what the event recorded, if anything."""

    def reached(self, event: Any) -> bool: ...
    def finish(self, stream: Any) -> None:
        """Wait until the stream is empty."""

    def finish_event(self, event: Any) -> None: ...

    def copy_in(self, target: Region, source: np.ndarray[Any, Any], stream: Any) -> None: ...
    def copy_out(self, target: np.ndarray[Any, Any], source: Region, stream: Any) -> None: ...
    def copy(self, target: Region, source: Region, stream: Any) -> None: ...
    def clear(self, target: Region, stream: Any) -> None:
        """Zero bytes."""

    def graph(self, launches: Sequence[Launch]) -> Any: ...
    def update(self, graph: Any, number: int, regions: Mapping[int, Region]) -> None:
        """Give a launch of a graph other regions, by their positions in it.

        Replays under way are not affected.
        """

    def launcher(self, graph: Any) -> Callable[[Any], None]:
        """What puts a graph on a stream, as often as it is called."""

    def close_graph(self, graph: Any) -> None: ...

    def view(self, value: Any, name: str, stream: Any) -> Any:
        """A DeviceArray of a value in this device's memory, its contents ready on the stream.

        None for a value that is elsewhere. Raises InputError for one that can't be read.
        """

    def alike(self, values: Sequence[Any]) -> Alike | None:
        """What is like values that were viewed; None where there is no quick way to them."""

    def order(self, first: Any, then: Any) -> None:
        """Let what comes next on a stream wait for what is on another one now."""

    def empty(self, model: Any, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Any:
        """A new array of the library of `model` in this device's memory; None where that can't be
        asked for."""

    def array(self, shape: tuple[int, ...], dtype: np.dtype[Any], size: int, stream: Any) -> Any:
        """A DeviceArray with memory of its own, to be written on the stream."""

    def close(self) -> None:
        """Give back what is left; memory of results stays valid until freed."""
