"""A kernel as text: loops by indentation, one statement a line, printed and read back.

    stagefuse kernel 1
    kernel k_2f1d0c9a7b for softmax
    buffer b0 : in f32[B, T]
    buffer b1 : out f32[B, T]
    dims B T
    parallel d0 in B
    fold r1 = max over (f1 in T) : f32 of b0.f32[d0, f1]
    for d1 in 0..T vector
      %0 = sub.f32(b0.f32[d0, d1], $r1.f32)
      store b1[d0, d1] = exp.f32(%0)

Statements have the form that their class declares. Values: `f32(0.5)` a constant, `index(d0 + 1)`
an index expression, `$r1.f32` a bound scalar, `b0.f32[d0, {value} if guard, guard else 0.0]` a
load (the stored dtype; a position that is no index expression stands in braces), `add.f32(a, b)`
an operation, `round_to.f32<bf16>(a)` one with a storage dtype, `checked(value of T at 0)` a
position read from data. `%0 = value` names a value for the lines below, since values are shared;
it is no statement.
"""

from __future__ import annotations

import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields

from stagefuse.dsl.dims import Expr, const
from stagefuse.dsl.dtypes import DTYPES

from .cpu.values import Unique, parts, post_order
from .errors import IRTextError
from .kernel_ir import (
    Buffer,
    Checked,
    Const,
    Index,
    Kernel,
    Load,
    Local,
    Op,
    Operand,
    Statement,
    Value,
)
from .text_form import (
    CODECS,
    EXPR,
    NAMED,
    STR,
    Codec,
    Form,
    Reader,
    form_of,
    listed,
    read_dtype,
    read_number,
    write_number,
    write_str,
)

FIRST_LINE = "stagefuse kernel 1"
DEPTH = 6
"""A value nested deeper than this gets a name, as one used twice does."""


def print_kernel(kernel: Kernel) -> str:
    """The kernel's text."""
    label = f" for {write_str(kernel.label)}" if kernel.label else ""
    lines = [FIRST_LINE, f"kernel {write_str(kernel.name)}{label}"]
    lines.extend(form_of(Buffer).write(b) for b in kernel.buffers)
    lines.append(" ".join(["dims", *kernel.dims]))
    if kernel.guarded:
        lines.append("guarded")
    lines.extend(f"parallel {name} in {extent}" for name, extent in kernel.parallel)
    lines.extend(print_statements(kernel.body))
    return "\n".join(lines) + "\n"


def print_statements(body: Sequence[Statement]) -> list[str]:
    """The lines of statements."""
    names = _Names()
    names.count(body)
    return names.lines(body, "")


def print_statement(statement: Statement) -> str:
    """A statement without its body, values written out to a small depth."""
    head = form_of(type(statement)).write(statement, _Names())
    return head if len(head) <= 300 else f"{head[:300]} ..."


def values_of(statement: Statement) -> tuple[Value, ...]:
    """The values that a statement itself reads."""
    found: list[Value] = []
    for f in fields(statement):
        value = getattr(statement, f.name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, Const | Index | Load | Op | Local | Checked):
                found.append(item)
    return tuple(found)


def bodies_of(statement: Statement) -> tuple[Statement, ...]:
    """The statements inside one."""
    body: tuple[Statement, ...] = getattr(statement, "body", ())
    return body


@dataclass
class _Names:
    """Names of shared values while printing."""

    unique: Unique = field(default_factory=Unique)
    uses: dict[int, int] = field(default_factory=dict)
    depth: dict[int, int] = field(default_factory=dict)
    named: dict[int, str] = field(default_factory=dict)
    fresh: int = 0

    def count(self, body: Sequence[Statement]) -> None:
        """Counts in how many places each value stands."""
        for statement in body:
            for root in values_of(statement):
                self._count(self.unique(root))
            self.count(bodies_of(statement))

    def _count(self, root: Value) -> None:
        for value in post_order(root):
            if id(value) not in self.uses:
                self.uses[id(value)] = 0
                for part in parts(value):
                    self.uses[id(part)] += 1
        self.uses[id(root)] += 1

    def lines(self, body: Sequence[Statement], indent: str) -> list[str]:
        """Lines of a block; names given inside end with it."""
        outside = dict(self.named)
        found: list[str] = []
        for statement in body:
            for root in values_of(statement):
                found.extend(indent + line for line in self._definitions(self.unique(root)))
            found.append(indent + form_of(type(statement)).write(statement, self))
            found.extend(self.lines(bodies_of(statement), indent + "  "))
        self.named = outside
        return found

    def _definitions(self, root: Value) -> list[str]:
        found: list[str] = []
        for value in post_order(root):
            if id(value) in self.named:
                continue
            deep = 1 + max((self.depth.get(id(p), 0) for p in parts(value)), default=0)
            self.depth[id(value)] = deep
            leaf = isinstance(value, Const | Index | Local)
            shared = self.uses.get(id(value), 0) > 1 and not leaf
            if value is not root and (shared or deep > DEPTH):
                text = self.text(value)
                self.named[id(value)] = f"%{self.fresh}"
                self.fresh += 1
                self.depth[id(value)] = 0
                found.append(f"{self.named[id(value)]} = {text}")
        return found

    def text(self, value: Value, depth: int = 0) -> str:
        value = self.unique(value)
        if id(value) in self.named:
            return self.named[id(value)]
        if depth > 2 * DEPTH:
            return "..."
        return _write_one(value, lambda v: self.text(v, depth + 1))


def _write_one(value: Value, inner: Callable[[Value], str]) -> str:
    if isinstance(value, Const):
        return f"{value.dtype}({write_number(value.value)})"
    if isinstance(value, Index):
        return f"index({value.expr})"
    if isinstance(value, Local):
        return f"${value.name}.{value.dtype}"
    if isinstance(value, Op):
        to = "" if value.to is None else f"<{value.to}>"
        return f"{value.fn}.{value.dtype}{to}({', '.join(map(inner, value.args))})"
    if isinstance(value, Checked):
        word = "proved" if value.proved else "checked"
        length = "" if value.length == const(1) else f" for {value.length}"
        return f"{word}({inner(value.value)} of {value.extent}{length} at {value.site})"
    guard = ""
    if value.guard or repr(value.fill) != "0":
        guard = f" if {', '.join(map(inner, value.guard))} else {write_number(value.fill)}"
    return f"{value.buffer}.{value.stored}[{_write_places(value.indices, inner)}{guard}]"


def _write_places(places: Sequence[Value], inner: Callable[[Value], str]) -> str:
    return ", ".join(str(p.expr) if isinstance(p, Index) else f"{{{inner(p)}}}" for p in places)


def parse_kernel(text: str) -> Kernel:
    """The kernel that a text describes. Raises IRTextError."""
    lines = text.splitlines()
    if not lines or lines[0].strip() != FIRST_LINE:
        raise IRTextError(f"the first line of a kernel is `{FIRST_LINE}`", 1)
    found = [_Line(Reader(s, n), len(s) - len(s.lstrip(" "))) for n, s in enumerate(lines[1:], 2)]
    found = [line for line in found if line.reader.tokens]
    return _Parser(found, len(lines)).kernel()


@dataclass
class _Line:
    reader: Reader
    indent: int


class _Parser:
    """Reads lines in order; `named` are the values that lines above have named."""

    def __init__(self, lines: list[_Line], last: int) -> None:
        self.lines, self.at, self.last = lines, 0, last
        self.named: dict[str, Value] = {}

    def kernel(self) -> Kernel:
        reader = self._next("kernel")
        name = STR.read(reader, None)
        label = STR.read(reader, None) if reader.accept("for") else ""
        reader.end()
        buffers = []
        while self._is("buffer"):
            reader = self._next("buffer", keep=True)
            buffers.append(form_of(Buffer).read(reader))
            reader.end()
        reader = self._next("dims")
        dims = []
        while reader.peek():
            dims.append(reader.name())
        guarded = self._is("guarded")
        if guarded:
            self._next("guarded").end()
        parallel: list[tuple[str, Expr]] = []
        while self._is("parallel"):
            parallel.append(_read_loop(self._next("parallel"), None))
            self.lines[self.at - 1].reader.end()
        body = self.block(0)
        return Kernel(name, tuple(buffers), tuple(dims), tuple(parallel), body, label, guarded)

    def _is(self, keyword: str) -> bool:
        return self.at < len(self.lines) and self.lines[self.at].reader.peek() == keyword

    def _next(self, keyword: str, keep: bool = False) -> Reader:
        if self.at == len(self.lines):
            raise IRTextError(f"expected `{keyword}`, found the end", self.last)
        reader = self.lines[self.at].reader
        if self.lines[self.at].indent:
            reader.fail("this line is indented, but nothing above it takes a body")
        if not self._is(keyword) or not keep:
            reader.expect(keyword)
        self.at += 1
        return reader

    def block(self, indent: int) -> tuple[Statement, ...]:
        """The statements from here that are indented by `indent`."""
        if indent > 200:
            self.lines[self.at].reader.fail("blocks are nested too deeply")
        outside = dict(self.named)
        body: list[Statement] = []
        while self.at < len(self.lines) and self.lines[self.at].indent >= indent:
            line = self.lines[self.at]
            if line.indent > indent:
                line.reader.fail("this line is indented, but nothing above it takes a body")
            self.at += 1
            if line.reader.peek().startswith("%"):
                self._name(line.reader)
            else:
                body.append(self._statement(line.reader, indent))
        self.named = outside
        return tuple(body)

    def _name(self, reader: Reader) -> None:
        name = reader.take()
        reader.expect("=")
        self.named[name] = self.value(reader)
        reader.end()

    def _statement(self, reader: Reader, indent: int) -> Statement:
        form = FORMS.get(reader.peek())
        if form is None:
            reader.fail(f"there is no statement {reader.found()}; there is {', '.join(FORMS)}")
        given: dict[str, tuple[Statement, ...]] = {}
        if any(f.name == "body" for f in fields(form.cls)):
            given["body"] = ()
        found: Statement = form.read(reader, self, **given)
        reader.end()
        if not given:
            return found
        body = self.block(indent + 2)
        values = {f.name: getattr(found, f.name) for f in fields(form.cls)}
        made: Statement = form.cls(**{**values, "body": body})
        return made

    def value(self, reader: Reader, depth: int = 0) -> Value:
        if depth > 60:
            reader.fail("a value is nested too deeply; name its parts")
        token = reader.take()
        if token.startswith("%") and len(token) > 1:
            if token not in self.named:
                reader.fail(f"`{token}` is not named above")
            return self.named[token]
        if token.startswith("$"):
            name, _, dtype = token[1:].rpartition(".")
            if dtype not in DTYPES:
                reader.fail(f"a bound scalar is written `$name.dtype`, not `{token}`")
            return Local(name, DTYPES[dtype])
        if reader.peek() == "[":
            return self._load(token, reader, depth)
        return self._call(token, reader, depth)

    def _call(self, token: str, reader: Reader, depth: int) -> Value:
        if token in DTYPES:
            reader.expect("(")
            number = read_number(reader)
            reader.expect(")")
            return Const(number, DTYPES[token])
        if token == "index":
            reader.expect("(")
            expr = reader.expr()
            reader.expect(")")
            return Index(expr)
        if token in ("checked", "proved"):
            reader.expect("(")
            value = self.value(reader, depth + 1)
            reader.expect("of")
            extent = reader.expr()
            length = reader.expr() if reader.accept("for") else const(1)
            reader.expect("at")
            site = reader.integer()
            reader.expect(")")
            return Checked(value, extent, site, token == "proved", length)
        name, _, dtype = token.rpartition(".")
        if dtype not in DTYPES or not name:
            reader.fail(f"expected a value, found `{token}`")
        to = None
        if reader.accept("<"):
            to = read_dtype(reader)
            reader.expect(">")
        args = reader.list_of(lambda: self.value(reader, depth + 1), "(", ")")
        return Op(name, args, DTYPES[dtype], to)

    def _load(self, token: str, reader: Reader, depth: int) -> Load:
        name, _, dtype = token.rpartition(".")
        if dtype not in DTYPES or not name:
            reader.fail(f"a load is written `buffer.dtype[...]`, not `{token}[...]`")
        reader.expect("[")
        places = self._places(reader, depth, ("if", "]"))
        guard: list[Value] = []
        fill: float | int | bool = 0
        if reader.accept("if"):
            while reader.peek() != "else":
                if guard:
                    reader.expect(",")
                guard.append(self.value(reader, depth + 1))
            reader.expect("else")
            fill = read_number(reader)
        reader.expect("]")
        return Load(name, places, DTYPES[dtype], tuple(guard), fill)

    def _places(self, reader: Reader, depth: int, ends: tuple[str, ...]) -> tuple[Value, ...]:
        found: list[Value] = []
        while reader.peek() not in ends:
            if found:
                reader.expect(",")
            if reader.accept("{"):
                found.append(self.value(reader, depth + 1))
                reader.expect("}")
            else:
                found.append(Index(reader.expr()))
        return tuple(found)

    def places(self, reader: Reader) -> tuple[Value, ...]:
        reader.expect("[")
        found = self._places(reader, 0, ("]",))
        reader.expect("]")
        return found


def _read_loop(reader: Reader, env: object) -> tuple[str, Expr]:
    name = reader.name()
    reader.expect("in")
    return name, reader.expr()


def _write_operand(x: Operand, env: object) -> str:
    panels = f", {x.panel}, {x.step}" if x.panel else ""
    panels = f", 0, {x.step}, {x.run}" if x.run else panels
    return f"{x.buffer}({x.offset}, {x.along}, {x.across}{panels})"


def _read_operand(reader: Reader, env: object) -> Operand:
    name = reader.name()
    offset, along, across, *panels = reader.list_of(reader.expr, "(", ")")
    if not panels:
        return Operand(name, offset, along, across)
    panel, step, *runs = panels
    run = runs[0].as_int() or 0 if runs else 0
    return Operand(name, offset, along, across, panel.as_int() or 0, step, run)


CODECS[Operand] = Codec(_write_operand, _read_operand)
CODECS[Value] = Codec(lambda v, env: env.text(v), lambda reader, env: env.value(reader))
CODECS[Value | None] = CODECS[Value]
CODECS[tuple[Value, ...]] = listed(CODECS[Value])
CODECS[tuple[tuple[str, Expr], ...]] = listed(
    Codec(lambda loop, env: f"{loop[0]} in {EXPR.write(loop[1], env)}", _read_loop), "(", ")"
)
NAMED["places"] = Codec(
    lambda places, env: f"[{_write_places(places, env.text)}]",
    lambda reader, env: env.places(reader),
)
FORMS: dict[str, Form] = {form_of(s).keyword: form_of(s) for s in typing.get_args(Statement)}
"""The forms of the statements, by keyword."""
