"""Exceptions that the compiler and the reader of plans raise, besides diagnostics."""

from __future__ import annotations


class PlanError(ValueError):
    """A plan file that is damaged, foreign, of another version, or inconsistent in itself."""


class InternalError(RuntimeError):
    """A fault of stagefuse itself, never of the program or its inputs."""


class IRTextError(ValueError):
    """Text that is no graph or kernel: what is wrong, and in which line (from 1)."""

    def __init__(self, message: str, line: int) -> None:
        super().__init__(f"line {line}: {message}")
        self.line = line


class VerifyError(ValueError):
    """A graph or kernel that breaks a numbered invariant of its verifier.

    `where` is the node or statement in IR text, `place` the source line it came from.
    """

    def __init__(self, invariant: int, message: str, where: str = "", place: str = "") -> None:
        parts = [f"invariant {invariant}: {message}", where, place and f"from {place}"]
        super().__init__("\n  ".join(p for p in parts if p))
        self.invariant, self.where, self.place = invariant, where, place
