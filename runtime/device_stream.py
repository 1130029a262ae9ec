"""A pipeline bound to a stream of the caller's: calls in its order, each under way at once."""

from __future__ import annotations

import sys
from contextlib import suppress
from threading import RLock
from typing import TYPE_CHECKING, Any

from .device_space import Space
from .drivers import closing
from .errors import DeviceError, IndexOutOfRange, InputError

if TYPE_CHECKING:
    from .device_pipeline import DevicePipeline


class OnStream:
    """What `DevicePipeline.on` gives.

    It keeps the space of its first call, so that one call after the other on the stream needs no
    event between them, until nobody refers to it, or the pipeline is closed.
    """

    def __init__(
        self, pipeline: DevicePipeline, stream: Any, owner: Any, defer_errors: bool = False
    ) -> None:
        self.pipeline, self.stream, self.defer_errors = pipeline, stream, defer_errors
        self.space: Space | None = None
        self._is_active = pipeline.driver.is_active
        self._owner = owner  # the caller's object, without which there may be no stream
        self._lock = RLock()

    def __call__(self, /, *args: Any, out: Any = None, **inputs: Any) -> Any:
        with self._lock:
            if self._is_active():
                return self._call(args, out, inputs)
            with self.pipeline.driver.active():
                return self._call(args, out, inputs)

    def _call(self, args: tuple[Any, ...], out: Any, inputs: dict[str, Any]) -> Any:
        pipeline, space = self.pipeline, self.space
        if space is None:
            pipeline._require_open()  # closing waits for the lock, and then lets go
            space = self.space = pipeline.acquire()
            space.defers = self.defer_errors and space.seen is not None
        try:
            if space.defers:
                pipeline.report_noted(space, self.stream)
            return pipeline.made(space, self.stream, args, out, inputs, None)
        except (InputError, IndexOutOfRange):
            raise
        except BaseException:
            self.space = None
            pipeline.discard(space, self.stream)
            raise

    def check(self) -> None:
        """Wait for what is on the stream. Raises IndexOutOfRange of a call that did not wait."""
        with self._lock, self.pipeline.driver.active():
            if self.space is not None:
                self._asked(self.space)

    def _asked(self, space: Space) -> None:
        self.pipeline.driver.finish(self.stream)
        self.pipeline.report_noted(space, self.stream)
        space.unasked = []

    def let_go(self) -> None:
        """Give the space back to the pipeline, as soon as no call is in it."""
        with self._lock:
            space, self.space = self.space, None
            if space is None:
                return
            with closing(self.pipeline.driver):
                try:
                    if space.defers:  # what nobody asked for is not the next call's
                        with suppress(IndexOutOfRange):
                            self._asked(space)
                        space.defers = False
                    self.pipeline.give_back(space)
                except DeviceError:  # such as for a stream that its owner has closed
                    self.pipeline.discard(space, None)

    def __del__(self) -> None:
        if getattr(self, "space", None) is not None and not sys.is_finalizing():
            with suppress(Exception):
                self.let_go()
