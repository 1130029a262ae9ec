"""What is wrong with a program, as records, and how it is shown.

A diagnostic is structured first and worded once: a stable code, a sentence that stands alone,
places with labels, notes that say why, and help that says what to do.
"""

from __future__ import annotations

import json
import unicodedata
from collections.abc import Iterable, Sequence
from typing import Any

from .frozen import frozen
from .source import Source, Span

CODES: dict[str, str] = {
    "E0101": "a character without meaning",
    "E0102": "a tab in the indentation",
    "E0103": "a name beyond ASCII",
    "E0104": "not a number",
    "E0105": "a broken string",
    "E0106": "unbalanced brackets",
    "E0107": "nested too deeply",
    "E0108": "wrong indentation",
    "E0109": "unexpected syntax",
    "E0110": "a statement of another language",
    "E0111": "reserved for later",
    "E0112": "chained comparison",
    "E0113": "not a target",
}
"""Every code with its title; the other phases add theirs here."""


@frozen
class Label:
    """A place and what this bit of the source is."""

    span: Span
    text: str = ""


@frozen
class Edit:
    """An exact change of the source; `certain` if it surely is what was meant."""

    span: Span
    replacement: str
    certain: bool = False


@frozen
class Help:
    """What to do, in words, and as an edit where it can be exact."""

    text: str
    edit: Edit | None = None


@frozen
class Diagnostic:
    """One thing that is wrong."""

    code: str
    message: str
    primary: Label
    secondary: tuple[Label, ...] = ()
    notes: tuple[str, ...] = ()
    help: Help | None = None
    severity: str = "error"

    @property
    def position(self) -> tuple[str, int]:
        """For sorting: the file, then the place."""
        return (self.primary.span.source.name, self.primary.span.start)


def error(
    code: str,
    message: str,
    span: Span,
    label: str = "",
    *,
    secondary: Sequence[Label] = (),
    notes: Sequence[str] = (),
    help: Help | str | None = None,
) -> Diagnostic:
    """An error with its primary place."""
    advice = Help(help) if isinstance(help, str) else help
    return Diagnostic(code, message, Label(span, label), tuple(secondary), tuple(notes), advice)


class CompileError(Exception):
    """A program that is not valid; its text is the rendered diagnostics."""

    def __init__(self, diagnostics: Sequence[Diagnostic]) -> None:
        super().__init__(diagnostics)
        self.diagnostics: tuple[Diagnostic, ...] = tuple(diagnostics)

    def __str__(self) -> str:
        return render_all(self.diagnostics)


_BOLD, _RED, _BLUE, _RESET = "\x1b[1m", "\x1b[1;31m", "\x1b[1;34m", "\x1b[0m"


def render_all(diagnostics: Iterable[Diagnostic], color: bool = False) -> str:
    """Every diagnostic in source order, a blank line between."""
    return "\n\n".join(render(d, color) for d in sorted(diagnostics, key=lambda d: d.position))


def render(diagnostic: Diagnostic, color: bool = False) -> str:
    """The diagnostic as a terminal shows it, with the user's own lines."""
    red, blue, bold, reset = (_RED, _BLUE, _BOLD, _RESET) if color else ("", "", "", "")
    primary = diagnostic.primary
    labels = [primary, *diagnostic.secondary]
    width = len(str(max(label.span.line for label in labels)))
    bar = f"{blue}{' ' * width} |{reset}"
    title = f"{red}{diagnostic.severity}[{diagnostic.code}]{reset}"
    out = [f"{title}{bold}: {visible(diagnostic.message)}{reset}"]
    for number, (source, group) in enumerate(_by_source(primary.span.source, labels)):
        span = place_of(diagnostic) if number == 0 else group[0].span
        arrow = "-->" if number == 0 else ":::"
        out.append(f"{blue}{' ' * width}{arrow}{reset} {source.name}:{span.line}:{span.column}")
        out.append(bar)
        out.extend(_lines(source, group, primary, width, (red, blue, reset)))
    notes = [f"note: {note}" for note in diagnostic.notes]
    if diagnostic.help:
        notes.append(f"help: {diagnostic.help.text}")
    for note in notes:
        first, *rest = note.split("\n")
        out.append(f"{blue}{' ' * width} = {reset}{visible(first)}")
        out.extend(f"{' ' * (width + 9)}{visible(line)}" for line in rest)
    return "\n".join(out)


def place_of(diagnostic: Diagnostic) -> Span:
    """Where the excerpt that holds the primary label starts: its first label without a gap."""
    found = diagnostic.primary.span
    same = [s.span for s in diagnostic.secondary if s.span.source is found.source]
    for span in sorted(same, key=lambda span: -span.start):
        if span.start < found.start and found.line - span.line <= 1:
            found = span
    return found


def _by_source(first: Source, labels: Sequence[Label]) -> list[tuple[Source, list[Label]]]:
    groups: list[tuple[Source, list[Label]]] = [(first, [])]
    for label in labels:
        for source, group in groups:
            if source is label.span.source:
                group.append(label)
                break
        else:
            groups.append((label.span.source, [label]))
    return groups


def _lines(
    source: Source,
    labels: Sequence[Label],
    primary: Label,
    width: int,
    paint: tuple[str, str, str],
) -> list[str]:
    """The lines that have labels, each with its marks below it."""
    red, blue, reset = paint
    out: list[str] = []
    lines: dict[int, list[Label]] = {}
    for label in sorted(labels, key=lambda label: label.span.start):
        lines.setdefault(label.span.line, []).append(label)
    before = 0
    for line, group in lines.items():
        if before and line > before + 1:
            out.append(f"{blue}...{reset}")
        before = line
        text, shift, cut = _window(source.line(line), group)
        out.append(f"{blue}{line:>{width}} |{reset} {visible(cut)}")
        for label in group:
            start = min(max(0, label.span.column - 1 - shift), len(text))
            end = min(max(start, start + label.span.end - label.span.start), len(text))
            lead = 3 if shift else 0
            mark = ("^" if label is primary else "-") * max(1, _columns(text[start:end]))
            tint = red if label is primary else blue
            tail = f" {visible(label.text)}" if label.text else ""
            pad = " " * (lead + _columns(text[:start]))
            out.append(f"{blue}{' ' * width} |{reset} {pad}{tint}{mark}{tail}{reset}")
    return out


MAX_COLUMNS = 160
"""The longest part of a line that is shown."""


def _window(text: str, labels: Sequence[Label]) -> tuple[str, int, str]:
    """The part of a line around its labels, where it starts, and how it is shown."""
    if len(text) <= MAX_COLUMNS:
        return text, 0, text
    first = min(label.span.column - 1 for label in labels)
    shift = max(0, first - 40) if first > MAX_COLUMNS // 2 else 0
    part = text[shift : shift + MAX_COLUMNS]
    head = "..." if shift else ""
    tail = "..." if shift + len(part) < len(text) else ""
    return part, shift, head + part + tail


def visible(text: str) -> str:
    """The text with a sign in place of each character that a terminal would act on."""
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() else " " if char == "\t" else "\ufffd" for char in text
    )


def _columns(text: str) -> int:
    """How many columns of a terminal the text takes."""
    if text.isascii():
        return len(text)
    wide = sum(unicodedata.east_asian_width(char) in "WF" for char in text)
    return len(text) + wide - sum(unicodedata.combining(char) > 0 for char in text)


def render_line(diagnostic: Diagnostic) -> str:
    """The diagnostic in one line: file:line:column: error[code]: message."""
    span = place_of(diagnostic)
    place = f"{span.source.name}:{span.line}:{span.column}"
    return f"{place}: {diagnostic.severity}[{diagnostic.code}]: {visible(diagnostic.message)}"


def to_json(diagnostic: Diagnostic) -> dict[str, Any]:
    """The diagnostic as a JSON object."""

    def place(span: Span) -> dict[str, Any]:
        end_line, end_column = span.source.position(span.end)
        return {
            "file": span.source.name,
            "line": span.line,
            "column": span.column,
            "end_line": end_line,
            "end_column": end_column,
        }

    found: dict[str, Any] = {
        "code": diagnostic.code,
        "severity": diagnostic.severity,
        "message": diagnostic.message,
        **place(diagnostic.primary.span),
        "label": diagnostic.primary.text,
        "secondary": [{**place(s.span), "label": s.text} for s in diagnostic.secondary],
        "notes": list(diagnostic.notes),
        "help": diagnostic.help.text if diagnostic.help else None,
    }
    if diagnostic.help and diagnostic.help.edit:
        edit = diagnostic.help.edit
        found["edit"] = {
            **place(edit.span), "replacement": edit.replacement, "certain": edit.certain,
        }  # fmt: skip
    return found


def render_json(diagnostics: Iterable[Diagnostic]) -> str:
    """The diagnostics as a JSON array, in source order."""
    ordered = sorted(diagnostics, key=lambda d: d.position)
    return json.dumps([to_json(d) for d in ordered], indent=2)


def edit_distance(a: str, b: str) -> int:
    """The Damerau-Levenshtein distance (adjacent transpositions count one)."""
    rows = [list(range(len(b) + 1))]
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            best = min(rows[-1][j] + 1, row[-1] + 1, rows[-1][j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                best = min(best, rows[-2][j - 2] + 1)
            row.append(best)
        rows.append(row)
    return rows[-1][-1]


def nearest(name: str, candidates: Iterable[str]) -> str | None:
    """The candidate that is near: at most one edit away for short names, two otherwise."""
    limit = 1 if len(name) <= 4 else 2
    close = [c for c in candidates if abs(len(c) - len(name)) <= limit]
    ranked = sorted((edit_distance(name.lower(), c.lower()), c) for c in close)
    return ranked[0][1] if ranked and ranked[0][0] <= limit else None
