"""`runtime.cuda.calls` without a GPU: nothing runs before something waits, and all is checked.

Work put on a stream is kept until the host waits for it, so what the host does too early shows.
Every access to memory is compared with earlier ones: two that touch a byte, one writing, must be
ordered by streams, events or edges of a graph (happens-before). Memory must be alive, and read
only after something wrote it. Kernels run in the emulator, each buffer with exact bounds; their
parameters are checked as the PTX declares them. What launches touch is noted by `noting`, since
addresses alone don't say it. Faults are kept in `faults` too, where an exception would be lost.
"""

from __future__ import annotations

import ctypes
import itertools
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

from stagefuse.dsl.dtypes import DTYPES
from stagefuse.runtime import emulator
from stagefuse.runtime.cuda.calls import Graph, Node, View
from stagefuse.runtime.errors import DeviceError, OutOfMemory

from .fake_code import Library, NotedNode
from .fake_order import ATOMIC, READ, WRITE, Access, Block, Ordered
from .fake_tensor import FakeTensor


@dataclass(frozen=True)
class FakeMap:
    """A tensor map, innermost dimension first."""

    dtype: str
    address: int
    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    swizzle: int

    def of(self, memory: np.ndarray[Any, Any], start: int) -> emulator.TensorMap:
        """The emulator's map, of the bytes of a buffer that starts at an address."""
        return emulator.TensorMap.of_part(
            memory, self.address - start, DTYPES[self.dtype].numpy, self.sizes[::-1],
            self.strides[::-1], self.box[::-1], self.swizzle,
        )  # fmt: skip


class FakeCuda(Ordered):
    """GPUs as (name, major, minor, bytes of memory)."""

    Node, Graph, View = NotedNode, Graph, View

    def __init__(self, *gpus: tuple[str, int, int, int]) -> None:
        super().__init__()
        self.gpus = gpus or (("NVIDIA H200", 9, 0, 1 << 24),)
        self.foreign: set[int] = set()  # blocks and streams of other libraries
        self.events: dict[int, int] = {}
        self.timers: dict[int, float] = {}  # when each was reached, by the device's clock
        self.clock = 0.0  # microseconds
        self.cost: Callable[[str, tuple[int, ...]], float] = lambda kernel, grid: 1.0
        self.graphs: set[Graph] = set()
        self.libraries: set[Any] = set()
        self.contexts = 0
        self.used = 0  # bytes
        self.counts: dict[str, int] = {}
        self.fail: dict[str, Exception] = {}  # raised once by a function of that name
        self.fail_kernel: str | None = None
        self.launched: list[tuple[str, tuple[int, ...]]] = []
        self._thread = threading.local()
        self._lock = threading.RLock()
        self._numbers = itertools.count(1)
        self._next = 0x7F00_0000_0000

    # What tests ask for

    def leaks(self) -> dict[str, int]:
        """What the runtime still holds, by kind."""
        found = {
            "blocks": len(self.blocks.keys() - self.foreign), "pinned": len(self.pinned),
            "streams": len(self.streams.keys() - self.foreign),
            "events": len(self.events), "graphs": len(self.graphs),
            "libraries": len(self.libraries), "contexts": self.contexts,
        }  # fmt: skip
        return {kind: count for kind, count in found.items() if count}

    def tensor(self, array: np.ndarray[Any, Any], stream: int | None = None) -> FakeTensor:
        """An array on the GPU that a stream, or the host, fills."""
        address = self._allocate(array.nbytes)
        self.foreign.add(address)
        if array.nbytes:
            source = np.ascontiguousarray(array).reshape(-1).view(np.uint8).copy()
            block, begin = self._at(address, array.nbytes)

            def run() -> None:
                block.bytes[begin : begin + source.nbytes] = source
                block.known[begin : begin + source.nbytes] = True

            at = self.foreign_stream() if stream is None else stream
            self._enqueue(at, run, [(block, begin, begin + array.nbytes, WRITE)])
            if stream is None:
                self._finish(self.streams[at])
        return FakeTensor(self, address, array.shape, array.dtype, stream)

    def foreign_stream(self) -> int:
        number = next(self._numbers)
        self.streams[number] = 0
        self.foreign.add(number)
        return number

    def read(self, address: int, shape: tuple[int, ...], dtype: Any, stream: int) -> Any:
        """What an op on the stream reads, as soon as it has."""
        size = int(np.prod(shape)) * np.dtype(dtype).itemsize
        if not size:
            return np.zeros(shape, dtype)
        block, begin = self._at(address, size)
        found: list[np.ndarray[Any, Any]] = []
        access = (block, begin, begin + size, READ)
        self._enqueue(
            stream, lambda: found.append(block.bytes[begin : begin + size].copy()), [access]
        )
        self._finish(self.streams[stream])
        return found[0].view(dtype).reshape(shape)

    def finish_all(self) -> None:
        """The device has done all that it was given; the host does not know it yet."""
        for op in self.ops:
            if not op.done:
                op.done = True
                op.run()

    # Devices

    def driver_version(self) -> tuple[int, int]:
        return (13, 0)

    def device_count(self) -> int:
        return len(self.gpus)

    def describe(self, number: int) -> tuple[str, int, int, int]:
        return self.gpus[number]

    def multiprocessors(self, number: int) -> int:
        return 7

    def open_context(self, number: int) -> str:
        self.contexts += 1
        return f"context {number}"

    def enter(self, context: str) -> None:
        if self.broken is None:  # as a context that failed
            self.stack().append(context)
        else:
            raise self.broken

    def current(self, context: str) -> Callable[[], bool]:
        return lambda: self.broken is None and self.stack()[-1:] == [context]

    def leave(self) -> None:
        self._require(bool(self.stack()), "a context left that was not entered")
        self.stack().pop()

    def stack(self) -> list[str]:
        if not hasattr(self._thread, "stack"):
            self._thread.stack = []
        return self._thread.stack  # type: ignore[no-any-return]

    def close_context(self, number: int) -> None:
        self.contexts -= 1

    # Code

    def load(self, code: bytes) -> Any:
        with self._entered("load"):
            if code.startswith(b"\x7fELF"):
                text = code[4:].decode()
            else:
                self._require(code.endswith(b"\0"), "PTX without a zero byte at its end")
                text = code[:-1].decode()
            library = Library(text)
            self.libraries.add(library)
            return library

    def unload(self, library: Any) -> None:
        with self._entered("unload"):
            self.libraries.remove(library)

    def kernel(self, library: Any, name: str) -> Any:
        with self._entered("kernel"):
            if name not in library.entries:
                raise DeviceError(f"looking for the kernel {name}: not found")
            return (library, name)

    def parameter_sizes(self, kernel: Any, count: int) -> list[int]:
        library, name = kernel
        return [128 if kind == "align" else 8 for kind in library.entries[name]][:count]

    # Memory

    def allocate(self, size: int, purpose: str) -> int:
        with self._entered("allocate"):
            if self.used + size > self.gpus[0][3]:
                raise OutOfMemory(f"allocating {size} bytes for {purpose}: out of memory")
            return self._allocate(size)

    def _allocate(self, size: int) -> int:
        if size == 0:
            return 0
        address = self._next
        self._next += -(-size // 512) * 512 + 4096
        content = np.full(size, 0xCB, np.uint8)
        self.blocks[address] = Block(address, content, np.zeros(size, bool))
        self.used += size
        return address

    def free(self, address: int) -> None:
        with self._entered("free"):
            if address:
                block = self.blocks.pop(address)
                self._retire(block)
                self.used -= block.bytes.nbytes

    def pin(self, size: int, purpose: str) -> int:
        with self._entered("pin"):
            content = np.full(size, 0xCB, np.uint8)
            address = content.ctypes.data
            self.pinned[address] = Block(address, content, np.ones(size, bool))
            return address

    def unpin(self, address: int) -> None:
        with self._entered("unpin"):
            self._retire(self.pinned.pop(address))

    def _retire(self, block: Block) -> None:
        busy = any(not op.done and block in op.blocks for op in self.ops)
        self._require(not busy, "memory freed while work that uses it is under way")
        block.alive = False

    def copy_in(self, address: int, host: int, size: int, stream: int) -> None:
        with self._entered("copy_in"):
            block, begin = self._at(address, size)
            accesses = [(block, begin, begin + size, WRITE)]
            locked = self._locked(host, size)
            if locked is None:
                source: Any = np.frombuffer(ctypes.string_at(host, size), np.uint8)
            else:
                source = locked[0].bytes[locked[1] : locked[1] + size]
                accesses.append((*locked, locked[1] + size, READ))

            def run() -> None:
                block.bytes[begin : begin + size] = source
                block.known[begin : begin + size] = True

            self._enqueue(stream, run, accesses)

    def copy_out(self, host: int, address: int, size: int, stream: int) -> None:
        with self._entered("copy_out"):
            block, begin = self._at(address, size)
            accesses = [(block, begin, begin + size, READ)]
            locked = self._locked(host, size)
            if locked is not None:
                accesses.append((*locked, locked[1] + size, WRITE))
            ctypes.memset(host, 0xEE, size)  # for who looks before the copy is done

            def run() -> None:
                ctypes.memmove(host, block.bytes[begin:].ctypes.data, size)

            self._enqueue(stream, run, accesses)

    def copy(self, to: int, source: int, size: int, stream: int) -> None:
        with self._entered("copy"):
            (target, at), (block, begin) = self._at(to, size), self._at(source, size)

            def run() -> None:
                target.bytes[at : at + size] = block.bytes[begin : begin + size]
                target.known[at : at + size] = True

            accesses = [(block, begin, begin + size, READ), (target, at, at + size, WRITE)]
            self._enqueue(stream, run, accesses)

    def clear(self, address: int, size: int, stream: int) -> None:
        with self._entered("clear"):
            block, begin = self._at(address, size)

            def run() -> None:
                block.bytes[begin : begin + size] = 0
                block.known[begin : begin + size] = True

            self._enqueue(stream, run, [(block, begin, begin + size, WRITE)])

    # Streams and events

    def stream(self) -> int:
        with self._entered("stream"):
            number = next(self._numbers)
            self.streams[number] = 0
            return number

    def close_stream(self, stream: int) -> None:
        with self._entered("close_stream"):
            del self.streams[stream]

    def finish(self, stream: int) -> None:
        with self._entered("finish"):
            self._finish(self.streams[stream])

    def event(self) -> int:
        with self._entered("event"):
            number = next(self._numbers)
            self.events[number] = 0
            return number

    def timer(self) -> int:
        event = self.event()
        self.timers[event] = 0.0
        return event

    def elapsed(self, first: int, then: int) -> float:
        with self._entered("elapsed"):
            reached = self.reached(first) and self.reached(then)
            self._require(reached, "a time between events that were not reached")
            return self.timers[then] - self.timers[first]

    def close_event(self, event: int) -> None:
        with self._entered("close_event"):
            del self.events[event]
            self.timers.pop(event, None)

    def record(self, event: int, stream: int) -> None:
        with self._entered("record"):
            self._require(event in self.events, "an event that does not exist")
            if event in self.timers:

                def note() -> None:
                    self.timers[event] = self.clock

                self._enqueue(stream, note, [])
            self.events[event] = self.streams[stream]

    def wait(self, stream: int, event: int) -> None:
        with self._entered("wait"):
            self.streams[stream] |= self.events[event]

    def reached(self, event: int) -> bool:
        with self._entered("reached"):
            mask = self.events[event]
            return all(op.done for op in self.ops if mask >> op.number & 1)

    def finish_event(self, event: int) -> None:
        with self._entered("finish_event"):
            self._finish(self.events[event])

    # Graphs

    def graph(self, nodes: Sequence[Node], device: int) -> Graph:
        with self._entered("graph"):
            for number, node in enumerate(nodes):
                self._check_node(node)
                good = all(0 <= i < number for i in node.after)
                self._require(good, "an edge from a node that is not there yet")
            given = [(n.arguments.copy(), list(n.maps)) for n in nodes]
            graph = Graph(tuple(nodes), tuple(given))
            self.graphs.add(graph)
            return graph

    def update(
        self, graph: Graph, number: int, arguments: Mapping[int, int], maps: Mapping[int, Any]
    ) -> None:
        with self._entered("update"):
            for given, changed in zip(graph.parameters[number], (arguments, maps), strict=True):
                for position, value in changed.items():
                    given[position] = value

    def close_graph(self, graph: Graph) -> None:
        with self._entered("close_graph"):
            self.graphs.remove(graph)

    def launcher(self, graph: Graph) -> Callable[[int], None]:
        return lambda stream: self.replay(graph, stream)

    def replay(self, graph: Graph, stream: int) -> None:
        with self._entered("replay"):
            self._require(graph in self.graphs, "a graph that is closed")
            start, masks = self.streams[stream], list[int]()
            for node, given in zip(graph.nodes, graph.parameters, strict=True):
                mask = start
                for other in node.after:
                    mask |= masks[other]
                masks.append(self._launch(node, *given, mask))
                self.streams[stream] |= masks[-1]

    def _check_node(self, node: Node) -> None:
        library, name = node.kernel
        self._require(library in self.libraries, "a kernel of an unloaded library")
        kinds = library.entries[name]
        blocks = node.grid[0] * node.grid[1] * node.grid[2]
        threads = node.block[0] * node.block[1] * node.block[2]
        room = max(256 // threads, 1) * self.multiprocessors(0)  # if all have all registers
        fit = not node.together or blocks <= room
        self._require(fit, f"{name}: {blocks} blocks cannot be at work at once")
        maps = kinds.count("align")
        wanted = (len(kinds) - maps, np.dtype(np.uint64), maps)
        found = (len(node.arguments), node.arguments.dtype, len(node.maps))
        self._require(found == wanted, f"{name} takes {wanted}, the launch gives {found}")

    def _launch(self, node: Node, given: np.ndarray[Any, Any], maps: list[Any], before: int) -> int:
        library, name = node.kernel
        kinds = library.entries[name]
        values = [int(v) for v in given]
        signed = [v - (1 << 64) if v >> 63 else v for v in values]
        pointers = [i for i, kind in enumerate(kinds) if kind == "u64"]
        touches: tuple[tuple[int, bool], ...] = node.touches  # type: ignore[attr-defined]
        sizes = [*((size, WRITE if writes else READ) for size, writes in touches), (16, ATOMIC)]
        arguments: list[Any] = [np.int64(v) for v in signed]
        accesses: list[Access] = []
        for i, (size, kind) in zip(pointers, sizes, strict=True):
            if size:
                block, begin = self._at(values[i], size)
                accesses.append((block, begin, begin + size, kind))
                arguments[i] = block.bytes[begin : begin + size]
            else:
                arguments[i] = np.zeros(0, np.uint8)
        for map in maps:
            own = [
                i for i, (size, _) in zip(pointers, sizes, strict=True)
                if isinstance(map, FakeMap) and 0 <= map.address - values[i] < size
            ]  # fmt: skip
            arguments.append(map.of(arguments[own[0]], values[own[0]]) if own else bytes(map))

        def run() -> None:
            if name == self.fail_kernel:
                raise DeviceError(f"running on the GPU: {name}: an illegal memory access")
            reads = [(b, i, j, b.bytes[i:j].copy()) for b, i, j, kind in accesses if kind == READ]
            library.module.launch(
                name, grid=node.grid, block=node.block, cluster=node.cluster,
                shared_bytes=node.shared_bytes, args=arguments,
            )  # fmt: skip
            for block, begin, end, before_ in reads:
                same = np.array_equal(block.bytes[begin:end], before_)
                self._require(same, f"{name} writes what its plan says it reads")
            for block, begin, end, kind in accesses:
                if kind == WRITE:
                    block.known[begin:end] = True
            self.launched.append((name, node.grid))
            self.clock += self.cost(name, node.grid)

        return self._put(before, run, accesses)

    def tensor_map(self, dtype: str, address: int, *numbers: Any) -> FakeMap:
        self._require(address % 16 == 0, "a tensor map of memory that is not aligned")
        self._at(address, 1)
        return FakeMap(dtype, address, *numbers)

    # Arrays of other libraries

    def view(self, value: FakeTensor, stream: int) -> View:
        with self._entered("view"):
            self._order(value.stream, stream)
            return View(value.address, 0, value.shape, value.strides, value.dtype, False, value)

    def _order(self, producer: int | None, consumer: int) -> None:
        if producer is not None and consumer in self.streams:
            self.streams[consumer] |= self.streams[producer]

    def export(
        self, address: int, shape: tuple[int, ...], strides: Any, dtype: Any, number: int,
        owner: Any, max_version: Any,
    ) -> FakeTensor:  # fmt: skip
        tensor = FakeTensor(self, address, shape, dtype, None)
        tensor.owner = owner
        return tensor

    # Inside

    @contextmanager
    def _entered(self, name: str) -> Iterator[None]:
        with self._lock:
            self.counts[name] = self.counts.get(name, 0) + 1
            if self.broken is not None:
                raise self.broken
            self._require(bool(self.stack()), f"{name} on a thread without a context")
            if name in self.fail:
                raise self.fail.pop(name)
            yield
