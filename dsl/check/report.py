"""Collecting diagnostics: one per cause, none twice, in the order of the source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from stagefuse.dsl.diagnostics import CODES, Diagnostic, Label, error
from stagefuse.dsl.diagnostics import nearest as nearest_of
from stagefuse.dsl.source import Span

CODES.update(
    {
        "E0201": "an unknown name",
        "E0202": "two dtypes that differ",
        "E0203": "two shapes that do not broadcast",
        "E0204": "a value of the wrong kind",
        "E0205": "a tensor of another type than declared",
        "E0206": "arguments that do not fit the parameters",
        "E0207": "an operation that its operands do not allow",
        "E0208": "not known while compiling",
        "E0209": "a value that nothing uses",
        "E0210": "a name that cannot be bound",
        "E0211": "defined by itself",
        "E0212": "reserved for later",
        "E0213": "an import that fails",
        "E0214": "weights that are not there",
        "E0215": "index notation",
        "E0216": "an index",
        "E0217": "a condition of `where`",
        "E0218": "a body without a result",
        "E0219": "a type",
        "E0220": "an unknown attribute",
        "E0221": "a recurrence",
        "E0222": "an update of items",
        "E0223": "state",
    }
)
MAX_REPORTS = 100


class Failed(Exception):
    """A wrong program, with everything that its diagnostic says."""

    def __init__(
        self,
        code: str,
        message: str,
        span: Span,
        label: str = "",
        others: Sequence[tuple[Span, str]] = (),
        notes: Sequence[str] = (),
        help: str | None = None,
    ) -> None:
        super().__init__(message)
        self.code, self.message, self.span, self.label = code, message, span, label
        self.others, self.notes, self.help = tuple(others), tuple(notes), help

    def worded(self, words: Callable[[str], str]) -> Failed:
        """The same with each of its texts in other words."""
        return Failed(
            self.code,
            words(self.message),
            self.span,
            words(self.label),
            [(span, words(text)) for span, text in self.others],
            [words(note) for note in self.notes],
            None if self.help is None else words(self.help),
        )


def text_of(span: Span) -> str:
    """The source of a span, on one line."""
    return " ".join(span.source.text[span.start : span.end].split())


def nearest(name: str, names: Iterable[str]) -> str | None:
    """The known name that is near; one of one or two letters is near only in another case."""
    if len(name) < 3:
        return next((n for n in names if n != name and n.lower() == name.lower()), None)
    return nearest_of(name, names)


_ABOUT_THE_LINE = {
    "E0202": "convert what the call is given to one dtype; weights have that of their file",
    **dict.fromkeys(("E0203", "E0207", "E0215", "E0222")),
}
"""Codes whose help is about the line where they are found, and the help where that line is not the
user's own."""


class Reporter:
    """The diagnostics found so far; the same place is reported once.

    What is wrong in a function of the standard library is wrong with the call of it, and shown
    there; the library's line is shown too.

    While `doubt` is set, the failures that it holds for are not reported.
    """

    def __init__(self) -> None:
        self.found: dict[tuple[str, str, int, int], Diagnostic] = {}
        self.doubt: Callable[[Failed], bool] | None = None

    def report(self, failure: Failed, stack: Sequence[Span] = ()) -> None:
        """Keep a failure; `stack` are the calls that led to it, outermost first."""
        span, others = failure.span, list(failure.others)
        label, advice = failure.label, failure.help
        calls = [c for c in reversed(stack) if c is not span]
        own = next((n for n, c in enumerate(calls) if not c.source.is_standard), None)
        if span.source.is_standard and own is not None:
            others.insert(0, (span, label))
            span, label = calls[own], ""
            calls = calls[own + 1 :]
            if failure.code in _ABOUT_THE_LINE:
                advice = _ABOUT_THE_LINE[failure.code]
        key = (failure.code, span.source.name, span.start, failure.span.end)
        if key in self.found or len(self.found) >= MAX_REPORTS:
            return
        if self.doubt is not None and self.doubt(failure):
            return
        notes = list(failure.notes)
        for call in calls[:4]:
            line, column = call.source.position(call.start)
            notes.append(f"in the call `{_short(call)}` at {call.source.name}:{line}:{column}")
        secondary = [Label(place, text) for place, text in others]
        self.found[key] = error(
            failure.code, failure.message, span, label,
            secondary=secondary, notes=notes, help=advice,
        )  # fmt: skip

    def extend(self, diagnostics: Iterable[Diagnostic]) -> None:
        """Keep the diagnostics of another phase."""
        for diagnostic in diagnostics:
            span = diagnostic.primary.span
            key = (diagnostic.code, span.source.name, span.start, span.end)
            self.found.setdefault(key, diagnostic)

    @contextmanager
    def catching(self, stack: Sequence[Span] = ()) -> Iterator[None]:
        """Report a failure inside and go on after the block."""
        try:
            yield
        except Failed as failure:
            self.report(failure, stack)

    def ordered(self, first: str) -> tuple[Diagnostic, ...]:
        """All of them: those of the file `first` before others, by place."""
        return tuple(
            sorted(self.found.values(), key=lambda d: (d.position[0] != first, d.position))
        )


def _short(span: Span) -> str:
    text = text_of(span)
    return text if len(text) <= 50 else text[:47] + "..."


__all__ = ["Failed", "Reporter", "nearest", "text_of"]
