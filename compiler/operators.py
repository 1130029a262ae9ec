"""The operators of a value that is written as instructions, for every writer of code alike.

Formulas over scalars are written once with them, for LLVM IR (`cpu.ir`) and PTX (`gpu.ir`).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Self, TypeVar

FLOATS = frozenset(("half", "bfloat", "float", "double"))
BITS = {
    "half": 16, "bfloat": 16, "float": 32, "double": 64,
    "i1": 1, "i8": 8, "i16": 16, "i32": 32, "i64": 64,
}  # fmt: skip


def integer_of(kind: str) -> str:
    """The integer type as wide as a type."""
    return f"i{BITS[kind]}"


class Operators(ABC):
    """A typed value of a function being written; its operators write instructions.

    A number beside it becomes a constant of its type. Types have LLVM's names.
    """

    __slots__ = ()
    type: str

    @property
    def is_float(self) -> bool:
        return self.type in FLOATS

    @abstractmethod
    def binary(self, op: str, other: Self | int | float, swap: bool = False) -> Self:
        """add, sub, mul, div, and on integers and, or, xor, shl, lshr, ashr: of this value and
        the other, or the other way round."""

    @abstractmethod
    def to(self, word: str, kind: str) -> Self:
        """A conversion named as LLVM's, such as trunc or bitcast; itself if of that type."""

    @abstractmethod
    def compare(self, relation: str, other: Self | int | float, unsigned: bool = False) -> Self:
        """Relation eq ne lt le gt ge, an i1; on floats false on NaN, but for ne."""

    @abstractmethod
    def select(self, yes: Self, no: Self | int | float) -> Self:
        """This bit chooses between two values."""

    def __add__(self, other: Self | int | float) -> Self:
        return self.binary("add", other)

    def __radd__(self, other: Self | int | float) -> Self:
        return self.binary("add", other, swap=True)

    def __sub__(self, other: Self | int | float) -> Self:
        return self.binary("sub", other)

    def __rsub__(self, other: Self | int | float) -> Self:
        return self.binary("sub", other, swap=True)

    def __mul__(self, other: Self | int | float) -> Self:
        return self.binary("mul", other)

    def __rmul__(self, other: Self | int | float) -> Self:
        return self.binary("mul", other, swap=True)

    def __truediv__(self, other: Self | int | float) -> Self:
        return self.binary("div", other)

    def __rtruediv__(self, other: Self | int | float) -> Self:
        return self.binary("div", other, swap=True)

    def __and__(self, other: Self | int | float) -> Self:
        return self.binary("and", other)

    def __or__(self, other: Self | int | float) -> Self:
        return self.binary("or", other)

    def __xor__(self, other: Self | int | float) -> Self:
        return self.binary("xor", other)

    def shl(self, other: Self | int | float) -> Self:
        return self.binary("shl", other)

    def lshr(self, other: Self | int | float) -> Self:
        return self.binary("lshr", other)

    def ashr(self, other: Self | int | float) -> Self:
        return self.binary("ashr", other)

    def bits(self) -> Self:
        """The bit pattern as an integer."""
        return self.to("bitcast", integer_of(self.type))

    def as_float(self, kind: str) -> Self:
        """The float with this bit pattern."""
        return self.to("bitcast", kind)


Typed = TypeVar("Typed", bound=Operators)

POWERS = (1.0, 2.0, 3.0, 4.0, -1.0)
"""Exponents of `power_by_products`."""


def power_by_products(x: Typed, exponent: float) -> Typed:
    """A float to one of `POWERS`."""
    if exponent == -1.0:
        return 1.0 / x
    if exponent == 1.0:
        return x
    square = x * x
    if exponent == 3.0:
        return square * x
    return square if exponent == 2.0 else square * square


def unsigned_power(x: Typed, y: Typed, power: Callable[[Typed, Typed], Typed]) -> Typed:
    """A power of 64 bits by one of half the exponent, which is not negative."""
    half = power(x, y.lshr(1))
    return half * half * (y & 1).compare("ne", 0).select(x, 1)
