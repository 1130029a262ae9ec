"""Arrays of other libraries, by DLPack: in as NumPy views, results out as the same kind.

Imports no library: an object's own module is loaded already.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import numpy as np

from stagefuse.dsl.dtypes import DTYPES

from .errors import InputError

CPU_DEVICES = (1, 3)  # kDLCPU, kDLCUDAHost: memory that the processor reads
# What NumPy's DLPack lacks: torch's name of the dtype to ours.
_TORCH_ONLY = {f"torch.{d.array}": d.name for d in DTYPES.values() if d.is_extended}
_HOMES = {"torch": "torch", "jax": "jax.numpy", "jaxlib": "jax.numpy"}
Importer = Callable[[np.ndarray[Any, Any]], Any]


def is_foreign(value: object) -> bool:
    """Whether a value is another library's array."""
    return not isinstance(value, np.ndarray) and hasattr(type(value), "__dlpack__")


def view(value: Any, name: str) -> np.ndarray[Any, Any]:
    """A NumPy view of another library's array, without a copy. Raises InputError."""
    kind = f"{type(value).__module__.partition('.')[0]}.{type(value).__name__}"
    try:
        device = int(value.__dlpack_device__()[0])
    except Exception as error:
        raise InputError(f"input `{name}`: a {kind} without a DLPack device: {error}") from None
    if device not in CPU_DEVICES:
        raise InputError(
            f"input `{name}` is a {kind} on another device, but this pipeline runs on the CPU\n"
            f"  = help: bring it here first, such as with `.cpu()`"
        )
    special = _TORCH_ONLY.get(str(getattr(value, "dtype", "")))
    try:
        if special is None:
            return np.from_dlpack(value)
        dtype = DTYPES[special]
        torch = sys.modules["torch"]
        raw = value.view(torch.uint8 if dtype.itemsize == 1 else torch.int16)
        return np.from_dlpack(raw).view(dtype.numpy)
    except Exception as error:
        raise InputError(
            f"input `{name}`: this {kind} could not be read by DLPack: {error}"
        ) from None


def importer(value: object) -> Importer | None:
    """What turns a NumPy result into an array of the library of `value`; None if unknown."""
    root = type(value).__module__.partition(".")[0]
    module = sys.modules.get(_HOMES.get(root, root))
    convert = getattr(module, "from_dlpack", None)
    if convert is None:
        return None
    return _to_torch if root == "torch" else convert


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
