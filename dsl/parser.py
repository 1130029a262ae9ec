"""Text to syntax tree. The grammar is `grammar.lark`; this module recovers from errors.

Items are parsed one by one. Where one does not parse, each of its lines is parsed alone, what is
wrong with it is reported, and the item is parsed again without the wrong lines: two readings find
every independent error, however many there are.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import Any

import lark
from lark import Token as LarkToken
from lark.exceptions import UnexpectedToken
from lark.lexer import Lexer as LarkLexer
from lark.lexer import PatternStr

from . import ast
from .blocks import Placed, place
from .diagnostics import CompileError, Diagnostic, error
from .lexer import Lexer, Line, Token, layout
from .source import Source, Span
from .tables import parser_with
from .tree import TreeBuilder
from .wording import unexpected

_LOST = frozenset(("E0101", "E0104", "E0105", "E0106", "E0107"))
"""Errors of the lexer after which the tokens of a line are no longer what was meant."""
_OWN = frozenset(
    ("NAME", "INT", "FLOAT", "STRING", "REDUCE", "ERROR", "NEWLINE", "INDENT", "DEDENT", "OR",
     "AND", "NOT", "COMPARE", "BAR", "CARET", "AMPERSAND", "SHIFT", "PLUS", "MINUS", "STAR",
     "TIMES", "TILDE", "POWER")
)  # fmt: skip


class _Fed(LarkLexer):
    """Hands Lark the tokens that our lexer made."""

    def __init__(self, conf: Any) -> None:
        pass

    def lex(self, data: Sequence[Token]) -> Iterator[LarkToken]:  # type: ignore[override]
        kinds = _kinds()
        for token in data:
            kind = token.kind
            if kind not in _OWN:
                kind = kinds.get(token.value, kind)
            yield LarkToken(kind, token.value, start_pos=token.start, end_pos=token.end)


@cache
def _lark() -> lark.Lark:
    return parser_with(_Fed)


@cache
def _kinds() -> dict[str, str]:
    """The terminal that Lark named for each keyword and sign of the grammar."""
    return {t.pattern.value: t.name for t in _lark().terminals if isinstance(t.pattern, PatternStr)}


def parse(source: Source) -> tuple[ast.Module, tuple[Diagnostic, ...]]:
    """The syntax tree of what parses, and everything that does not, in source order."""
    reader = Lexer(source)
    problems = list(reader.problems)
    lost = _lost_lines(reader)
    items: list[ast.Item] = []
    doc = ""
    for number, lines in enumerate(_chunks(reader.lines)):
        item = _item(source, lines, lost, problems)
        if isinstance(item, str):
            doc = doc if number else item
        elif item is not None:
            items.append(item)
    module = ast.Module(Span(source, 0, len(source.text)), doc, tuple(items))
    unique: dict[int, Diagnostic] = {}
    for problem in sorted(problems, key=lambda d: d.position):
        unique.setdefault(problem.primary.span.start, problem)
    return module, tuple(unique.values())


def parse_or_raise(source: Source) -> ast.Module:
    """The syntax tree. Raises CompileError with every syntax error."""
    module, problems = parse(source)
    if problems:
        raise CompileError(problems)
    return module


class LazyItems(Mapping[str, ast.Item]):
    """The items of a valid source by name, each parsed when it is first asked for.

    Raises CompileError for an item that does not parse.
    """

    def __init__(self, source: Source) -> None:
        self._source = source
        self._lines = {
            lines[0].tokens[1].value: lines
            for lines in _chunks(Lexer(source).lines)
            if len(lines[0].tokens) > 1
        }
        self._parsed: dict[str, ast.Item] = {}

    def __getitem__(self, name: str) -> ast.Item:
        if name not in self._parsed:
            problems: list[Diagnostic] = []
            item = _item(self._source, self._lines[name], frozenset(), problems)
            if problems or item is None or isinstance(item, str):
                raise CompileError(problems)
            self._parsed[name] = item
        return self._parsed[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._lines)

    def __len__(self) -> int:
        return len(self._lines)


@cache
def standard_items(source: Source) -> LazyItems:
    """The items of a module of the standard library, of which a program uses little.

    The library is tested, and parsed once in a process.
    """
    return LazyItems(source)


def _lost_lines(reader: Lexer) -> frozenset[int]:
    """The starts of the lines that have an error of the lexer which spoils their tokens."""
    starts = [line.tokens[0].start for line in reader.lines]
    found = set()
    for problem in reader.problems:
        index = bisect_right(starts, problem.primary.span.start) - 1
        if problem.code in _LOST and index >= 0:
            found.add(starts[index])
    return frozenset(found)


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
    source: Source, lines: list[Line], lost: frozenset[int], problems: list[Diagnostic]
) -> ast.Item | str | None:
    """One item; a string that stands alone, as its text; None where there is nothing valid."""
    placed = place(source, lines, problems)
    for entry in placed:
        if entry.line.tokens[0].start in lost:
            entry.bad = entry.silent = True
    tree = None if any(entry.bad for entry in placed) else _parsed(placed)
    if tree is None:
        for entry in placed:
            wrong = None if entry.silent else _line_error(source, entry.line)
            if wrong is not None:
                problems.append(wrong)
                entry.bad = True
        if placed[0].bad:
            return None
        tree = _parsed(_without_bad(placed))
        if tree is None:
            first = placed[0].line.tokens[0]
            if not any(first.start <= p.primary.span.start <= placed[-1].line.tokens[-1].end
                       for p in problems):  # fmt: skip
                span = Span(source, first.start, first.end)
                problems.append(error("E0109", "this is not valid", span))
            return None
    before = len(problems)
    built = TreeBuilder(source, problems).build(tree)
    if len(problems) > before or not built:
        return None
    found: ast.Item | str = built[0]
    return found


def _parsed(placed: Sequence[Placed]) -> lark.Tree[Any] | None:
    lines = [Line(entry.depth, entry.line.tokens) for entry in placed]
    try:
        return _lark().parse(list(layout(lines)), "module")
    except lark.exceptions.UnexpectedInput:
        return None


def _line_error(source: Source, line: Line) -> Diagnostic | None:
    """What is wrong with a line by itself."""
    tokens = line.tokens
    end = tokens[-1].end
    try:
        _lark().parse([*tokens, Token("NEWLINE", "", end, end)], "line")
    except UnexpectedToken as found:
        start = found.token.start_pos
        ended = found.token.type in ("NEWLINE", "$END")
        at = len(tokens) if ended else next(i for i, t in enumerate(tokens) if t.start == start)
        return unexpected(source, tokens, at, frozenset(found.accepts or found.expected))
    return None


def _without_bad(placed: Sequence[Placed]) -> list[Placed]:
    """The lines with each bad one, and the block below it, as a placeholder."""
    kept: list[Placed] = []
    hidden: int | None = None
    for entry in placed:
        if hidden is not None and entry.depth > hidden:
            continue
        first = entry.line.tokens[0]
        orphan = hidden == entry.depth and first.kind in ("ELIF", "ELSE")
        hidden = entry.depth if entry.bad or orphan else None
        if orphan:
            continue
        if entry.bad:
            if first.kind in ("ELIF", "ELSE"):
                continue
            line = Line(entry.line.indent, (Token("ERROR", "", first.start, first.end),))
            entry = Placed(line, entry.depth)
        kept.append(entry)
    return kept
