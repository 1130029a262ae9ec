"""Initial values of variables (PTX ISA, "Initializers"): where each one in braces lies.

A variable keeps them in one row, in the order of memory; rows that are written in part are filled
with zeros, and zeros at the end are left out.
"""

from __future__ import annotations

from dataclasses import replace
from math import prod
from typing import Any

from . import syntax as s
from .constants import int_of
from .errors import PtxError
from .types import TYPES


class Initials:
    """What the grammar's rules for initial values give."""

    def initial_symbol(self, c: list[Any]) -> s.Symbol:
        return s.Symbol(str(c[0]), c[1] or 0)

    def initial_generic(self, c: list[Any]) -> s.GenericOf:
        if c[0] != "generic":
            raise PtxError(f"`{c[0]}` in an initial value", line=c[0].line)
        return s.GenericOf(str(c[1]), c[2] or 0)

    def initial_byte(self, c: list[Any]) -> s.ByteOf:
        mask = int_of(c[0])
        number = next((i for i in range(8) if mask == 0xFF << 8 * i), None)
        if number is None:
            raise PtxError(f"the mask `{c[0]}` is not that of one byte", line=c[0].line)
        return s.ByteOf(c[1], number)

    def initial_list(self, c: list[Any]) -> list[Any]:
        return c


def with_initial(v: s.Variable, values: Any, line: int) -> s.Variable:
    """A variable with its initial values, nested lists as they are written, `None` for none.

    Raises: PtxError where they do not fit its sizes or its type.
    """
    if values is None:
        return v
    try:
        if v.shape and v.shape[0] == 0:
            v = replace(v, shape=(len(values) if isinstance(values, list) else 0, *v.shape[1:]))
        sizes = v.shape if v.vector == 1 else (*v.shape, v.vector)
        flat = _placed(values, sizes, zero(v.type))
        for value in flat:
            _check(v, value)
    except PtxError as error:
        raise PtxError(f"`{v.name}`: {error.message}", line=line) from None
    return replace(v, initial=tuple(flat))


def zero(kind: str) -> s.Immediate | s.FloatImmediate:
    """The zero of a type."""
    of = TYPES[kind]
    return s.FloatImmediate(0, of.bits) if of.kind == "float" else s.Immediate(0)


def _placed(values: Any, sizes: tuple[int, ...], filling: s.Initial) -> list[s.Initial]:
    if isinstance(values, list) != bool(sizes):
        raise PtxError(f"initial values in {len(sizes)} pairs of braces are expected")
    if not sizes:
        return [values]
    if len(values) > sizes[0]:
        raise PtxError(f"{len(values)} initial values for {sizes[0]}")
    row, flat = prod(sizes[1:]), list[s.Initial]()
    for at, value in enumerate(values):
        flat += [filling] * (at * row - len(flat))
        flat += _placed(value, sizes[1:], filling)
    return flat


def _check(v: s.Variable, x: s.Initial) -> None:
    kind = TYPES[v.type]
    match x:
        case s.ByteOf():
            fits = v.type == "u8"
        case s.Symbol() | s.GenericOf():
            fits = v.type in ("u32", "u64")
        case s.FloatImmediate(_, width):
            fits = kind.bits >= 32 and (kind.kind == "float" or kind.name == f"b{width}")
        case _:
            fits = kind.kind in ("bits", "unsigned", "signed")
    if not fits:
        raise PtxError(f"an initial value that no {v.type} holds")
