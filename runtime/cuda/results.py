"""Memory of results on a GPU: freed memory waits to be used again, behind its last readers.

Freeing waits for the whole GPU, and allocating is slow too. Memory of a result that died is used
again for one of the same size, as soon as the streams that it was handed to have got past what was
on them. Who asked for the address alone may read on any stream: such memory is freed instead.
"""

from __future__ import annotations

import threading
import weakref
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from stagefuse.runtime.drivers import Memory, quietly
from stagefuse.runtime.errors import DeviceError, OutOfMemory

from . import calls

if TYPE_CHECKING:
    from .driver import CudaDriver

_LIMIT = 1 << 28  # bytes that wait at most


@dataclass(eq=False)
class Users:
    """The streams that may still use an array's memory; `unknown`: its address was given away.

    What a call waited for is not among them.
    """

    streams: set[int] = field(default_factory=set)
    unknown: bool = False


class _Owned:
    """A result's memory; its death is the death of the last array that refers to it."""


class ResultMemory:
    """Blocks of memory by size, each with events that must pass before it is used again."""

    def __init__(self, driver: CudaDriver) -> None:
        self._driver = driver
        self._waiting: dict[int, list[tuple[int, list[int]]]] = {}
        self._waiting_bytes = 0
        self._live = 0
        self._closed = False
        # Re-entrant: a garbage collection inside may free a result of this very driver.
        self._lock = threading.RLock()

    def take(self, size: int, stream: int) -> tuple[Memory, Users]:
        """Memory that the stream may write. Raises OutOfMemory."""
        size = max(size, 1)  # also an empty array needs an address that CUDA knows
        with self._lock:
            blocks = self._waiting.get(size)
            address, events = blocks.pop() if blocks else (None, [])
            if address is not None:
                self._waiting_bytes -= size
            self._live += 1
        try:
            while events:
                calls.wait(stream, events[-1])
                calls.close_event(events.pop())
            if address is None:
                address = self._allocate(size)
        except BaseException:
            if address is not None:
                self._free(address, events)
            with self._lock:
                self._live -= 1
            raise
        owner, users = _Owned(), Users()
        # Not at exit: the driver may be gone by then.
        weakref.finalize(owner, self._died, address, size, users).atexit = False
        return Memory(address, size, owner), users

    def _allocate(self, size: int) -> int:
        try:
            return calls.allocate(size, "a result")
        except OutOfMemory:
            if not self.trim():
                raise
        return calls.allocate(size, "a result")

    def _died(self, address: int, size: int, users: Users) -> None:
        try:
            with self._driver.active():
                self._take_back(address, size, users)
        except DeviceError:
            pass  # no call to carry it to; the next one meets the same error
        with self._lock:
            self._live -= 1
        self._release_if_last()

    def _take_back(self, address: int, size: int, users: Users) -> None:
        with self._lock:
            keep = not self._closed and self._waiting_bytes + size <= _LIMIT
        if not keep or users.unknown:
            calls.free(address)
            return
        events: list[int] = []
        try:
            for stream in sorted(users.streams):
                events.append(calls.event())
                calls.record(events[-1], stream)
        except DeviceError:  # such as a stream that its owner has closed
            quietly(*((calls.close_event, e) for e in events), (calls.free, address))
            return
        with self._lock:
            self._waiting.setdefault(size, []).append((address, events))
            self._waiting_bytes += size

    def trim(self) -> bool:
        """Free what waits; whether anything did."""
        with self._lock:
            waiting, self._waiting, self._waiting_bytes = self._waiting, {}, 0
        for blocks in waiting.values():
            for address, events in blocks:
                self._free(address, events)
        return bool(waiting)

    def _free(self, address: int, events: list[int]) -> None:
        """Behind the events."""
        for event in events:
            quietly((calls.finish_event, event), (calls.close_event, event))
        quietly((calls.free, address))

    def close(self) -> None:
        """Free what waits, and keep nothing from now on."""
        with self._lock:
            self._closed = True
        try:
            with self._driver.active():
                self.trim()
        finally:
            self._release_if_last()

    def _release_if_last(self) -> None:
        with self._lock:
            last, self._closed = self._closed and self._live == 0, self._closed
            if last:
                self._live = -1  # only once
        if last:
            self._driver.release()

    def waiting(self) -> Any:
        """Bytes that wait, for tests."""
        return self._waiting_bytes
