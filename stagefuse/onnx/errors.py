"""What is said of a model that cannot be imported. Imports nothing heavy."""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.dsl.frozen import frozen


@frozen
class Problem:
    """One thing that stands in the way of an import.

    `op` and `node` say where, `attribute` which part of it (empty: the whole), `need` what would
    have to be there, and `inputs` which inputs of the model would have to be fixed.
    """

    message: str
    op: str = ""
    node: str = ""
    attribute: str = ""
    need: str = ""
    inputs: tuple[str, ...] = ()

    def __str__(self) -> str:
        place = " ".join(filter(None, (self.op, f"`{self.node}`" if self.node else "")))
        text = f"{place}: {self.message}" if place else self.message
        return text + (f"\n  = needs: {self.need}" if self.need else "")


class OnnxError(ValueError):
    """A model that cannot be imported: damaged, hostile, or with parts that are not supported.

    `problems` lists everything that was found, not only the first.
    """

    def __init__(self, problems: Sequence[Problem], path: str = "") -> None:
        self.problems, self.path = tuple(problems), path
        head = f"{path}: " if path else ""
        super().__init__("\n".join(f"{head}{problem}" for problem in self.problems))


class Refused(Exception):
    """Raised by the record of an op for a node that it does not translate."""

    def __init__(
        self, message: str, need: str = "", attribute: str = "", inputs: Sequence[str] = ()
    ) -> None:
        super().__init__(message)
        self.message, self.need, self.attribute = message, need, attribute
        self.inputs = tuple(inputs)

    def at(self, op: str, node: str) -> Problem:
        return Problem(self.message, op, node, self.attribute, self.need, self.inputs)
