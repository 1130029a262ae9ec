"""What one call at a time owns on a device: a stream, memory, and graphs made for that memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .device_prepared import STATUS_BYTES, DeviceBucket, padded
from .drivers import Driver, Launch, Memory, Region, quietly

if TYPE_CHECKING:
    from .device_again import Again

_MAX_GRAPHS = 64


class Ready:
    """A bucket's launches in a space as a graph, and where the buffers lie that lie elsewhere."""

    def __init__(
        self, driver: Driver, bucket: DeviceBucket, launches: Sequence[Launch],
        elsewhere: Mapping[int, Region],
    ) -> None:  # fmt: skip
        self._driver = driver
        self.graph = driver.graph(launches)
        self.places = {b: region.place for b, region in elsewhere.items()}
        self._uses: dict[int, list[tuple[int, int]]] = {}  # launches, and positions in them
        for number, launch in enumerate(bucket.launches):
            for position, buffer in enumerate(launch.plan.buffers):
                self._uses.setdefault(buffer, []).append((number, position))

    def move(self, regions: Mapping[int, Region]) -> None:
        """Have buffers lie in other regions from now on."""
        changed: dict[int, dict[int, Region]] = {}
        for buffer, region in regions.items():
            self.places[buffer] = region.place
            for number, position in self._uses.get(buffer, ()):
                changed.setdefault(number, {})[position] = region
        for number, arguments in changed.items():
            self._driver.update(self.graph, number, arguments)


class Space:
    """Memory, a stream and the graphs of buckets that replay in it.

    `owners` keeps alive what work under way reads and writes. Where a space is not `idle`, there
    may be such work: behind what `done` stands for, or on the stream `busy`, which `done` is not
    recorded on yet.
    """

    def __init__(self, driver: Driver, weights: Mapping[int, Region]) -> None:
        self.driver, self.weights = driver, weights
        self.stream: Any = None
        self.done: Any = None
        self.status_host: np.ndarray[Any, Any] | None = None
        self.memory: Memory | None = None
        self.owners: tuple[Any, ...] = ()
        self.idle = True
        self.busy: Any = None
        self.again: Again | None = None  # the latest call, if it can be made again
        self._past: deque[tuple[Any, tuple[Any, ...]]] = deque()  # owners, until an event
        self._graphs: dict[DeviceBucket, Ready] = {}
        try:
            self.stream = driver.stream()
            self.done = driver.event()
            self.status_host = driver.pin(STATUS_BYTES, "a status")
        except BaseException:
            self.close()
            raise

    def reserve(self, bucket: DeviceBucket) -> None:
        """Have memory for the bucket. Raises OutOfMemory, and then has none."""
        if self.memory is not None and self.memory.size >= bucket.size:
            return
        self._drop_graphs()
        if self.memory is not None:  # let go of the old one first
            memory, self.memory = self.memory, None
            self.finish()
            self.driver.free(memory)
        self.memory = self.driver.allocate(padded(bucket.size), "intermediates")
        self.clear_status()

    def come_after(self, stream: Any) -> None:
        """Let what comes next on a stream find the space's memory free for it."""
        if not self.idle and (self.busy is None or self.busy != stream):
            self.mark()
            self.driver.wait(stream, self.done)
        self.idle, self.busy = False, stream

    def mark(self) -> None:
        """Let `done` stand for all work in the space."""
        if self.busy is not None:
            self.driver.record(self.done, self.busy)
            self.busy = None

    def finish(self) -> None:
        """Wait until no work is under way."""
        self.mark()
        self.driver.finish_event(self.done)
        self.driver.finish(self.stream)
        self.rest()

    def rest(self) -> None:
        """Take note that no work is under way."""
        self.idle, self.busy, self.owners = True, None, ()
        while self._past:
            self.driver.close_event(self._past.popleft()[0])

    @property
    def owns(self) -> bool:
        """Whether anything is kept alive."""
        return bool(self.owners or self._past)

    def own(self, owners: tuple[Any, ...]) -> None:
        """Keep alive what the next work uses, beside what work under way does."""
        free = []
        while self._past and self.driver.reached(self._past[0][0]):
            free.append(self._past.popleft()[0])
        if self.owners and self.busy is not None:
            event = free.pop() if free else self.driver.event()
            self._past.append((event, self.owners))
            self.driver.record(event, self.busy)
        for event in free:
            self.driver.close_event(event)
        self.owners = owners

    def clear_status(self) -> None:
        """Zero the status, behind all work in the space; `done` then stands for that too."""
        self.mark()
        self.driver.wait(self.stream, self.done)
        self.driver.clear(self.status, self.stream)
        self.driver.record(self.done, self.stream)
        self.idle = False

    @property
    def status(self) -> Region:
        assert self.memory is not None
        return Region(self.memory, 0, STATUS_BYTES)

    def region(self, bucket: DeviceBucket, buffer: int) -> Region:
        """Where a buffer lies in this memory."""
        assert self.memory is not None
        offset, size = bucket.places[buffer]
        return Region(self.memory, offset, size)

    def ready(self, bucket: DeviceBucket, elsewhere: Mapping[int, Region]) -> Ready:
        """The bucket's launches, with buffers that lie elsewhere than in this memory."""
        ready = self._graphs.get(bucket)
        if ready is None:
            if len(self._graphs) >= _MAX_GRAPHS:
                self._drop_graphs()
            launches = self._launches(bucket, elsewhere)
            ready = self._graphs[bucket] = Ready(self.driver, bucket, launches, elsewhere)
            return ready
        places, before = {b: r.place for b, r in elsewhere.items()}, ready.places
        if places != before:
            every = (b for b in before | places if places.get(b) != before.get(b))
            ready.move({b: elsewhere.get(b) or self.region(bucket, b) for b in every})
            ready.places = places
        return ready

    def single_launches(
        self, bucket: DeviceBucket, elsewhere: Mapping[int, Region]
    ) -> list[Launch]:
        """The bucket's launches, each to be a graph of its own."""
        return [replace(n, after=()) for n in self._launches(bucket, elsewhere)]

    def _launches(self, bucket: DeviceBucket, elsewhere: Mapping[int, Region]) -> list[Launch]:
        found = []
        for prepared in bucket.launches:
            plan = prepared.plan
            regions = tuple(
                elsewhere.get(b) or self.weights.get(b) or self.region(bucket, b)
                for b in plan.buffers
            )
            found.append(
                Launch(
                    plan.kernel, prepared.grid, plan.block, plan.cluster, prepared.shared_bytes,
                    regions, prepared.writes, prepared.dims, self.status, prepared.after,
                    plan.label, prepared.maps,
                )
            )  # fmt: skip
        return found

    def _drop_graphs(self) -> None:
        graphs, self._graphs = self._graphs, {}
        self.again = None
        if graphs:
            quietly((self.finish,))
        quietly(*((self.driver.close_graph, ready.graph) for ready in graphs.values()))

    def close(self) -> None:
        """Wait for what is under way and give everything back, as far as the device lets."""
        driver = self.driver
        if self.done is not None:
            quietly((self.mark,), (driver.finish_event, self.done))
        if self.stream is not None:
            quietly((driver.finish, self.stream))
        quietly((self.rest,))
        self._drop_graphs()
        if self.memory is not None:
            quietly((driver.free, self.memory))
        if self.status_host is not None:
            quietly((driver.unpin, self.status_host))
        if self.done is not None:
            quietly((driver.close_event, self.done))
        if self.stream is not None:
            quietly((driver.close_stream, self.stream))
        self.memory = self.status_host = self.done = self.stream = None
