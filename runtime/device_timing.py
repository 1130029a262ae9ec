"""What kernels of some forms take on a device, by its own clock, in calls with given inputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from types import TracebackType
from typing import TYPE_CHECKING, Any

from .drivers import Launch, Region, quietly

if TYPE_CHECKING:
    from .device_pipeline import DevicePipeline

CACHE = 128 << 20
"""Bytes written before a kernel is timed, so that no cache has what it reads: more than the L2
cache of any GPU. In a model, weights come from memory too."""


class Timer:
    """Calls of a pipeline without states, in which each run of launches whose reports name the same
    form is timed; all else runs between, so that kernels work on what they do in a call."""

    def __init__(self, pipeline: DevicePipeline, inputs: Mapping[str, Any]) -> None:
        self.pipeline, self.driver = pipeline, pipeline.driver
        operands, _ = pipeline._bind((), dict(inputs))
        bucket = pipeline._bucket(operands, None)
        with self.driver.active():
            self.space = pipeline.new_space()
            self.graphs: list[tuple[str, Any]] = []
            self.marks: list[Any] = []
            self.flush = None
            try:
                self.space.reserve(bucket)
                for number, operand in zip(pipeline._preparer.inputs, operands, strict=True):
                    if operand.nbytes:
                        region = self.space.region(bucket, number)
                        self.driver.copy_in(region, operand, self.space.stream)
                self.driver.finish(self.space.stream)
                self.flush = self.driver.allocate(CACHE, "emptying the cache")
                self.marks = [self.driver.timer() for _ in range(2)]
                runs: list[tuple[str, list[Launch]]] = []
                launches = self.space.single_launches(bucket, {})
                for launch, prepared in zip(launches, bucket.launches, strict=True):
                    form = str(prepared.plan.report.get("form", ""))
                    if not runs or runs[-1][0] != form:
                        runs.append((form, []))
                    chain = runs[-1][1]
                    after = (len(chain) - 1,) if chain else ()
                    chain.append(replace(launch, after=after))
                for form, chain in runs:
                    self.graphs.append((form, self.driver.graph(chain)))
            except BaseException:
                self.close()
                raise

    def __enter__(self) -> Timer:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        with self.driver.active():
            self.close()

    def times(self) -> dict[str, float]:
        """Microseconds by form, of one call."""
        driver, stream = self.driver, self.space.stream
        found: dict[str, float] = {}
        begin, end = self.marks
        assert self.flush is not None
        with driver.active():
            for form, graph in self.graphs:
                if not form:
                    driver.launcher(graph)(stream)
                    continue
                driver.clear(Region(self.flush, 0, CACHE), stream)
                driver.record(begin, stream)
                driver.launcher(graph)(stream)
                driver.record(end, stream)
                driver.finish(stream)
                found[form] = found.get(form, 0.0) + driver.elapsed(begin, end)
            driver.finish(stream)
        return found

    def close(self) -> None:
        """Give everything back."""
        quietly(*((self.driver.close_graph, graph) for _, graph in self.graphs))
        quietly(*((self.driver.close_event, mark) for mark in self.marks))
        if self.flush is not None:
            quietly((self.driver.finish, self.space.stream), (self.driver.free, self.flush))
        self.space.close()
