"""Calling a compiled pipeline: arguments in, one native call, results out.

A call with known shapes does no more than look up its bucket, write the addresses of inputs and
results into a free workspace's argument slots and enter `sf_run`, which holds no lock of Python's.
"""

from __future__ import annotations

import ctypes
import os
import threading
import weakref
from collections import deque, namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from stagefuse.compiler.plan import PipelinePlan, Plan
from stagefuse.dsl.dtypes import DTYPES

from . import interchange, native
from .binding import Binder
from .errors import DeviceError, IndexOutOfRange, InputError, InternalError, PlanError
from .memory import POOLED_BYTES, ResultPool, pointer_to
from .prepared import Bucket, Evaluator, Preparer, Workspace
from .report import Report
from .signature import Signature, of_plan

_MAX_BUCKETS = 1024
_MAX_THREADS = 64  # of the pool in generated code
_MAX_FREE_WORKSPACES = 16
_DENSE = 0x0001 | 0x0100  # of `ndarray.flags.num`: C-contiguous and aligned


class _Code:
    """A loaded object; its threads end and its code goes when nothing refers to it any more."""

    def __init__(self, plan: Plan) -> None:
        level = native.detect_level()
        usable = [x for x in ("v4", "v3") if x in plan.objects and (level or "") >= x]
        if not usable:
            holds = ", ".join(f"x86-64-{x}" for x in plan.objects) or "no CPU code"
            has = f"x86-64-{level}" if level else "less than x86-64-v3"
            raise DeviceError(f"the plan holds {holds}, this machine is {has}")
        self.level = usable[0]
        try:
            self._object = native.NativeObject(plan.objects[self.level])
            # Not at exit: a daemon thread may still be running the code then.
            weakref.finalize(self, self._object.close).atexit = False
            self.run: Callable[[int, int, int], Any] = self._object.function(
                "sf_run", None, ctypes.c_void_p, ctypes.c_int64, ctypes.c_int64
            )
        except (native.ObjectError, KeyError) as error:
            raise PlanError(f"the machine code of the plan does not load: {error}") from None

    def addresses(self, plan: PipelinePlan) -> dict[str, int]:
        """Where the kernels of a pipeline lie."""
        try:
            return {s.symbol: self._object.address(s.symbol) for s in plan.steps}
        except KeyError as error:
            raise PlanError(f"the machine code of the plan lacks the kernel {error}") from None


class Pipeline:
    """A compiled pipeline on this machine. Call it with arrays by name; safe to share by threads.

    Results belong to the caller and never alias an input. `close` (or leaving a `with` block)
    gives back threads and memory; results stay valid.
    """

    def __init__(self, plan: Plan, name: str | None = None, *, threads: int | None = None) -> None:
        self._plan = _chosen(plan, name)
        self.threads = _thread_count(threads)
        self._code: _Code | None = _Code(plan)
        self._binder = Binder(self._plan)
        functions = self._code.addresses(self._plan)
        self._preparer = Preparer(self._plan, functions, plan.arrays, self.threads)
        self._expected = self._binder.expected
        self._buckets: dict[tuple[tuple[int, ...], ...], Bucket] = {}
        self._free: list[Workspace] = []
        self._pool = ResultPool()
        self._executor: ThreadPoolExecutor | None = None
        self._lock = threading.Lock()
        self._tuple = _result_type(self._plan)
        self._last: dict[str, int] | None = None

    @property
    def name(self) -> str:
        return self._plan.name

    @property
    def signature(self) -> Signature:
        """What it takes and gives; prints like the source."""
        return of_plan(self._plan)

    def __repr__(self) -> str:
        return f"<pipeline {self.signature}>"

    def __call__(self, /, *args: Any, out: Any = None, **inputs: Any) -> Any:
        """Results for inputs by name: one array, or a named tuple of several.

        NumPy in, NumPy out; arrays of a library with DLPack in, the same kind out. `out` takes
        what a call returns and gives it back filled.

        Raises InputError, IndexOutOfRange, OutOfMemory.
        """
        arrays: list[np.ndarray[Any, Any]] = []
        try:
            for name, dtype in self._expected:
                array = inputs[name]
                if (
                    type(array) is not np.ndarray
                    or array.dtype is not dtype
                    or array.flags.num & _DENSE != _DENSE
                ):
                    raise KeyError
                arrays.append(array)
            if args or len(inputs) != len(arrays):
                raise KeyError
            convert = None
        except KeyError:
            arrays, convert = self._bind(args, inputs)
        bucket = self._buckets.get(tuple([a.shape for a in arrays])) or self._bucket(arrays)
        if out is None:
            results = self._fresh(bucket)
            self._execute(bucket, arrays, results)
        else:
            given = self._given(out)
            results = self._targets(bucket, arrays, given)
            self._execute(bucket, arrays, results)
            for (_, target), result in zip(given, results, strict=True):
                if result is not target:
                    np.copyto(target, result)
            return out
        if convert is not None:
            results = [convert(result) for result in results]
        return results[0] if self._tuple is None else self._tuple(*results)

    def _bind(
        self, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[list[np.ndarray[Any, Any]], interchange.Importer | None]:
        if args:
            names = ", ".join(f"{name}=..." for name, _ in self._expected)
            raise InputError(f"inputs are given by name\n  = help: call `{self.name}({names})`")
        arrays = self._binder.arrays(inputs)
        for value in inputs.values():
            if interchange.is_foreign(value) and not isinstance(value, np.generic):
                return arrays, interchange.importer(value)
        return arrays, None

    def _loaded(self) -> _Code:
        code = self._code
        if code is None:
            raise InputError(f"the pipeline {self.name} is closed")
        return code

    def _bucket(self, arrays: list[np.ndarray[Any, Any]]) -> Bucket:
        """The bucket of a combination of shapes seen for the first time."""
        self._loaded()
        for argument, array in zip(self._plan.inputs, arrays, strict=True):
            self._binder.array(argument, array)  # the fast path does not look at ranks
        bucket = self._preparer.prepare(self._binder.sizes(arrays))
        if len(self._buckets) >= _MAX_BUCKETS:
            self._buckets = {}
        self._buckets[tuple([a.shape for a in arrays])] = bucket
        self._last = bucket.dims
        return bucket

    def _fresh(self, bucket: Bucket) -> list[np.ndarray[Any, Any]]:
        return [
            np.empty(spec.shape, spec.dtype)
            if spec.size < POOLED_BYTES
            else self._pool.array(spec.shape, spec.dtype, spec.size)
            for spec in bucket.results
        ]

    def _given(self, out: Any) -> list[tuple[Any, np.ndarray[Any, Any]]]:
        """The caller's result arrays with NumPy views of them."""
        if self._tuple is None:
            items = [out]
        elif isinstance(out, Mapping):
            names = self._tuple._fields  # type: ignore[attr-defined]
            if set(out) != set(names):
                raise InputError(f"out= needs the results {', '.join(names)}")
            items = [out[name] for name in names]
        elif isinstance(out, (tuple, list)):
            items = list(out)
        else:
            items = [out]
        if len(items) != len(self._plan.results):
            raise InputError(
                f"out= holds {len(items)} arrays, but {self.name} has "
                f"{len(self._plan.results)} results"
            )
        return [(x, interchange.view(x, "out") if interchange.is_foreign(x) else x) for x in items]

    def _targets(
        self,
        bucket: Bucket,
        arrays: list[np.ndarray[Any, Any]],
        given: list[tuple[Any, np.ndarray[Any, Any]]],
    ) -> list[np.ndarray[Any, Any]]:
        """Where kernels write: the caller's arrays, or others where those do not suit."""
        targets: list[np.ndarray[Any, Any]] = []
        for number, ((owner, target), spec) in enumerate(zip(given, bucket.results, strict=True)):
            _check_target(owner, target, spec.shape, spec.dtype, self._plan.results[number].name)
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
    ) -> None:
        code = self._loaded()  # the reference keeps the code while it runs
        try:
            workspace = self._free.pop()
        except IndexError:
            workspace = Workspace()
        bound = workspace._bound.get(bucket) or workspace.bind(bucket)
        args = bound.args
        for array, slots in zip(arrays, bucket.input_slots, strict=True):
            if slots:
                pointer = pointer_to(array)
                for slot in slots:
                    args[slot] = pointer
        for array, slots in zip(results, bucket.result_slots, strict=True):
            if slots:
                pointer = pointer_to(array)
                for slot in slots:
                    args[slot] = pointer
        if bound.count:
            code.run(bound.address, bound.count, self.threads)
        self._finish(workspace, bucket)

    def _finish(self, workspace: Workspace, bucket: Bucket) -> None:
        """Give the workspace back, and raise what the kernels reported."""
        site, value = workspace.status[0], workspace.status[1]
        if site:
            workspace.status[0] = workspace.status[1] = 0
        if len(self._free) < _MAX_FREE_WORKSPACES and self._code is not None:
            self._free.append(workspace)
        if site:
            raise self._out_of_range(site - 1, value, bucket)

    def _out_of_range(self, number: int, value: int, bucket: Bucket) -> Exception:
        if not 0 <= number < len(self._plan.sites):
            return InternalError(f"a kernel reported the unknown site {number}")
        site = self._plan.sites[number]
        extent = f", the axis has size {Evaluator(bucket.dims)(site.extent)}" if site.extent else ""
        reason = site.message or "this index is out of range"
        lines = [f"{reason}: it is {value}{extent}", f"  --> {site.file}:{site.line}:{site.column}"]
        if site.text:
            lines.append(f"   | {site.text.strip()}")
        return IndexOutOfRange(
            "\n".join(lines), file=site.file, line=site.line, column=site.column, value=value
        )

    def submit(self, /, *, out: Any = None, **inputs: Any) -> Future[Any]:
        """The call as a future, run by a thread of the pipeline's own.

        The inputs must stay unchanged until it is done.
        """
        with self._lock:
            self._loaded()
            if self._executor is None:
                self._executor = ThreadPoolExecutor(4, thread_name_prefix=f"stagefuse-{self.name}")
            return self._executor.submit(self, out=out, **inputs)

    def map(self, batches: Iterable[Mapping[str, Any]], *, depth: int = 3) -> Iterator[Any]:
        """Results for dicts of inputs, in order, with up to `depth` batches under way.

        Batches are taken ahead of the results, so each needs arrays of its own.
        """
        if depth < 1:
            raise InputError(f"depth is {depth}, but at least one batch must be under way")
        return self._mapped(iter(batches), depth)

    def _mapped(self, batches: Iterator[Mapping[str, Any]], depth: int) -> Iterator[Any]:
        pending: deque[Future[Any]] = deque()
        try:
            for batch in batches:
                if not isinstance(batch, Mapping):
                    raise InputError(f"map takes dicts of inputs, found {type(batch).__name__}")
                pending.append(self.submit(**batch))
                if len(pending) >= depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def report(self) -> Report:
        """What the compiler decided, kernel by kernel; prints as a table."""
        return Report.of_plan(self._plan, self._code.level if self._code else "")

    def profile(self, path: str | Path, /, *, calls: int = 5, **inputs: Any) -> Path:
        """Run it step by step and write the times as a Chrome trace, which Perfetto opens.

        Without inputs it makes some with the sizes of the latest new combination of shapes.
        """
        from . import profile

        return profile.write_trace(self, Path(path), calls, inputs)

    def close(self) -> None:
        """Give back threads and memory; calls under way finish first, later ones are refused."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=True)
        self._code = None
        self._buckets, self._free = {}, []
        self._pool.clear()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _chosen(plan: Plan, name: str | None) -> PipelinePlan:
    names = ", ".join(plan.names)
    if name is None:
        if len(plan.pipelines) > 1:
            raise InputError(f"several pipelines: {names}\n  = help: choose one by pipeline=")
        return plan.pipelines[0]
    for pipeline in plan.pipelines:
        if pipeline.name == name:
            return pipeline
    raise InputError(f"no pipeline is called {name!r}; there is {names}")


def _thread_count(threads: int | None) -> int:
    available = len(os.sched_getaffinity(0))
    if threads is None:
        return min(available, _MAX_THREADS)
    if type(threads) is not int or not 1 <= threads <= _MAX_THREADS:
        raise InputError(f"threads is {threads!r}, but it must be from 1 to {_MAX_THREADS}")
    return threads


def _result_type(plan: PipelinePlan) -> Callable[..., Any] | None:
    """What makes a named tuple of several results; None for a single one."""
    if len(plan.results) == 1:
        return None
    fields = [result.name or f"result{i}" for i, result in enumerate(plan.results)]
    kind: Callable[..., Any] = namedtuple(plan.name, fields, rename=True)  # type: ignore[misc]
    return kind


def _check_target(
    owner: Any, target: Any, shape: tuple[int, ...], dtype: np.dtype[Any], name: str | None
) -> None:
    what = f"out= for the result `{name}`" if name else "out="
    if not isinstance(target, np.ndarray):
        raise InputError(f"{what} is a {type(target).__name__}, not an array")
    if target.dtype != dtype or target.shape != shape:
        raise InputError(
            f"{what} is {target.dtype.name}{list(target.shape)}, but the result is "
            f"{dtype.name}{list(shape)}"
        )
    if target is owner and not target.flags.writeable:
        raise InputError(f"{what} is read-only")


def example_inputs(plan: PipelinePlan, values: Mapping[str, int]) -> dict[str, Any]:
    """Inputs of given sizes: zeros for integers, small numbers for floats."""
    evaluate = Evaluator(dict(values))
    inputs: dict[str, Any] = {}
    for argument in plan.inputs:
        dtype = DTYPES[argument.dtype]
        shape = evaluate.shape(argument.shape)
        if dtype.is_float:
            size = int(np.prod(shape))
            inputs[argument.name or ""] = (
                np.linspace(-1, 1, size, dtype=np.float32).reshape(shape).astype(dtype.numpy)
            )
        else:
            inputs[argument.name or ""] = np.zeros(shape, dtype.numpy)
    return inputs
