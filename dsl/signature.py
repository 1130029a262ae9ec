"""What the checker must know of a built-in operation; the records live with the compiler."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

from .dims import Expr
from .facts import Facts
from .frozen import frozen
from .types import TensorType


class Required:
    """The default of a parameter that has none."""

    def __repr__(self) -> str:
        return "REQUIRED"


REQUIRED = Required()


@frozen
class Param:
    """One parameter of a built-in.

    `kind` is tensor, tensors, int, float, bool, str, dtype, axis, dims, ints, pairs, parts or
    scalar.
    Tensor parameters of one `group` share a dtype, which an untyped literal takes.
    """

    name: str
    kind: str
    default: Any = REQUIRED
    group: str | None = None
    keyword_only: bool = False


@dataclass
class OpError(Exception):
    """A call that the type rule refuses; the checker adds the places."""

    message: str
    param: str | None = None
    label: str = ""
    notes: list[str] = field(default_factory=list)
    help: str | None = None

    def __str__(self) -> str:
        return self.message


class Builtin(Protocol):
    """A built-in operation as the checker sees it."""

    @property
    def name(self) -> str: ...
    @property
    def params(self) -> tuple[Param, ...]: ...
    @property
    def doc(self) -> str: ...
    @property
    def user_callable(self) -> bool: ...

    def infer(self, args: Mapping[str, Any], facts: Facts) -> tuple[TensorType, ...]:
        """The result types. Raises OpError."""
        ...

    def checks(self, args: Mapping[str, Any], facts: Facts) -> list[tuple[Expr, str, str]]:
        """What only a call can decide: an expression, "==0" or ">=0", and the message."""
        ...

    def fold(self, *numbers: Any) -> Any:
        """The value for literal arguments, or None if it cannot be folded."""
        ...
