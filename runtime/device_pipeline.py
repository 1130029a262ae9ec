"""Calling a pipeline on a device through a driver: copies in, one graph, copies out.

Inputs that lie in the device's memory are read where they are, and then results are arrays there
too. A call waits until its results are whole, but for calls on a stream of the caller's, whose
results are whole in the order of that stream.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any
from weakref import WeakSet

import numpy as np

from stagefuse.compiler.plan import GpuPlan, Plan

from . import interchange
from .device_again import repeatable
from .device_arrays import DeviceArray, DeviceBinder
from .device_graphs import Ready
from .device_prepared import DeviceBucket, DevicePreparer
from .device_space import Space
from .device_states import DeviceStates
from .device_stream import OnStream
from .drivers import MAP_BYTES, Driver, Memory, Region, closing, quietly
from .errors import DeviceError, IndexOutOfRange, InputError, OutOfMemory
from .pipeline import Pipeline, check_depth, check_out, check_out_type, chosen
from .report import Report
from .session import Session

_MAX_BUCKETS = 1024
_MAX_FREE_SPACES = 8
_DENSE = 0x0001 | 0x0100  # of `ndarray.flags.num`: C-contiguous and aligned
Operand = Any  # np.ndarray or DeviceArray


class DevicePipeline(Pipeline):
    """A pipeline on a GPU, or in the emulator. It owns the driver, and closes it."""

    def __init__(self, plan: Plan, name: str | None, driver: Driver) -> None:
        one = chosen(plan, name)
        super().__init__(one, DeviceBinder(one), plan.arrays)
        self.driver, self.device = driver, driver.device
        self._gpu = gpu_plan(one.gpu, driver.arch, one.name)
        self._preparer = DevicePreparer(one, self._gpu, driver.multiprocessors)
        self._buckets: dict[tuple[tuple[int, ...], ...], DeviceBucket] = {}
        self._free: list[Space] = []
        self._spaces: list[Space] = []
        self._maps: set[Any] = set()  # of device_map.Lanes, under way
        self._bound: WeakSet[OnStream] = WeakSet()
        self._idle = threading.Condition(self._lock)
        self._calls = 0  # under way
        self._weight_memory: Memory | None = None
        self._weights: dict[int, Region] = {}
        try:
            kernels = {
                n.kernel: [8] * (len(n.buffers) + len(n.dims) + 1) + [MAP_BYTES] * len(n.maps)
                for n in self._gpu.launches
            }
            with driver.active():
                driver.load(kernels)
                self._upload(plan)
        except BaseException:
            self._closed = True
            self._release()
            raise

    def _upload(self, plan: Plan) -> None:
        places, copies, size = self._preparer.weights(plan.arrays)
        if not size:
            return
        driver = self.driver
        memory = self._weight_memory = driver.allocate(size, "weights")
        stream = driver.stream()
        try:
            for offset, array in copies:
                if array.nbytes:
                    source = np.require(array, None, ["C", "A"])
                    driver.copy_in(Region(memory, offset, array.nbytes), source, stream)
            driver.finish(stream)
        finally:
            quietly((driver.finish, stream), (driver.close_stream, stream))
        self._weights = {i: Region(memory, *place) for i, place in places.items()}

    def __call__(self, /, *args: Any, out: Any = None, **inputs: Any) -> Any:
        return self._call(args, out, inputs, None)

    def _call_in(
        self, session: Session, args: tuple[Any, ...], out: Any, inputs: dict[str, Any]
    ) -> Any:
        return self._call(args, out, inputs, session)

    def _new_states(self, types: Sequence[tuple[np.dtype[Any], tuple[int, ...]]]) -> DeviceStates:
        return DeviceStates(self.driver, types)

    def on(self, stream: Any, *, defer_errors: bool = False) -> OnStream:
        made = OnStream(self, self.driver.adopt(stream), stream, defer_errors)
        with self._lock:
            self._bound.add(made)
        return made

    def _call(
        self, args: tuple[Any, ...], out: Any, inputs: dict[str, Any], session: Session | None
    ) -> Any:
        with self._lock:
            self._require_open()
            self._calls += 1
        try:
            if self.driver.is_active():
                return self._called(args, out, inputs, session)
            with self.driver.active():
                return self._called(args, out, inputs, session)
        finally:
            with self._lock:
                self._calls -= 1
                if self._closed:
                    self._idle.notify_all()

    def _called(
        self, args: tuple[Any, ...], out: Any, inputs: dict[str, Any], session: Session | None
    ) -> Any:
        space = self.acquire()
        try:
            result = self.made(space, None, args, out, inputs, session)
        except (InputError, IndexOutOfRange):
            self.give_back(space)
            raise
        except BaseException:
            self.discard(space, None)
            raise
        self.give_back(space)
        return result

    def made(
        self,
        space: Space,
        stream: Any,
        args: tuple[Any, ...],
        out: Any,
        inputs: dict[str, Any],
        session: Session | None,
    ) -> Any:
        """What a call in a space gives: as its latest one where it can be, else from scratch."""
        again = space.again
        if again is not None and not args:
            started = again.start(stream, session, out, inputs)
            if started is not None:
                result, where = started
                if stream is None or (self._plan.sites and not space.defers):
                    self._settle(space, where, again.bucket)
                elif self._plan.sites:
                    space.leave(again.bucket)
                return result
        space.again = None
        return self._run(space, stream, args, out, inputs, session)

    def _run(
        self,
        space: Space,
        stream: Any,
        args: tuple[Any, ...],
        out: Any,
        inputs: dict[str, Any],
        session: Session | None,
    ) -> Any:
        on = space.stream if stream is None else stream
        operands, convert, model = self._operands(on, args, inputs)
        bucket = self._bucket(operands, session)
        made = None if out is not None or model is None else self._like(model, bucket)
        given = None
        if made is not None:
            given = [(x, self._viewed(x, "out", on)) for x in made]
        elif out is not None:
            given = self._given(out, lambda x: self._out_view(x, on))
        if given is None:
            targets = self._fresh(bucket, model is not None, on)
        else:
            targets = self._targets(bucket, operands, given)
        ready = self._start(space, on, bucket, operands, targets, session)
        there = all(isinstance(x, DeviceArray) for x in (*operands, *targets))
        if stream is None or (self._plan.sites and not space.defers) or not there:
            self._settle(space, on, bucket)
        else:
            if self._plan.sites:
                space.leave(bucket)
            for target in targets:
                target.is_made_on(on)
        if given is not None:
            if ready is not None and not args:
                owners = [owner for owner, _ in given]
                space.again = repeatable(self, space, bucket, ready, session, inputs, owners)
            for (_, target), result in zip(given, targets, strict=True):
                if result is not target and isinstance(target, np.ndarray):
                    np.copyto(target, result)
            if made is None:
                return out
            targets = made
        else:
            convert = convert if model is None else interchange.device_importer(model)
            if convert is not None:
                targets = [convert(t) for t in targets]
        return targets[0] if self._tuple is None else self._tuple(*targets)

    def _settle(self, space: Space, stream: Any, bucket: DeviceBucket) -> None:
        """Wait until the results are whole, and raise what the kernels reported."""
        if self._plan.sites:
            space.copy_status(stream)
        self.driver.finish(stream)
        space.rest()
        if self._plan.sites:
            space.leave(bucket)  # behind those of calls that did not wait
            self._report_left(space)

    def report_noted(self, space: Space, stream: Any) -> None:
        """Raise what kernels of calls that did not ask have reported until now."""
        status = space.status_host
        if space.unasked and status is not None and status.view(np.int64)[0]:
            self.driver.finish(stream)
            space.rest()
            self._report_left(space)

    def _report_left(self, space: Space) -> None:
        """Raise what kernels of the calls that are left, and done, reported."""
        buckets, space.unasked = space.unasked, []
        self.report_status(space, buckets[0].dims if len(buckets) == 1 else None)

    def _operands(
        self, stream: Any, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[list[Operand], interchange.Importer | None, Any]:
        """The inputs in order, what makes results of this machine the caller's kind, and the first
        input that lies in the device's memory."""
        operands: list[Operand] = []
        model = None
        for name, dtype in self._binder.expected:  # the usual case at once
            value = inputs.get(name)
            if type(value) is np.ndarray:
                if value.dtype is not dtype or value.flags.num & _DENSE != _DENSE:
                    break
            else:
                model = value if model is None else model
                value = self.driver.view(value, name, stream)
                if value is None or value.dtype != dtype or not value.dense:
                    break
            operands.append(value)
        else:
            if not args and len(inputs) == len(operands):
                return operands, None, model
        viewed = {k: self._viewed(v, k, stream) for k, v in inputs.items()}
        operands, convert = self._bind(args, viewed)
        model = next((inputs[k] for k, v in viewed.items() if isinstance(v, DeviceArray)), None)
        return operands, convert, model

    def _viewed(self, value: Any, name: str, stream: Any) -> Any:
        if type(value) is np.ndarray:
            return value
        view = self.driver.view(value, name, stream)
        return value if view is None else view

    def _start(
        self,
        space: Space,
        stream: Any,
        bucket: DeviceBucket,
        operands: Sequence[Operand],
        targets: Sequence[Operand],
        session: Session | None,
    ) -> Ready | None:
        """Put the call's work on the stream.

        Gives the launches if they are all of it: every array is used where it lies.
        """
        driver = self.driver
        self._reserve(space, bucket)
        space.own((*operands, *targets))
        space.come_after(stream)
        elsewhere: dict[int, Region] = {}
        states = None if session is None else session.states
        if isinstance(states, DeviceStates):
            elsewhere.update(zip(self._preparer.states, states.regions, strict=True))
        direct = True
        for number, operand in zip(self._preparer.inputs, operands, strict=True):
            if isinstance(operand, DeviceArray) and operand.region.is_aligned:
                elsewhere[number] = operand.region
                continue
            direct = False
            if isinstance(operand, DeviceArray):
                driver.copy(space.region(bucket, number), operand.region, stream)
            elif operand.nbytes:
                driver.copy_in(space.region(bucket, number), operand, stream)
        moves: list[tuple[Region, Region]] = []
        for number, target in zip(self._preparer.results, targets, strict=True):
            if isinstance(target, DeviceArray):
                shared = any(target.region.overlaps(r) for r in elsewhere.values() if r.size)
                if shared or not target.region.is_aligned:
                    moves.append((target.region, space.region(bucket, number)))
                else:
                    elsewhere[number] = target.region
        ready = space.ready(bucket, elsewhere)
        ready.launch(stream)
        for number, target in zip(self._preparer.results, targets, strict=True):
            if not isinstance(target, DeviceArray):
                direct = False
                if target.nbytes:
                    driver.copy_out(target, space.region(bucket, number), stream)
        for to, source in moves:
            driver.copy(to, source, stream)
        return ready if direct and not moves else None

    def _reserve(self, space: Space, bucket: DeviceBucket) -> None:
        """Memory for the call, if need be that of spaces which no call uses now."""
        try:
            space.reserve(bucket)
        except OutOfMemory:
            with self._lock:
                idle = [s for s in self._free if s.idle or self.driver.reached(s.done)]
                for other in idle:  # from the same list, to which others may add meanwhile
                    self._free.remove(other)
                    self._spaces.remove(other)
            for other in idle:
                other.close()
            self.driver.trim()
            space.reserve(bucket)

    def report_status(self, space: Space, dims: dict[str, int] | None) -> None:
        """Raise what the kernels of a finished call reported."""
        if not self._plan.sites or space.status_host is None:
            return
        site, value = (int(x) for x in space.status_host.view(np.int64))
        if site:
            space.clear_status()
            space.finish()
            raise self._out_of_range(site - 1, value, dims)

    def _bucket(self, operands: Sequence[Operand], session: Session | None = None) -> DeviceBucket:
        key = tuple([a.shape for a in operands])
        if session is not None:
            key = (session.key, *key)
        bucket = self._buckets.get(key)
        if bucket is None:
            if session is None:
                self._require_session()
            for argument, array in zip(self._plan.inputs, operands, strict=True):
                self._binder.array(argument, array)  # the quick way does not look at ranks
            sizes = None if session is None else session.sizes
            bucket = self._preparer.prepare(self._binder.sizes(operands, sizes))
            if len(self._buckets) >= _MAX_BUCKETS:
                self._buckets = {}
            self._buckets[key] = bucket
            self._last = bucket.dims
        return bucket

    def _like(self, model: Any, bucket: DeviceBucket) -> list[Any] | None:
        """New arrays of the caller's library for the results, where it can be asked for them."""
        made = [self.driver.empty(model, spec.shape, spec.dtype) for spec in bucket.results]
        return None if any(x is None for x in made) else made

    def _fresh(self, bucket: DeviceBucket, on_device: bool, stream: Any) -> list[Operand]:
        if not on_device:
            return [np.empty(spec.shape, spec.dtype) for spec in bucket.results]
        return [self.driver.array(s.shape, s.dtype, s.size, stream) for s in bucket.results]

    def _out_view(self, value: Any, stream: Any) -> Any:
        viewed = self._viewed(value, "out", stream)
        if isinstance(viewed, DeviceArray) or not interchange.is_foreign(viewed):
            return viewed
        return interchange.target(viewed)

    def _targets(
        self,
        bucket: DeviceBucket,
        operands: Sequence[Operand],
        given: list[tuple[Any, Operand]],
    ) -> list[Operand]:
        """Where results go: the caller's arrays, or others where those do not suit."""
        targets: list[Operand] = []
        for number, ((owner, target), spec) in enumerate(zip(given, bucket.results, strict=True)):
            if isinstance(target, DeviceArray):
                check_out_type(target, spec.shape, spec.dtype, "out=")
                if target.readonly or not target.dense:
                    raise InputError("out= is read-only, or not dense and row-major")
            else:
                name = self._plan.results[number].name
                check_out(owner, target, spec.shape, spec.dtype, name)
            if any(_share(target, other) for _, other in given[:number]):
                raise InputError("two arrays of out= share memory")
            if isinstance(target, np.ndarray) and target.flags.num & _DENSE != _DENSE:
                target = np.empty(spec.shape, spec.dtype)
            targets.append(target)
        return targets

    def acquire(self) -> Space:
        """A space that no call uses and whose work is done."""
        with self._lock:
            for number, space in enumerate(self._free):
                if space.idle or self.driver.reached(space.done):
                    del self._free[number]
                    space.rest()
                    return space
            if len(self._free) >= _MAX_FREE_SPACES:
                space = self._free.pop(0)
                space.finish()
                return space
            space = self.new_space()
            self._spaces.append(space)
            return space

    def new_space(self) -> Space:
        is_status_read = any(launch.guarded for launch in self._preparer.gpu.launches)
        return Space(self.driver, self._weights, is_status_read)

    def give_back(self, space: Space) -> None:
        space.mark()
        self._free.append(space)  # without the lock: a garbage collection within it may come here

    def discard(self, space: Space, stream: Any) -> None:
        """Close a space whose call failed; what the failure left in it is gone with it."""
        with self._lock:
            self._spaces.remove(space)
        if stream is not None:
            quietly((self.driver.finish, stream))
        space.close()

    def map(self, batches: Iterable[Mapping[str, Any]], *, depth: int = 3) -> Iterator[Any]:
        self._require_session()
        check_depth(depth)
        from .device_map import mapped

        return mapped(self, iter(batches), depth)

    def report(self) -> Report:
        return Report.of_gpu(self._plan, self._gpu)

    def _profile(
        self, path: Path, calls: int, inputs: dict[str, Any], session: Session | None
    ) -> Path:
        from . import device_profile

        return device_profile.write_trace(self, path, calls, inputs, session)

    def _release(self) -> None:
        with self._idle:
            self._idle.wait_for(lambda: self._calls == 0)
        for lanes in list(self._maps):
            lanes.close()
        for on in list(self._bound):
            on.let_go()
        with closing(self.driver):
            self._give_all_back()
        quietly((self.driver.close,))

    def __del__(self) -> None:
        """What nobody closed goes with the last reference; calls under way have one."""
        if getattr(self, "_closed", True) or sys.is_finalizing():
            return
        with suppress(Exception):
            self._closed = True
            if self._executor is not None:
                self._executor.shutdown(wait=False)  # it may be one of its threads that runs this
            self._release()

    def _give_all_back(self) -> None:
        spaces, self._spaces, self._free = self._spaces, [], []
        for space in spaces:
            space.close()
        memory, self._weight_memory = self._weight_memory, None
        if memory is not None:
            quietly((self.driver.free, memory))
        self._buckets, self._weights = {}, {}


def gpu_plan(plans: Sequence[GpuPlan], arch: str, name: str) -> GpuPlan:
    """The pipeline's code for an arch. Raises DeviceError."""
    for plan in plans:
        if plan.arch == arch:
            return plan
    holds = ", ".join(p.arch for p in plans) or "none"
    raise DeviceError(f"{name} has no code for {arch}; it has {holds}")


def _share(one: Operand, other: Operand) -> bool:
    if isinstance(one, DeviceArray) and isinstance(other, DeviceArray):
        return one.region.overlaps(other.region)
    if isinstance(one, np.ndarray) and isinstance(other, np.ndarray):
        return np.may_share_memory(one, other)
    return False
