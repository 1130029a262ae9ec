"""stagefuse: a small typed language for model pipelines, and its ahead-of-time compiler.

    import stagefuse as sf

    pipe = sf.compile("model.pipe")
    y = pipe(x=x)

Nothing heavy is imported before it is used. `import_onnx` and `export_onnx` are here too where the
package `onnx` is installed, and left out of `from stagefuse import *`.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

if TYPE_CHECKING:
    from .dsl.diagnostics import CompileError
    from .onnx.errors import OnnxError
    from .onnx.export.exporting import export_onnx as export_onnx
    from .onnx.importing import import_onnx as import_onnx
    from .runtime.api import compile, load
    from .runtime.errors import (
        DeviceError,
        IndexOutOfRange,
        InputError,
        InternalError,
        OutOfMemory,
        PlanError,
    )
    from .runtime.pipeline import Pipeline
    from .runtime.session import Session

__all__ = [
    "CompileError",
    "DeviceError",
    "IndexOutOfRange",
    "InputError",
    "InternalError",
    "OnnxError",
    "OutOfMemory",
    "Pipeline",
    "PlanError",
    "Session",
    "compile",
    "load",
]

_HOMES = {
    "CompileError": "dsl.diagnostics",
    "OnnxError": "onnx.errors",
    "Pipeline": "runtime.pipeline",
    "Session": "runtime.session",
    "compile": "runtime.api",
    "export_onnx": "onnx.export.exporting",
    "import_onnx": "onnx.importing",
    "load": "runtime.api",
}


def __getattr__(name: str) -> Any:
    if name not in __all__ and name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    home = _HOMES.get(name, "runtime.errors")
    value = getattr(import_module(f".{home}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
