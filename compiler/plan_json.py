"""Frozen dataclasses of plans to JSON values and back, strictly: no field missing or unknown."""

from __future__ import annotations

import types
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import PlanError

T = TypeVar("T")
_HINTS: dict[type, dict[str, Any]] = {}


def encode(value: Any) -> Any:
    """The JSON value of a record, a tuple or a plain value."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: encode(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, (tuple, list)):
        return [encode(item) for item in value]
    if isinstance(value, dict):
        return {str(key): encode(item) for key, item in value.items()}
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    return str(value)


def decode(kind: type[T], value: Any, where: str) -> T:
    """The record that `encode` wrote. Raises PlanError, naming the place by `where`."""
    return _decode(kind, value, where)  # type: ignore[no-any-return]


def _decode(kind: Any, value: Any, where: str) -> Any:
    if isinstance(kind, type) and is_dataclass(kind):
        return _record(kind, value, where)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = next(a for a in arguments if a is not type(None))
        return None if value is None else _decode(inner, value, where)
    if origin is tuple:
        items = _expect(list, value, where)
        if arguments[-1] is not Ellipsis and len(items) != len(arguments):
            raise PlanError(f"{where}: expected {len(arguments)} items, found {len(items)}")
        return tuple(_decode(arguments[0], v, f"{where}[{i}]") for i, v in enumerate(items))
    if origin is dict:
        return _expect(dict, value, where)
    return _expect(kind, value, where)


def _record(kind: type, value: Any, where: str) -> Any:
    found = _expect(dict, value, where)
    if kind not in _HINTS:
        _HINTS[kind] = get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    for name in found:
        if name not in known:
            raise PlanError(f"{where}: unknown field {name!r}")
    arguments: dict[str, Any] = {}
    for f in fields(kind):
        if f.name in found:
            arguments[f.name] = _decode(_HINTS[kind][f.name], found[f.name], f"{where}.{f.name}")
        elif f.default is MISSING and f.default_factory is MISSING:
            raise PlanError(f"{where}: field {f.name!r} is missing")
    return kind(**arguments)


def _expect(kind: type, value: Any, where: str) -> Any:
    if type(value) is not kind:
        raise PlanError(f"{where}: expected {kind.__name__}, found {type(value).__name__}")
    return value
