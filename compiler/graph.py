"""The dataflow graph: a few primitives, typed results, topology kept by NetworkX.

A node's operands are references to results of earlier nodes. Views are index maps: each says
where an element of the result comes from, as expressions over the result's index symbols.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from stagefuse.dsl.dims import Expr, const, floordiv, mod
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.source import Span
from stagefuse.dsl.types import TensorType

if TYPE_CHECKING:
    pass


_NUMBERS = (float, int)


class _BitEqual:
    """Equal where all fields are, numbers bit for bit: 0.0 is not -0.0, nor is 1 True."""

    def _bits(self) -> tuple[Any, ...]:
        values = [getattr(self, name) for name in self.__dataclass_fields__]  # type: ignore[attr-defined]
        return tuple([repr(v) if isinstance(v, _NUMBERS) else v for v in values])

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        return type(other) is type(self) and other._bits() == self._bits()

    def __hash__(self) -> int:
        found: int | None = self.__dict__.get("_hash")
        if found is None:
            found = self.__dict__["_hash"] = hash(self._bits())
        return found


WIDE = 128
"""Operands of one concatenation; more are concatenated in steps."""


class Ref(NamedTuple):
    """A result of a node."""

    node: int
    result: int = 0


@frozen
class Input:
    """An argument of the pipeline."""

    FORM: ClassVar[str] = "input {name}"
    name: str


@frozen
class State:
    """What a session keeps, as it is before the call."""

    FORM: ClassVar[str] = "state {name}"
    name: str


@frozen
class Weight:
    """A tensor of a weight file: the file's name in the source, and the tensor's key."""

    FORM: ClassVar[str] = "weight {weights} {key}"
    weights: str
    key: str


@frozen
class Constant:
    """A tensor known while compiling: its bytes, row-major."""

    FORM: ClassVar[str] = "constant {data}"
    data: bytes


@dataclass(frozen=True, eq=False)
class Scalar(_BitEqual):
    """A number known while compiling, already rounded to the result's dtype."""

    FORM: ClassVar[str] = "scalar {value}"
    value: float | int | bool


@frozen
class Map:
    """A pointwise function; all operands have the result's shape. `cast` converts to its dtype."""

    FORM: ClassVar[str] = "map {fn}"
    fn: str


@frozen
class Reduce:
    """A reduction that removes `axes` (ascending). Small floats accumulate in f32."""

    FORM: ClassVar[str] = "reduce {kind} over {axes}"
    kind: str  # sum prod max min any all argmax argmin
    axes: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class View(_BitEqual):
    """result[symbols] = operand[indices] where every guard is >= 0, else `fill`."""

    FORM: ClassVar[str] = "view {symbols} -> {indices}[[ where {guard:nonneg} else {fill}]]"
    symbols: tuple[str, ...]
    indices: tuple[Expr, ...]
    guard: tuple[Expr, ...] = ()
    fill: float | int | bool = 0


@frozen
class Indirect:
    """An index read from an i64 operand: value * scale + offset; negative counts from the end."""

    FORM: ClassVar[str] = "operand {operand} at {indices}[[ times {scale}]][[ plus {offset}]]"
    operand: int
    indices: tuple[Expr, ...]
    scale: Expr = const(1)
    offset: Expr = const(0)


@frozen
class Gather:
    """result[symbols] = operand[indices], some of them read from index tensors and checked."""

    FORM: ClassVar[str] = "gather {symbols} -> {indices}"
    symbols: tuple[str, ...]
    indices: tuple[Expr | Indirect, ...]


@frozen
class Position:
    """result[symbols] = the i64 value of an expression over the symbols and dimensions."""

    FORM: ClassVar[str] = "position {symbols} -> {expr}"
    symbols: tuple[str, ...]
    expr: Expr


@frozen
class Concat:
    """The operands one after another along `axis`."""

    FORM: ClassVar[str] = "concat along {axis}"
    axis: int


@frozen
class Scan:
    """The running sum or product along `axis`."""

    FORM: ClassVar[str] = "scan {kind} along {axis}"
    kind: str
    axis: int


@frozen
class Sort:
    """Two results: the values in stable order along `axis`, and where they came from.

    NaN is greater than every number: last, or first if descending.
    """

    FORM: ClassVar[str] = "sort along {axis}[[ {descending:flag}]]"
    axis: int
    descending: bool = False


@frozen
class Scatter:
    """Operands base, indices (i64, rank 1), updates: base with updates combined along `axis`."""

    FORM: ClassVar[str] = "scatter {kind} along {axis}"
    kind: str  # add max set
    axis: int


@frozen
class Within:
    """The i64 operand as positions: p with p..p+length in 0..extent; negative counts from the end.

    One that is not is reported, and is 0.
    """

    FORM: ClassVar[str] = "within {extent}[[ for {length}]]"
    extent: Expr
    length: Expr = const(1)


@frozen
class Update:
    """Operands base, value, index tensors: result[indices] = value[symbols], else the base.

    The result lies where the base lies: whatever else reads the base runs before, or the base is a
    copy. Index tensors hold positions that are known to be inside; of repeated ones the last
    holds. `state` names what it changes for the next call too: its base is that state, or an
    update of it.
    """

    FORM: ClassVar[str] = "update[[ of {state}]] {symbols} -> {indices}"
    symbols: tuple[str, ...]
    indices: tuple[Expr | Indirect, ...]
    state: str = ""


@frozen
class Contract:
    """A matrix product: operands a and panels, both f32, f64 or (for GPUs) i32, or (for CPUs) of
    integers of 8 bits each, with a result in i32. A third one, if
    there is one, is what `filtering` makes of a: it says nothing new.

    `batch`, `rows`, `columns` are the result's axes; `depth` the length of the sum. Row m (flat)
    of the matrix starts at element `base + m * row_stride` of `a` and is contiguous; `base` is
    over the result's symbols i0, i1... of the batch axes. `panels` is
    [batch..., ceil(columns / panel), depth, panel], zero-padded.
    """

    batch: tuple[int, ...]
    rows: tuple[int, ...]
    columns: tuple[int, ...]
    depth: Expr
    base: Expr
    row_stride: Expr
    panel: int = 48


@frozen
class Carried:
    """The two latest values of what a recurrence carries: the one at its step is at [step % 2].

    Operand: the value before the first step. Result: [2, ...]; the other half is not defined at
    the first step.
    """

    FORM: ClassVar[str] = "carried {number} over {step}"
    step: str
    number: int


@frozen
class Recurrence:
    """Steps one after the other: what depends on the symbol `step` or on what is carried over it
    is computed at each of the `count` steps, from 0.

    Operands: the `carried` nodes, as many values for the next step, and what is gathered. Results:
    for each carried node its two latest values, the last at [count % 2]; for each gathered
    value, all of them along a new first axis, that of a step at its place in `places`.
    """

    FORM: ClassVar[str] = "recurrence of {count} over {step} carries {carried} gathers at {places}"
    step: str
    count: Expr
    carried: int
    places: tuple[Expr, ...]


Primitive: TypeAlias = (
    Input | State | Weight | Constant | Scalar | Map | Reduce | View | Gather | Position | Concat
    | Scan | Sort | Scatter | Within | Update | Contract | Carried | Recurrence
)  # fmt: skip


@frozen
class Node:
    """One primitive applied, and the source it came from."""

    id: int
    primitive: Primitive
    operands: tuple[Ref, ...]
    types: tuple[TensorType, ...]
    span: Span | None = None
    stack: tuple[Span, ...] = ()
    label: str = ""

    @property
    def type(self) -> TensorType:
        return self.types[0]


@dataclass
class Graph:
    """Nodes by id, in a topological order, with the inputs' names and the results.

    Behind the pipeline's results stand the updates that give its states their new values.
    """

    facts: Facts
    nodes: dict[int, Node] = field(default_factory=dict)
    results: tuple[Ref, ...] = ()
    made: Any = field(default=None, repr=False, compare=False)  # the topology, once it is asked for
    read: dict[Ref, list[int]] | None = field(default=None, init=False, repr=False, compare=False)

    def add(self, node: Node) -> None:
        self.nodes[node.id] = node
        self.read = None
        if self.made is not None:
            self._connect(node)

    @property
    def topology(self) -> Any:
        """The nodes' numbers as a NetworkX directed graph, from operands to their users."""
        if self.made is None:
            import networkx as nx  # 70 ms, and checking a program asks for no topology

            self.made = nx.DiGraph()
            for node in self.nodes.values():
                self._connect(node)
        return self.made

    def _connect(self, node: Node) -> None:
        self.made.add_node(node.id)
        self.made.add_edges_from((ref.node, node.id) for ref in node.operands)

    def type(self, ref: Ref) -> TensorType:
        return self.nodes[ref.node].types[ref.result]

    def uses(self) -> dict[Ref, list[int]]:
        """The nodes that read each result, in order, a node once per operand; not to be changed."""
        if self.read is None:
            self.read = {}
            for node in self.nodes.values():
                for ref in node.operands:
                    self.read.setdefault(ref, []).append(node.id)
        return self.read

    def live(self) -> Graph:
        """This graph without what no result depends on; inputs stay."""
        keep: set[int] = set()
        pending = [ref.node for ref in self.results]
        while pending:
            here = pending.pop()
            if here not in keep:
                keep.add(here)
                pending.extend(ref.node for ref in self.nodes[here].operands)
        graph = Graph(self.facts, results=self.results)
        for node_id, node in self.nodes.items():
            if node_id in keep or isinstance(node.primitive, Input):
                graph.add(node)
        return graph


def flatten_index(at: Sequence[Expr], shape: Sequence[Expr]) -> Expr:
    """The row-major position of an index."""
    total = const(0)
    for index, size in zip(at, shape, strict=True):
        total = total * size + index
    return total


def split_index(position: Expr, shape: Sequence[Expr], facts: Facts) -> list[Expr]:
    """The index of a row-major position; the inverse of `flatten_index`."""
    parts: list[Expr] = []
    for axis, size in reversed(list(enumerate(shape))):
        if size.as_int() == 1:
            parts.append(const(0))
        elif all(d.as_int() == 1 for d in shape[:axis]):
            parts.append(position)
            position = const(0)
        else:
            parts.append(mod(position, size, facts))
            position = floordiv(position, size, facts)
    return parts[::-1]
