"""What one call at a time owns on a device: a stream, memory, and graphs made for that memory."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from .device_prepared import STATUS_BYTES, DeviceBucket, padded
from .drivers import Driver, Launch, Memory, Region, quietly

_MAX_GRAPHS = 64


class Space:
    """Memory, a stream and the graphs of buckets that replay in it.

    `owners` keeps alive what work under way reads and writes. Where a space is not `idle`, there
    may be such work: on its stream, or on another, and then `done` is recorded behind it.
    """

    def __init__(self, driver: Driver, weights: Mapping[int, Region]) -> None:
        self.driver, self.weights = driver, weights
        self.stream: Any = None
        self.done: Any = None
        self.status_host: np.ndarray[Any, Any] | None = None
        self.memory: Memory | None = None
        self.owners: tuple[Any, ...] = ()
        self.idle = True
        self._graphs: dict[DeviceBucket, tuple[Any, dict[int, tuple[Any, int]]]] = {}
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
            self.driver.finish(self.stream)
            self.driver.free(memory)
        self.memory = self.driver.allocate(padded(bucket.size), "intermediates")
        self.clear_status()

    def clear_status(self) -> None:
        """Zero the status, behind what `done` stands for; `done` then stands for that too."""
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

    def graph(self, bucket: DeviceBucket, elsewhere: Mapping[int, Region]) -> Any:
        """The bucket's graph, with buffers that lie elsewhere than in this memory."""
        places = {b: region.place for b, region in elsewhere.items()}
        known = self._graphs.get(bucket)
        if known is None:
            if len(self._graphs) >= _MAX_GRAPHS:
                self._drop_graphs()
            every = range(len(bucket.launches))
            graph = self.driver.graph(self._launches(bucket, elsewhere, every))
        else:
            graph, before = known
            if places == before:
                return graph
            moved = {b for b in places.keys() | before.keys() if places.get(b) != before.get(b)}
            touched = [
                i for i, n in enumerate(bucket.launches) if not moved.isdisjoint(n.plan.buffers)
            ]
            launches = self._launches(bucket, elsewhere, touched)
            for number, launch in zip(touched, launches, strict=True):
                self.driver.update(graph, number, launch)
        self._graphs[bucket] = (graph, places)
        return graph

    def single_launches(
        self, bucket: DeviceBucket, elsewhere: Mapping[int, Region]
    ) -> list[Launch]:
        """The bucket's launches, each to be a graph of its own."""
        launches = self._launches(bucket, elsewhere, range(len(bucket.launches)))
        return [replace(n, after=()) for n in launches]

    def _launches(
        self, bucket: DeviceBucket, elsewhere: Mapping[int, Region], numbers: Sequence[int]
    ) -> list[Launch]:
        found = []
        for prepared in (bucket.launches[i] for i in numbers):
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
        if graphs:
            quietly((self.driver.finish, self.stream))
        quietly(*((self.driver.close_graph, graph) for graph, _ in graphs.values()))

    def close(self) -> None:
        """Wait for what is under way and give everything back, as far as the device lets."""
        driver = self.driver
        if self.done is not None:
            quietly((driver.finish_event, self.done))
        if self.stream is not None:
            quietly((driver.finish, self.stream))
        self.owners = ()
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
