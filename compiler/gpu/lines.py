"""The lines of a PTX body as it is written: labels, branches, and the loops and branches in which
lines and what they compute belong.

A loop has an open place before it, where what does not change in it goes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple, TypeAlias, Union

if TYPE_CHECKING:
    from .ir import Value

Item: TypeAlias = Union["Line", list["Item"]]


class Line(NamedTuple):
    """A line of PTX with the place in the source that it stands for."""

    text: str
    loc: int = 0


@dataclass(eq=False)
class Scope:
    """A loop or branch being written: where its lines go, and what it knows.

    What a branch computes stays inside. Of one that `leaves` a loop, by the loop's depth, what does
    not change in the loop is computed before it.
    """

    lines: list[Item]
    fixed: bool  # a branch
    known: dict[tuple[str, ...], Value] = field(default_factory=dict)
    leaves: int | None = None


class Lines:
    """Lines in nested scopes."""

    def __init__(self) -> None:
        self.root: list[Item] = []
        self.loc = 0
        self.scopes = [Scope(self.root, False)]
        self._labels: dict[str, int] = {}

    @property
    def depth(self) -> int:
        return len(self.scopes) - 1

    # Text

    def text(self) -> list[str]:
        """The lines, with `.loc` where the place in the source changes."""
        found: list[str] = []
        at = 0
        stack: list[Iterator[Item]] = [iter(self.root)]
        while stack:
            item = next(stack[-1], None)
            if item is None:
                stack.pop()
            elif isinstance(item, list):
                stack.append(iter(item))
            else:
                if item.loc not in (0, at):
                    at = item.loc
                    found.append(f"\t.loc 1 {at} 0")
                found.append(item.text)
        return found

    def line(self, text: str) -> None:
        """An instruction that stays here."""
        self.scopes[-1].lines.append(Line(f"\t{text}", self.loc))

    def comment(self, text: str) -> None:
        self.scopes[-1].lines.append(Line(f"\t// {text}"))

    def label(self, hint: str) -> str:
        self._labels[hint] = self._labels.get(hint, 0) + 1
        return f"${hint}{self._labels[hint]}"

    def start(self, label: str) -> None:
        self.scopes[-1].lines.append(Line(f"{label}:"))

    def branch(self, label: str) -> None:
        self.line(f"bra {label};")

    def branch_if(self, condition: Value, label: str, holds: bool = True) -> None:
        if condition.known is not None:
            if bool(condition.known) == holds:
                self.branch(label)
            return
        self.line(f"@{'' if holds else '!'}{condition.text} bra {label};")

    # Scopes

    @contextmanager
    def loop_scope(self) -> Iterator[None]:
        """A loop: what does not change in it is computed before it."""
        outer = self.scopes[-1]
        before: list[Item] = []
        inside: list[Item] = []
        outer.lines += [before, inside]
        lines, outer.lines = outer.lines, before
        self.scopes.append(Scope(inside, False))
        try:
            yield
        finally:
            self.scopes.pop()
            outer.lines = lines

    @contextmanager
    def branch_scope(self, leaves: int | None = None) -> Iterator[None]:
        """A branch: what is computed inside is not known after it."""
        self.scopes.append(Scope(self.scopes[-1].lines, True, leaves=leaves))
        try:
            yield
        finally:
            self.scopes.pop()

    def place(self, operands: Sequence[Value]) -> int:
        """The depth of the outermost scope in which operands exist and that no branch shuts in."""
        at = len(self.scopes) - 1
        if at:
            least = max([o.depth for o in operands], default=0)
            while at > least:
                scope = self.scopes[at]
                if not scope.fixed:
                    at -= 1
                elif scope.leaves is not None and least < scope.leaves:
                    at = scope.leaves - 1
                else:
                    break
        return at
