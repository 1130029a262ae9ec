"""Exceptions that loading and calling a pipeline raise. Imports nothing heavy."""

from __future__ import annotations

from stagefuse.compiler.errors import InternalError, PlanError

__all__ = [
    "DeviceError",
    "IndexOutOfRange",
    "InputError",
    "InternalError",
    "OutOfMemory",
    "PlanError",
]


class InputError(ValueError):
    """Arguments of a call that the pipeline does not accept; the text says what it takes."""


class IndexOutOfRange(IndexError):
    """An index read from an input that is outside the axis it indexes.

    `file`, `line` and `column` say where in the source, `value` is the index that was found.
    """

    def __init__(
        self, message: str, *, file: str = "", line: int = 0, column: int = 0, value: int = 0
    ) -> None:
        super().__init__(message)
        self.file, self.line, self.column, self.value = file, line, column, value


class DeviceError(RuntimeError):
    """A device or a target that this machine, or this build, does not have."""


class OutOfMemory(MemoryError):
    """Memory for intermediates or results that could not be allocated."""
