"""What native code of calls and the runtime agree on; see `cpu.native_calls`.

All records are words of 8 bytes; an address is one. Files hold code that was made for what stands
here: a change is one of `plan.ABI_VERSION`.
"""

from __future__ import annotations

API = (
    "PyObject_GetAttr", "PyLong_AsVoidPtr", "Py_IncRef", "Py_DecRef", "PyTuple_Size",
    "PyTuple_GetItem", "PyErr_Clear", "PyErr_Occurred", "PyObject_Vectorcall", "PyEval_SaveThread",
    "PyEval_RestoreThread", "PyArray_Empty", "ndarray", "_table", "_in_python", "_after",
)  # fmt: skip
"""Functions of CPython and NumPy, the type of arrays, and names of attributes as strings."""
TABLE = ("buckets", "busy", "inputs", "results", "threads", "run", "tuple", "input", "result",
         "bucket")  # fmt: skip
"""How many combinations of shapes, inputs and results there are; `sf_run`; the class for several
results, or 0; the first records of inputs and results, and the first of the addresses of those of
buckets."""
INPUT = ("name", "dtype", "rank")
RESULT = ("dtype", "rank")
BUCKET = ("steps", "count", "status", "places", "place", "shapes", "result shapes", "makers")
"""The steps for `sf_run` and where they leave a status; the first of `places` pairs, each the
number of an input or result and the slot for the address of its elements; all extents of the
inputs, and of the results; for each result what is called for its array, or 0 for a new one."""
MOST = 64
"""Inputs and results together."""
ARRAY = {"type": 8, "elements": 16, "rank": 24, "shape": 32, "dtype": 56, "flags": 64}
"""Byte offsets in an array object of NumPy's (`PyArrayObject_fields`); rank and flags have 4 bytes.
"""
DENSE = 0x0001 | 0x0100
"""Flags of arrays that kernels take: NPY_ARRAY_C_CONTIGUOUS, NPY_ARRAY_ALIGNED."""
