"""How records are written in the text of an IR: one line form per dataclass, printed and read.

A record class declares its form in `FORM`: a keyword and literal words, with `{field}` where a
field stands and `[[ ... ]]` around a part left out while its fields have their defaults. A class
without one is written as its name and `field=value` for every field that is not its default. What
a field looks like follows from its annotation (`CODECS`), or from a codec named after a colon:
`{guard:nonneg}`.
"""

from __future__ import annotations

import dataclasses
import json
import re
import typing
from collections.abc import Callable, Mapping
from typing import Any

from stagefuse.dsl.dims import Expr
from stagefuse.dsl.dims_text import parse_tokens
from stagefuse.dsl.dtypes import DTYPES, DType
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.types import TensorType

from .errors import IRTextError

TOKEN = re.compile(
    r'\s*(?:("(?:[^"\\]|\\.)*")|(%\d+(?:\.\d+)?)|(\$\w+(?:\.\w+)?|@\w+)'
    r"|(\d+(?:\.\d+)?(?:e[-+]?\d+)?)|([A-Za-z_][\w$]*(?:\.\w+)*)"
    r"|(->|\.\.=|\.\.|//|>=|[-+*%(),:=\[\]{}<>]))",
    re.ASCII,
)
NAME = re.compile(r"[A-Za-z_][\w$]*(?:\.\w+)*", re.ASCII)


def tokens_of(text: str, line: int = 0) -> list[str]:
    """The tokens of a line without its comment. Raises IRTextError."""
    found: list[str] = []
    at, end = 0, len(text)
    while at < end:
        rest = text[at:].lstrip()
        if not rest or rest.startswith("#"):
            break
        match = TOKEN.match(text, at)
        if match is None:
            raise IRTextError(f"`{rest[:20]}` is no token", line)
        found.append(match.group().strip())
        at = match.end()
    return found


class Reader:
    """The tokens of one line, taken from left to right."""

    def __init__(self, text: str, line: int) -> None:
        self.line = line
        self.tokens = tokens_of(text, line)
        self.at = 0

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self) -> str:
        token = self.peek()
        self.at += 1
        return token

    def accept(self, token: str) -> bool:
        if self.peek() != token:
            return False
        self.at += 1
        return True

    def expect(self, *tokens: str) -> None:
        for token in tokens:
            if not self.accept(token):
                self.fail(f"expected `{token}`, found {self.found()}")

    def found(self) -> str:
        return f"`{self.peek()}`" if self.peek() else "the end of the line"

    def fail(self, message: str) -> typing.NoReturn:
        raise IRTextError(message, self.line)

    def end(self) -> None:
        if self.peek():
            self.fail(f"`{self.peek()}` follows the end")

    def name(self) -> str:
        if not NAME.fullmatch(self.peek()):
            self.fail(f"expected a name, found {self.found()}")
        return self.take()

    def integer(self) -> int:
        sign = -1 if self.accept("-") else 1
        if not self.peek().isdecimal() or len(self.peek()) > 4000:
            self.fail(f"expected a whole number, found {self.found()}")
        return sign * int(self.take())

    def expr(self) -> Expr:
        try:
            expr, taken = parse_tokens(self.tokens[self.at :])
        except ValueError:
            self.fail(f"expected a dimension expression at {self.found()}")
        self.at += taken
        return expr

    def list_of(self, item: Callable[[], Any], opening: str, closing: str) -> tuple[Any, ...]:
        """Items with commas between, in brackets."""
        self.expect(opening)
        items: list[Any] = []
        while not self.accept(closing):
            if items:
                self.expect(",")
            items.append(item())
        return tuple(items)


def write_number(value: float | int | bool) -> str:
    """A number that reads back with its type: `true`, `3`, `3.0`, `-inf`, `nan`."""
    return str(value).lower() if isinstance(value, bool) else repr(value)


def read_number(reader: Reader) -> float | int | bool:
    negative = reader.accept("-")
    token = reader.take()
    if token in ("true", "false") and not negative:
        return token == "true"
    if not re.fullmatch(r"inf|nan|\d+(\.\d+)?(e[-+]?\d+)?", token) or len(token) > 4000:
        reader.fail(f"expected a number, found `{token}`")
    value = int(token) if token.isdecimal() else float(token)
    return -value if negative else value


def write_str(value: str) -> str:
    return value if NAME.fullmatch(value) else json.dumps(value)


def read_str(reader: Reader) -> str:
    if not reader.peek().startswith('"'):
        return reader.name()
    try:
        return str(json.loads(reader.take()))
    except ValueError:
        reader.fail("this text has an escape that JSON does not know")


def read_dtype(reader: Reader) -> DType:
    name = reader.take()
    if name not in DTYPES:
        reader.fail(f"`{name}` is no dtype")
    return DTYPES[name]


def read_type(reader: Reader) -> TensorType:
    """`f32[B, 384]`, or `f32` for a scalar."""
    dtype = read_dtype(reader)
    shape = reader.list_of(reader.expr, "[", "]") if reader.peek() == "[" else ()
    return TensorType(dtype, shape)


def read_bool(reader: Reader) -> bool:
    if reader.peek() not in ("true", "false"):
        reader.fail(f"expected true or false, found {reader.found()}")
    return reader.take() == "true"


def _write_nonneg(guards: tuple[Expr, ...], env: Any) -> str:
    return " and ".join(f"{g} >= 0" for g in guards)


def _read_nonneg(reader: Reader, env: Any) -> tuple[Expr, ...]:
    guards: list[Expr] = []
    while not guards or reader.accept("and"):
        guards.append(reader.expr())
        reader.expect(">=", "0")
    return tuple(guards)


@frozen
class Codec:
    """How values of one type are written and read; `env` is whatever the caller passes on."""

    write: Callable[[Any, Any], str]
    read: Callable[[Reader, Any], Any]


def plain(write: Callable[[Any], str], read: Callable[[Reader], Any]) -> Codec:
    return Codec(lambda value, env: write(value), lambda reader, env: read(reader))


def listed(item: Codec, opening: str = "[", closing: str = "]") -> Codec:
    """A tuple in brackets."""
    return Codec(
        lambda values, env: opening + ", ".join(item.write(v, env) for v in values) + closing,
        lambda reader, env: reader.list_of(lambda: item.read(reader, env), opening, closing),
    )


INTEGER = plain(str, Reader.integer)
EXPR = plain(str, Reader.expr)
STR = plain(write_str, read_str)
CODECS: dict[Any, Codec] = {
    str: STR,
    int: INTEGER,
    bool: plain(write_number, read_bool),
    float | int | bool: plain(write_number, read_number),
    Expr: EXPR,
    Expr | None: EXPR,
    DType: plain(str, read_dtype),
    tuple[int, ...]: listed(INTEGER),
    tuple[str, ...]: listed(STR, "(", ")"),
    tuple[Expr, ...]: listed(EXPR),
}
"""Codecs by the annotation of a field; an IR adds those of its own types."""
NAMED = {"nonneg": Codec(_write_nonneg, _read_nonneg)}


@frozen
class _Part:
    """A piece of a form: literal words, a field, or an optional group."""

    literal: tuple[str, ...] = ()
    text: str = ""
    field: str = ""
    codec: Codec | None = None
    flag: bool = False
    group: tuple[_Part, ...] = ()

    def fields(self) -> tuple[str, ...]:
        inside = tuple(name for part in self.group for name in part.fields())
        return (self.field, *inside) if self.field else inside


@frozen
class Form:
    """The line form of a record class."""

    cls: type
    keyword: str
    parts: tuple[_Part, ...]
    defaults: Mapping[str, str]

    def write(self, record: Any, env: Any = None) -> str:
        return self._write(self.parts, record, env)

    def _write(self, parts: tuple[_Part, ...], record: Any, env: Any) -> str:
        return "".join(self._write_part(part, record, env) for part in parts)

    def _write_part(self, part: _Part, record: Any, env: Any) -> str:
        if part.group:
            plain = all(self.defaults.get(n) == repr(getattr(record, n)) for n in part.fields())
            return "" if plain else self._write(part.group, record, env)
        if part.flag:
            return part.field
        if part.codec is not None:
            return part.codec.write(getattr(record, part.field), env)
        return part.text

    def read(self, reader: Reader, env: Any = None, **given: Any) -> Any:
        """The record; `given` are fields that the form leaves to the caller."""
        found = dict(given)
        self._read(self.parts, reader, env, found)
        return self.cls(**found)

    def _read(
        self, parts: tuple[_Part, ...], reader: Reader, env: Any, found: dict[str, Any]
    ) -> None:
        for part in parts:
            if part.group:
                first = next(p for p in part.group if p.literal or p.flag)
                if reader.peek() == (first.field if first.flag else first.literal[0]):
                    self._read(part.group, reader, env, found)
            elif part.flag:
                reader.expect(part.field)
                found[part.field] = True
            elif part.codec is not None:
                found[part.field] = part.codec.read(reader, env)
            else:
                reader.expect(*part.literal)


def form_of(cls: type) -> Form:
    """The form that a class declares, or the one that follows from its fields."""
    if cls not in _FORMS:
        _FORMS[cls] = _made_form(cls)
    return _FORMS[cls]


_FORMS: dict[type, Form] = {}


def _made_form(cls: type) -> Form:
    fields = dataclasses.fields(cls)
    hints = typing.get_type_hints(cls)
    spec = cls.__dict__.get("FORM") or _plain_spec(cls)
    defaults = {f.name: repr(f.default) for f in fields if f.default is not dataclasses.MISSING}
    parts = _parts(spec, hints)
    return Form(cls, parts[0].literal[0], parts, defaults)


def _plain_spec(cls: type) -> str:
    """The class's name in words, and `field=value` for each field, defaults left out."""
    spec = re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower()
    for field in dataclasses.fields(cls):
        pair = f" {field.name}={{{field.name}}}"
        spec += pair if field.default is dataclasses.MISSING else f"[[{pair}]]"
    return spec


_PIECE = re.compile(r"\[\[(.*?)\]\]|\{(\w+)(?::(\w+))?\}|((?:(?!\[\[)[^{])+)", re.DOTALL)


def _parts(spec: str, hints: Mapping[str, Any]) -> tuple[_Part, ...]:
    found: list[_Part] = []
    for group, field, named, literal in _PIECE.findall(spec):
        if group:
            found.append(_Part(group=_parts(group, hints)))
        elif field and named == "flag":
            found.append(_Part(field=field, flag=True))
        elif field:
            codec = NAMED[named] if named else CODECS[hints[field]]
            found.append(_Part(field=field, codec=codec))
        else:
            found.append(_Part(literal=tuple(tokens_of(literal)), text=literal))
    return tuple(found)
