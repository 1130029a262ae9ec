"""ONNX models in: a `.pipe` source that a person can read, with its weights beside it.

Needs the package `onnx`: `pip install stagefuse[onnx]`. It is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .backend import Backend, BackendRep
    from .errors import OnnxError, Problem
    from .importing import Imported, import_model, import_onnx

__all__ = [
    "Backend", "BackendRep", "Imported", "OnnxError", "Problem", "import_model", "import_onnx",
]  # fmt: skip

_HOMES = {
    "Backend": "backend", "BackendRep": "backend", "Imported": "importing",
    "OnnxError": "errors", "Problem": "errors", "import_model": "importing",
    "import_onnx": "importing",
}  # fmt: skip


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value
