"""Buffers, scopes and loops of a kernel under construction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeAlias

from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.graph import (
    Graph,
    Ref,
)
from stagefuse.compiler.kernel_ir import (
    Buffer,
    For,
    If,
    Statement,
    Value,
)
from stagefuse.compiler.schedule import Schedule
from stagefuse.dsl.dims import Expr, const
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.source import Span

from .expressions import product_of

Parallel: TypeAlias = tuple[list[tuple[str, Expr]], Expr]
"""The parallel indices with their extents, and the arithmetic of one step."""


@dataclass
class Sites:
    """The places whose data-dependent positions are checked, numbered from 0, each with the size
    of the axis that it indexes and how many positions it takes from there."""

    places: list[tuple[Span | None, Expr, Expr]] = field(default_factory=list)

    def number(self, span: Span | None, extent: Expr, length: Expr | None = None) -> int:
        place = (span, extent, const(1) if length is None else length)
        if place not in self.places:
            self.places.append(place)
        return self.places.index(place)


@dataclass
class Scope:
    """A block under construction, and the loop symbols bound around it and by it."""

    bound: frozenset[str]
    body: list[Statement] = field(default_factory=list)
    known: dict[object, Value] = field(default_factory=dict)


class Blocks:
    """The buffers and nested blocks of the kernel that is being made."""

    def __init__(self, graph: Graph, group: Group, sites: Sites, schedule: Schedule) -> None:
        self.graph, self.group, self.sites, self.schedule = graph, group, sites, schedule
        self.buffers: dict[Ref, Buffer] = {}
        self.flat = False
        self.scopes = [Scope(frozenset())]
        self.fresh = 0
        self.products: dict[Ref, Callable[[tuple[Value, ...]], Value]] = {}
        self.column: tuple[Expr, Expr] | None = None
        self.columns = schedule.columns  # of a block of them
        self.beside: list[tuple[str, Expr]] = []  # axes before the last whose columns are one block
        self.facts: Facts = graph.facts

    # Buffers and scopes

    def buffer(self, ref: Ref, mode: str) -> Buffer:
        if self.group.kind == "update" and ref in self.group.roots:
            ref = self.graph.nodes[ref.node].operands[0]  # where it is updated
        if ref not in self.buffers:
            type = self.graph.type(ref)
            shape = type.shape
            if self.flat:
                shape = (product_of(shape),) if shape else ()
            self.buffers[ref] = Buffer(f"b{len(self.buffers)}", type.dtype, shape, mode)
        elif self.buffers[ref].mode != mode:
            self.buffers[ref] = replace(self.buffers[ref], mode="inout")
        return self.buffers[ref]

    def name(self, prefix: str) -> str:
        self.fresh += 1
        return f"{prefix}{self.fresh}"

    def emit(self, statement: Statement) -> None:
        self.scopes[-1].body.append(statement)

    def loop(
        self, index: str, lo: Expr, hi: Expr, body: Callable[[], None], vector: bool = False
    ) -> None:
        self.facts = self.facts.with_ranges({index: (lo, hi - 1)})
        self.scopes.append(Scope(self.scopes[-1].bound | {index}))
        body()
        scope = self.scopes.pop()
        self.emit(For(index, lo, hi, tuple(scope.body), vector))

    def nest(self, loops: Sequence[tuple[str, Expr]], body: Callable[[], None]) -> None:
        """Loops over whole axes, the last one a vector loop."""
        if not loops:
            return body()
        (index, extent), rest = loops[0], loops[1:]
        self.loop(index, const(0), extent, lambda: self.nest(rest, body), vector=not rest)

    def branch(self, condition: Value, body: Callable[[], None]) -> None:
        """Statements that run where a condition holds."""
        self.scopes.append(Scope(self.scopes[-1].bound))
        body()
        scope = self.scopes.pop()
        self.emit(If(condition, tuple(scope.body)))

    def scope_for(self, symbols: frozenset[str]) -> Scope:
        """The outermost scope that binds these loop symbols."""
        everything = frozenset[str]().union(*(s.bound for s in self.scopes))
        needed = symbols & everything
        return next(s for s in self.scopes if needed <= s.bound)

    # Kernel forms

    def bind(self, parallel: Sequence[tuple[str, Expr]]) -> None:
        self.scopes[0].bound |= {name for name, _ in parallel}
        self.facts = self.facts.with_ranges({n: (0, e - 1) for n, e in parallel})

    def axes(self, axes: Sequence[int]) -> list[tuple[str, Expr]]:
        return [(f"d{a}", self.group.domain[a]) for a in axes]
