"""The latest call in a space, made again at the price of one launch.

A call with arrays of the same types needs no more than their addresses. Where those are the same
too, nothing is changed before the launch; an array that moved changes the launches that use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

from .device_prepared import DeviceBucket
from .device_space import Ready, Space
from .drivers import KERNEL_ALIGNMENT, Like, Memory, Region

if TYPE_CHECKING:
    from .device_pipeline import DevicePipeline
    from .session import Session


@dataclass(frozen=True, eq=False)
class Place:
    """An array of a call: what is like it, the plan's buffer, and its bytes."""

    like: Like
    buffer: int
    size: int


class Again:
    """A call whose arrays all lie in the device's memory, each where a kernel can use it.

    `form` makes what a call gives of several results. It holds for as long as its space makes no
    other call.
    """

    def __init__(
        self,
        space: Space,
        bucket: DeviceBucket,
        ready: Ready,
        states: Any,
        inputs: Mapping[str, Place],
        results: Sequence[Place],
        addresses: Sequence[int],
        form: Callable[..., Any] | None,
    ) -> None:
        self.bucket = bucket
        self._driver, self._space, self._ready = space.driver, space, ready
        self._states = None if states is None else ref(states)  # which die with their session
        self._places = (*inputs.values(), *results)
        self._inputs = [(name, place.like.address) for name, place in inputs.items()]
        self._results = [place.like for place in results]
        self._addresses = list(addresses)
        self._stream = self._places[0].like.stream()
        self._form = form

    def start(
        self, stream: Any, session: Session | None, out: Any, inputs: Mapping[str, Any]
    ) -> tuple[Any, Any] | None:
        """Put the call on a stream, or on the one that the arrays' library works on now.

        What it gives, and that stream; None for arrays that are not alike, and then nothing is
        done.
        """
        states = None if session is None else session.states
        if len(inputs) != len(self._inputs) or not self._is_of(states):
            return None
        addresses = [address(inputs.get(name)) for name, address in self._inputs]
        if out is None:
            made: Any = [like.new() for like in self._results]
        elif self._form is None:
            made = (out,)
        elif isinstance(out, tuple) and len(out) == len(self._results):
            made = out
        else:
            return None
        addresses += [like.address(x) for like, x in zip(self._results, made, strict=True)]
        if 0 in addresses:
            return None
        space, theirs = self._space, self._stream()
        moved = addresses != self._addresses
        if moved and not self._move(addresses):
            return None
        if stream is None or stream == theirs:
            stream = theirs
            if space.owns:
                space.own(())  # what dies is used again behind this call, as in its library
        else:
            owners = (*inputs.values(), *made)
            if moved:
                space.own(owners)
            else:  # the same memory; another object may stand for it
                space.owners = owners
            self._driver.order(theirs, stream)
        self._launch(stream, states)
        if out is None:
            out = made[0] if self._form is None else self._form(*made)
        return out, stream

    def _is_of(self, states: Any) -> bool:
        """Whether the latest call was of the same session, or also of none."""
        return states is None if self._states is None else states is self._states() is not None

    def _launch(self, stream: Any, states: Any) -> None:
        space = self._space
        if space.busy is None or space.busy != stream:
            space.come_after(stream)
        if states is None:
            self._driver.replay(self._ready.graph, stream)
            return
        self._driver.wait(stream, states.done)
        self._driver.replay(self._ready.graph, stream)
        self._driver.record(states.done, stream)

    def _move(self, addresses: list[int]) -> bool:
        """Have the launches use other addresses; False where kernels can't work on them there."""
        count = len(self._inputs)
        for number, (place, at) in enumerate(zip(self._places, addresses, strict=True)):
            if at % KERNEL_ALIGNMENT:
                return False
            if number >= count:  # a result must not lie over anything else
                for other, begin in zip(self._places[:number], addresses, strict=False):
                    if at < begin + other.size and begin < at + place.size:
                        return False
        self._ready.move(
            {
                place.buffer: Region(Memory(at, place.size), 0, place.size)
                for place, at, before in zip(self._places, addresses, self._addresses, strict=True)
                if at != before
            }
        )
        self._addresses = addresses
        return True


def repeatable(
    pipeline: DevicePipeline,
    space: Space,
    bucket: DeviceBucket,
    ready: Ready,
    session: Session | None,
    inputs: Mapping[str, Any],
    results: Sequence[Any],
) -> Again | None:
    """A call of these arrays, to be made again; None if a library has no quick way for that."""
    preparer, plan = pipeline._preparer, pipeline._plan
    numbers = dict(zip([i.name for i in plan.inputs], preparer.inputs, strict=True))
    buffers = [*(numbers[name] for name in inputs), *preparer.results]
    places, addresses = [], []
    for array, buffer in zip((*inputs.values(), *results), buffers, strict=True):
        like = pipeline.driver.like(array)
        if like is None:
            return None
        places.append(Place(like, buffer, bucket.places[buffer][1]))
        addresses.append(like.address(array))
    if not inputs or 0 in addresses:
        return None
    return Again(
        space, bucket, ready, None if session is None else session.states,
        dict(zip(inputs, places, strict=False)), places[len(inputs) :], addresses, pipeline._tuple,
    )  # fmt: skip
