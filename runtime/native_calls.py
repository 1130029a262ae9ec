"""Calls of a pipeline that run no Python; their code is `compiler.cpu.native_calls`.

A pipeline whose calls suit gets a class with a native method `__call__`, and a table of
the shapes that it was called with. Whatever the method does not take goes to the method in Python.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import chain
from typing import Any, TypeVar

import numpy as np

from stagefuse.compiler.call_abi import API, ARRAY, BUCKET, DENSE, MOST, TABLE

from . import native
from .memory import POOLED_BYTES, ResultPool, pointer_to
from .prepared import Bucket, ResultSpec, Workspace

MAX_BUCKETS = 32
"""They are looked through one after another."""
MAX_BYTES, MAX_SCRATCH = 1 << 20, 1 << 26
"""Intermediates of a call that is worth it: others take much longer than Python. Scratch memory is
as much as might be needed, and mostly never touched."""
_VARIABLE_ARGUMENTS, _KEYWORDS = 0x0080, 0x0002  # METH_FASTCALL, METH_KEYWORDS
_GET_VERSION, _EMPTY = 0, 184
"""Places in NumPy's table of functions, the same in all versions: `PyArray_GetNDArrayCVersion` and
`PyArray_Empty`. Source: `numpy/_core/code_generators/numpy_api.py`."""
_NUMPY_ABI = (0x01000009, 0x02000000)
_Kind = TypeVar("_Kind", bound=type)
_Words = np.ndarray[Any, np.dtype[np.int64]]


class _MethodDef(ctypes.Structure):
    """`PyMethodDef` of CPython's C API."""

    _fields_ = [
        ("name", ctypes.c_char_p),
        ("function", ctypes.c_void_p),
        ("flags", ctypes.c_int),
        ("doc", ctypes.c_char_p),
    ]


_made: dict[tuple[type, bytes], tuple[type | None, Any]] = {}
"""Classes, with what they refer to. Nothing is taken away: a call may always be running."""


def with_native_call(kind: _Kind, code: bytes) -> _Kind | None:
    """A class like another but with the native call of a plan; None where Python or NumPy differ
    from what the code expects, or it does not load."""
    if (kind, code) not in _made:
        try:
            _made[kind, code] = _subclass(kind, code) if _is_known_layout() else (None, None)
        except (native.ObjectError, KeyError, AttributeError, ImportError, OSError):
            _made[kind, code] = None, None
    return _made[kind, code][0]  # type: ignore[return-value]


def _subclass(kind: type, code: bytes) -> tuple[type | None, Any]:
    functions = _numpy_functions()
    if functions is None:
        return None, None
    loaded = native.NativeObject(code)
    known = {
        "PyArray_Empty": functions[_EMPTY],
        "ndarray": id(np.ndarray),
        **{name: id(sys.intern(name)) for name in API if name.startswith("_")},
    }
    addresses = [known.get(name) or _address(name) for name in API]
    (ctypes.c_void_p * len(API)).from_address(loaded.address("sf_api"))[:] = addresses
    made = type(kind.__name__, (kind,), {
        "__module__": kind.__module__, "__qualname__": kind.__qualname__, "__doc__": kind.__doc__,
    })  # fmt: skip
    # As CPython writes signatures of its own methods.
    doc = f"__call__($self, /, *args, out=None, **inputs)\n--\n\n{kind.__call__.__doc__ or ''}"
    flags = _VARIABLE_ARGUMENTS | _KEYWORDS
    definition = _MethodDef(b"__call__", loaded.address("sf_call"), flags, doc.encode())
    new = ctypes.pythonapi.PyDescr_NewMethod
    new.restype, new.argtypes = ctypes.py_object, [ctypes.py_object, ctypes.POINTER(_MethodDef)]
    made.__call__ = new(made, definition)  # type: ignore[method-assign]
    return made, (loaded, definition, addresses)


def _address(name: str) -> int:
    """A function of CPython's."""
    return ctypes.cast(getattr(ctypes.pythonapi, name), ctypes.c_void_p).value or 0


def _numpy_functions() -> Any:
    """NumPy's table of functions; None if it is of an unknown version."""
    from numpy._core import _multiarray_umath  # type: ignore[attr-defined]

    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    table = (ctypes.c_void_p * (_EMPTY + 1)).from_address(get(_multiarray_umath._ARRAY_API, None))
    version = ctypes.CFUNCTYPE(ctypes.c_uint)(table[_GET_VERSION] or 0)()
    return table if version in _NUMPY_ABI else None


def _is_known_layout() -> bool:
    """Whether objects lie in memory as the code expects, and Python has its lock."""
    locked = getattr(sys, "_is_gil_enabled", lambda: True)()
    if sys.implementation.name != "cpython" or not locked:
        return False
    array = np.zeros((3, 5), np.float32)[1:]
    found = {name: _word(id(array) + offset) for name, offset in ARRAY.items()}
    shape = [_word(found["shape"] + 8 * axis) for axis in range(2)]
    expected = (id(np.ndarray), array.ctypes.data, 2, id(array.dtype), DENSE, [2, 5])
    flags = found["flags"] & DENSE
    rank = found["rank"] & 0xFFFFFFFF
    return expected == (found["type"], found["elements"], rank, found["dtype"], flags, shape)


def _word(address: int) -> int:
    return ctypes.c_uint64.from_address(address).value


def suits(bucket: Bucket, inputs: int) -> bool:
    """Whether calls of a combination of shapes, of which there are so many, are short enough."""
    small = bucket.arena_bytes <= MAX_BYTES and bucket.scratch_bytes <= MAX_SCRATCH
    return small and 0 < inputs <= MOST - len(bucket.results)


class CallTable:
    """The shapes that one pipeline's native calls take, and the memory that they run in."""

    def __init__(
        self,
        inputs: Sequence[tuple[str, np.dtype[Any], int]],
        results: Sequence[tuple[np.dtype[Any], int]],
        class_: Callable[..., Any] | None,
        run: tuple[int, int],
        code: object,
        pool: ResultPool,
    ) -> None:
        """Inputs with name, dtype and rank, and results; the class of several results; the address
        of `sf_run` and how many threads it has; what must live as long as calls run; the memory of
        large results."""
        self._pool = pool
        names = [sys.intern(name) for name, _, _ in inputs]
        self._workspaces = [Workspace()]
        named = zip(names, inputs, strict=True)
        self._input = _words(w for n, (_, dtype, rank) in named for w in (id(n), id(dtype), rank))
        self._result = _words(w for dtype, rank in results for w in (id(dtype), rank))
        self._bucket = np.zeros(MAX_BUCKETS, np.int64)
        fields = {
            "inputs": len(inputs), "results": len(results), "threads": run[1], "run": run[0],
            "tuple": 0 if class_ is None else id(class_),
            "input": pointer_to(self._input), "result": pointer_to(self._result),
            "bucket": pointer_to(self._bucket),
        }  # fmt: skip
        self._table = _words(fields.get(name, 0) for name in TABLE)
        self._kept: list[Any] = [names, inputs, results, class_, code]
        self.address = pointer_to(self._table)
        self.buckets: list[Bucket] = []

    @property
    def busy(self) -> bool:
        """Whether a call is running in it."""
        return bool(self._table[TABLE.index("busy")])

    @property
    def failed(self) -> bool:
        """Whether a call left a status."""
        return any(workspace.status[0] for workspace in self._workspaces)

    def add(self, bucket: Bucket, shapes: Sequence[tuple[int, ...]]) -> bool:
        """Take the shapes of inputs from now on, unless there are many already; False while a call
        runs."""
        count = len(self.buckets)
        if self.busy or count == MAX_BUCKETS:
            return not self.busy
        if self._workspaces[-1].size < bucket.arena_bytes + bucket.scratch_bytes:
            self._workspaces.append(Workspace(bucket.arena_bytes + bucket.scratch_bytes))
        workspace = self._workspaces[-1]
        bound = workspace.bind(bucket)
        slots = pointer_to(bound.table)
        pairs = _words(w for number, slot in bucket.slots for w in (number, slots + 8 * slot))
        extents = _words(chain.from_iterable(shapes))
        made = _words(chain.from_iterable(spec.shape for spec in bucket.results))
        takers = [self._pooled(spec) for spec in bucket.results]
        makers = _words(0 if taker is None else id(taker) for taker in takers)
        fields = {
            "steps": bound.address, "count": bound.count, "status": workspace.status_address,
            "places": len(bucket.slots),
            "place": pointer_to(pairs), "shapes": pointer_to(extents),
            "result shapes": pointer_to(made), "makers": pointer_to(makers),
        }  # fmt: skip
        record = _words(fields[name] for name in BUCKET)
        self._kept.append((bound, pairs, extents, made, takers, makers, record))
        self._bucket[count] = pointer_to(record)
        self.buckets.append(bucket)
        self._table[TABLE.index("buckets")] = count + 1
        return True

    def _pooled(self, spec: ResultSpec) -> Callable[[], Any] | None:
        """What gives an array for a result, where that is not a new one."""
        if spec.size < POOLED_BYTES:
            return None
        return partial(self._pool.array, spec.shape, spec.dtype, spec.size)

    def close(self) -> None:
        """Take no more calls. What one that runs refers to lives on in this object."""
        self._table[TABLE.index("buckets")] = 0


def _words(values: Iterable[int]) -> _Words:
    return np.fromiter(values, np.int64)
