"""Frozen records as `dataclass(frozen=True)` makes them, for a tenth of its price.

`dataclass` writes and compiles six methods for each class, about a millisecond; we have two
hundred, and compile a program in a second. Here a method is written when it is called first, and
most never are. What `dataclasses` knows of its classes it knows of these: `fields`, `replace`,
`is_dataclass`; and `field` serves.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import MISSING, FrozenInstanceError, dataclass, field, fields
from typing import Any, NoReturn, TypeVar, dataclass_transform

C = TypeVar("C", bound=type)


@dataclass_transform(frozen_default=True, field_specifiers=(field,))
def frozen(cls: C) -> C:
    """Makes a class a record of its annotated fields, in order.

    Records of one class and equal fields are equal. Methods that the class itself has stay.
    """
    cls.__doc__ = cls.__doc__ or cls.__name__  # else `dataclass` writes a signature, slowly
    own: Any = dataclass(init=False, repr=False, eq=False)(cls)
    methods = {name: _later(own, name, write) for name, write in _WRITTEN.items()}
    for name, method in {**methods, **_COMMON}.items():
        if cls.__dict__.get(name) is None:  # `__hash__` is None where there is an `__eq__`
            setattr(own, name, method)
    return cls


def _later(cls: Any, name: str, write: Callable[[Any, dict[str, Any]], str]) -> Callable[..., Any]:
    """A method that writes itself when it is called."""

    def method(*values: Any, **named: Any) -> Any:
        scope: dict[str, Any] = {}
        exec(write(cls, scope), scope)
        made = scope[name]
        made.__qualname__ = f"{cls.__qualname__}.{name}"  # what a TypeError calls it
        setattr(cls, name, made)
        return made(*values, **named)

    return method


def _init(cls: Any, scope: dict[str, Any]) -> str:
    """Takes the fields, by position or name."""
    scope.update(MISSING=MISSING, put=object.__setattr__)
    parameters, lines = ["self"], ["pass"]
    for f in fields(cls):
        parameter, value = f.name, f.name
        if f.default is not MISSING:
            scope[f"default_{f.name}"] = f.default
            parameter += f"=default_{f.name}"
        elif f.default_factory is not MISSING:
            scope[f"make_{f.name}"] = f.default_factory
            parameter += "=MISSING"
            value = f"make_{f.name}() if {f.name} is MISSING else {f.name}"
        parameters.append(parameter)
        lines.append(f"put(self, {f.name!r}, {value})")
    return f"def __init__({', '.join(parameters)}):\n " + "\n ".join(lines)


def _eq(cls: Any, scope: dict[str, Any]) -> str:
    return (
        "def __eq__(self, other):\n"
        " if other.__class__ is not self.__class__: return NotImplemented\n"
        f" return {_compared(cls, 'self')} == {_compared(cls, 'other')}"
    )


def _hash(cls: Any, scope: dict[str, Any]) -> str:
    return f"def __hash__(self): return hash({_compared(cls, 'self')})"


def _compared(cls: Any, record: str) -> str:
    return f"({''.join(f'{record}.{f.name}, ' for f in fields(cls) if f.compare)})"


def _repr(self: Any) -> str:
    pairs = [f"{f.name}={getattr(self, f.name)!r}" for f in fields(self) if f.repr]
    return f"{type(self).__qualname__}({', '.join(pairs)})"


def _setattr(self: object, name: str, value: object) -> NoReturn:
    raise FrozenInstanceError(f"cannot assign to field {name!r}")


def _delattr(self: object, name: str) -> NoReturn:
    raise FrozenInstanceError(f"cannot delete field {name!r}")


_WRITTEN = {"__init__": _init, "__eq__": _eq, "__hash__": _hash}
_COMMON = {"__repr__": _repr, "__setattr__": _setattr, "__delattr__": _delattr}
