"""Arrays of other libraries, by DLPack: in as NumPy views, results out as the same kind.

Imports no library: an object's own module is loaded already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from stagefuse.dsl.dtypes import DTYPES, DType

from .errors import InputError

CPU_DEVICES = (1, 3)  # kDLCPU, kDLCUDAHost: memory that the processor reads
# What NumPy's DLPack lacks: torch's name of the dtype to ours.
_TORCH_ONLY = {f"torch.{d.array}": d.name for d in DTYPES.values() if d.is_extended}
_EXTENDED = {d.array: d.name for d in DTYPES.values() if d.is_extended}
_HOMES = {"torch": "torch", "jax": "jax.numpy", "jaxlib": "jax.numpy"}
_NEVER_WRITTEN = ("jax", "jaxlib")
Importer = Callable[[np.ndarray[Any, Any]], Any]


def is_foreign(value: object) -> bool:
    """Whether a value is another library's array."""
    return not isinstance(value, np.ndarray) and hasattr(type(value), "__dlpack__")


def view(value: Any, what: str) -> np.ndarray[Any, Any]:
    """A NumPy view of another library's array, without a copy. Raises InputError.

    `what` is how a message names it.
    """
    kind = _kind(value)
    try:
        device = int(value.__dlpack_device__()[0])
    except Exception as error:
        raise InputError(f"{what}: a {kind} without a DLPack device: {error}") from None
    if device not in CPU_DEVICES:
        raise InputError(
            f"{what} is a {kind} on another device, but this pipeline runs on the CPU\n"
            f"  = help: bring it here first, such as with `.cpu()`"
        )
    try:
        return _viewed(value)
    except Exception as error:
        raise InputError(f"{what}: this {kind} could not be read by DLPack: {error}") from None


def target(value: Any) -> np.ndarray[Any, Any]:
    """A view of another library's array for results to be written to. Raises InputError."""
    if type(value).__module__.partition(".")[0] in _NEVER_WRITTEN:
        raise InputError(
            f"out= is a {_kind(value)}, which is never written to\n"
            f"  = help: call without out=: the results are arrays of the inputs' kind"
        )
    return view(value, "out=")


def _kind(value: object) -> str:
    return f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"


def _viewed(value: Any) -> np.ndarray[Any, Any]:
    name = str(getattr(value, "dtype", ""))
    if name in _EXTENDED:  # a library whose dtypes are those of ml_dtypes
        return np.asarray(value)
    special = _TORCH_ONLY.get(name)
    torch = sys.modules.get("torch")
    if torch is not None and isinstance(value, torch.Tensor) and value.is_neg():
        value = value.resolve_neg()  # which DLPack does not know of
    if special is None or torch is None:
        return np.from_dlpack(value)
    dtype = DTYPES[special]
    raw = value.view(torch.uint8 if dtype.itemsize == 1 else torch.int16)
    return np.from_dlpack(raw).view(dtype.numpy)


def conversion(value: object, dtype: DType) -> str:
    """What makes an array of a dtype of another, as its library has it; behind its name."""
    if type(value).__module__.partition(".")[0] == "torch":
        return f".to(torch.{dtype.array})"
    module = "ml_dtypes" if dtype.is_extended else "np"
    return f".astype({module}.{dtype.numpy.name})"


def importer(value: object) -> Importer | None:
    """What turns a NumPy result into an array of the library of `value`; None if unknown."""
    root = type(value).__module__.partition(".")[0]
    module = sys.modules.get(_HOMES.get(root, root))
    convert = getattr(module, "from_dlpack", None)
    if convert is None:
        return None
    if root == "torch":
        return _to_torch
    extended = getattr(module, "asarray", convert)  # DLPack of NumPy's lacks these
    return lambda array: (extended if array.dtype.name in _EXTENDED else convert)(array)


def device_importer(value: object) -> Callable[[Any], Any] | None:
    """What turns an array in a device's memory into one of the library of `value`, by DLPack."""
    root = type(value).__module__.partition(".")[0]
    module = sys.modules.get(_HOMES.get(root, root))
    convert: Callable[[Any], Any] | None = getattr(module, "from_dlpack", None)
    return convert


def _to_torch(array: np.ndarray[Any, Any]) -> Any:
    torch = sys.modules["torch"]
    for theirs, ours in _TORCH_ONLY.items():
        dtype = DTYPES[ours]
        if array.dtype.name == dtype.numpy.name:
            raw = array.view(np.uint8 if dtype.itemsize == 1 else np.int16)
            return torch.from_dlpack(raw).view(getattr(torch, theirs.partition(".")[2]))
    return torch.from_dlpack(array)
