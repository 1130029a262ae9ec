"""Which line belongs to which block: indentation, and what may stand where."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .diagnostics import Diagnostic, error, nearest
from .lexer import CONTINUES, KEYWORDS, Line
from .source import Source, Span

MAX_BLOCKS = 20
"""Blocks inside blocks; more could exhaust Python's stack in the phases that follow."""

FOREIGN = {
    "return": "the last line of a body is its result: leave `return` out",
    "def": "write `fn name(...)` or `pipeline name(...)`",
    "func": "write `fn name(...)` or `pipeline name(...)`",
    "function": "write `fn name(...)` or `pipeline name(...)`",
    "class": "there are no classes; a `fn` takes `weights` for what it needs",
    "lambda": "define a `fn` and name it",
    "while": "loops run over constants: `for i in 0..n:`",
    "try": "there are no exceptions in the language",
    "except": "there are no exceptions in the language",
    "finally": "there are no exceptions in the language",
    "raise": "there are no exceptions in the language",
    "with": "there are no context managers in the language",
    "from": "write `import module`, and `module.name` for what is in it",
    "pass": "leave the line out",
    "let": "an assignment is `name = value`",
    "var": "an assignment is `name = value`",
    "break": "loops are unrolled while compiling; choose the range instead",
    "continue": "use `if` on a constant",
    "yield": "the last line of a body is its result",
    "async": "a pipeline has no side effects to wait for",
    "await": "a pipeline has no side effects to wait for",
    "assert": "state facts in `where`",
    "del": "a name may be bound again",
    "global": "what lives between calls is `state name: type = initial` in a pipeline",
    "nonlocal": "what lives between calls is `state name: type = initial` in a pipeline",
    "match": "use `if` and `elif` on constants",
    "struct": "there are no structs; several results are a tuple",
}
RESERVED = ("extern",)
ITEMS = frozenset(("FN", "PIPELINE", "CONST", "IMPORT", "WEIGHTS"))
HEADERS = frozenset(("FN", "PIPELINE", "FOR", "SCAN", "IF", "ELIF", "ELSE"))
_PLAIN = frozenset(("EQUAL", "DOT", "COMMA", "PIPE", "LPAR", "LSQB"))
"""After a name that begins a line, these make it a plain name and no statement of Python."""


@dataclass(slots=True)
class Placed:
    """A line and the depth of its block; bad lines are left out, with the block below them."""

    line: Line
    depth: int
    bad: bool = False
    silent: bool = False
    """True if what is wrong with this line was reported already, or follows from it."""

    @property
    def opens(self) -> bool:
        """Whether a block belongs below the line."""
        tokens = self.line.tokens
        return tokens[0].kind in HEADERS or tokens[-1].kind == "COLON"


@dataclass(slots=True)
class _Level:
    indent: int
    depth: int
    stray: bool = False
    last: str = ""
    meant: int = 0
    """Of a stray level that is shallower than its block: the block's indentation."""


def place(source: Source, lines: Sequence[Line], problems: list[Diagnostic]) -> list[Placed]:
    """The lines of one item with their depths; adds what is wrong with them as a whole."""
    placed: list[Placed] = []
    levels = [_Level(0, 0)]
    for line in lines:
        found = _place(source, line, levels, placed, problems)
        placed.append(found)
        if not found.silent:
            _check_start(source, found, levels[-1], problems)
        levels[-1].last = line.tokens[0].kind if not found.bad else f"bad {line.tokens[0].kind}"
    if placed:
        _check_block(source, placed[-1], problems)
    return placed


def _place(
    source: Source,
    line: Line,
    levels: list[_Level],
    placed: list[Placed],
    problems: list[Diagnostic],
) -> Placed:
    before = placed[-1] if placed else None
    first = line.tokens[0]
    span = Span(source, first.start, first.end)
    if line.indent == levels[-1].meant and levels[-1].stray:
        return Placed(line, levels[-1].depth)
    if line.indent > levels[-1].indent:
        if before is not None and before.opens:
            depth = levels[-1].depth + 1
            levels.append(_Level(line.indent, depth))
            if depth == MAX_BLOCKS + 1:
                problems.append(
                    error(
                        "E0107",
                        f"blocks are nested more than {MAX_BLOCKS} deep",
                        span,
                        help="move the inner part to a `fn`",
                    )
                )
            return Placed(line, depth, bad=depth > MAX_BLOCKS, silent=depth > MAX_BLOCKS)
        unfinished = before is not None and _is_unfinished(before.line)
        if not unfinished:
            problems.append(
                error(
                    "E0108",
                    "unexpected indentation",
                    span,
                    help="only a block below a `:` and a line that starts with `|>` or a "
                    "binary operator are indented",
                )
            )
        levels.append(_Level(line.indent, levels[-1].depth, True, levels[-1].last))
        return Placed(line, levels[-1].depth, bad=unfinished, silent=unfinished)
    if before is not None:
        _check_block(source, before, problems)
    left = levels[-1]
    while line.indent < levels[-1].indent:
        left = levels.pop()
    if line.indent != levels[-1].indent:
        if not left.stray:
            problems.append(error("E0108", "this indentation matches no block above", span))
        levels.append(_Level(line.indent, left.depth, True, left.last, left.indent))
    elif left.stray and left is not levels[-1]:
        levels[-1].last = left.last
    depth = levels[-1].depth
    return Placed(line, depth, bad=depth > MAX_BLOCKS, silent=depth > MAX_BLOCKS)


def _is_unfinished(line: Line) -> bool:
    last = line.tokens[-1].kind
    return last in CONTINUES or last in ("COMMA", "EQUAL", "LPAR", "LSQB", "NOT", "TILDE")


def _check_block(source: Source, placed: Placed, problems: list[Diagnostic]) -> None:
    """Report a header without a block below it."""
    if not placed.opens or placed.bad:
        return
    placed.bad = placed.silent = True
    last = placed.line.tokens[-1]
    if last.kind == "COLON":
        problems.append(
            error(
                "E0109",
                "a block has no lines",
                Span(source, last.start, last.end),
                help="indent the lines of the block below this one",
            )
        )
    else:
        placed.silent = False


def _check_start(source: Source, placed: Placed, level: _Level, problems: list[Diagnostic]) -> None:
    """Report a line that cannot stand where it does, judged by its first word."""
    first, *rest = placed.line.tokens
    after = rest[0].kind if rest else ""
    span = Span(source, first.start, first.end)
    wrong: Diagnostic | None = None
    if first.kind in ("NAME", "WITH") and _is_foreign(first.value, after):
        wrong = error(
            "E0110",
            f"`{first.value}` is not a statement of this language",
            span,
            help=FOREIGN[first.value],
        )
    elif first.kind == "NAME" and first.value in RESERVED and after == "NAME":
        wrong = error(
            "E0111",
            f"`{first.value}` is reserved for a later version",
            span,
            help="this version has `pipeline`, `fn`, `const`, `import` and `weights`",
        )
    elif first.value == "@":
        wrong = error("E0110", "there are no decorators in this language", span)
    elif placed.depth == 0 and first.kind not in ITEMS and first.kind != "STRING":
        wrong = _no_item(first.value, first.kind, after, span)
    elif placed.depth > 0 and first.kind in ITEMS:
        wrong = error(
            "E0109",
            f"`{first.value}` stands inside a body",
            span,
            help="move it out of the body, to the start of a line",
        )
    elif first.kind in ("ELIF", "ELSE"):
        owner = level.last.removeprefix("bad ")
        if owner not in ("IF", "ELIF"):
            wrong = error("E0109", f"`{first.value}` has no `if` above it", span)
        elif owner != level.last:
            placed.bad = True
    if wrong is not None:
        problems.append(wrong)
        placed.bad = placed.silent = True


def _is_foreign(word: str, after: str) -> bool:
    if word in ("return", "yield", "del", "raise", "await"):
        return after not in ("EQUAL", "DOT", "COMMA", "PIPE")
    return word in FOREIGN and after not in _PLAIN


def _no_item(word: str, kind: str, after: str, span: Span) -> Diagnostic:
    near = nearest(word, KEYWORDS) if kind == "NAME" and after == "NAME" else None
    if near is not None:
        return error("E0109", f"`{word}` starts no item", span, help=f"write `{near}`")
    if kind == "STATE":
        advice = "what a session keeps is declared first in the body of its pipeline"
    elif kind == "NAME" and after == "EQUAL":
        advice = f"a constant is `const {word} = ...`; other assignments stand in a body"
    else:
        advice = "a file holds `import`, `const`, `weights`, `fn` and `pipeline`"
    return error("E0109", f"`{word}` starts no item", span, help=advice)
