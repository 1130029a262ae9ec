"""What pipelines on all devices share: signature, checks of arguments, futures, `map`, errors."""

from __future__ import annotations

import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque, namedtuple
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from stagefuse.compiler.plan import PipelinePlan, Plan, StatePlan
from stagefuse.compiler.plan_check import session_dims
from stagefuse.dsl.dtypes import DTYPES

from . import forks, interchange
from .binding import Binder
from .errors import IndexOutOfRange, InputError, InternalError, OutOfMemory
from .memory import overlaps_itself
from .prepared import Evaluator
from .report import Report
from .signature import Signature, of_plan

if TYPE_CHECKING:
    from .session import Session, States

Arrays: TypeAlias = Mapping[str, np.ndarray[Any, Any]]


class Pipeline(ABC):
    """A compiled pipeline on a device. Call it with arrays by name; safe to share by threads.

    Results belong to the caller and never alias an input. `close` (or leaving a `with` block)
    gives back threads and memory; results stay valid.
    """

    device = "cpu"
    threads = 1  # of this machine's processor that run one call

    def __init__(self, plan: PipelinePlan, binder: Binder, arrays: Arrays) -> None:
        self._plan, self._binder = plan, binder
        self._arrays = {s.array: arrays[s.array] for s in plan.states if s.array is not None}
        self._sessions: weakref.WeakSet[Session] = weakref.WeakSet()
        self._closing = self._closed = False  # calls that are submitted end in between
        self._executor: ThreadPoolExecutor | None = None
        self._own: set[int] = set()  # the executor's threads
        _pipelines.add(self)
        self._lock = forks.lock()
        self._tuple = _result_type(plan)
        self._last: dict[str, int] | None = None  # sizes of the latest new combination of shapes

    @property
    def name(self) -> str:
        return self._plan.name

    @property
    def signature(self) -> Signature:
        """What it takes and gives; prints like the source."""
        return of_plan(self._plan)

    def __repr__(self) -> str:
        return f"<pipeline {self.signature}>"

    def __reduce__(self) -> Any:
        raise TypeError(
            "a pipeline is code and memory of this process and is not copied or pickled: "
            "load its file where it is needed"
        )

    @abstractmethod
    def __call__(self, /, *args: Any, out: Any = None, **inputs: Any) -> Any:
        """Results for inputs by name: one array, or a named tuple of several.

        NumPy in, NumPy out; arrays of a library with DLPack in, the same kind out. `out` takes
        what a call returns and gives it back filled.

        Raises InputError, IndexOutOfRange, OutOfMemory, DeviceError.
        """

    def session(self, **sizes: int) -> Session:
        """New states, and the pipeline on them; `sizes` are those in the states' shapes.

        Raises InputError, OutOfMemory, DeviceError.
        """
        from .session import Session

        if not self._plan.states:
            raise InputError(f"{self.name} keeps nothing between calls: call the pipeline itself")
        self._require_open(new=True)
        made = Session(self, sizes)
        try:
            with self._lock:
                self._require_open(new=True)
                self._sessions.add(made)
        except InputError:
            made.close()
            raise
        return made

    @abstractmethod
    def _call_in(
        self, session: Session, args: tuple[Any, ...], out: Any, inputs: dict[str, Any]
    ) -> Any:
        """What a call gives that reads and updates the states of a session."""

    @abstractmethod
    def _new_states(self, types: Sequence[tuple[np.dtype[Any], tuple[int, ...]]]) -> States:
        """Memory for states of dtypes and shapes, with arbitrary contents. Raises OutOfMemory."""

    def _initial(
        self, state: StatePlan, dtype: np.dtype[Any], shape: tuple[int, ...]
    ) -> np.ndarray[Any, Any]:
        """What a state begins as; an array that is not to be written."""
        if state.array is not None:
            return self._arrays[state.array]
        element = np.frombuffer(bytes.fromhex(state.initial), dtype)
        return np.broadcast_to(element[0], shape)

    def _require_session(self) -> None:
        """Raise InputError where a call needs one."""
        if self._plan.states:
            kept = ", ".join(f"`{state.name}`" for state in self._plan.states)
            sizes = ", ".join(f"{name}=..." for name in session_dims(self._plan))
            raise InputError(
                f"{self.name} keeps {kept} between calls, so it is called through a session\n"
                f"  = help: `session = pipeline.session({sizes})`, then `session(...)`"
            )

    def on(self, stream: Any, *, defer_errors: bool = False) -> Callable[..., Any]:
        """The pipeline on a GPU's stream of the caller's, an object with `__cuda_stream__`.

        A call runs behind what is on the stream already, and returns as soon as it is under way
        where inputs and results are arrays of the device and no index can be out of range. With
        `defer_errors` it does so too where one can, unless the pipeline keeps states: an index out
        of range is then raised by a later call on the stream, or by `check()` of what this gives,
        which waits; results of a call that met one are not to be used.
        Raises InputError where there are no streams.
        """
        raise InputError(f"{self.device} has no streams: call the pipeline itself")

    @abstractmethod
    def report(self) -> Report:
        """What the compiler decided, kernel by kernel; prints as a table."""

    def profile(self, path: str | Path, /, *, calls: int = 5, **inputs: Any) -> Path:
        """Run it step by step and write the times as a Chrome trace, which Perfetto opens.

        Without inputs it makes some with the sizes of the latest new combination of shapes.
        """
        self._require_session()
        return self._profile(Path(path), calls, inputs, None)

    @abstractmethod
    def _profile(
        self, path: Path, calls: int, inputs: dict[str, Any], session: Session | None
    ) -> Path: ...

    @abstractmethod
    def _release(self) -> None:
        """Let go of code and memory; nothing of this pipeline runs any more."""

    def _bind(
        self, args: tuple[Any, ...], inputs: dict[str, Any]
    ) -> tuple[list[np.ndarray[Any, Any]], interchange.Importer | None]:
        if args:
            names = ", ".join(f"{name}=..." for name, _ in self._binder.expected)
            raise InputError(f"inputs are given by name\n  = help: call `{self.name}({names})`")
        arrays = self._binder.arrays(inputs)
        for value in inputs.values():
            if interchange.is_foreign(value) and not isinstance(value, np.generic):
                return arrays, interchange.importer(value)
        return arrays, None

    def _require_open(self, new: bool = False) -> None:
        """Raise InputError for calls of a closed pipeline, and for `new` ones once it closes."""
        if self._closed or (new and self._closing):
            raise InputError(f"the pipeline {self.name} is closed")

    def _given(self, out: Any, view: Callable[[Any], Any] | None = None) -> list[tuple[Any, Any]]:
        """The caller's result arrays with NumPy views of them, or with what `view` makes."""
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
        return [(x, (view or _target_view)(x)) for x in items]

    def _out_of_range(self, number: int, value: int, dims: dict[str, int] | None) -> Exception:
        """`dims`: of the call; None if it is not known which of several it was."""
        if not 0 <= number < len(self._plan.sites):
            return InternalError(f"a kernel reported the unknown site {number}")
        site = self._plan.sites[number]
        extent = ""
        if site.extent and dims is not None:
            extent = f", the axis has size {Evaluator(dims)(site.extent)}"
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
        self._require_session()
        with self._lock:
            self._require_open(new=True)
            if self._executor is None:
                name = f"stagefuse-{self.name}"
                self._executor = ThreadPoolExecutor(4, name, _note_thread, (self._own,))
            return self._executor.submit(self, out=out, **inputs)

    def map(self, batches: Iterable[Mapping[str, Any]], *, depth: int = 3) -> Iterator[Any]:
        """Results for dicts of inputs, in order, with up to `depth` batches under way.

        Batches are taken ahead of the results, so each needs arrays of its own.
        """
        check_depth(depth)
        return self._mapped(iter(batches), depth)

    def _mapped(self, batches: Iterator[Mapping[str, Any]], depth: int) -> Iterator[Any]:
        pending: deque[Future[Any]] = deque()
        try:
            for batch in _to_first_error(batches):
                if isinstance(batch, Exception):
                    while pending:  # what came before is whole
                        yield pending.popleft().result()
                    raise batch
                pending.append(self.submit(**batch))
                if len(pending) >= depth:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()

    def close(self) -> None:
        """Give back threads and memory; calls under way finish first, later ones are refused.

        In a callback of a submitted call, submitted ones that have not begun are refused too.
        """
        with self._lock:
            self._closing = True
            executor = self._executor
        if executor is not None:
            executor.shutdown(wait=threading.get_ident() not in self._own)
        with self._lock:
            closed, self._closed, self._executor = self._closed, True, None
        if not closed:
            for session in list(self._sessions):
                session.close()
            self._release()

    def _forked(self) -> None:
        """This is a child made by `fork`: it has the thread that made it alone."""
        self._executor, self._own = None, set()

    def __enter__(self) -> Pipeline:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


_pipelines: weakref.WeakSet[Pipeline] = weakref.WeakSet()


def _after_fork() -> None:
    for pipeline in list(_pipelines):
        pipeline._forked()


os.register_at_fork(after_in_child=_after_fork)


def _note_thread(threads: set[int]) -> None:
    threads.add(threading.get_ident())


def _to_first_error(
    batches: Iterator[Mapping[str, Any]],
) -> Iterator[Mapping[str, Any] | Exception]:
    """The batches; where taking one fails, the exception comes last."""
    try:
        for batch in batches:
            if not isinstance(batch, Mapping):
                raise InputError(f"map takes dicts of inputs, found {type(batch).__name__}")
            yield batch
    except Exception as error:
        yield error


def chosen(plan: Plan, name: str | None) -> PipelinePlan:
    names = ", ".join(plan.names)
    if name is None:
        if len(plan.pipelines) > 1:
            one = plan.names[0]
            choice = f'choose one: pipeline="{one}", or `--pipeline {one}`'
            raise InputError(f"several pipelines: {names}\n  = help: {choice}")
        return plan.pipelines[0]
    for pipeline in plan.pipelines:
        if pipeline.name == name:
            return pipeline
    raise InputError(f"no pipeline is called {name!r}; there is {names}")


def _result_type(plan: PipelinePlan) -> Callable[..., Any] | None:
    """What makes a named tuple of several results; None for a single one."""
    if len(plan.results) == 1:
        return None
    fields = [result.name or f"result{i}" for i, result in enumerate(plan.results)]
    kind: Callable[..., Any] = namedtuple(plan.name, fields, rename=True)  # type: ignore[misc]
    return kind


def check_depth(depth: Any) -> None:
    """Raise InputError unless so many batches can be under way."""
    if not isinstance(depth, int | np.integer) or depth < 1:
        raise InputError(f"depth is {depth!r}, but one batch or more must be under way")


def _target_view(value: Any) -> Any:
    return interchange.target(value) if interchange.is_foreign(value) else value


def check_out(
    owner: Any, target: Any, shape: tuple[int, ...], dtype: np.dtype[Any], name: str | None
) -> None:
    what = f"out= for the result `{name}`" if name else "out="
    if not isinstance(target, np.ndarray):
        raise InputError(f"{what} is a {type(target).__name__}, not an array")
    if type(target) is not np.ndarray and isinstance(target, np.ma.MaskedArray):
        raise InputError(
            f"{what} is a masked array, whose mask would stay as it is\n"
            "  = help: pass the array below it, its `.data`"
        )
    check_out_type(target, shape, dtype, what)
    if target is owner and not target.flags.writeable:
        raise InputError(f"{what} is read-only")
    if overlaps_itself(target):
        raise InputError(f"{what} has elements that share memory")


def check_out_type(
    target: Any, shape: tuple[int, ...], dtype: np.dtype[Any], what: str
) -> None:
    """Raise InputError unless an array of out= has the result's type."""
    if target.dtype != dtype or target.shape != shape:
        order = "" if target.dtype.isnative else " in foreign byte order"
        raise InputError(
            f"{what} is {target.dtype.name}{list(target.shape)}{order}, but the result is "
            f"{dtype.name}{list(shape)}"
        )


def example_inputs(plan: PipelinePlan, values: Mapping[str, int]) -> dict[str, Any]:
    """Inputs of given sizes: zeros for integers, small numbers for floats.

    Raises OutOfMemory where they are too large.
    """
    try:
        return _examples(plan, values)
    except (MemoryError, ValueError, OverflowError) as error:
        sizes = ", ".join(f"{n} = {v}" for n, v in values.items())
        raise OutOfMemory(f"inputs with {sizes} do not fit this machine's memory") from error


def _examples(plan: PipelinePlan, values: Mapping[str, int]) -> dict[str, Any]:
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
