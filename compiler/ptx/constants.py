"""Constants and constant expressions (PTX ISA, "Constants"), evaluated as they are read.

Values are an `int` for .s64, an `Unsigned` for .u64, a `float` or a `FloatImmediate` of 64 bits for
.f64. A number in the notation of f32, `0f3F800000`, is exact and takes part in no expression.
Where ptxas and the ISA's table differ, in the types of `&`, `|` and `^`, this follows ptxas.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

from . import syntax as s
from .errors import PtxError

_BITS = 64


class Unsigned(int):
    """A .u64 value."""


Value = int | float | s.FloatImmediate

_PRECEDENCE = {
    "||": 1, "&&": 2, "|": 3, "^": 4, "&": 5, "==": 6, "!=": 6, "<": 7, ">": 7, "<=": 7, ">=": 7,
    "<<": 8, ">>": 8, "+": 9, "-": 9, "*": 10, "/": 10, "%": 10,
}  # fmt: skip

_COMPARISONS: dict[str, Callable[[Any, Any], bool]] = {
    "==": lambda a, b: a == b,
    "!=": lambda a, b: a != b,
    "<": lambda a, b: a < b,
    ">": lambda a, b: a > b,
    "<=": lambda a, b: a <= b,
    ">=": lambda a, b: a >= b,
}

_ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "*": lambda a, b: a * b,
}

_BITWISE: dict[str, Callable[[int, int], int]] = {
    "&": lambda a, b: a & b,
    "|": lambda a, b: a | b,
    "^": lambda a, b: a ^ b,
}


class Constants:
    """What the grammar's rules for constants give: values, and at `constant` an operand."""

    def integer(self, c: list[Any]) -> int:
        text = str(c[0])
        value = 32 if text == "WARP_SZ" else int_of(text)
        return Unsigned(value) if text[-1] == "U" or value >> (_BITS - 1) else value

    def real(self, c: list[Any]) -> float:
        return float(c[0])

    def hexfloat(self, c: list[Any]) -> s.FloatImmediate:
        return s.FloatImmediate(int(c[0][2:], 16), 32 if c[0][1] in "fF" else 64)

    def unary(self, c: list[Any]) -> Value:
        return _unary(c[0], _operand(c[1]))

    def cast(self, c: list[Any]) -> Value:
        return _typed(_integer(_operand(c[1])), str(c[0]) == ".u64")

    def constant(self, c: list[Any]) -> s.Immediate | s.FloatImmediate:
        value: Value = c[0]
        if isinstance(value, int):
            return s.Immediate(int(value))
        if isinstance(value, s.FloatImmediate):
            return value
        return s.FloatImmediate(int.from_bytes(struct.pack("<d", value), "little"), 64)

    def offset(self, c: list[Any]) -> int:
        """What follows a name: a number of bytes."""
        if not isinstance(c[0], s.Immediate):
            raise PtxError("an offset is an integer")
        return int(_typed(c[0].value, False))

    def binary(self, c: list[Any]) -> str:
        return str(c[0])

    unary_operator = binary

    def chain(self, c: list[Any]) -> Value:
        return _chain(c)

    def choice(self, c: list[Any]) -> Value:
        *condition, yes, no = c
        yes, no = _integer(_operand(yes)), _integer(_operand(no))
        unsigned = isinstance(yes, Unsigned) or isinstance(no, Unsigned)
        return _typed(yes if _integer(_chain(condition)) else no, unsigned)


def int_of(text: str) -> int:
    """The value of an integer literal."""
    text = text.rstrip("U")
    if text[:2] in ("0x", "0X"):
        return int(text, 16)
    if text[:2] in ("0b", "0B"):
        return int(text, 2)
    if len(text) == 1 or text[0] != "0":
        return int(text)
    if set(text) & set("89"):
        raise PtxError(f"`{text}` is no octal number")
    return int(text, 8)


def _operand(x: Value) -> int | float:
    """A value that takes part in an expression."""
    if isinstance(x, s.FloatImmediate):
        if x.width == 32:
            raise PtxError("a number in the notation of f32 takes part in no expression")
        return x.value
    return x


def _integer(x: int | float) -> int:
    if isinstance(x, float):
        raise PtxError("an integer is expected in a constant expression")
    return x


def _typed(value: int, unsigned: bool) -> int:
    """A value cut to 64 bits, as .u64 or .s64."""
    value &= (1 << _BITS) - 1
    if unsigned:
        return Unsigned(value)
    return value - (value >> (_BITS - 1) << _BITS)


def _unary(operator: str, x: int | float) -> int | float:
    if operator == "+":
        return x
    if operator == "-":
        return -x if isinstance(x, float) else _typed(-x, isinstance(x, Unsigned))
    if operator == "!":
        return int(not _integer(x))
    return _typed(~_integer(x), True)


def _chain(items: list[Any]) -> int | float:
    """Operands with operators between them, by precedence; equal ones from the left."""
    values, operators = [_operand(items[0])], list[str]()
    for operator, x in zip(items[1::2], items[2::2], strict=True):
        while operators and _PRECEDENCE[operators[-1]] >= _PRECEDENCE[operator]:
            _reduce(values, operators.pop())
        operators.append(operator)
        values.append(_operand(x))
    while operators:
        _reduce(values, operators.pop())
    return values[0]


def _reduce(values: list[int | float], operator: str) -> None:
    b, a = values.pop(), values.pop()
    values.append(_binary(operator, a, b))


def _binary(operator: str, a: int | float, b: int | float) -> int | float:
    if isinstance(a, float) and isinstance(b, float):
        return _floating(operator, a, b)
    a, b = _integer(a), _integer(b)
    if operator in ("<<", ">>"):
        by = b % _BITS
        return _typed(a << by if operator == "<<" else a >> by, isinstance(a, Unsigned))
    if operator in ("&&", "||"):
        return int(bool(a and b) if operator == "&&" else bool(a or b))
    unsigned = isinstance(a, Unsigned) or isinstance(b, Unsigned) or operator == "%"
    a, b = _typed(a, unsigned), _typed(b, unsigned)
    if operator in _COMPARISONS:
        return int(_COMPARISONS[operator](a, b))
    if operator in ("/", "%"):
        if not b:
            raise PtxError("a constant expression divides by zero")
        quotient = abs(a) // abs(b) * (1 if (a < 0) == (b < 0) else -1)
        return _typed(quotient if operator == "/" else a - quotient * b, unsigned)
    return _typed((_ARITHMETIC | _BITWISE)[operator](a, b), unsigned)


def _floating(operator: str, a: float, b: float) -> int | float:
    if operator in _COMPARISONS:
        return int(_COMPARISONS[operator](a, b))
    if operator in _ARITHMETIC:
        return float(_ARITHMETIC[operator](a, b))
    if operator != "/":
        raise PtxError(f"`{operator}` takes integers")
    if not b:
        raise PtxError("a constant expression divides by zero")
    return a / b
