"""The syntax tree of a PTX module: frozen records, as read, built and printed.

Line numbers and source positions take no part in comparisons.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Register:
    """A register by name; `type` is the one it was declared with."""

    name: str
    type: str


@dataclass(frozen=True, slots=True)
class Special:
    """A special register, such as `%tid.x`."""

    name: str


@dataclass(frozen=True, slots=True)
class Symbol:
    """A variable, function or label by name, and a number of bytes after it."""

    name: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class Immediate:
    """An integer constant."""

    value: int


@dataclass(frozen=True, slots=True)
class FloatImmediate:
    """A floating-point constant by its bits, `width` of them (32 or 64)."""

    bits: int
    width: int = 32

    @property
    def value(self) -> float:
        code, size = ("<f", 4) if self.width == 32 else ("<d", 8)
        return float(struct.unpack(code, self.bits.to_bytes(size, "little"))[0])


@dataclass(frozen=True, slots=True)
class Negated:
    """A predicate operand that is inverted: `!p`."""

    register: Register


@dataclass(frozen=True, slots=True)
class Vector:
    """A vector of operands: `{a, b}`."""

    elements: tuple[Operand, ...]


@dataclass(frozen=True, slots=True)
class Pair:
    """Two results: `d|p`."""

    first: Operand
    second: Operand


@dataclass(frozen=True, slots=True)
class Sink:
    """A result that nothing reads: `_`."""


@dataclass(frozen=True, slots=True)
class Address:
    """`[base + offset]`, or `[base, {coordinates}]` of a tensor."""

    base: Register | Symbol | Immediate
    offset: int = 0
    coordinates: tuple[Operand, ...] = ()


@dataclass(frozen=True, slots=True)
class Arguments:
    """The parenthesised list of a call."""

    elements: tuple[Operand, ...]


Operand = (
    Register
    | Special
    | Symbol
    | Immediate
    | FloatImmediate
    | Negated
    | Vector
    | Pair
    | Sink
    | Address
    | Arguments
)


def leaves(x: Operand | None) -> Iterator[Operand]:
    """The registers, names and constants in an operand, in order."""
    match x:
        case None:
            return
        case Negated(register):
            yield register
        case Vector(elements) | Arguments(elements):
            for element in elements:
                yield from leaves(element)
        case Pair(first, second):
            yield from leaves(first)
            yield from leaves(second)
        case Address(base, _, coordinates):
            yield base
            for element in coordinates:
                yield from leaves(element)
        case _:
            yield x


@dataclass(frozen=True, slots=True)
class Loc:
    """A `.loc` line: the source position of what follows. `inlined` keeps the rest as written."""

    file: int
    line: int
    column: int = 0
    inlined: str = ""


@dataclass(frozen=True, slots=True)
class Guard:
    """`@p` or `@!p`."""

    register: Register
    negated: bool = False


@dataclass(frozen=True, slots=True)
class Instruction:
    """One instruction: `add.rn.f32 d, a, b` has the opcode `add`, modifiers `rn` and `f32`."""

    opcode: str
    modifiers: tuple[str, ...]
    operands: tuple[Operand, ...] = ()
    guard: Guard | None = None
    line: int = field(default=0, compare=False)
    loc: Loc | None = field(default=None, compare=False)

    @property
    def name(self) -> str:
        """The opcode with its modifiers, as it is written."""
        return ".".join((self.opcode, *self.modifiers))


@dataclass(frozen=True, slots=True)
class Label:
    name: str


@dataclass(frozen=True, slots=True)
class Comment:
    text: str


@dataclass(frozen=True, slots=True)
class Registers:
    """`.reg`: names of one type; a count stands for `name0` to `name(count-1)`."""

    type: str
    names: tuple[tuple[str, int | None], ...]


@dataclass(frozen=True, slots=True)
class Variable:
    """A variable or parameter: its space, element type, sizes, and initial values.

    A size of 0 is an array whose size is not said (`extern .shared .b8 x[]`).
    """

    space: str
    type: str
    name: str
    shape: tuple[int, ...] = ()
    align: int | None = None
    vector: int = 1
    initial: tuple[Initial, ...] = ()
    linkage: tuple[str, ...] = ()
    pointer: tuple[str, ...] = ()
    """For a parameter: `("ptr", "global", "align", "16")`, what it points to."""


@dataclass(frozen=True, slots=True)
class GenericOf:
    """`generic(name)` in an initial value: the generic address of a variable."""

    name: str
    offset: int = 0


@dataclass(frozen=True, slots=True)
class ByteOf:
    """`0xFF00(name)` in an initial value: byte `number` of an address, the lowest being 0."""

    address: Symbol | GenericOf
    number: int


Initial = Immediate | FloatImmediate | Symbol | GenericOf | ByteOf


@dataclass(frozen=True, slots=True)
class Targets:
    """`.branchtargets` or `.calltargets` of a label."""

    name: str
    kind: str
    labels: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Prototype:
    """`.callprototype`: the shape of a function that is called through a pointer."""

    name: str
    results: tuple[Variable, ...]
    parameters: tuple[Variable, ...]
    noreturn: bool = False


@dataclass(frozen=True, slots=True)
class Pragma:
    texts: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Scope:
    """A block in braces; its names are its own."""

    body: tuple[Statement, ...]


Statement = (
    Instruction
    | Label
    | Comment
    | Registers
    | Variable
    | Loc
    | Targets
    | Prototype
    | Pragma
    | Scope
)


@dataclass(frozen=True, slots=True)
class Function:
    """An entry or a device function; `body` is `None` for a declaration."""

    name: str
    is_entry: bool
    parameters: tuple[Variable, ...] = ()
    results: tuple[Variable, ...] = ()
    directives: tuple[tuple[str, tuple[int | str, ...]], ...] = ()
    body: tuple[Statement, ...] | None = None
    linkage: tuple[str, ...] = ()
    line: int = field(default=0, compare=False)

    def directive(self, name: str) -> tuple[int | str, ...] | None:
        """The values of a directive such as `reqntid`, or `None` where it is missing."""
        return next((values for key, values in self.directives if key == name), None)


@dataclass(frozen=True, slots=True)
class Section:
    """A `.section` of debug information, kept as it was written."""

    name: str
    text: str


@dataclass(frozen=True, slots=True)
class Module:
    """A PTX module. `files` are the numbers and names of `.file`."""

    version: tuple[int, int]
    target: tuple[str, ...]
    address_size: int = 64
    variables: tuple[Variable, ...] = ()
    functions: tuple[Function, ...] = ()
    files: tuple[tuple[int, str], ...] = ()
    sections: tuple[Section, ...] = ()
    comments: tuple[str, ...] = ()
    aliases: tuple[tuple[str, str], ...] = ()
    """Names of functions, and the functions that they stand for."""

    def function(self, name: str) -> Function | None:
        """The definition of a function, else its declaration."""
        found = [f for f in self.functions if f.name == name]
        return next((f for f in found if f.body is not None), found[0] if found else None)

    def file(self, number: int) -> str:
        """The name of a source file by its number in `.loc`."""
        return dict(self.files).get(number, "")
