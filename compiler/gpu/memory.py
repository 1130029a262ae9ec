"""Buffers and scratch arrays of a kernel, and the elements that a lane has at a time."""

from __future__ import annotations

from dataclasses import dataclass, field

from stagefuse.compiler.evaluate import Known
from stagefuse.dsl.dims import Expr
from stagefuse.dsl.dtypes import DType
from stagefuse.dsl.frozen import frozen

from .ir import Value

VECTOR_BYTES = 16
Scope = Known[Value]
"""What is computed already, in a part of the code."""
Place = tuple[Expr, Value | None]
"""The position of an element: an expression, and what is added to it from data."""


@dataclass
class Memory:
    """A buffer or scratch array: `start` is its address, or None if it lives in registers.

    `cells` are the registers, by the place of their element relative to the lane's first.
    """

    name: str
    dtype: DType
    shape: tuple[Expr, ...]
    space: str  # global, shared or registers
    start: Value | None = None
    constant: bool = False
    cells: dict[object, Value] = field(default_factory=dict)


@frozen
class Group:
    """Adjacent elements of one lane: index `name` is `first` + 0 .. width - 1, now `at`."""

    name: str
    first: Expr
    width: int
    at: int

    def part(self, size: int) -> Group:
        """The elements around this one that one access of elements of so many bytes can have."""
        most = VECTOR_BYTES // size
        if self.width <= most:
            return self
        begin = self.at // most * most
        return Group(self.name, self.first + begin, most, self.at - begin)


@dataclass
class Slot:
    """The elements that a lane handles at a time in a shared loop."""

    name: str
    first: Expr
    width: int
    scopes: list[Scope] = field(default_factory=list)
