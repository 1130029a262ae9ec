"""Calling a pipeline on the CPU: arguments in, one native call, results out.

A call with known shapes does no more than look up its bucket, write the addresses of inputs and
results into a free workspace's argument slots and enter `sf_run`, which holds no lock of Python's.
From its second time on it is native code altogether, see `native_calls`.
"""

from __future__ import annotations

import ctypes
import math
import os
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from stagefuse.compiler.plan import PipelinePlan, Plan

from . import forks, interchange, native
from .binding import Binder
from .errors import DeviceError, InputError, PlanError
from .memory import POOLED_BYTES, ResultPool, allocate, point_to
from .pipeline import Pipeline, check_out, chosen
from .prepared import Bucket, Preparer, Workspace
from .report import Report
from .session import HostStates, Session

if TYPE_CHECKING:
    from .native_calls import CallTable

_MAX_BUCKETS = 1024
_MAX_THREADS = 64  # of the pool in generated code
_MAX_FREE_WORKSPACES = 16
_Shapes: TypeAlias = tuple[tuple[int, ...], ...]
_Array, _empty = np.ndarray, np.empty  # found quicker than in a module
_DENSE = 0x0001 | 0x0100  # of `ndarray.flags.num`: C-contiguous and aligned


class _Code:
    """A loaded object; its threads end and its code goes when nothing refers to it any more."""

    def __init__(self, plan: Plan, tiles: bool) -> None:
        level = native.detect_level()
        usable = [x for x in ("v4", "v3") if x in plan.objects and (level or "") >= x]
        if not usable:
            holds = ", ".join(f"x86-64-{x}" for x in plan.objects) or "no CPU code"
            has = f"x86-64-{level}" if level else "less than x86-64-v3"
            fix = "" if plan.objects else (
                '\n  = help: compile it again with target="cpu" among others, or run code for GPUs '
                'by device="emulator"'
            )
            raise DeviceError(f"the plan holds {holds}, this machine is {has}{fix}")
        self.level = usable[0]
        try:
            self._object = native.NativeObject(plan.objects[self.level])
            self.uses_tiles = tiles and self.level == "v4" and native.may_use_tiles()
            self._object.use_units(native.units(self.level, tiles))
            # Not at exit: a daemon thread may still be running the code then.
            weakref.finalize(self, self._object.close).atexit = False
            self.run: Callable[[int, int, int], Any] = self._object.function(
                "sf_run", None, *[ctypes.c_void_p] * 3  # which ctypes converts quickest
            )
            self.start = self._object.function("sf_run", None)  # by what is converted already
            self.entry = self._object.address("sf_run")
        except (native.ObjectError, KeyError) as error:
            raise PlanError(f"the machine code of the plan does not load: {error}") from None

    def cutter(self, columns: int) -> int:
        """The kernel that cuts panels of so many columns into pieces."""
        try:
            return self._object.address(f"sf_cut_{columns}")
        except KeyError as error:
            raise PlanError(f"the machine code of the plan lacks the kernel {error}") from None

    def addresses(self, plan: PipelinePlan) -> dict[str, int]:
        """Where the kernels of a pipeline lie."""
        try:
            return {s.symbol: self._object.address(s.symbol) for s in plan.steps}
        except KeyError as error:
            raise PlanError(f"the machine code of the plan lacks the kernel {error}") from None


class CpuPipeline(Pipeline):
    """A pipeline as native code on this machine's processor; `tiles`: with AMX if it has that."""

    def __init__(
        self,
        plan: Plan,
        name: str | None = None,
        *,
        threads: int | None = None,
        tiles: bool = True,
    ) -> None:
        one = chosen(plan, name)
        super().__init__(one, Binder(one), plan.arrays)
        self.threads = _thread_count(threads)
        self._threads_given = ctypes.c_void_p.from_param(self.threads)
        self._code: _Code | None = _Code(plan, tiles)
        functions = self._code.addresses(self._plan)
        cutter = self._code if self._code.uses_tiles else None
        self._preparer = Preparer(self._plan, functions, plan.arrays, self.threads, cutter)
        self._expected = self._binder.expected
        self._buckets: dict[_Shapes, Bucket] = {}
        self._free: list[Workspace] = []
        self._pool = ResultPool()
        self._native = plan.call if type(self) is CpuPipeline else b""
        self._waiting: set[Bucket] = set()  # for their second call
        self._calls: CallTable | None = None
        self._ending: list[CallTable] = []
        self._native_lock = forks.lock()

    def __call__(self, /, *args: Any, out: Any = None, **inputs: Any) -> Any:
        arrays, shapes, convert = self._in_order(args, inputs)
        bucket = self._buckets.get(shapes)
        if bucket is None:
            bucket = self._bucket(arrays)
        elif bucket in self._waiting:
            self._quicken(bucket, shapes)
        if out is None and convert is None:  # the usual case at once
            results = self._fresh(bucket)
            self._execute(bucket, arrays, results)
            return results[0] if self._tuple is None else self._tuple(*results)
        return self._called(bucket, arrays, convert, out, ())

    _in_python = __call__
    _table = 0
    """The address of the table of native calls; 0: there is none."""

    def _call_in(
        self, session: Session, args: tuple[Any, ...], out: Any, inputs: dict[str, Any]
    ) -> Any:
        arrays, shapes, convert = self._in_order(args, inputs)
        key = (session.key, *shapes)
        bucket = self._buckets.get(key) or self._bucket(arrays, session)
        assert isinstance(session.states, HostStates)
        return self._called(bucket, arrays, convert, out, session.states.arrays)

    def _in_order(
        self, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[list[np.ndarray[Any, Any]], _Shapes, interchange.Importer | None]:
        """The inputs in order with their shapes, and what makes results the caller's kind of
        arrays."""
        arrays: list[np.ndarray[Any, Any]] = []
        shapes: list[tuple[int, ...]] = []
        try:
            for name, dtype in self._expected:
                array = inputs[name]
                if (
                    type(array) is not _Array
                    or array.dtype is not dtype
                    or array.flags.num & _DENSE != _DENSE
                ):
                    raise KeyError
                arrays.append(array)
                shapes.append(array.shape)
            if args or len(inputs) != len(arrays):
                raise KeyError
            return arrays, tuple(shapes), None
        except KeyError:
            arrays, convert = self._bind(args, inputs)
            return arrays, tuple([a.shape for a in arrays]), convert

    def _called(
        self,
        bucket: Bucket,
        arrays: list[np.ndarray[Any, Any]],
        convert: interchange.Importer | None,
        out: Any,
        states: Sequence[np.ndarray[Any, Any]],
    ) -> Any:
        if out is None:
            results = self._fresh(bucket)
            self._execute(bucket, arrays, results, states)
        else:
            given = self._given(out)
            results = self._targets(bucket, arrays, given)
            self._execute(bucket, arrays, results, states)
            for (_, target), result in zip(given, results, strict=True):
                if result is not target:
                    np.copyto(target, result)
            return out
        if convert is not None:
            results = [convert(result) for result in results]
        return results[0] if self._tuple is None else self._tuple(*results)

    def _new_states(
        self, types: Sequence[tuple[np.dtype[Any], tuple[int, ...]]]
    ) -> HostStates:
        return HostStates([_state(dtype, shape) for dtype, shape in types])

    def _loaded(self) -> _Code:
        code = self._code
        if code is None:
            raise InputError(f"the pipeline {self.name} is closed")
        return code

    def _bucket(
        self, arrays: list[np.ndarray[Any, Any]], session: Session | None = None
    ) -> Bucket:
        """The bucket of a combination of shapes seen for the first time."""
        self._loaded()
        if session is None:
            self._require_session()
        for argument, array in zip(self._plan.inputs, arrays, strict=True):
            self._binder.array(argument, array)  # the fast path does not look at ranks
        sizes = None if session is None else session.sizes
        bucket = self._preparer.prepare(self._binder.sizes(arrays, sizes))
        if len(self._buckets) >= _MAX_BUCKETS:
            self._buckets = {}
            self._forget_native()
        if session is None and self._native:
            self._waiting.add(bucket)
        key = tuple([a.shape for a in arrays])
        self._buckets[key if session is None else (session.key, *key)] = bucket
        self._last = bucket.dims
        return bucket

    def _quicken(self, bucket: Bucket, shapes: _Shapes) -> None:
        """Have native code do calls of these shapes from now on."""
        from . import native_calls

        with self._native_lock:
            self._waiting.discard(bucket)
            if not native_calls.suits(bucket, len(shapes)):
                return
            if self._calls is None:
                self._begin_native(bucket, shapes)
            if self._calls is not None and not self._calls.add(bucket, shapes):
                self._waiting.add(bucket)

    def _begin_native(self, bucket: Bucket, shapes: _Shapes) -> None:
        """A table for native calls, if this interpreter suits them."""
        from . import native_calls

        kind = native_calls.with_native_call(CpuPipeline, self._native)
        if kind is None:
            self._native = b""
            self._waiting.clear()
            return
        code = self._loaded()
        inputs = [(n, d, len(s)) for (n, d), s in zip(self._expected, shapes, strict=True)]
        results = [(spec.dtype, len(spec.shape)) for spec in bucket.results]
        run = code.entry, self.threads
        calls = native_calls.CallTable(inputs, results, self._tuple, run, code, self._pool)
        self._end_native()  # if a garbage collection in between called the pipeline
        self._calls, self._table, self.__class__ = calls, calls.address, kind

    def _end_native(self) -> None:
        """Native code does no more calls. What it uses stays while one runs."""
        with self._native_lock:
            self.__class__ = CpuPipeline
            self._table = 0
            if self._calls is not None:
                self._calls.close()
                self._ending.append(self._calls)
                self._calls = None
            self._ending = [calls for calls in self._ending if calls.busy]

    def _forget_native(self) -> None:
        self._waiting.clear()
        self._end_native()

    def _renew(self) -> None:
        """Have another table of native calls, from each bucket's next call on."""
        if self._calls is not None:
            self._waiting.update(self._calls.buckets)
            self._end_native()

    def _forked(self) -> None:
        super()._forked()
        # A thread that is no more would leave its table busy for ever. Its lock was taken to fork,
        # if that did not take too long.
        busy = self._calls is not None and self._calls.busy
        if busy and self._native_lock.acquire(blocking=False):
            self._renew()
            self._native_lock.release()

    def _after(self) -> None:
        """A native call reported something, or its table was closed meanwhile."""
        with self._native_lock:
            if self._calls is not None and self._calls.failed:
                self._renew()
            self._ending = [calls for calls in self._ending if calls.busy]

    def _fresh(self, bucket: Bucket) -> list[np.ndarray[Any, Any]]:
        if bucket.small:
            return [_empty(shape, dtype) for shape, dtype in bucket.small]
        return [
            np.empty(spec.shape, spec.dtype)
            if spec.size < POOLED_BYTES
            else self._pool.array(spec.shape, spec.dtype, spec.size)
            for spec in bucket.results
        ]

    def _targets(
        self,
        bucket: Bucket,
        arrays: list[np.ndarray[Any, Any]],
        given: list[tuple[Any, np.ndarray[Any, Any]]],
    ) -> list[np.ndarray[Any, Any]]:
        """Where kernels write: the caller's arrays, or others where those do not suit."""
        targets: list[np.ndarray[Any, Any]] = []
        for number, ((owner, target), spec) in enumerate(zip(given, bucket.results, strict=True)):
            check_out(owner, target, spec.shape, spec.dtype, self._plan.results[number].name)
            if any(np.may_share_memory(target, other) for _, other in given[:number]):
                raise InputError("two arrays of out= share memory")
            if target.flags.num & _DENSE != _DENSE or any(
                np.may_share_memory(target, array) for array in arrays
            ):
                target = np.empty(spec.shape, spec.dtype)
            targets.append(target)
        return targets

    def _execute(
        self,
        bucket: Bucket,
        arrays: list[np.ndarray[Any, Any]],
        results: list[np.ndarray[Any, Any]],
        states: Sequence[np.ndarray[Any, Any]] = (),
    ) -> None:
        code = self._code or self._loaded()  # the reference keeps the code while it runs
        try:
            workspace = self._free.pop()
        except IndexError:
            workspace = Workspace()
        bound = workspace._bound.get(bucket) or workspace.bind(bucket)
        point_to(bound.args, bucket.slots, [*arrays, *results, *states])
        if bound.count:
            code.start(*bound.given, self._threads_given)
        if workspace.status[0] or len(self._free) >= _MAX_FREE_WORKSPACES or self._code is None:
            self._finish(workspace, bucket)
        else:
            self._free.append(workspace)

    def _finish(self, workspace: Workspace, bucket: Bucket) -> None:
        """Give the workspace back, and raise what the kernels reported."""
        site = workspace.status[0]
        if site:
            value = workspace.status[1]
            workspace.status[0] = workspace.status[1] = 0
            workspace.forget()  # loops may have ended in the middle
        if len(self._free) < _MAX_FREE_WORKSPACES and self._code is not None:
            self._free.append(workspace)
        if site:
            raise self._out_of_range(site - 1, value, bucket.dims)

    def report(self) -> Report:
        return Report.of_plan(self._plan, self._code.level if self._code else "")

    def _profile(
        self, path: Path, calls: int, inputs: dict[str, Any], session: Session | None
    ) -> Path:
        from . import profile

        return profile.write_trace(self, path, calls, inputs, session)

    def _release(self) -> None:
        self._code, self._native = None, b""
        self._forget_native()
        self._buckets, self._free = {}, []
        self._pool.clear()


def _state(dtype: np.dtype[Any], shape: tuple[int, ...]) -> np.ndarray[Any, Any]:
    size = math.prod(shape) * dtype.itemsize
    return allocate(size, "a state").view(dtype).reshape(shape)


def _thread_count(threads: int | None) -> int:
    available = len(os.sched_getaffinity(0))
    if threads is None:
        return min(available, _MAX_THREADS)
    if type(threads) is not int or not 1 <= threads <= _MAX_THREADS:
        raise InputError(f"threads is {threads!r}, but it must be from 1 to {_MAX_THREADS}")
    return threads
