"""What to say about a token where the grammar allows no such token."""

from __future__ import annotations

from collections.abc import Callable, Set

from .diagnostics import Diagnostic, Edit, Help, error
from .lexer import CONTINUES, OPERATORS, Token
from .source import Source, Span

_SHOWN = {
    "NAME": "a name",
    "INT": "a number",
    "FLOAT": "a number",
    "STRING": "a string",
    "NEWLINE": "the end of the line",
    "INDENT": "an indented block",
    "DEDENT": "the end of the block",
    "REDUCE": "a reduction",
    "ERROR": "a statement",
    "$END": "the end of the file",
    "TRUE": "`True`",
    "FALSE": "`False`",
    "NONE": "`None`",
    "STAR": "`*`",
    "TIMES": "an operator",
    "PLUS": "an operator",
    "MINUS": "an operator",
    "COMPARE": "a comparison",
    "TILDE": "`~`",
    "POWER": "`**`",
    "SHIFT": "a shift",
    "BAR": "`|`",
    "CARET": "`^`",
    "AMPERSAND": "`&`",
    "AND": "`and`",
    "OR": "`or`",
    "NOT": "`not`",
}
_PUNCTUATION = {kind: text for text, kind in OPERATORS.items()}
_HEADS = frozenset(("FN", "PIPELINE", "IF", "ELIF", "ELSE", "FOR", "SCAN"))
_ENDS = frozenset(("NAME", "INT", "FLOAT", "STRING", "RPAR", "RSQB", "TRUE", "FALSE", "NONE"))
_BEGINS = frozenset(
    ("NAME", "INT", "FLOAT", "STRING", "REDUCE", "TRUE", "FALSE", "NONE", "NOT", "TILDE")
)


def unexpected(
    source: Source, tokens: tuple[Token, ...], at: int, accepted: Set[str]
) -> Diagnostic:
    """The diagnostic for `tokens[at]`, or for the end of the line if there is no such token."""
    bad = tokens[at] if at < len(tokens) else None
    span = Span(source, bad.start, bad.end) if bad else Span(source, tokens[-1].end, tokens[-1].end)
    before = tokens[at - 1] if at > 0 else None
    after = tokens[at + 1] if at + 1 < len(tokens) else None
    if before is not None and before.kind == "RSQB" and (bad is None or bad.kind != "EQUAL"):
        first = _opened(tokens, at - 1)
        if tokens[first].kind == "REDUCE":
            return _unreduced(source, tokens[first], before)
    if bad is None:
        return _at_end(tokens, span, accepted)
    foreign = _foreign(source, tokens, at, bad, before, after, span)
    if foreign is not None:
        return foreign
    message = (
        f"`{bad.value}` is unexpected here"
        if bad.kind != "STRING"
        else ("a string is unexpected here")
    )
    return error("E0109", message, span, help=_advice(tokens, bad, before, accepted))


def _opened(tokens: tuple[Token, ...], at: int) -> int:
    """The place of the token before the bracket that `tokens[at]` closes, or 0."""
    depth = 0
    while at > 0:
        depth += (tokens[at].kind == "RSQB") - (tokens[at].kind == "LSQB")
        at -= 1
        if depth == 0:
            break
    return at


def _unreduced(source: Source, name: Token, end: Token) -> Diagnostic:
    """A reduction of nothing: most likely items of a value that was given a built-in name."""
    return error(
        "E0109",
        f"`{name.value}[...]` begins a reduction, and nothing follows that it reduces",
        Span(source, name.start, end.end),
        help=f"`{name.value}` is built in: name a value otherwise, such as `{name.value}_`",
    )


def _at_end(tokens: tuple[Token, ...], span: Span, accepted: Set[str]) -> Diagnostic:
    first, last = tokens[0], tokens[-1]
    if "COLON" in accepted and first.kind in _HEADS and last.kind in _ENDS | {"ELSE"}:
        return error(
            "E0109",
            "the header of a block ends with `:`",
            span,
            help=Help("add `:` at the end of the line", Edit(span, ":", True)),
        )
    if last.kind in CONTINUES:
        return error(
            "E0109",
            "the line ends in the middle of an expression",
            span,
            help=f"start the next line with `{last.value}`, indented deeper",
        )
    names = _names(accepted)
    return error(
        "E0109", "the line ends too early", span, help=f"expected {names}" if names else None
    )


def _foreign(
    source: Source,
    tokens: tuple[Token, ...],
    at: int,
    bad: Token,
    before: Token | None,
    after: Token | None,
    span: Span,
) -> Diagnostic | None:
    """The diagnostic for syntax that other languages have."""
    last = before.value if before else ""
    adjacent = before is not None and before.end == bad.start
    both = Span(source, before.start, bad.end) if before and adjacent else span

    def other(message: str, advice: str | None, where: Span = span) -> Diagnostic:
        return error("E0110", message, where, help=advice)

    if last == "lambda" or bad.value == "lambda":
        return other("there are no lambdas in this language", "define a `fn` and name it", both)
    if bad.kind == "IF":
        return other(
            "there is no conditional expression in this language",
            "write `select(condition, a, b)`, or an `if` statement on a constant",
        )
    if bad.kind == "FOR":
        return other(
            "there are no comprehensions in this language",
            "write `y[i] = ...` for a tensor; in a `for` over constants a list is made by "
            "`xs = xs + [x]`",
        )
    if bad.value == "where":
        return other("`where` belongs to a header", "of two values: `select(condition, a, b)`")
    if bad.value == "is":
        return other("`is` is not an operator of this language", "compare with `==` or `!=`")
    if bad.kind == "IN" or (bad.kind == "NOT" and after is not None and after.kind == "IN"):
        return other(
            "`in` is not an operator of this language",
            "ranges stand in `for`, `where` and the brackets of index notation",
        )
    if bad.kind == "EQUAL":
        return _equal(tokens, at, before, other, both, span)
    if bad.value in ("&", "|") and adjacent and last == bad.value:
        return _doubled(bad.value, both)
    if bad.kind in ("STAR", "POWER") and last in ("(", ","):
        return other("arguments are not unpacked in this language", "write them one by one")
    if bad.kind == "COLON" and after is not None and after.kind == "EQUAL":
        return other("there is no `:=` in this language", "assign on a line of its own")
    if bad.kind == "COLON" and at == 1 and tokens[0].kind == "NAME":
        return other("an assignment states no type", "write `name = value`; `f32(x)` converts")
    if bad.kind == "STRING" and adjacent and last.lower() in ("f", "r", "b", "rb", "fr", "u"):
        return other("strings have no prefixes in this language", None, both)
    if tokens[0].kind == "IMPORT" and bad.value in ("as", ".", ","):
        return other("an import is one name", "write `import name`, one a line")
    if last == ":" and tokens[0].kind in _HEADS and at > 1:
        what = "a block starts on the next line"
        return error("E0109", what, span, help="put it on lines of its own, indented")
    if tokens[0].kind == "ELSE" and bad.value == "if":
        return other("there is no `else if` in this language", "write `elif`", both)
    return None


def _doubled(operator: str, span: Span) -> Diagnostic:
    """`&&` and `||`."""
    word = "and" if operator == "&" else "or"
    what = f"`{operator * 2}` is not an operator of this language"
    return error("E0110", what, span, help=Help(f"write `{word}`", Edit(span, word)))


def _equal(
    tokens: tuple[Token, ...],
    at: int,
    before: Token | None,
    other: Callable[[str, str | None, Span], Diagnostic],
    both: Span,
    span: Span,
) -> Diagnostic:
    adjacent = both is not span
    if before is not None and adjacent and before.kind in CONTINUES | {"TILDE"}:
        if at == 2 and tokens[0].kind == "NAME":
            name = tokens[0].value
            advice = f"write `{name} = {name} {before.value} ...`"
        else:
            advice = "write the operation out"
        return other(f"`{before.value}=` is not an operator of this language", advice, both)
    if tokens[0].kind in ("IF", "ELIF"):
        return error(
            "E0109",
            "`=` cannot stand in a condition",
            span,
            help=Help("to compare, write `==`", Edit(span, "==")),
        )
    first = tokens[0]
    if first.kind == "REDUCE" and tokens[at - 1].kind == "RSQB":
        return error(
            "E0210",
            f"`{first.value}` is built in and cannot be redefined",
            Span(span.source, first.start, first.end),
            help=f"choose another name, such as `{first.value}_`",
        )
    if any(token.kind == "EQUAL" for token in tokens[:at]):
        return error(
            "E0109",
            "`=` cannot stand here",
            span,
            help="one assignment a line; to compare, write `==`",
        )
    return error(
        "E0109",
        "`=` cannot stand here",
        span,
        help="an assignment is `name = value`; to compare, write `==`",
    )


def _advice(
    tokens: tuple[Token, ...], bad: Token, before: Token | None, accepted: Set[str]
) -> str | None:
    head = tokens[0].kind
    if accepted == {"COLON"} and head in ("FN", "PIPELINE") and before is not None:
        name = before.value
        return f"state a type, or in the `[...]` of a function a class: `{name}: ...`"
    if "COLON" in accepted and bad.kind in ("RPAR", "COMMA") and head in ("FN", "PIPELINE"):
        return "every parameter has a type: `x: f32[B, T]`"
    if bad.kind == "REDUCE" and before is not None and before.kind in ("POWER", "TILDE"):
        return "put parentheses around the reduction"
    if (
        before is not None
        and before.kind in _ENDS
        and bad.kind in _BEGINS
        and ("PLUS" in accepted or "NEWLINE" in accepted)
    ):
        return "an operator, a `,` or a line break is missing before it"
    names = _names(accepted)
    if names:
        return f"expected {names}"
    if before is not None and bad.kind in CONTINUES | {"RPAR", "RSQB", "COMMA", "COLON"}:
        return f"a value is missing before `{bad.value}`" if before.kind not in _ENDS else None
    return None


def _names(accepted: Set[str]) -> str | None:
    names = sorted({_SHOWN.get(a) or f"`{_PUNCTUATION.get(a, a.lower())}`" for a in accepted})
    return " or ".join(names) if 0 < len(names) <= 4 else None
