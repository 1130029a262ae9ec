"""Text to syntax tree. The grammar is `grammar.lark`; this module recovers from errors.

A statement that does not parse is reported and left out, and its neighbours are read all the
same, so that one pass over a file finds every independent error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from importlib.resources import files
from typing import Any

import lark
from lark import Token as LarkToken
from lark.lexer import Lexer as LarkLexer
from lark.lexer import PatternStr

from . import ast
from .diagnostics import CompileError, Diagnostic, Help, error
from .lexer import MAX_OPERATORS, OPERATORS, Lexer, Line, Token, layout
from .source import Source, Span
from .tree import TreeBuilder

_FOREIGN = {
    "return": "the last line of a body is its result: leave `return` out",
    "def": "write `fn name(...)` or `pipeline name(...)`",
    "class": "there are no classes; a `fn` takes `weights` for what it needs",
    "lambda": "define a `fn` and name it",
    "while": "loops run over constants: `for i in 0..n:`",
    "try": "there are no exceptions in the language",
    "with": "there are no context managers in the language",
    "from": "write `import module`, and `module.name` for what is in it",
    "pass": "leave the line out",
    "let": "an assignment is `name = value`",
    "var": "an assignment is `name = value`",
    "break": "loops are unrolled while compiling; choose the range instead",
    "continue": "use `if` on a constant",
    "yield": "the last line of a body is its result",
    "assert": "state facts in `where`",
    "del": "a name may be bound again",
    "raise": "there are no exceptions in the language",
    "global": "there is no state in the language",
}
_RESERVED = ("extern", "scan", "state")
_SHOWN = {
    "NAME": "a name", "INT": "a number", "FLOAT": "a number", "STRING": "a string",
    "NEWLINE": "the end of the line", "INDENT": "an indented block",
    "DEDENT": "the end of the block", "REDUCE": "a reduction", "ERROR": "a statement",
    "$END": "the end of the file", "TRUE": "`True`", "FALSE": "`False`", "NONE": "`None`",
    "STAR": "`*`", "TIMES": "an operator", "PLUS": "an operator", "MINUS": "an operator",
    "COMPARE": "a comparison", "TILDE": "`~`", "POWER": "`**`", "SHIFT": "a shift",
    "BAR": "`|`", "CARET": "`^`", "AMPERSAND": "`&`", "AND": "`and`", "OR": "`or`", "NOT": "`not`",
}  # fmt: skip
_LEXICAL = ("E0105", "E0106", "E0107")
"""Errors after which an item's tokens are no longer what was meant."""
_PUNCTUATION = {kind: text for text, kind in OPERATORS.items()}


class _Fed(LarkLexer):
    """Hands Lark the tokens that our lexer made."""

    def __init__(self, conf: Any) -> None:
        pass

    def lex(self, data: Sequence[Token]) -> Iterator[LarkToken]:  # type: ignore[override]
        for token in data:
            kind = _kinds().get(token.value, token.kind) if token.value else token.kind
            if token.kind in _OWN:
                kind = token.kind
            yield LarkToken(kind, token.value, start_pos=token.start, end_pos=token.end)


_OWN = frozenset(
    ("NAME", "INT", "FLOAT", "STRING", "REDUCE", "ERROR", "NEWLINE", "INDENT", "DEDENT", "OR",
     "AND", "NOT", "COMPARE", "BAR", "CARET", "AMPERSAND", "SHIFT", "PLUS", "MINUS", "STAR",
     "TIMES", "TILDE", "POWER")
)  # fmt: skip


@cache
def _lark() -> lark.Lark:
    grammar = files(__package__).joinpath("grammar.lark").read_text("utf-8")
    return lark.Lark(
        grammar, parser="lalr", lexer=_Fed, start="module", propagate_positions=True,
        maybe_placeholders=True,
    )  # fmt: skip


@cache
def _kinds() -> dict[str, str]:
    """The terminal that Lark named for each keyword and sign of the grammar."""
    return {
        t.pattern.value: t.name for t in _lark().terminals if isinstance(t.pattern, PatternStr)
    }


def parse(source: Source) -> tuple[ast.Module, tuple[Diagnostic, ...]]:
    """The syntax tree of what parses, and everything that does not, in source order."""
    reader = Lexer(source)
    problems = list(reader.problems)
    items: list[ast.Item] = []
    doc = ""
    for number, lines in enumerate(_chunks(reader.lines)):
        found, text = _item(source, lines, problems)
        if found is not None:
            items.append(found)
        if number == 0:
            doc = text
    module = ast.Module(Span(source, 0, len(source.text)), doc, tuple(items))
    unique: dict[tuple[int, str], Diagnostic] = {}
    for problem in sorted(problems, key=lambda d: d.position):
        unique.setdefault((problem.primary.span.start, problem.code), problem)
    return module, tuple(unique.values())


def parse_or_raise(source: Source) -> ast.Module:
    """The syntax tree. Raises CompileError with every syntax error."""
    module, problems = parse(source)
    if problems:
        raise CompileError(problems)
    return module


def _chunks(lines: Sequence[Line]) -> Iterator[list[Line]]:
    """The lines of each item: one that is not indented, and the indented ones below it."""
    chunk: list[Line] = []
    for line in lines:
        if line.indent == 0 and chunk:
            yield chunk
            chunk = []
        chunk.append(line)
    if chunk:
        yield chunk


def _item(
    source: Source, lines: list[Line], problems: list[Diagnostic]
) -> tuple[ast.Item | None, str]:
    """One item, or None; and its text if it is only a string."""
    start, end = lines[0].tokens[0].start, lines[-1].tokens[-1].end
    if any(p.code in _LEXICAL and start <= p.primary.span.start <= end for p in problems):
        return None, ""
    lines = _checked_lines(source, lines, problems)
    for _ in range(len(lines) + 1):
        if not lines:
            return None, ""
        try:
            tree = _lark().parse(list(layout(lines, source)))  # type: ignore[arg-type]
        except lark.exceptions.UnexpectedInput as unexpected:
            bad = _report(source, lines, unexpected, problems)
            if bad == 0:
                return None, ""
            lines = _without(lines, bad)
            continue
        before = len(problems)
        built = TreeBuilder(source, problems).build(tree)
        if len(problems) > before or not built:
            return None, ""
        return (None, built[0]) if isinstance(built[0], str) else (built[0], "")
    return None, ""


def _checked_lines(
    source: Source, lines: list[Line], problems: list[Diagnostic]
) -> list[Line]:
    """Lines with consistent indentation and without statements of other languages."""
    good: list[Line] = []
    levels = [0]
    for line in lines:
        first = line.tokens[0]
        span = Span(source, first.start, first.end)
        opens = bool(good) and good[-1].tokens[-1].kind == "COLON"
        if line.indent > levels[-1] and (opens or not good):
            levels.append(line.indent)
        elif line.indent > levels[-1]:
            problems.append(
                error("E0108", "unexpected indentation", span,
                      help="only a block below a `:` and a line that starts with `|>` or a "
                      "binary operator are indented")
            )  # fmt: skip
        while line.indent < levels[-1]:
            levels.pop()
        if line.indent > levels[-1] and good and good[-1].indent > levels[-1] and not opens:
            problems.append(error("E0108", "this indentation matches no block above", span))
        statement = _foreign(source, line, problems)
        if statement is not None:
            line = Line(levels[-1], (Token("ERROR", "", first.start, first.end),))
            if not good:
                return []
        elif line.indent != levels[-1]:
            line = Line(levels[-1], line.tokens)
        operators = sum(t.kind in _OPERATORS for t in line.tokens)
        if operators > MAX_OPERATORS:
            problems.append(
                error("E0107", f"this statement has more than {MAX_OPERATORS} operators", span,
                      help="give a part of it a name on a line of its own")
            )  # fmt: skip
            line = Line(line.indent, (Token("ERROR", "", first.start, first.end),))
            if not good:
                return []
        good.append(line)
    return good


_OPERATORS = frozenset(
    ("PLUS", "MINUS", "STAR", "TIMES", "POWER", "TILDE", "BAR", "CARET", "AMPERSAND", "SHIFT",
     "COMPARE", "AND", "OR", "NOT", "PIPE", "DOT", "LSQB", "LPAR", "REDUCE")
)  # fmt: skip


def _foreign(source: Source, line: Line, problems: list[Diagnostic]) -> str | None:
    first, *rest = line.tokens
    following = rest[0].kind if rest else "NEWLINE"
    span = Span(source, first.start, first.end)
    if first.kind != "NAME" or following in ("EQUAL", "DOT", "LPAR", "LSQB", "COMMA", "PIPE"):
        if first.kind != "NAME" or first.value not in ("return",):
            return None
    if first.value in _RESERVED and following in ("NAME",):
        problems.append(
            error("E0111", f"`{first.value}` is reserved for a later version", span,
                  help="this version has `pipeline`, `fn`, `const`, `import` and `weights`")
        )  # fmt: skip
        return first.value
    if first.value in _FOREIGN and following not in ("EQUAL", "DOT", "COMMA", "PIPE"):
        problems.append(
            error("E0110", f"`{first.value}` is not a statement of this language", span,
                  help=_FOREIGN[first.value])
        )  # fmt: skip
        return first.value
    return None


def _without(lines: list[Line], bad: int) -> list[Line]:
    """The lines with one replaced by a placeholder, together with the block below it."""
    end = bad + 1
    while end < len(lines) and lines[end].indent > lines[bad].indent:
        end += 1
    first = lines[bad].tokens[0]
    placeholder = Line(lines[bad].indent, (Token("ERROR", "", first.start, first.end),))
    return [*lines[:bad], placeholder, *lines[end:]]


def _report(
    source: Source,
    lines: list[Line],
    unexpected: lark.exceptions.UnexpectedInput,
    problems: list[Diagnostic],
) -> int:
    """Words a syntax error; returns the number of the line that has it."""
    token = getattr(unexpected, "token", None)
    start = getattr(token, "start_pos", None)
    end = getattr(token, "end_pos", None)
    kind = getattr(token, "type", "$END")
    if start is None:
        start = end = lines[-1].tokens[-1].end
    number = 0
    for index, line in enumerate(lines):
        if line.tokens[0].start <= start:
            number = index
    if kind in ("INDENT", "DEDENT") and number > 0:
        number -= 1
    message, help = _wording(lines, number, kind, str(token or ""), unexpected)
    if kind in ("NEWLINE", "INDENT", "DEDENT", "$END"):
        last = lines[number].tokens[-1]
        span = Span(source, last.end, last.end + 1)
    else:
        span = Span(source, start, max(int(end or start), start + 1))
    if not any(p.primary.span.start == span.start for p in problems):
        problems.append(error("E0109", message, span, help=Help(help) if help else None))
    return number


def _wording(
    lines: list[Line], number: int, kind: str, text: str, unexpected: Any
) -> tuple[str, str | None]:
    line = lines[number]
    first = line.tokens[0]
    accepted = set(getattr(unexpected, "accepts", None) or getattr(unexpected, "expected", ()))
    shown = _SHOWN.get(kind) or f"`{text}`"
    if kind in _OWN and kind not in ("NEWLINE", "INDENT", "DEDENT"):
        shown = f"`{text}`" if text else shown
    header = first.value in ("pipeline", "fn", "if", "elif", "else", "for", "where")
    last = line.tokens[-1]
    if kind in ("NEWLINE", "INDENT") and "COLON" in accepted and header:
        return "the header of a block ends with `:`", "add `:` at the end of the line"
    if kind == "DEDENT" or (kind == "$END" and last.kind == "COLON") or (
        kind in ("NEWLINE", "$END") and last.kind == "COLON"
    ):
        return "a block has no lines", "indent the lines of the block below this one"
    if kind == "EQUAL":
        return "`=` cannot stand here", "an assignment is `name = value`; to compare, write `==`"
    names = sorted({_SHOWN.get(a) or f"`{_PUNCTUATION.get(a, a.lower())}`" for a in accepted})
    if 0 < len(names) <= 4:
        return f"{shown} is unexpected here", f"expected {' or '.join(names)}"
    if first.kind == "NAME" and line.indent == 0 and kind == "NAME":
        return f"`{first.value}` starts no item", (
            "a file holds `import`, `const`, `weights`, `fn` and `pipeline`"
        )
    if line.indent == 0 and number == 0 and first.value not in ("pipeline", "fn", "const"):
        return f"{shown} is unexpected here", (
            "a file holds `import`, `const`, `weights`, `fn` and `pipeline`"
        )
    return f"{shown} is unexpected here", None
