"""The latest call in a space, made again at the price of one launch.

A call with arrays of the same types needs no more than their addresses. Where those are the same
too, nothing is changed before the launch; an array that moved changes the launches that use it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from weakref import ref

from .device_graphs import Ready
from .device_prepared import DeviceBucket
from .device_space import Space
from .drivers import KERNEL_ALIGNMENT, Alike, Memory, Region

if TYPE_CHECKING:
    from .device_pipeline import DevicePipeline
    from .session import Session


@dataclass(frozen=True, eq=False)
class Place:
    """Where a call has an array: the plan's buffer, and its bytes."""

    buffer: int
    size: int


class Again:
    """A call whose arrays all lie in the device's memory, each where a kernel can use it.

    `places` are those of the inputs called `names`, then those of the results, and `fixed` is where
    the states lie; `form` makes what a call gives of several results. It holds for as long as its
    space makes no other call.
    """

    def __init__(
        self,
        space: Space,
        bucket: DeviceBucket,
        ready: Ready,
        states: Any,
        fixed: Mapping[int, Region],
        alike: Alike,
        names: Sequence[str],
        places: Sequence[Place],
        addresses: list[int],
        form: Callable[..., Any] | None,
    ) -> None:
        self.bucket = bucket
        self._driver, self._space, self._ready = space.driver, space, ready
        self._states = None if states is None else ref(states)  # which die with their session
        self._fixed = fixed
        self._known = {tuple(addresses): ready}
        self._alike, self._names, self._places = alike, [*names], places
        self._results = range(len(names), len(places))
        self._addresses = addresses
        self._stream = alike.stream()
        self._form = form

    def start(
        self, stream: Any, session: Session | None, out: Any, inputs: Mapping[str, Any]
    ) -> tuple[Any, Any] | None:
        """Put the call on a stream, or on the one that the arrays' library works on now.

        What it gives, and that stream; None for arrays that are not alike, and then nothing is
        done. Of what a call costs this is all but the launch: it is written to be quick.
        """
        if not self._is_of(session):
            return None
        made: Any
        if out is None:
            made = [*map(self._alike.new, self._results)]
        elif self._form is None:
            made = (out,)
        elif isinstance(out, (tuple, list)) and len(out) == len(self._results):
            made = out
        else:
            return None
        if [*inputs] == self._names:
            arrays = (*inputs.values(), *made)
        elif inputs.keys() == {*self._names}:
            arrays = (*map(inputs.__getitem__, self._names), *made)
        else:
            return None
        addresses = self._alike.addresses(arrays)
        if addresses is None:
            return None
        moved = addresses is not self._addresses and addresses != self._addresses
        if moved and not self._move(addresses):
            return None
        space, theirs = self._space, self._stream()
        if stream is None or stream == theirs:
            stream = theirs
            if space.owners or space.past:
                space.own(())  # what dies is used again behind this call, as in its library
        else:
            if moved:
                space.own(arrays)
            else:  # the same memory; another object may stand for it
                space.owners = arrays
            self._driver.order(theirs, stream)
        if space.busy is None or space.busy != stream:
            space.come_after(stream)
        self._ready.launch(stream)
        if out is None:
            out = made[0] if self._form is None else self._form(*made)
        return out, stream

    def _is_of(self, session: Session | None) -> bool:
        """Whether the latest call was of the same session, or also of none."""
        if session is None:
            return self._states is None
        return self._states is not None and self._states() is session.states

    def _move(self, addresses: list[int]) -> bool:
        """Have the arrays at other addresses; False where kernels can't work on them there."""
        key = tuple(addresses)
        ready = self._known.get(key)
        if ready is None:
            if not self._suits(addresses):
                return False
            elsewhere = dict(self._fixed)
            for place, at in zip(self._places, addresses, strict=True):
                elsewhere[place.buffer] = Region(Memory(at, place.size), 0, place.size)
            ready = self._space.ready(self.bucket, elsewhere)
            # It may have been another call's.
            self._known = {k: other for k, other in self._known.items() if other is not ready}
            self._known[key] = ready
        self._ready, self._addresses = ready, addresses
        return True

    def _suits(self, addresses: list[int]) -> bool:
        """Whether all are aligned, and no result lies over anything else."""
        count = len(self._names)
        for number, (place, at) in enumerate(zip(self._places, addresses, strict=True)):
            if at % KERNEL_ALIGNMENT:
                return False
            if number >= count:
                for other, begin in zip(self._places[:number], addresses, strict=False):
                    if at < begin + other.size and begin < at + place.size:
                        return False
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
    """A call of these arrays, to be made again; None where there is no quick way to them."""
    preparer, plan = pipeline._preparer, pipeline._plan
    arrays = (*inputs.values(), *results)
    alike = pipeline.driver.alike(arrays) if inputs else None
    addresses = None if alike is None else alike.addresses(arrays)
    if alike is None or addresses is None:
        return None
    numbers = dict(zip([i.name for i in plan.inputs], preparer.inputs, strict=True))
    buffers = [*(numbers[name] for name in inputs), *preparer.results]
    states: Any = None if session is None else session.states
    fixed = zip(preparer.states, () if states is None else states.regions, strict=True)
    return Again(
        space, bucket, ready, states, dict(fixed), alike, [*inputs],
        [Place(b, bucket.places[b][1]) for b in buffers], addresses, pipeline._tuple,
    )  # fmt: skip
