"""What can be wrong with PTX: its syntax, an instruction, an operand, a target."""

from __future__ import annotations


class PtxError(ValueError):
    """PTX that cannot be read, or that an instruction, operand or target does not allow.

    `line` is the line of the text that was read, or 0 where there was none.
    """

    def __init__(self, message: str, *, line: int = 0) -> None:
        super().__init__(f"line {line}: {message}" if line else message)
        self.message, self.line = message, line
