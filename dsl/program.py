"""The checked program: each pipeline as a flat list of typed operations.

Functions are inlined, loops unrolled, names resolved; every value has a tensor type.
"""

from __future__ import annotations

import keyword
from collections.abc import Mapping
from dataclasses import field
from typing import Any

from .dims import Expr
from .facts import Facts
from .frozen import frozen
from .source import Source, Span
from .types import TensorType

ValueId = int
NO_INPUTS = frozenset((*keyword.kwlist, "out"))
"""Names by which a call cannot pass an input."""


@frozen
class Apply:
    """One operation applied: tensor operands, static attributes, results, and where it stands."""

    op: str
    operands: tuple[ValueId, ...]
    attributes: tuple[tuple[str, Any], ...]
    results: tuple[ValueId, ...]
    span: Span
    stack: tuple[Span, ...] = ()
    label: str = ""


@frozen
class Check:
    """A condition on the sizes that only a call can decide: `expr` is zero, or not negative."""

    expr: Expr
    relation: str  # "==0" or ">=0"
    message: str
    span: Span


@frozen
class State:
    """What a session keeps between calls: its value before a call, and after it.

    It begins as a number, or as the tensor of a weight file: the file's name and the key.
    `updated` is the last value that came from updates of items alone.
    """

    name: str
    type: TensorType
    initial: int | float | bool | tuple[str, str]
    before: ValueId
    updated: ValueId
    after: ValueId
    span: Span


@frozen
class Pipeline:
    """An entry point: what goes in, what comes out, and the operations between."""

    name: str
    doc: str
    inputs: tuple[tuple[str, TensorType, Span], ...]
    results: tuple[tuple[str | None, ValueId], ...]
    types: Mapping[ValueId, TensorType]
    body: tuple[Apply, ...]
    facts: Facts
    dims: tuple[str, ...]
    checks: tuple[Check, ...] = ()
    span: Span | None = None
    states: tuple[State, ...] = ()

    @property
    def session_dims(self) -> tuple[str, ...]:
        """The dimensions that a session fixes: those in the shapes of its states."""
        used = {s for state in self.states for size in state.type.shape for s in size.symbols()}
        return tuple(d for d in self.dims if d in used)


@frozen
class Program:
    """A checked source file: its pipelines and the weight files they read, by name."""

    source: Source
    pipelines: tuple[Pipeline, ...]
    weights: Mapping[str, str] = field(default_factory=dict)
