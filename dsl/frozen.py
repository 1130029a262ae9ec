"""Frozen records as `dataclass(frozen=True)` makes them, for the price of a plain class.

`dataclass` writes and compiles methods for each class, about half a millisecond; a syntax tree has
forty, and a program is checked in a third of a second. Here the methods are written once.
"""

from __future__ import annotations

from typing import Any, ClassVar, NoReturn, dataclass_transform


@dataclass_transform(frozen_default=True)
class Frozen:
    """A record of its annotated fields, in order. Records of one type and equal fields are equal.

    A class attribute is a default. Fields are given by position or name; TypeError if they do
    not fit.
    """

    __match_args__: ClassVar[tuple[str, ...]] = ()

    def __init_subclass__(cls) -> None:
        annotated = cls.__dict__.get("__annotations__", {})
        own = (n for n, t in annotated.items() if "ClassVar" not in str(t))
        names = tuple(dict.fromkeys((*cls.__match_args__, *own)))
        type.__setattr__(cls, "__match_args__", names)

    def __init__(self, *values: Any, **named: Any) -> None:
        names = self.__match_args__
        if len(values) == len(names) and not named:
            self.__dict__.update(zip(names, values, strict=True))
            return
        fields = dict(zip(names, values, strict=False))
        if len(values) > len(names) or fields.keys() & named.keys() or named.keys() - set(names):
            raise TypeError(f"{type(self).__name__} has the fields {', '.join(names)}")
        fields.update(named)
        missing = [n for n in names if n not in fields and not hasattr(type(self), n)]
        if missing:
            raise TypeError(f"{type(self).__name__} needs {', '.join(missing)}")
        self.__dict__.update(fields)

    def _values(self) -> tuple[Any, ...]:
        return tuple(getattr(self, name) for name in self.__match_args__)

    def __eq__(self, other: object) -> bool:
        if type(other) is not type(self):
            return NotImplemented
        return self._values() == other._values()

    def __hash__(self) -> int:
        return hash((type(self), self._values()))

    def __repr__(self) -> str:
        pairs = zip(self.__match_args__, self._values(), strict=True)
        return f"{type(self).__name__}({', '.join(f'{n}={v!r}' for n, v in pairs)})"

    def __setattr__(self, name: str, value: object) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen: `{name}` cannot be set")

    def __delattr__(self, name: str) -> NoReturn:
        raise AttributeError(f"{type(self).__name__} is frozen: `{name}` cannot be deleted")
