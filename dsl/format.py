"""The one layout of a source: what `stagefuse fmt` writes.

Works on tokens, line by line: no line is broken or joined, and comments, strings and numbers stay
as they are written. What changes is white space: indentation, spaces around tokens, blank lines.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from .lexer import REDUCTIONS, Lexer, Line, Token
from .parser import parse_or_raise
from .source import Source

STEP = 4
"""Spaces by which a block, a bracket and a continued line are indented."""
_OPERANDS = frozenset(
    ("NAME", "INT", "FLOAT", "STRING", "TRUE", "FALSE", "NONE", "RPAR", "RSQB", "ELLIPSIS")
)
_SIGNS = frozenset(("MINUS", "PLUS", "TILDE", "STAR"))
_RANGES = frozenset(("RANGE", "RANGE_TO"))


def formatted(source: Source) -> str:
    """The source in the one layout. Raises CompileError for one that does not parse."""
    parse_or_raise(source)
    lines = Lexer(source).lines
    text = _Writer(source).written([line.tokens for line in lines], [line.indent for line in lines])
    if _meaning(Lexer(Source(source.name, text)).lines) != _meaning(lines):
        raise AssertionError(f"the layout of {source.name} would change what it means")
    return text


def _meaning(lines: Sequence[Line]) -> list[tuple[int, list[tuple[str, str]]]]:
    """Depths and tokens of lines: what a layout must keep."""
    found = []
    levels = [0]
    for line in lines:
        while line.indent < levels[-1]:
            levels.pop()
        if line.indent > levels[-1]:
            levels.append(line.indent)
        found.append((len(levels), [(token.kind, token.value) for token in line.tokens]))
    return found


@dataclass
class _Bracket:
    """An open bracket: its token, what it means, the indentation of the line that opens it."""

    token: Token
    role: str
    indent: int


@dataclass
class _Spacing:
    """The space before each token of a logical line."""

    first: Token
    previous: Token | None = None
    after_sign: bool = False
    after_indices: bool = False
    """Directly after `sum[i]`, where an operand begins."""
    brackets: list[_Bracket] = field(default_factory=list)

    def role(self, token: Token) -> str:
        """What an opening bracket is: of generics, parameters, a reduction, or any other."""
        header = self.first.kind in ("FN", "PIPELINE") and not self.brackets
        if header and token.kind == "LSQB":
            return "generics"
        if header:
            return "parameters"
        reduced = self.previous is not None and self.previous.kind == "REDUCE"
        return "indices" if reduced else "other"

    def before(self, token: Token) -> str:
        """The space between the token and the one before it."""
        previous = self.previous
        if previous is None or token.kind in ("RPAR", "RSQB", "COMMA"):
            return ""
        if previous.kind == "COMMA":
            return " "
        if previous.kind in ("LPAR", "LSQB") or token.kind == "COLON":
            return ""
        if "DOT" in (previous.kind, token.kind):
            return " " if previous.kind in ("INT", "FLOAT") else ""  # `1 .x` is no `1.`
        if previous.kind == "COLON":
            return "" if self._slices() else " "
        if "EQUAL" in (previous.kind, token.kind):
            return "" if self._is_keyword() else " "
        if self.after_sign:
            return ""
        if previous.kind in _RANGES or token.kind in _RANGES:
            joined = previous.value.endswith(".") and previous.kind == "FLOAT"
            return " " if joined or token.value.startswith(".") and token.kind == "FLOAT" else ""
        if token.kind in ("LPAR", "LSQB"):
            return self._before_bracket(previous, token)
        return " "

    def _before_bracket(self, previous: Token, token: Token) -> str:
        # `sum [` is an element of something named sum, `sum[` a reduction
        named = previous.kind == "NAME" and previous.value in REDUCTIONS and token.kind == "LSQB"
        follows = previous.kind in _OPERANDS and not self.after_indices
        return "" if previous.kind == "REDUCE" or (follows and not named) else " "

    def _slices(self) -> bool:
        """Whether a colon here is one of a slice."""
        top = self.brackets[-1] if self.brackets else None
        return top is not None and top.token.kind == "LSQB" and top.role != "generics"

    def _is_keyword(self) -> bool:
        top = self.brackets[-1] if self.brackets else None
        return top is not None and top.token.kind == "LPAR" and top.role != "parameters"

    def passed(self, token: Token, indent: int) -> None:
        """Notes that a token was written, on a line indented `indent`."""
        starts = self.previous is None or self.previous.kind not in _OPERANDS
        self.after_sign = token.kind in _SIGNS and (starts or self.after_indices)
        self.after_indices = False
        if token.kind in ("LPAR", "LSQB"):
            self.brackets.append(_Bracket(token, self.role(token), indent))
        elif token.kind in ("RPAR", "RSQB") and self.brackets:
            self.after_indices = self.brackets.pop().role == "indices"
        self.previous = token


@dataclass
class _Level:
    """A block: the column it has and the column it gets."""

    old: int
    new: int


class _Writer:
    """Writes a source anew, one physical line after the other."""

    def __init__(self, source: Source) -> None:
        self.source, self.text = source, source.text
        self.out: list[str] = []
        self.current = ""
        self.shift = 0
        self.levels = [_Level(0, 0)]
        self.end = 0

    def written(self, lines: Sequence[Sequence[Token]], indents: Sequence[int]) -> str:
        for number, (tokens, indent) in enumerate(zip(lines, indents, strict=True)):
            self._begin(tokens[0], indent, lines[number - 1] if number else None)
            spacing = _Spacing(tokens[0])
            for token in tokens:
                if spacing.previous is not None:
                    self._between(spacing, token)
                spacing.passed(token, _indent_of(self.current))
                written = self._written(token)
                self.current += written
                self.end = token.end
        self._gap(len(self.text), list(self.levels), 0)
        while self.out and not self.out[-1]:
            self.out.pop()
        return "".join(line + "\n" for line in self.out)

    def _written(self, token: Token) -> str:
        """The token as it is written; the lines of a text that ends further down are whole."""
        *above, last = self.text[token.start : token.end].split("\n")
        for line in above:
            self.out.append(self.current + line)
            self.current = ""
            self.shift = 0
        return last

    def _begin(self, first: Token, indent: int, before: Sequence[Token] | None) -> None:
        """Starts a logical line: its block, and what stands between it and the one before."""
        open_levels = list(self.levels)
        while indent < self.levels[-1].old:
            self.levels.pop()
        if indent > self.levels[-1].old:
            self.levels.append(_Level(indent, self.levels[-1].new + STEP))
        new = self.levels[-1].new
        above = len(self.out)
        self._gap(first.start, open_levels, new)
        leaves = len(open_levels) > 1 or first.kind in ("FN", "PIPELINE")
        item = new == 0 and before is not None and leaves
        if item and len(self.out) == above + 1 and self.out[-1]:
            self.out.append("")
        self.current, self.shift = " " * new, new - indent

    def _between(self, spacing: _Spacing, token: Token) -> None:
        if "\n" not in self.text[self.end : token.start]:
            self.current += spacing.before(token)
            return
        new = self._continued(spacing, token)
        old = token.start - self._line_start(token.start)
        self._gap(token.start, [], new)
        self.current, self.shift = " " * new, new - old

    def _continued(self, spacing: _Spacing, token: Token) -> int:
        """The indentation of a physical line inside a logical one."""
        if spacing.brackets:
            opener = spacing.brackets[-1].indent
            return opener if token.kind in ("RPAR", "RSQB") else opener + STEP
        return self.levels[-1].new + (0 if token.kind == "WHERE" else STEP)

    def _line_start(self, position: int) -> int:
        return self.text.rfind("\n", 0, position) + 1

    def _gap(self, start: int, open_levels: Sequence[_Level], new: int) -> None:
        """Ends the current line, and writes the comments and blank lines before `start`.

        `open_levels` are the blocks that a comment may still belong to; `new` is the indentation
        of the code that follows.
        """
        pieces = self.text[self.end : start].split("\n")
        if start < len(self.text):
            pieces.pop()  # the indentation of what follows
        follows = start - self._line_start(start) if start < len(self.text) else 0
        first, *others = pieces or [""]
        if self.end:
            self._end_line(first)
        else:
            others = pieces
        most = 2 if new == 0 and (len(open_levels) <= 1) else 1
        blank = 0
        for piece in others:
            comment = piece.strip(" \t\f")
            if not comment:
                blank += 1
                continue
            self._blanks(blank, most)
            blank = 0
            column = len(piece) - len(piece.lstrip(" \t\f"))
            self.out.append(" " * _home(column, follows, open_levels, new) + comment)
        self._blanks(blank, 2 if new == 0 else most)

    def _end_line(self, rest: str) -> None:
        comment = rest.strip(" \t\f")
        line = self.current.rstrip(" ")
        if comment:
            column = self.end - self._line_start(self.end) + rest.index("#") + self.shift
            line = line.ljust(max(len(line) + 2, column)) + comment
        self.out.append(line)
        self.current = ""

    def _blanks(self, count: int, most: int) -> None:
        if self.out:
            self.out.extend([""] * min(count, most))


def _home(column: int, follows: int, open_levels: Sequence[_Level], new: int) -> int:
    """The column of a comment that stands alone: of the code below it, or of a block above."""
    if column <= follows:
        return new
    return next((lv.new for lv in reversed(open_levels) if follows < lv.old <= column), new)


def _indent_of(line: str) -> int:
    return len(line) - len(line.lstrip(" "))


def differences(source: Source, text: str) -> Iterator[str]:
    """The lines of a unified diff from the source to a text."""
    from difflib import unified_diff

    return unified_diff(
        source.text.splitlines(keepends=True), text.splitlines(keepends=True),
        source.name, f"{source.name} (formatted)",
    )  # fmt: skip
