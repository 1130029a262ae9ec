"""Frozen dataclasses of plans to JSON values and back, strictly: no field missing or unknown."""

from __future__ import annotations

import json
import types
from collections.abc import Callable
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, Union, get_args, get_origin, get_type_hints

from .errors import PlanError

T = TypeVar("T")
Decoder = Callable[[Any], Any]


def encode(value: Any) -> bytes:
    """A line of JSON: records as objects of their fields, what JSON lacks as text."""
    text = json.dumps(
        value, default=_plainer, ensure_ascii=False, separators=(",", ":"), allow_nan=False
    )
    return text.encode() + b"\n"


def fields_of(record: Any) -> dict[str, Any]:
    """The fields of a record by name."""
    kind: Any = type(record)
    return {name: getattr(record, name) for name in _names(kind)}


def _plainer(value: Any) -> Any:
    return fields_of(value) if is_dataclass(type(value)) else str(value)


@cache
def _names(kind: Any) -> tuple[str, ...]:
    return tuple(f.name for f in fields(kind))


def decode(kind: type[T], value: Any, where: str) -> T:
    """The record that `encode` wrote. Raises PlanError, naming the place by `where`."""
    try:
        return _decoder(kind)(value)  # type: ignore[no-any-return, arg-type]
    except _Misfit as misfit:
        raise PlanError(f"{where}{misfit.path}: {misfit}") from None


class _Misfit(Exception):
    """A value of another kind than it should be; its path is put together on the way out."""

    path = ""

    def under(self, place: str) -> _Misfit:
        self.path = place + self.path
        return self


@cache
def _decoder(kind: Any) -> Decoder:
    """What decodes values of a type: made once, since types are looked at slowly."""
    if isinstance(kind, type) and is_dataclass(kind):
        return _record(kind)
    origin, arguments = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        inner = _decoder(next(a for a in arguments if a is not type(None)))
        return lambda value: None if value is None else inner(value)
    if origin is tuple:
        return _tuple(arguments)
    return _plain(dict if origin is dict else kind)


def _plain(kind: type) -> Decoder:
    def run(value: Any) -> Any:
        if type(value) is not kind:
            raise _Misfit(f"expected {kind.__name__}, found {type(value).__name__}")
        return value

    return run


def _tuple(arguments: tuple[Any, ...]) -> Decoder:
    check, inner = _plain(list), _decoder(arguments[0])
    count = None if arguments[-1] is Ellipsis else len(arguments)

    def run(value: Any) -> Any:
        check(value)
        if count not in (None, len(value)):
            raise _Misfit(f"expected {count} items, found {len(value)}")
        try:
            return tuple([inner(item) for item in value])
        except _Misfit as misfit:
            # which one it was: decoding is quick, and happens again only for a damaged plan
            raise misfit.under(f"[{_first_misfit(inner, value)}]") from None

    return run


def _first_misfit(inner: Decoder, values: list[Any]) -> int:
    for number, value in enumerate(values):
        try:
            inner(value)
        except _Misfit:
            return number
    return len(values)


def _record(kind: type) -> Decoder:
    check, hints = _plain(dict), get_type_hints(kind)
    members = [(f.name, _decoder(hints[f.name]), _is_needed(f)) for f in fields(kind)]
    known = {name for name, *_ in members}

    def run(value: Any) -> Any:
        check(value)
        if not value.keys() <= known:
            unknown = next(name for name in value if name not in known)
            raise _Misfit(f"unknown field {unknown!r}")
        arguments: dict[str, Any] = {}
        for name, inner, needed in members:
            if name in value:
                try:
                    arguments[name] = inner(value[name])
                except _Misfit as misfit:
                    raise misfit.under(f".{name}") from None
            elif needed:
                raise _Misfit(f"field {name!r} is missing")
        return kind(**arguments)

    return run


def _is_needed(field: Any) -> bool:
    return field.default is MISSING and field.default_factory is MISSING
