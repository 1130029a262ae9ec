"""`map` on a device: copies in, kernels and copies out of several batches overlap.

Three streams, one for each of the three; each batch has a lane of its own: memory on the device
and page-locked memory here that mirrors its beginning, so copies go on while Python does.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from threading import RLock
from typing import TYPE_CHECKING, Any

import numpy as np

from .device_arrays import DeviceArray
from .device_prepared import DeviceBucket, padded
from .drivers import closing, quietly
from .errors import InputError

if TYPE_CHECKING:
    from .device_pipeline import DevicePipeline

Result = Callable[[], Any]


def mapped(
    pipeline: DevicePipeline, batches: Iterator[Mapping[str, Any]], depth: int
) -> Iterator[Any]:
    """Results in order, with up to `depth` batches under way."""
    lanes = Lanes(pipeline, depth)
    pending: deque[Result] = deque()
    try:
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise InputError(f"map takes dicts of inputs, found {type(batch).__name__}")
            pending.append(lanes.start(batch))
            if len(pending) >= depth:
                yield pending.popleft()()
        while pending:
            yield pending.popleft()()
    finally:
        lanes.close()


class _Lane:
    def __init__(self, pipeline: DevicePipeline) -> None:
        self.driver = pipeline.driver
        self.space = pipeline.new_space()
        self.pinned: np.ndarray[Any, Any] | None = None
        self.events: list[Any] = []
        try:
            for _ in range(2):
                self.events.append(self.driver.event())
        except BaseException:
            self.close()
            raise
        self.copied_in, self.ran = self.events

    def reserve(self, bucket: DeviceBucket) -> None:
        self.space.reserve(bucket)
        if self.pinned is None or self.pinned.nbytes < bucket.io_bytes:
            old, self.pinned = self.pinned, None
            if old is not None:
                self.driver.unpin(old)
            self.pinned = self.driver.pin(padded(bucket.io_bytes), "copies")

    def here(self, bucket: DeviceBucket, buffer: int) -> np.ndarray[Any, Any]:
        """The page-locked bytes that mirror a buffer."""
        assert self.pinned is not None
        offset, size = bucket.places[buffer]
        return self.pinned[offset : offset + size]

    def close(self) -> None:
        self.space.close()
        pinned, self.pinned = self.pinned, None
        if pinned is not None:
            quietly((self.driver.unpin, pinned))
        for event in self.events:
            quietly((self.driver.close_event, event))


class Lanes:
    """The streams and lanes of one `map`."""

    def __init__(self, pipeline: DevicePipeline, depth: int) -> None:
        self.pipeline, self.driver, self.depth = pipeline, pipeline.driver, depth
        pipeline._require_open()
        self._lock = RLock()  # another thread may close the pipeline meanwhile
        self.lanes: list[_Lane] = []
        self.streams: list[Any] = []
        self.count = 0
        pipeline._maps.add(self)
        try:
            with self.driver.active():
                for _ in range(3):
                    self.streams.append(self.driver.stream())
        except BaseException:
            self.close()
            raise

    def start(self, batch: Mapping[str, Any]) -> Result:
        """Put a batch under way; what comes back waits for its result."""
        with self._lock:
            self.pipeline._require_open()
            with self.driver.active():
                return self._started(batch)

    def _started(self, batch: Mapping[str, Any]) -> Result:
        pipeline = self.pipeline
        viewed = {k: pipeline._viewed(v, k, self.streams[0]) for k, v in batch.items()}
        if any(isinstance(v, DeviceArray) for v in viewed.values()):
            result = pipeline(**batch)  # nothing to copy, so nothing to overlap
            return lambda: result
        operands, convert = pipeline._bind((), viewed)
        bucket = pipeline._bucket(operands)
        lane = self._next(bucket)
        self._copy_in(lane, bucket, operands)
        self._run(lane, bucket)
        self._copy_out(lane, bucket)
        return lambda: self._locked_result(lane, bucket, convert)

    def _next(self, bucket: DeviceBucket) -> _Lane:
        """The lane that has been idle longest: of `depth`, the one `depth` batches ago."""
        number = self.count % self.depth
        self.count += 1
        if number == len(self.lanes):
            self.lanes.append(_Lane(self.pipeline))
        lane = self.lanes[number]
        lane.reserve(bucket)
        return lane

    def _copy_in(self, lane: _Lane, bucket: DeviceBucket, operands: list[Any]) -> None:
        driver, (stream, _, _) = self.driver, self.streams
        driver.wait(stream, lane.space.done)
        for number, operand in zip(self.pipeline._preparer.inputs, operands, strict=True):
            here = lane.here(bucket, number)
            if here.nbytes:
                np.copyto(here.view(operand.dtype).reshape(operand.shape), operand)
                driver.copy_in(lane.space.region(bucket, number), here, stream)
        driver.record(lane.copied_in, stream)

    def _run(self, lane: _Lane, bucket: DeviceBucket) -> None:
        driver, (_, stream, _) = self.driver, self.streams
        driver.wait(stream, lane.copied_in)
        lane.space.ready(bucket, {}).launch(stream)
        driver.record(lane.ran, stream)

    def _copy_out(self, lane: _Lane, bucket: DeviceBucket) -> None:
        driver, (_, _, stream) = self.driver, self.streams
        driver.wait(stream, lane.ran)
        for number in self.pipeline._preparer.results:
            here = lane.here(bucket, number)
            if here.nbytes:
                driver.copy_out(here, lane.space.region(bucket, number), stream)
        lane.space.copy_status(stream)
        driver.record(lane.space.done, stream)

    def _locked_result(self, lane: _Lane, bucket: DeviceBucket, convert: Any) -> Any:
        with self._lock:
            self.pipeline._require_open()
            return self._result(lane, bucket, convert)

    def _result(self, lane: _Lane, bucket: DeviceBucket, convert: Any) -> Any:
        pipeline = self.pipeline
        with self.driver.active():
            self.driver.finish_event(lane.space.done)
            pipeline.report_status(lane.space, bucket.dims)
        results = pipeline._fresh(bucket, False, None)
        for number, result in zip(pipeline._preparer.results, results, strict=True):
            here = lane.here(bucket, number)
            np.copyto(result, here.view(result.dtype).reshape(result.shape))
        if convert is not None:
            results = [convert(r) for r in results]
        return results[0] if pipeline._tuple is None else pipeline._tuple(*results)

    def close(self) -> None:
        """Wait for what is under way and give everything back; once."""
        with self._lock:
            if self not in self.pipeline._maps:
                return
            self.pipeline._maps.discard(self)
            with closing(self.driver):
                quietly(*((self.driver.finish, s) for s in self.streams))
                for lane in self.lanes:
                    lane.close()
                quietly(*((self.driver.close_stream, s) for s in self.streams))
