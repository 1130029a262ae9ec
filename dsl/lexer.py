"""Characters to tokens: names, numbers, strings, and the lines and blocks they form."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from .diagnostics import Diagnostic, Help, error
from .frozen import frozen
from .source import Source, Span

KEYWORDS = frozenset(
    ("pipeline", "fn", "const", "import", "weights", "for", "scan", "with", "in", "if", "elif",
     "else", "where")
)  # fmt: skip
CONSTANTS = {"True": "TRUE", "False": "FALSE", "None": "NONE"}
LOGIC = {"and": "AND", "or": "OR", "not": "NOT"}
REDUCTIONS = frozenset(("sum", "prod", "max", "min", "mean", "any", "all"))
OPERATORS = {
    "|>": "PIPE", "->": "ARROW", "...": "ELLIPSIS", "..=": "RANGE_TO", "..": "RANGE",
    "**": "POWER", "//": "TIMES", "/": "TIMES", "%": "TIMES", "@": "TIMES", "*": "STAR",
    "+": "PLUS", "-": "MINUS", "~": "TILDE", "&": "AMPERSAND", "|": "BAR", "^": "CARET",
    "<<": "SHIFT", ">>": "SHIFT", "==": "COMPARE", "!=": "COMPARE", "<=": "COMPARE",
    ">=": "COMPARE", "<": "COMPARE", ">": "COMPARE", "=": "EQUAL", ",": "COMMA", ":": "COLON",
    ".": "DOT", "(": "LPAR", ")": "RPAR", "[": "LSQB", "]": "RSQB",
}  # fmt: skip
CONTINUES = frozenset(
    ("PIPE", "POWER", "TIMES", "STAR", "PLUS", "MINUS", "AMPERSAND", "BAR", "CARET", "SHIFT",
     "COMPARE", "AND", "OR")
)  # fmt: skip
_HINTS = {
    ";": "write one statement a line", "{": "blocks are indented, lists are `[...]`",
    "!": "write `not`", "?": "write `select(condition, a, b)`",
    "\u00a0": "write a plain space", "\u2212": "write `-`",
    "\u2013": "write `-`", "\u00d7": "write `*`", "\u2192": "write `->`", "\u2264": "write `<=`",
    "\u2265": "write `>=`", "\u2260": "write `!=`", "\u201c": "write `\"`", "\u201d": "write `\"`",
    "\u2018": "write `'`", "\u2019": "write `'`", "\u2026": "write `...`",
}  # fmt: skip
BRACKETS = {")": "(", "]": "["}
MAX_NESTING = 60

_TOKEN = re.compile(
    r"""(?P<space>[ \t\f]+)|(?P<comment>\#[^\n]*)|(?P<newline>\n)
    |(?P<name>[^\W\d]\w*)
    |(?P<float>[0-9][0-9_]*(?:\.(?![.])[0-9_]*(?:[eE][+-]?[0-9]+)?|[eE][+-]?[0-9]+)
        |\.[0-9]+(?:[eE][+-]?[0-9]+)?)
    |(?P<int>0[xX][0-9a-fA-F][0-9a-fA-F_]*|0[bB][01][01_]*|0[oO][0-7][0-7_]*|[0-9][0-9_]*)
    |(?P<string>\"\"\"|\'\'\'|\"|\')
    |(?P<operator>\.\.\.|\.\.=|\.\.|\|>|->|\*\*|//|<<|>>|==|!=|<=|>=|[-+*/%@~&|^<>=,:.()\[\]])
    """,
    re.VERBOSE,
)
_ITEM = re.compile(r"(?:pipeline|fn|const|import|weights)[ ]+[^\W\d]")
"""An item at the start of a line: no bracket reaches this far."""
_BLANK = re.compile(r"[ \t\f]*")
_NAMED = re.compile(r"[ \t\f]+[^\W\d]\w*[ \t\f]*:")
"""What makes `state` a declaration at the start of a line; else it is a name."""
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\", '"': '"', "'": "'", "\n": "", "r": "\r", "0": "\0"}


@dataclass(frozen=True, slots=True)
class Token:
    """A token: its kind in the grammar, its value, its place, and its logical line."""

    kind: str
    value: str
    start: int
    end: int


@frozen
class Line:
    """A logical line: its indentation and its tokens."""

    indent: int
    tokens: tuple[Token, ...]


class Lexer:
    """Reads a source once; `lines` and `problems` are the result."""

    def __init__(self, source: Source) -> None:
        self.source, self.text = source, source.text
        self.problems: list[Diagnostic] = []
        self.lines: list[Line] = []
        self._brackets: list[Token] = []
        self._strict = False
        """True from a bracket that is never closed to the end of its item: lines end brackets."""
        self._read()

    def _span(self, start: int, end: int) -> Span:
        return Span(self.source, start, end)

    def _problem(self, code: str, message: str, start: int, end: int, label: str = "",
                 help: str | None = None, notes: tuple[str, ...] = ()) -> None:  # fmt: skip
        self.problems.append(
            error(code, message, self._span(start, end), label, notes=notes,
                  help=Help(help) if help else None)
        )  # fmt: skip

    def _read(self) -> None:
        current: list[Token] = []
        indent = 0
        at_start = True
        position = 0
        while True:
            ended = position >= len(self.text)
            if at_start and not ended and _ITEM.match(self.text, position):
                lost = bool(self._brackets) and not self._strict
                self._strict = lost
            else:
                lost = ended and bool(self._brackets) and not self._strict
                self._strict = self._strict or lost
            if lost:
                position, at_start = self._rewind(current, indent), True
                continue
            if ended:
                break
            if at_start and self._brackets and self._strict:
                if not self._is_inside(position, indent):
                    self._unclosed()
            at_start = at_start and not self._brackets
            if at_start:
                here, position, blank = self._indentation(position)
                if blank:
                    continue
                at_start = False
                if current and not self._continues(current, here, indent, position):
                    self.lines.append(Line(indent, tuple(current)))
                    current = []
                if not current:
                    indent = here
            match = _TOKEN.match(self.text, position)
            if match is None:
                position = self._unknown(position)
                continue
            kind = match.lastgroup or ""
            if kind == "newline":
                at_start = True
                position = match.end()
            elif kind in ("space", "comment"):
                position = match.end()
            else:
                token, position = self._token(kind, match, current)
                if token is not None:
                    current.append(token)
        self._unclosed()
        if current:
            self.lines.append(Line(indent, tuple(current)))

    def _is_inside(self, position: int, indent: int) -> bool:
        """Whether a physical line belongs to the open bracket of a line indented `indent`."""
        match = _BLANK.match(self.text, position)
        blank = match.end() - position if match else 0
        rest = self.text[position + blank : position + blank + 1]
        return blank > indent or rest in ("", "\n", "#", ")", "]")

    def _rewind(self, current: list[Token], indent: int) -> int:
        """Report a bracket that is never closed; returns where the line after its own starts.

        What was read since is forgotten, and read again.
        """
        opened = self._brackets[0]
        position = opened.end
        while True:
            end = self.text.find("\n", position)
            position = len(self.text) if end < 0 else end + 1
            if end < 0 or not self._is_inside(position, indent):
                break
        self._brackets = [opened]
        self.problems = [p for p in self.problems if p.primary.span.start < position]
        while current and current[-1].start >= position:
            current.pop()
        self._unclosed()
        return position

    def _indentation(self, position: int) -> tuple[int, int, bool]:
        """The column where a line starts, the position there, and whether the line is blank."""
        start = position
        while position < len(self.text) and self.text[position] in " \t\f":
            position += 1
        end = self.text.find("\n", position)
        end = len(self.text) if end < 0 else end
        if position == len(self.text) or self.text[position] in "\n#":
            return 0, min(end + 1, len(self.text)), True
        blank = self.text[start:position]
        if "\t" in blank:
            self._problem(
                "E0102", "a tab in the indentation", start + blank.index("\t"), position,
                "a tab", "indent with spaces",
            )  # fmt: skip
        return len(blank.expandtabs(8)), position, False

    def _continues(self, current: list[Token], here: int, indent: int, position: int) -> bool:
        match = _TOKEN.match(self.text, position)
        text = match.group() if match else ""
        if current[0].kind in ("FN", "PIPELINE") and current[-1].kind != "COLON":
            listed = current[-1].kind == "COMMA" and any(t.kind == "WHERE" for t in current)
            if text in ("where", "->") or (listed and text not in KEYWORDS):
                return True
        kind = OPERATORS.get(text) or LOGIC.get(text, "")
        return here > indent and kind in CONTINUES and current[-1].kind != "COLON"

    def _token(
        self, kind: str, match: re.Match[str], current: list[Token]
    ) -> tuple[Token | None, int]:
        start, end, text = match.start(), match.end(), match.group()
        if kind == "name":
            return self._name(text, start, end, current), end
        if kind == "string":
            return self._string(text, start)
        if kind in ("int", "float"):
            return self._number(kind, text, start, end)
        self._bracket(text, start, end)
        return Token(OPERATORS[text], text, start, end), end

    def _name(self, text: str, start: int, end: int, current: list[Token]) -> Token:
        if not text.isascii():
            self._problem(
                "E0103", f"the name `{text}` has a character beyond ASCII", start, end,
                help="use the letters a to z, digits and `_`",
            )  # fmt: skip
            return Token("NAME", "_", start, end)
        if current and current[-1].kind == "DOT":
            return Token("NAME", text, start, end)
        if text in REDUCTIONS and self.text[end : end + 1] == "[":
            return Token("REDUCE", text, start, end)
        if text in KEYWORDS or (text == "state" and not current and _NAMED.match(self.text, end)):
            return Token(text.upper(), text, start, end)
        return Token(CONSTANTS.get(text) or LOGIC.get(text, "NAME"), text, start, end)

    def _number(self, kind: str, text: str, start: int, end: int) -> tuple[Token | None, int]:
        tail = re.compile(r"\w+").match(self.text, end)
        if tail:
            self._problem(
                "E0104", f"`{text}{tail.group()}` is not a number", start, tail.end(),
                help="a name starts with a letter or `_`",
            )  # fmt: skip
            return Token("INT", "0", start, tail.end()), tail.end()
        if kind == "float" and math.isinf(float(text.replace("_", ""))):
            self._problem("E0104", "this number is too large for f64", start, end)
        elif kind == "int" and len(text) > 40:
            self._problem("E0104", "this integer is too large", start, end)
        else:
            return Token(kind.upper(), text, start, end), end
        return Token("INT", "0", start, end), end

    def _string(self, quote: str, start: int) -> tuple[Token | None, int]:
        position = start + len(quote)
        parts: list[str] = []
        while True:
            if position >= len(self.text) or (len(quote) == 1 and self.text[position] == "\n"):
                self._problem(
                    "E0105", "this string has no end", start, position,
                    help=f"close it with `{quote}`",
                )  # fmt: skip
                if len(quote) > 1:
                    end = self.text.find("\n", start)
                    position = len(self.text) if end < 0 else end
                return Token("STRING", "", start, position), position
            if self.text.startswith(quote, position):
                end = position + len(quote)
                return Token("STRING", "".join(parts), start, end), end
            if self.text[position] == "\\" and position + 1 < len(self.text):
                escape = self.text[position + 1]
                if escape not in _ESCAPES:
                    self._problem(
                        "E0105", f"`\\{escape}` is not an escape", position, position + 2,
                        help="write `\\\\` for a backslash",
                    )  # fmt: skip
                parts.append(_ESCAPES.get(escape, escape))
                position += 2
            else:
                parts.append(self.text[position])
                position += 1

    def _bracket(self, text: str, start: int, end: int) -> None:
        if text in "([":
            self._brackets.append(Token("", text, start, end))
            if len(self._brackets) == MAX_NESTING + 1:
                self._problem(
                    "E0107", f"brackets are nested more than {MAX_NESTING} deep", start, end,
                    help="give the inner part a name on a line of its own",
                )  # fmt: skip
        elif text in BRACKETS:
            if self._brackets and self._brackets[-1].value == BRACKETS[text]:
                self._brackets.pop()
                return
            if not self._brackets:
                self._problem("E0106", f"`{text}` closes nothing", start, end)
                return
            opened = self._brackets.pop()
            self._problem(
                "E0106", f"`{text}` does not close `{opened.value}`", start, end,
                f"`{opened.value}` in line {self._span(opened.start, opened.end).line} is open",
            )  # fmt: skip

    def _unclosed(self) -> None:
        if self._brackets:
            opened = self._brackets[0]
            self._problem("E0106", f"`{opened.value}` is never closed", opened.start, opened.end)
            self._brackets.clear()

    def _unknown(self, position: int) -> int:
        """Report characters without meaning, neighbours as one."""
        char = self.text[position]
        end = position + 1
        while end < len(self.text) and self.text[end] == char:
            end += 1
        if char in "!?" or char.isascii() and char.isprintable():
            message = f"the character `{char}` has no meaning here"
        else:
            name = unicodedata.name(char, "a control character").lower()
            message = f"the character U+{ord(char):04X} ({name}) has no meaning here"
        self._problem("E0101", message, position, end, help=_HINTS.get(char))
        return end


def layout(lines: Sequence[Line]) -> Iterator[Token]:
    """The tokens of lines with NEWLINE, INDENT and DEDENT; their indents are depths, from 0."""
    depth = 0
    end = 0
    for line in lines:
        start = line.tokens[0].start
        while depth < line.indent:
            depth += 1
            yield Token("INDENT", "", start, start)
        while depth > line.indent:
            depth -= 1
            yield Token("DEDENT", "", end, end)
        yield from line.tokens
        end = line.tokens[-1].end
        yield Token("NEWLINE", "", end, end)
    for _ in range(depth):
        yield Token("DEDENT", "", end, end)
