"""The launches of a call as graphs: one for each of a few sets of places that its arrays come in.

Callers often have two or three sets of arrays in turn, such as results of which one is made while
the one before still lives. A set that comes again gets a graph of its own, so that nothing has to
be changed before its launch.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from typing import Any

from .device_prepared import DeviceBucket
from .drivers import Driver, Launch, Region

_SETS = 4  # that get graphs of their own
_REMEMBERED = 8  # that were left, and may come again
Places = dict[int, tuple[Any, int]]  # handles and offsets, by buffer


class Ready:
    """A bucket's launches in a space as a graph, and where the buffers lie that lie elsewhere."""

    def __init__(
        self,
        driver: Driver,
        bucket: DeviceBucket,
        launches: Sequence[Launch],
        elsewhere: Mapping[int, Region],
    ) -> None:
        self._driver = driver
        self.graph = driver.graph(launches)
        self.launch = driver.launcher(self.graph)
        self.places = places_of(elsewhere)
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


class Graphs:
    """A bucket's graphs in a space, the latest used first."""

    def __init__(self, ready: Ready) -> None:
        self.all = deque([ready])
        self._left: deque[Places] = deque(maxlen=_REMEMBERED)

    def at(self, places: Places) -> Ready | None:
        """The graph for a set of places, if there is one."""
        for ready in self.all:
            if ready.places == places:
                if ready is not self.all[0]:
                    self.all.remove(ready)
                    self.all.appendleft(ready)
                return ready
        return None

    def wants(self, places: Places) -> bool:
        """Whether a set of places without a graph is to get one of its own."""
        return len(self.all) < _SETS and places in self._left

    def add(self, ready: Ready) -> None:
        self.all.appendleft(ready)

    def leave(self) -> Ready:
        """The graph that is to be changed to other places: the one used last of all."""
        self.all.rotate()
        self._left.append(dict(self.all[0].places))
        return self.all[0]


def places_of(regions: Mapping[int, Region]) -> Places:
    return {buffer: region.place for buffer, region in regions.items()}
