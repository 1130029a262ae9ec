"""Sessions: what a pipeline keeps between calls, one set of states for each.

Sessions share the loaded pipeline: its code, weights and intermediates. A session's calls run one
after the other, also from several threads; two sessions run at once.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from stagefuse.compiler.plan import ArgumentPlan, PipelinePlan
from stagefuse.compiler.plan_check import session_dims, solve_order
from stagefuse.dsl.dims_text import parse
from stagefuse.dsl.dtypes import DTYPES, from_numpy

from .errors import InputError
from .prepared import Evaluator
from .signature import range_text, type_text

if TYPE_CHECKING:
    from .pipeline import Pipeline

Array = np.ndarray[Any, Any]


class States(Protocol):
    """The memory of a session's states, in the order of the plan."""

    def read(self, number: int) -> Array:
        """A copy of a state."""

    def write(self, number: int, value: Array) -> None:
        """Give a state the value of an array of its dtype and shape, dense and row-major."""

    def close(self) -> None: ...


class Session:
    """A pipeline with states of its own. Call it as the pipeline would be called.

    A call that raises leaves the states as they were, except for DeviceError: then only `reset`
    and `restore` make them whole again.
    """

    def __init__(self, pipeline: Pipeline, sizes: Mapping[str, int]) -> None:
        plan = pipeline._plan
        self._pipeline, self._plan = pipeline, plan
        self.sizes = _checked_sizes(plan, sizes)
        evaluate = Evaluator(dict(self.sizes))
        self._types = {
            s.name: (DTYPES[s.dtype].numpy, evaluate.shape(s.shape)) for s in plan.states
        }
        self._lock = threading.RLock()
        self.key = tuple(self.sizes.values())
        self.states = pipeline._new_states(tuple(self._types.values()))
        self._closed = False
        self.reset()

    @property
    def pipeline(self) -> Pipeline:
        """What it is a session of."""
        return self._pipeline

    @property
    def state(self) -> Mapping[str, Array]:
        """The states by name, each copied when it is looked up."""
        return _Reading(self)

    def __repr__(self) -> str:
        sizes = ", ".join(f"{name} = {size}" for name, size in self.sizes.items())
        return f"<session of {self._plan.name}{f' with {sizes}' if sizes else ''}>"

    def __call__(self, /, *args: Any, out: Any = None, **inputs: Any) -> Any:
        """Results for inputs by name, as of the pipeline; the states are updated.

        Raises InputError, IndexOutOfRange, OutOfMemory, DeviceError.
        """
        with self._lock:
            self._require_open()
            return self._pipeline._call_in(self, args, out, inputs)

    def reset(self) -> None:
        """Give all states the values that they began with."""
        with self._lock:
            self._require_open()
            for number, (state, type) in enumerate(
                zip(self._plan.states, self._types.values(), strict=True)
            ):
                self.states.write(number, self._pipeline._initial(state, *type))

    def snapshot(self) -> dict[str, Array]:
        """The states as arrays of the caller's, by name; `numpy.savez` writes them to a file."""
        with self._lock:
            self._require_open()
            return {s.name: self.states.read(i) for i, s in enumerate(self._plan.states)}

    def restore(self, snapshot: Mapping[str, Any]) -> None:
        """Give the states the values of a snapshot, also of another session. Raises InputError."""
        with self._lock:
            self._require_open()
            values = self._checked(snapshot)
            for number, value in enumerate(values):
                self.states.write(number, value)

    def _checked(self, snapshot: Mapping[str, Any]) -> list[Array]:
        """The arrays of a snapshot in order, each of the state's type."""
        names = list(self._types)
        if not isinstance(snapshot, Mapping):
            raise InputError(f"a snapshot is a dict of arrays, not a {type(snapshot).__name__}")
        missing = [name for name in names if name not in snapshot]
        unknown = [str(name) for name in snapshot if name not in names]
        if missing or unknown:
            what = f"lacks `{missing[0]}`" if missing else f"has `{unknown[0]}`"
            listed = ", ".join(f"`{name}`" for name in names)
            raise InputError(f"the snapshot {what}: {self._plan.name} keeps {listed}")
        found = []
        for name, (dtype, shape) in self._types.items():
            value = np.asarray(snapshot[name])
            if value.dtype.kind == "V" and value.dtype.itemsize == dtype.itemsize:
                value = value.view(dtype)  # bf16 and f8 as they come from a file of NumPy's
            if value.dtype != dtype or value.shape != shape:
                raise InputError(
                    f"the state `{name}` is {_text(dtype, shape)}, and the snapshot has "
                    f"{_text(value.dtype, value.shape)}"
                )
            found.append(np.require(value, None, ["C", "A"]))
        return found

    def profile(self, path: str | Path, /, *, calls: int = 5, **inputs: Any) -> Path:
        """Run it step by step and write the times as a Chrome trace; the states stay as they were.

        Without inputs it makes some with the sizes of the latest new combination of shapes.
        """
        with self._lock:
            kept = self.snapshot()
            try:
                return self._pipeline._profile(Path(path), calls, inputs, self)
            finally:
                self.restore(kept)

    def _require_open(self) -> None:
        if self._closed:
            raise InputError(f"the session of {self._plan.name} is closed")

    def close(self) -> None:
        """Give back the states' memory; the pipeline stays open."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self.states.close()

    def __enter__(self) -> Session:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Reading(Mapping[str, Array]):
    """The states of a session by name, read when they are looked up."""

    def __init__(self, session: Session) -> None:
        self._session = session
        self._names = [s.name for s in session._plan.states]

    def __getitem__(self, name: str) -> Array:
        with self._session._lock:
            self._session._require_open()
            if name not in self._names:
                raise KeyError(name)
            return self._session.states.read(self._names.index(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __repr__(self) -> str:
        types = self._session._types.items()
        listed = ", ".join(f"{name}: {_text(d, shape)}" for name, (d, shape) in types)
        return f"<states {listed}>"


def _checked_sizes(plan: PipelinePlan, given: Mapping[str, int]) -> dict[str, int]:
    """The sizes that a session fixes, in order and within their ranges. Raises InputError."""
    names = session_dims(plan)
    takes = ", ".join(f"{name}=..." for name in names)
    for name in given:
        if name not in names:
            near = get_close_matches(name, names, 1)
            fix = f"\n  = help: write `{near[0]}=`" if near else ""
            text = f"no size of a session is called `{name}`: write session({takes})"
            raise InputError(text + fix)
    missing = [name for name in names if name not in given]
    if missing:
        raise InputError(
            f"a session of {plan.name} fixes the size {', '.join(missing)}\n"
            f"  = help: write `session({takes})`"
        )
    sizes: dict[str, int] = {}
    for name in names:
        value = given[name]
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise InputError(f"{name} is {value!r}, but a size is a whole number")
        sizes[name] = int(value)
    evaluate = Evaluator(sizes)
    for dim in plan.dims:
        if dim.name in sizes:
            low, high = _end(evaluate, dim.low), _end(evaluate, dim.high)
            value = sizes[dim.name]
            if (low is not None and value < low) or (high is not None and value > high):
                wanted = range_text(dim.name, low, high)
                raise InputError(f"{dim.name} is {value}, but {plan.name} takes {wanted}")
    return sizes


def sizes_of(plan: PipelinePlan, snapshot: Mapping[str, Any]) -> dict[str, int]:
    """The sizes of the session that a snapshot is of, as far as its shapes tell."""
    states = [ArgumentPlan(s.name, s.dtype, s.shape, s.buffer) for s in plan.states]
    sizes: dict[str, int] = {}
    for name, number, axis, rest, factor in solve_order(states):
        value = snapshot.get(states[number].name or "")
        if name not in sizes and value is not None and np.ndim(value) == len(states[number].shape):
            sizes[name] = (np.shape(value)[axis] - rest.evaluate(sizes)) // factor
    return sizes


def _end(evaluate: Evaluator, text: str | None) -> int | None:
    """An end of a range, if the sizes of a session decide it."""
    if text is None or not parse(text).symbols() <= evaluate.values.keys():
        return None
    return evaluate(text)


def _text(dtype: np.dtype[Any], shape: tuple[int, ...]) -> str:
    ours = from_numpy(dtype)
    return type_text(dtype.name if ours is None else ours.name, shape)


class HostStates:
    """States in this machine's memory."""

    def __init__(self, arrays: list[Array]) -> None:
        self.arrays = arrays

    def read(self, number: int) -> Array:
        return self.arrays[number].copy()

    def write(self, number: int, value: Array) -> None:
        np.copyto(self.arrays[number], value)

    def close(self) -> None:
        self.arrays = []
