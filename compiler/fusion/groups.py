"""Groups of nodes that are one kernel each, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeAlias

from stagefuse.compiler.graph import (
    Carried,
    Concat,
    Constant,
    Gather,
    Graph,
    Input,
    Map,
    Node,
    Position,
    Recurrence,
    Ref,
    State,
    Update,
    View,
    Weight,
)
from stagefuse.compiler.patterns.attention import Softmax
from stagefuse.compiler.scalar import FUNCTIONS
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.frozen import frozen

Access: TypeAlias = tuple[Expr, ...] | None  # None: at positions read from data
SOURCES = (Input, State, Weight, Constant, Carried, Recurrence)
FREE = (View, Position, Gather, Concat)


@dataclass(eq=False)
class Group:
    """A kernel to be: roots are stored, members computed inside; `domain` is the loop space.

    `placed`: a root that holds another value in another order, as that value and the place of
    its element d0, d1... `rows`: in a chain, the row kernel between its two products. `packs`:
    panels that the kernel packs itself, as the kernel that would. `nest`: the recurrences at whose
    steps the kernel runs, outermost first. `when`: 1 at sizes at which the kernel runs and 0 at
    others, where another one has the same results. `thin`: products of few rows, whose panels are
    read where they lie. `softmax`: in attention, what the row kernel computes. `apart`: the kernels
    that do the same in several steps, for targets or sizes at which that is quicker.
    """

    kind: str  # pointwise, row, contract, chain, attention, scan, sort, scatter, update
    roots: list[Ref]
    domain: tuple[Expr, ...]
    members: set[int] = field(default_factory=set)
    accesses: dict[int, list[Access]] = field(default_factory=dict)
    row_axes: tuple[int, ...] | None = None
    anchor: int | None = None
    placed: dict[Ref, tuple[Ref, tuple[Expr, ...]]] = field(default_factory=dict)
    rows: Group | None = None
    packs: dict[Ref, Group] = field(default_factory=dict)
    nest: tuple[str, ...] = ()
    when: Expr = const(1)
    thin: bool = False
    softmax: Softmax | None = None
    apart: tuple[Group, ...] = ()

    def source(self, root: Ref) -> Ref:
        """The value that a root holds."""
        return self.placed[root][0] if root in self.placed else root

    def reads(self, graph: Graph) -> set[Ref]:
        """The values that members read, and stored ones that roots hold."""
        found = {ref for member in self.members for ref in graph.nodes[member].operands}
        return found | {ref for ref, _ in self.placed.values() if ref.node not in self.members}

    def loads(self, graph: Graph) -> set[Ref]:
        """What the kernel reads from memory, but for the base of an update."""
        found = {ref for ref, _ in self.placed.values() if ref.node not in self.members}
        for member in self.members:
            node = graph.nodes[member]
            operands = node.operands[1:] if isinstance(node.primitive, Update) else node.operands
            found |= {ref for ref in operands if ref.node not in self.members}
        for part in (*self.packs.values(), *([self.rows] if self.rows else [])):
            found |= part.loads(graph)
        return found


@frozen
class Decision:
    """Why a node was fused into a kernel, or was not."""

    node: int
    fused: bool
    reason: str


@dataclass
class Partition:
    """The kernels in an order in which each comes after what it reads."""

    groups: list[Group]
    decisions: list[Decision]


def is_free(node: Node) -> bool:
    """Whether a node is only an index map: it is computed again wherever it is read."""
    return isinstance(node.primitive, FREE)


def flops(node: Node) -> int:
    """Arithmetic per element, as the scalar table counts it."""
    return FUNCTIONS[node.primitive.fn].flops if isinstance(node.primitive, Map) else 0


def own_position(domain: Sequence[Expr]) -> tuple[Expr, ...]:
    """A kernel's own position; along an axis of size 1 there is only 0."""
    return tuple(const(0) if d.as_int() == 1 else sym(f"d{i}") for i, d in enumerate(domain))


def count_of(shape: Sequence[Expr]) -> Expr:
    total = const(1)
    for size in shape:
        total = total * size
    return total
