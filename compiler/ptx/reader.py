"""PTX text to the syntax tree. The grammar is `ptx.lark`.

Reading checks syntax and that names of registers are declared; the instruction table says
whether an instruction exists (`check.py`).
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, lru_cache
from importlib.resources import files
from typing import Any

import lark
from lark.exceptions import UnexpectedCharacters, UnexpectedInput, UnexpectedToken, VisitError

from . import syntax as s
from .constants import Constants, int_of
from .errors import PtxError
from .initial import Initials, with_initial
from .names import Resolve, parts
from .shapes import Hole, Shape, Unfit, Written, fillings, outline, pieces, shape_of, with_holes
from .types import TYPES

SPACES = ("const", "global", "local", "param", "shared", "reg")
LINKAGE = ("visible", "extern", "weak", "common")


def read_module(text: str) -> s.Module:
    """The module that PTX text says.

    Raises: PtxError with the line where the text is no PTX.
    """
    module = _read(_parser(), text, "module")
    assert isinstance(module, s.Module)
    return module


def _read(parser: lark.Lark, text: str, start: str) -> Any:
    """What text says, from a rule of the grammar on."""
    try:
        return parser.parse(text, start=start)
    except UnexpectedToken as error:
        shown = error.token
        if shown.type == "RUN":  # an instruction where none may be
            shown = shown.split(None, 1)[0].rstrip(";")
        raise PtxError(f"unexpected `{shown}`", line=error.line) from None
    except UnexpectedCharacters as error:
        raise PtxError(f"unexpected character {error.char!r}", line=error.line) from None
    except UnexpectedInput as error:
        raise PtxError("unexpected end of the text", line=error.line or 0) from None
    except VisitError as error:
        if isinstance(error.orig_exc, PtxError):
            raise error.orig_exc from None
        raise


def _grammar() -> str:
    return files(__package__).joinpath("ptx.lark").read_text("utf-8")


@cache
def _parser() -> lark.Lark:
    starts = ["module", "instruction"]
    return lark.Lark(_grammar(), parser="lalr", start=starts, transformer=_Build())


@cache
def _shape_parser() -> lark.Lark:
    """Reads an instruction that has holes where others of its shape have other numbers."""
    grammar = _grammar() + "\n%extend unit: HOLE -> hole\nHOLE: /#\\d+/\n"
    return lark.Lark(grammar, parser="lalr", start="instruction", transformer=_BuildShape())


@lru_cache(1 << 14)
def _shape(is_call: bool, common: str) -> Shape | None:
    """The shape of operands by what they have in common, `None` where each is read by itself."""
    try:
        text = f"{'call' if is_call else 'any'} {with_holes(common)}"
        read: Any = _shape_parser().parse(text)
        return shape_of(read.operands)
    except (UnexpectedInput, VisitError, PtxError, Unfit):
        return None


def _instruction(piece: re.Match[str], line: int) -> s.Instruction | Written:
    """An instruction by its shape, or else as the grammar reads it."""
    name, operands = piece["name"], piece["operands"]
    shape = _shape(name in ("call", "call.uni"), outline(operands))
    filled = fillings(operands, shape) if shape is not None else None
    if shape is None or filled is None:
        try:
            read: s.Instruction = _read(_parser(), "\n" * (line - 1) + piece[0], "instruction")
        except PtxError as error:
            raise PtxError(error.message, line=error.line or line) from None
        return read
    if piece["guard"]:
        line += piece[0].count("\n", 0, piece.start("name") - piece.start())
    opcode, modifiers = _opcode(name)
    guard = (piece["guard"], piece["negated"] == "!") if piece["guard"] else None
    return Written(opcode, modifiers, guard, shape, filled, line)


@lru_cache(1 << 12)
def _opcode(name: str) -> tuple[str, tuple[str, ...]]:
    opcode, *modifiers = name.split(".")
    return opcode, tuple(modifiers)


class _Build(Constants, Initials, lark.Transformer[Any, Any]):
    """Builds records while Lark parses. Names are resolved when their function is complete."""

    # operands

    def name(self, c: list[Any]) -> s.Operand:
        return s.Symbol(c[0])

    def symbol_offset(self, c: list[Any]) -> s.Operand:
        return s.Symbol(c[0], c[1])

    def negated(self, c: list[Any]) -> s.Operand:
        return s.Negated(s.Register(c[0], "pred"))

    def vector(self, c: list[Any]) -> s.Operand:
        return s.Vector(tuple(c))

    def pair(self, c: list[Any]) -> s.Operand:
        return s.Pair(c[0], c[1])

    def arguments(self, c: list[Any]) -> s.Operand:
        return s.Arguments(tuple(x for x in c if x is not None))

    def base_name(self, c: list[Any]) -> s.Address:
        return s.Address(s.Symbol(c[0]), c[1] or 0)

    def address(self, c: list[Any]) -> s.Operand:
        base = c[0] if isinstance(c[0], s.Address) else s.Address(c[0])
        rest = tuple(x for x in c[1:] if x is not None)
        if len(rest) == 1 and isinstance(rest[0], s.Vector):
            rest = rest[0].elements
        return replace(base, coordinates=rest) if rest else base

    # statements

    def guard(self, c: list[Any]) -> s.Guard:
        return s.Guard(s.Register(c[0], "pred"))

    def guard_not(self, c: list[Any]) -> s.Guard:
        return s.Guard(s.Register(c[0], "pred"), True)

    def instruction(self, c: list[Any]) -> s.Instruction:
        opcode, *modifiers = c[1].split(".")
        operands = tuple(x for x in c[2:] if x is not None)
        return s.Instruction(opcode, tuple(modifiers), operands, c[0], c[1].line)

    call = instruction

    def run(self, c: list[Any]) -> list[s.Loc | s.Instruction | Written]:
        line, at, found = c[0].line, 0, list[s.Loc | s.Instruction | Written]()
        for one in pieces(c[0]):
            line += c[0].count("\n", at, one.start())
            at = one.start()
            if one["name"]:
                found.append(_instruction(one, line))
            elif one["loc"]:
                file, row, column = map(int_of, one["loc"].split())
                found.append(s.Loc(file, row, column))
        return found

    def label(self, c: list[Any]) -> s.Label:
        return s.Label(str(c[0]))

    def scope(self, c: list[Any]) -> s.Scope:
        return s.Scope(tuple(_flat(c)))

    def loc(self, c: list[Any]) -> s.Loc:
        rest = [str(x) for x in c[3:] if x is not None]
        text = ""
        if len(rest) == 4:
            text = f"{rest[0]} {' '.join(rest[1:])}"
        elif rest:
            name = rest[1] if len(rest) == 6 else f"{rest[1]}+{rest[2]}"
            text = f"{rest[0]} {name}, {' '.join(rest[-4:])}"
        return s.Loc(int_of(c[0]), int_of(c[1]), int_of(c[2]), text)

    def pragma(self, c: list[Any]) -> s.Pragma:
        return s.Pragma(tuple(str(x)[1:-1] for x in c))

    def targets(self, c: list[Any]) -> s.Targets:
        return s.Targets(str(c[0]), str(c[1])[1:], tuple(map(str, c[2:])))

    def prototype(self, c: list[Any]) -> s.Prototype:
        noreturn = any(x == ".noreturn" for x in c[4:])
        return s.Prototype(str(c[0]), c[1] or (), c[3] or (), noreturn)

    # declarations

    def attributes(self, c: list[Any]) -> list[Any]:
        return c

    def attribute(self, c: list[Any]) -> str:
        return str(c[0])[1:]

    def align(self, c: list[Any]) -> tuple[str, int]:
        return ("align", int_of(c[0]))

    def quality(self, c: list[Any]) -> str:
        return str(c[0])

    def attribute_list(self, c: list[Any]) -> tuple[str, int]:
        return ("attribute", 0)

    def dimension(self, c: list[Any]) -> tuple[int]:
        return (0 if c[0] is None else int_of(c[0]),)

    def variables(self, c: list[Any]) -> list[s.Variable]:
        return [
            with_initial(_variable(c[0], name, shape), values, name.line)
            for name, shape, values in c[1:]
        ]

    def variable(self, c: list[Any]) -> tuple[Any, ...]:
        shape = tuple(x[0] for x in c[1:] if isinstance(x, tuple))
        return c[0], shape, c[-1] if c[1:] and not isinstance(c[-1], tuple) else None

    def parameter(self, c: list[Any]) -> s.Variable:
        return _variable(c[0], c[1], tuple(x[0] for x in c[2:]))

    def register_parameter(self, c: list[Any]) -> s.Variable:
        return _variable(["reg", *c[0]], c[1], ())

    def parameters(self, c: list[Any]) -> tuple[s.Variable, ...]:
        return tuple(x for x in c if x is not None)

    def register_name(self, c: list[Any]) -> tuple[str, int | None]:
        return (str(c[0]), None if c[1] is None else int_of(c[1]))

    def registers(self, c: list[Any]) -> s.Registers:
        (kind,) = [x for x in c[0] if isinstance(x, str) and x in TYPES]
        if count := 4 * ("v4" in c[0]) or 2 * ("v2" in c[0]):
            return s.Registers(kind, tuple(_vectors(c[1:], count)))
        return s.Registers(kind, tuple(c[1:]))

    # functions and the module

    def directive(self, c: list[Any]) -> tuple[str, tuple[Any, ...]]:
        values = (x for x in c[1:] if x is not None)
        return (str(c[0])[1:], tuple(int_of(x) if x[0].isdigit() else str(x) for x in values))

    def header_pragma(self, c: list[Any]) -> tuple[str, tuple[Any, ...]]:
        return ("pragma", c[0].texts)

    def body(self, c: list[Any]) -> list[Any]:
        return _flat(c)

    def entry(self, c: list[Any]) -> s.Function:
        return _function(c[0], c[1], None, c[2], c[3:], True)

    def func(self, c: list[Any]) -> s.Function:
        return _function(c[0], c[2], c[1], c[3], c[4:], False)

    def version(self, c: list[Any]) -> tuple[str, Any]:
        major, minor = c[0].split(".")
        return ("version", (int(major), int(minor)))

    def target(self, c: list[Any]) -> tuple[str, Any]:
        return ("target", tuple(map(str, c)))

    def alias(self, c: list[Any]) -> tuple[str, Any]:
        return ("alias", (str(c[0]), str(c[1])))

    def address_size(self, c: list[Any]) -> tuple[str, Any]:
        return ("address_size", int_of(c[0]))

    def file(self, c: list[Any]) -> tuple[str, Any]:
        return ("file", (int_of(c[0]), str(c[1])[1:-1]))

    def section(self, c: list[Any]) -> s.Section:
        lines: list[str] = []
        for text in c[1:]:
            if text[0] == "." or not lines:
                lines.append("")
            lines[-1] += f"{text} "
        return s.Section(str(c[0])[1:], "\n".join(line.rstrip() for line in lines))

    def section_item(self, c: list[Any]) -> str:
        return str(c[0])

    def module(self, c: list[Any]) -> s.Module:
        named = [x for x in c if isinstance(x, tuple)]
        found: dict[str, Any] = dict(named)
        if "version" not in found or "target" not in found:
            raise PtxError("no .version or no .target", line=1)
        return s.Module(
            found["version"],
            found["target"],
            found.get("address_size", 64),
            tuple(x for x in _flat(c) if isinstance(x, s.Variable)),
            tuple(x for x in c if isinstance(x, s.Function)),
            tuple(value for key, value in named if key == "file"),
            tuple(x for x in c if isinstance(x, s.Section)),
            aliases=tuple(value for key, value in named if key == "alias"),
        )


class _BuildShape(_Build):
    """As `_Build`, with holes for numbers."""

    def hole(self, c: list[Any]) -> Any:
        return Hole(int(c[0][1:]))

    def unary(self, c: list[Any]) -> Any:
        if not isinstance(c[1], Hole):
            return super().unary(c)
        if c[0] not in "+-" or c[1].negative:
            raise Unfit
        return Hole(c[1].number, c[0] == "-")

    def constant(self, c: list[Any]) -> Any:
        return c[0] if isinstance(c[0], Hole) else super().constant(c)

    def offset(self, c: list[Any]) -> Any:
        return c[0] if isinstance(c[0], Hole) else super().offset(c)

    def chain(self, c: list[Any]) -> Any:
        raise Unfit

    cast = choice = chain


def _vectors(names: list[tuple[str, int | None]], count: int) -> Iterator[tuple[str, None]]:
    """Declarations of the registers of vectors."""
    for name, number in names:
        for vector in [name] if number is None else [f"{name}{i}" for i in range(number)]:
            yield from ((part, None) for part in parts(vector, count))


def _flat(items: list[Any]) -> list[Any]:
    """Items in order, with those of lists one by one."""
    return [y for x in items for y in (x if isinstance(x, list) else [x])]


def _variable(attributes: list[Any], name: Any, shape: tuple[int, ...]) -> s.Variable:
    """A variable or parameter from its attributes, in the order in which they stand."""
    space, kind, align, vector = "", "", None, 1
    linkage: list[str] = []
    pointer: list[str] = []
    for at in attributes:
        if isinstance(at, tuple):
            if at[0] == "align" and pointer:
                pointer += ["align", str(at[1])]
            elif at[0] == "align":
                align = at[1]
        elif at == "ptr":
            pointer.append(at)
        elif pointer:
            pointer.append(at)
        elif at in SPACES:
            space = at
        elif at in TYPES:
            kind = at
        elif at in ("v2", "v4"):
            vector = int(at[1:])
        elif at in LINKAGE:
            linkage.append(at)
        else:
            raise PtxError(f"`.{at}` does not belong to a variable", line=name.line)
    if not kind:
        raise PtxError(f"`{name}` has no type", line=name.line)
    return s.Variable(
        space, kind, str(name), shape, align, vector, (), tuple(linkage), tuple(pointer)
    )


def _function(
    attributes: list[Any], name: Any, results: Any, parameters: Any, rest: list[Any], entry: bool
) -> s.Function:
    """A function whose names are resolved."""
    body = rest[-1] if rest and isinstance(rest[-1], list) else None
    directives = tuple(x for x in rest if isinstance(x, tuple))
    function = s.Function(
        str(name), entry, parameters or (), results or (), directives, None, tuple(attributes),
        name.line,
    )  # fmt: skip
    if body is None:
        return function
    declared = {v.name: v.type for v in (*function.parameters, *function.results)
                if v.space == "reg"}  # fmt: skip
    return replace(function, body=Resolve(declared).body(body))
