"""What one call at a time owns on a device: a stream, memory, and graphs made for that memory."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from .device_graphs import Graphs, Ready, places_of
from .device_prepared import STATUS_BYTES, DeviceBucket, padded
from .drivers import Driver, Launch, Memory, Region, quietly

if TYPE_CHECKING:
    from .device_again import Again

_MAX_GRAPHS = 64


class Space:
    """Memory, a stream and the graphs of buckets that replay in it.

    `owners` keeps alive what work under way reads and writes, and `past` what earlier work did,
    each until an event. Where a space is not `idle`, there may be such work: behind what `done`
    stands for, or on the stream `busy`, which `done` is not recorded on yet. The status lies in
    this machine's memory unless kernels read it, so that no copy follows a call for it.
    """

    def __init__(self, driver: Driver, weights: Mapping[int, Region], is_status_read: bool) -> None:
        self.driver, self.weights = driver, weights
        self.seen: Memory | None = None  # `status_host` as kernels see it, if they only report
        self.defers = False  # whether calls leave what kernels report to later ones
        self.unasked: list[DeviceBucket] = []  # of calls that did, two of them at most
        self.stream: Any = None
        self.done: Any = None
        self.status_host: np.ndarray[Any, Any] | None = None
        self.memory: Memory | None = None
        self.owners: tuple[Any, ...] = ()
        self.idle = True
        self.busy: Any = None
        self.again: Again | None = None  # the latest call, if it can be made again
        self.past: deque[tuple[Any, tuple[Any, ...]]] = deque()
        self._graphs: dict[DeviceBucket, Graphs] = {}
        try:
            self.stream = driver.stream()
            self.done = driver.event()
            self.status_host = driver.pin(STATUS_BYTES, "a status")
            if not is_status_read:
                self.seen = driver.seen(self.status_host)
                self.status_host[:] = 0
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
        if self.seen is None:
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
        while self.past:
            self.driver.close_event(self.past.popleft()[0])

    def own(self, owners: tuple[Any, ...]) -> None:
        """Keep alive what the next work uses, beside what work under way does."""
        free = []
        while self.past and self.driver.reached(self.past[0][0]):
            free.append(self.past.popleft()[0])
        if self.owners and self.busy is not None:
            event = free.pop() if free else self.driver.event()
            self.past.append((event, self.owners))
            self.driver.record(event, self.busy)
        for event in free:
            self.driver.close_event(event)
        self.owners = owners

    def clear_status(self) -> None:
        """Zero the status, behind all work in the space; `done` then stands for that too."""
        if self.seen is not None:
            self.finish()
            assert self.status_host is not None
            self.status_host[:] = 0
            return
        self.mark()
        self.driver.wait(self.stream, self.done)
        self.driver.clear(self.status, self.stream)
        self.driver.record(self.done, self.stream)
        self.idle = False

    @property
    def status(self) -> Region:
        memory = self.seen or self.memory
        assert memory is not None
        return Region(memory, 0, STATUS_BYTES)

    def leave(self, bucket: DeviceBucket) -> None:
        """Leave what the kernels of a call report to a later one."""
        if len(self.unasked) < 2 and bucket not in self.unasked:
            self.unasked.append(bucket)

    def copy_status(self, stream: Any) -> None:
        """Have `status_host` say what kernels reported, once what is on the stream is done."""
        if self.seen is None:
            assert self.status_host is not None
            self.driver.copy_out(self.status_host, self.status, stream)

    def region(self, bucket: DeviceBucket, buffer: int) -> Region:
        """Where a buffer lies in this memory."""
        assert self.memory is not None
        offset, size = bucket.places[buffer]
        return Region(self.memory, offset, size)

    def ready(self, bucket: DeviceBucket, elsewhere: Mapping[int, Region]) -> Ready:
        """The bucket's launches, with buffers that lie elsewhere than in this memory."""
        graphs = self._graphs.get(bucket)
        if graphs is None:
            if len(self._graphs) >= _MAX_GRAPHS:
                self._drop_graphs()
            graphs = self._graphs[bucket] = Graphs(self._new_ready(bucket, elsewhere))
            return graphs.all[0]
        places = places_of(elsewhere)
        ready = graphs.at(places)
        if ready is None and graphs.wants(places):
            ready = self._new_ready(bucket, elsewhere)
            graphs.add(ready)
        elif ready is None:
            ready = graphs.leave()
            before = ready.places
            every = (b for b in before | places if places.get(b) != before.get(b))
            ready.move({b: elsewhere.get(b) or self.region(bucket, b) for b in every})
            ready.places = places
        return ready

    def _new_ready(self, bucket: DeviceBucket, elsewhere: Mapping[int, Region]) -> Ready:
        return Ready(self.driver, bucket, self._launches(bucket, elsewhere), elsewhere)

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
                    plan.label, prepared.maps, bool(plan.together),
                )
            )  # fmt: skip
        return found

    def _drop_graphs(self) -> None:
        graphs, self._graphs = self._graphs, {}
        self.again = None
        if graphs:
            quietly((self.finish,))
        every = (ready for one in graphs.values() for ready in one.all)
        quietly(*((self.driver.close_graph, ready.graph) for ready in every))

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
        self.memory = self.seen = self.status_host = self.done = self.stream = None
