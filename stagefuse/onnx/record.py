"""One record per ONNX op: from which opsets on, and the function that writes it in the language."""

from __future__ import annotations

import pkgutil
from collections.abc import Callable, Sequence
from functools import cache
from importlib import import_module
from typing import TypeAlias

from stagefuse.dsl.frozen import frozen

from .node import Node, Val

Written: TypeAlias = "str | Val | Sequence[str | Val]"
Writer: TypeAlias = Callable[[Node], Written]


@frozen
class Record:
    """An op of the default domain, or `domain::op`.

    `write` gives the result as an expression or a value, or a list of them; it raises Refused for
    what it does not translate. `family` groups ops in the table of scores.
    """

    op: str
    write: Writer
    family: str
    unread: frozenset[str] = frozenset()


def op(*names: str, unread: Sequence[str] = ()) -> Callable[[Writer], Writer]:
    """Registers a function as the record of ops; `unread` are attributes without effect here."""

    def register(write: Writer) -> Writer:
        family = str(write.__module__).rpartition(".")[2]
        for name in names:
            if name in _FOUND:
                raise ValueError(f"two records are named {name}")
            _FOUND[name] = Record(name, write, family, frozenset(unread))
        return write

    return register


_FOUND: dict[str, Record] = {}


@cache
def records() -> dict[str, Record]:
    """All records by name; a module of `ops` is a family, nothing else lists them."""
    package = import_module(f"{__package__}.ops")
    for name in sorted(m.name for m in pkgutil.iter_modules(package.__path__)):
        import_module(f"{package.__name__}.{name}")
    return _FOUND
