"""Instructions by their shapes: how one is written, but for its names and numbers.

A kernel has thousands of instructions of some hundred shapes. The grammar reads the operands of a
shape once, with holes for what differs; instructions of that shape are then filled in.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from stagefuse.dsl.frozen import frozen

from . import syntax as s
from .constants import int_of
from .errors import PtxError

if TYPE_CHECKING:
    from .names import Resolve

_NAME = r"(?:%(?=[\w$])|[A-Za-z_$])[\w$]*(?:(?:\.|::)\w+)*"
_PIECES = re.compile(
    rf"(?:@(?P<negated>!?)(?P<guard>{_NAME})\s+)?(?P<name>{_NAME})(?P<operands>[^;]*;)"
    r"|\.loc(?P<loc>(?:[ \t]+\d+){3})|//[^\n]*"
)
_NAMES = re.compile(rf"(?<![\w.$%:])(?!WARP_SZ(?![\w$])){_NAME}")
_NUMBERS = re.compile(
    r"(?<![\w.$%])(?:0[fF][0-9a-fA-F]{8}|0[dD][0-9a-fA-F]{16}|0[xX][0-9a-fA-F]+U?|0[bB][01]+U?"
    r"|\d+U?)(?![\w.])"
)
_FILLED = re.compile(f"{_NAMES.pattern}|{_NUMBERS.pattern}")
_MARKS = re.compile("[?#]")
"""What outlines have for names and numbers: neither is in the text of an instruction whose
outline is made."""
_FLOAT_MARKS = ("0f", "0F", "0d", "0D")


class Unfit(Exception):
    """A shape whose numbers are part of an expression, which each instruction has to compute."""


@frozen
class Hole:
    """A place in a shape that an integer or float takes, by its number, or what it negates."""

    number: int
    negative: bool = False


Make = Callable[[Sequence[Any], "Resolve"], s.Operand]
"""An operand from what fills the holes."""


@frozen
class Shape:
    """Operands with holes. `numbers` are the holes of numbers: which one, whether what is there is
    negated, and whether it is the offset of an address."""

    operands: tuple[Make, ...]
    is_simple: bool
    """Whether each operand is a hole and nothing else."""
    numbers: tuple[tuple[int, bool, bool], ...]


@frozen
class Written:
    """An instruction by its shape, and what fills it."""

    opcode: str
    modifiers: tuple[str, ...]
    guard: tuple[str, bool] | None
    shape: Shape
    fillings: Sequence[Any]
    line: int

    def resolved(self, names: Resolve) -> s.Instruction:
        """The instruction, with the names that hold where it stands."""
        guard = None
        if self.guard is not None:
            guard = s.Guard(names.register(self.guard[0]), self.guard[1])
        if self.shape.is_simple:
            operands = names.simple(self.fillings)
        else:
            operands = tuple([make(self.fillings, names) for make in self.shape.operands])
        return s.Instruction(self.opcode, self.modifiers, operands, guard, self.line, names.loc)


def pieces(text: str) -> Iterator[re.Match[str]]:
    """The instructions, `.loc` lines and comments of a text that the grammar took as a whole."""
    return _PIECES.finditer(text)


def outline(operands: str) -> str:
    """What operands have in common with others of their shape."""
    return _NAMES.sub("?", _NUMBERS.sub("#", operands))


def with_holes(common: str) -> str:
    """An outline with its holes numbered: `%0` where a name belongs, `#1` where a number does."""
    count = iter(range(len(common)))
    return _MARKS.sub(lambda m: f"{'%' if m[0] == '?' else '#'}{next(count)}", common)


def fillings(operands: str, shape: Shape) -> list[Any] | None:
    """What stands in the holes of a shape, `None` where a number has to be computed."""
    found: list[Any] = _FILLED.findall(operands)
    for at, negative, is_offset in shape.numbers:
        value = _number(found[at], negative)
        if is_offset:
            if not isinstance(value, s.Immediate) or value.value >> 63 not in (0, -1):
                return None
            found[at] = value.value
        elif value is None:
            return None
        else:
            found[at] = value
    return found


@lru_cache(1 << 12)
def _number(text: str, negative: bool) -> s.Immediate | s.FloatImmediate | None:
    """A constant; `None` for one with a sign that an expression has to work out."""
    if text.startswith(_FLOAT_MARKS):
        bits = int(text[2:], 16)
        return None if negative else s.FloatImmediate(bits, 32 if text[1] in "fF" else 64)
    try:
        value = int_of(text)
    except PtxError:
        return None
    if negative and (text[-1] == "U" or value >> 63):
        return None
    return s.Immediate(-value if negative else value)


def shape_of(operands: Sequence[s.Operand]) -> Shape:
    """A shape from its operands as the grammar reads them, with holes in them.

    Raises: Unfit where one cannot be filled in.
    """
    numbers: list[tuple[int, bool, bool]] = []
    simple = all(isinstance(x, Hole) or isinstance(x, s.Symbol) and not x.offset for x in operands)
    return Shape(tuple(_make(x, numbers) for x in operands), simple, tuple(numbers))


def _make(x: Any, numbers: list[tuple[int, bool, bool]]) -> Make:
    match x:
        case Hole(number, negative):
            numbers.append((number, negative, False))
            return lambda filled, names: filled[number]
        case s.Symbol(name, 0):
            at = int(name[1:])
            return lambda filled, names: names.name(filled[at])
        case s.Symbol(name, offset):
            at, plus = int(name[1:]), _offset(offset, numbers)
            return lambda filled, names: names.symbol(filled[at], filled[plus])
        case s.Negated(register):
            at = int(register.name[1:])
            return lambda filled, names: s.Negated(names.register(filled[at]))
        case s.Vector(elements) | s.Arguments(elements):
            makes, kind = [_make(e, numbers) for e in elements], type(x)
            return lambda filled, names: kind(tuple([make(filled, names) for make in makes]))
        case s.Pair(first, second):
            one, two = _make(first, numbers), _make(second, numbers)
            return lambda filled, names: s.Pair(one(filled, names), two(filled, names))
        case s.Address():
            return _address(x, numbers)
        case _:
            raise Unfit


def _offset(x: Any, numbers: list[tuple[int, bool, bool]]) -> int:
    """The hole of an offset."""
    if not isinstance(x, Hole):
        raise Unfit
    numbers.append((x.number, x.negative, True))
    return x.number


def _address(x: s.Address, numbers: list[tuple[int, bool, bool]]) -> Make:
    base = _make(x.base, numbers)
    at = _offset(x.offset, numbers) if x.offset else None
    coordinates = [_make(c, numbers) for c in x.coordinates]

    def address(filled: Sequence[Any], names: Resolve) -> s.Operand:
        found = names.base(base(filled, names))
        rest = tuple([make(filled, names) for make in coordinates]) if coordinates else ()
        return s.Address(found, filled[at] if at is not None else 0, rest)

    return address
