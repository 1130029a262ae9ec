"""The checked program: each pipeline as a flat list of typed operations.

Functions are inlined, loops unrolled, names resolved; every value has a tensor type.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .dims import Expr, Facts
from .source import Source, Span
from .types import TensorType

ValueId = int


@dataclass(frozen=True)
class Apply:
    """One operation applied: tensor operands, static attributes, results, and where it stands."""

    op: str
    operands: tuple[ValueId, ...]
    attributes: tuple[tuple[str, Any], ...]
    results: tuple[ValueId, ...]
    span: Span
    stack: tuple[Span, ...] = ()
    label: str = ""


@dataclass(frozen=True)
class Check:
    """A condition on the sizes that only a call can decide: `expr` is zero, or not negative."""

    expr: Expr
    relation: str  # "==0" or ">=0"
    message: str
    span: Span


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Program:
    """A checked source file: its pipelines and the weight files they read, by name."""

    source: Source
    pipelines: tuple[Pipeline, ...]
    weights: Mapping[str, str] = field(default_factory=dict)
