"""Collecting diagnostics: one per cause, none twice, in the order of the source."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from ..source import Span


class Failed(Exception):
    """A wrong program, with everything that its diagnostic says."""

    def __init__(
        self, code: str, message: str, span: Span, label: str = "",
        others: Sequence[tuple[Span, str]] = (), notes: Sequence[str] = (),
        help: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.span, self.label = code, message, span, label
        self.others, self.notes, self.help = tuple(others), tuple(notes), help


def text_of(span: Span) -> str:
    """The source of a span, on one line."""
    return " ".join(span.source.text[span.start : span.end].split())


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The known name that is nearest, if one is near.

    Source: Damerau-Levenshtein distance, at most 1 for short names and 2 otherwise.
    """
    limit = 1 if len(name) < 5 else 2
    best: tuple[int, str] | None = None
    for candidate in sorted(set(names)):
        if abs(len(candidate) - len(name)) > limit or candidate == name:
            continue
        distance = _distance(name.lower(), candidate.lower())
        if distance <= limit and (best is None or distance < best[0]):
            best = (distance, candidate)
    return best[1] if best else None


def _distance(a: str, b: str) -> int:
    before: list[int] = []
    last = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        row = [i]
        for j, y in enumerate(b, 1):
            cost = min(last[j] + 1, row[j - 1] + 1, last[j - 1] + (x != y))
            if i > 1 and j > 1 and x == b[j - 2] and a[i - 2] == y:
                cost = min(cost, before[j - 2] + 1)
            row.append(cost)
        before, last = last, row
    return last[-1]
