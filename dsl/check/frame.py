"""What the names of one body stand for."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from stagefuse.dsl.dims import Expr
from stagefuse.dsl.dtypes import DType
from stagefuse.dsl.source import Span

from .modules import Checker, ModuleScope
from .record import Recorder
from .report import Failed
from .values import Dim, DTypeValue, Space, Tensor, Value

if TYPE_CHECKING:
    from .notation import Notation
    from .recurrence import Steps


@dataclass
class Frame:
    """A body being evaluated: its module, its names, the index notation and the scan around it."""

    checker: Checker
    recorder: Recorder
    module: ModuleScope
    locals: dict[str, Value] = field(default_factory=dict)
    dims: dict[str, Expr] = field(default_factory=dict)
    dtypes: dict[str, DType] = field(default_factory=dict)
    indices: dict[str, Dim] = field(default_factory=dict)
    space: Space = ()
    notation: Notation | None = None
    steps: Steps | None = None
    states: dict[str, Tensor] = field(default_factory=dict)  # as updates of items alone left them

    def find(self, name: str) -> Value | None:
        """The value of a name, or None."""
        if name in self.indices:
            return self.indices[name]
        if name in self.locals:
            return self.locals[name]
        if name in self.dims:
            return Dim(self.dims[name])
        if name in self.dtypes:
            return DTypeValue(self.dtypes[name])
        found = self.checker.value(self.module, name)
        return found if found is not None else self.checker.builtin(name)

    def names(self) -> list[str]:
        """Every name that could be meant."""
        return [
            *self.indices,
            *self.locals,
            *self.dims,
            *self.dtypes,
            *self.module.items,
            *self.checker.known_names(),
        ]

    def bind(self, name: str, value: Value, span: Span) -> None:
        """Bind a local name; a state keeps its type. Raises Failed."""
        self.checker.require_free(name, span)
        if name in self.states:
            from .updates import kept

            value = kept(self, name, value, span)
        self.locals[name] = value

    def report(self, failure: Failed) -> None:
        """Keep a failure, as found in the calls that led here, in the source's own names."""
        self.checker.reporter.report(failure.worded(self.recorder.shown), self.recorder.calls)

    def within(self, indices: dict[str, Dim], space: Space, notation: Notation | None) -> Frame:
        """The same names with indices in scope."""
        return replace(self, indices=indices, space=space, notation=notation)
