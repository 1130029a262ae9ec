"""The operations of the language: one file per family, one record per operation.

A module of this package that defines `OPS` is a family; nothing else lists them.
"""

from __future__ import annotations

import pkgutil
from importlib import import_module

from .record import Op


def _discover() -> dict[str, Op]:
    found: dict[str, Op] = {}
    for module in sorted(m.name for m in pkgutil.iter_modules(__path__)):
        for op in getattr(import_module(f"{__name__}.{module}"), "OPS", ()):
            if op.name in found:
                raise ValueError(f"two operations are named {op.name}")
            found[op.name] = op
    return found


BUILTINS: dict[str, Op] = _discover()

__all__ = ["BUILTINS", "Op"]
