"""The dataflow graph: a few primitives, typed results, topology kept by NetworkX.

A node's operands are references to results of earlier nodes. Views are index maps: each says
where an element of the result comes from, as expressions over the result's index symbols.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, TypeAlias

from stagefuse.dsl.dims import Expr, IntLike, as_expr, const, floordiv, mod, sym
from stagefuse.dsl.dtypes import BOOL, I64, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.source import Span
from stagefuse.dsl.types import TensorType

from .scalar import convert

if TYPE_CHECKING:
    import numpy as np


class _BitEqual:
    """Equal where all fields are, numbers bit for bit: 0.0 is not -0.0, nor is 1 True."""

    def _bits(self) -> tuple[Any, ...]:
        values = (getattr(self, name) for name in self.__dataclass_fields__)  # type: ignore[attr-defined]
        return tuple(repr(v) if isinstance(v, float | int) else v for v in values)

    def __eq__(self, other: object) -> bool:
        return type(other) is type(self) and other._bits() == self._bits()

    def __hash__(self) -> int:
        return hash(self._bits())


WIDE = 64
"""Operands of one concatenation; more are concatenated in steps."""


class Ref(NamedTuple):
    """A result of a node."""

    node: int
    result: int = 0


@dataclass(frozen=True)
class Input:
    """An argument of the pipeline."""

    FORM: ClassVar[str] = "input {name}"
    name: str


@dataclass(frozen=True)
class State:
    """What a session keeps, as it is before the call."""

    FORM: ClassVar[str] = "state {name}"
    name: str


@dataclass(frozen=True)
class Weight:
    """A tensor of a weight file: the file's name in the source, and the tensor's key."""

    FORM: ClassVar[str] = "weight {weights} {key}"
    weights: str
    key: str


@dataclass(frozen=True)
class Constant:
    """A tensor known while compiling: its bytes, row-major."""

    FORM: ClassVar[str] = "constant {data}"
    data: bytes


@dataclass(frozen=True, eq=False)
class Scalar(_BitEqual):
    """A number known while compiling, already rounded to the result's dtype."""

    FORM: ClassVar[str] = "scalar {value}"
    value: float | int | bool


@dataclass(frozen=True)
class Map:
    """A pointwise function; all operands have the result's shape. `cast` converts to its dtype."""

    FORM: ClassVar[str] = "map {fn}"
    fn: str


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Indirect:
    """An index read from an i64 operand: value * scale + offset; negative counts from the end."""

    FORM: ClassVar[str] = "operand {operand} at {indices}[[ times {scale}]][[ plus {offset}]]"
    operand: int
    indices: tuple[Expr, ...]
    scale: Expr = const(1)
    offset: Expr = const(0)


@dataclass(frozen=True)
class Gather:
    """result[symbols] = operand[indices], some of them read from index tensors and checked."""

    FORM: ClassVar[str] = "gather {symbols} -> {indices}"
    symbols: tuple[str, ...]
    indices: tuple[Expr | Indirect, ...]


@dataclass(frozen=True)
class Position:
    """result[symbols] = the i64 value of an expression over the symbols and dimensions."""

    FORM: ClassVar[str] = "position {symbols} -> {expr}"
    symbols: tuple[str, ...]
    expr: Expr


@dataclass(frozen=True)
class Concat:
    """The operands one after another along `axis`."""

    FORM: ClassVar[str] = "concat along {axis}"
    axis: int


@dataclass(frozen=True)
class Scan:
    """The running sum or product along `axis`."""

    FORM: ClassVar[str] = "scan {kind} along {axis}"
    kind: str
    axis: int


@dataclass(frozen=True)
class Sort:
    """Two results: the values in stable order along `axis`, and where they came from.

    NaN is greater than every number: last, or first if descending.
    """

    FORM: ClassVar[str] = "sort along {axis}[[ {descending:flag}]]"
    axis: int
    descending: bool = False


@dataclass(frozen=True)
class Scatter:
    """Operands base, indices (i64, rank 1), updates: base with updates combined along `axis`."""

    FORM: ClassVar[str] = "scatter {kind} along {axis}"
    kind: str  # add max set
    axis: int


@dataclass(frozen=True)
class Within:
    """The i64 operand as positions: p with p..p+length in 0..extent; negative counts from the end.

    One that is not is reported, and is 0.
    """

    FORM: ClassVar[str] = "within {extent}[[ for {length}]]"
    extent: Expr
    length: Expr = const(1)


@dataclass(frozen=True)
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


@dataclass(frozen=True)
class Contract:
    """A matrix product: operands a and panels, both f32 or f64.

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


@dataclass(frozen=True)
class Carried:
    """The two latest values of what a recurrence carries: the one at its step is at [step % 2].

    Operand: the value before the first step. Result: [2, ...]; the other half is not defined at
    the first step.
    """

    FORM: ClassVar[str] = "carried {number} over {step}"
    step: str
    number: int


@dataclass(frozen=True)
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


@dataclass(frozen=True)
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


def _topology() -> Any:
    import networkx as nx  # 70 ms, and checking a program builds no graph

    return nx.DiGraph()


@dataclass
class Graph:
    """Nodes by id, in a topological order, with the inputs' names and the results.

    Behind the pipeline's results stand the updates that give its states their new values.
    """

    facts: Facts
    nodes: dict[int, Node] = field(default_factory=dict)
    topology: Any = field(default_factory=_topology)
    results: tuple[Ref, ...] = ()

    def add(self, node: Node) -> None:
        self.nodes[node.id] = node
        self.topology.add_node(node.id)
        self.topology.add_edges_from((ref.node, node.id) for ref in node.operands)

    def type(self, ref: Ref) -> TensorType:
        return self.nodes[ref.node].types[ref.result]

    def uses(self) -> dict[Ref, list[int]]:
        """The nodes that read each result, in order, a node once per operand."""
        found: dict[Ref, list[int]] = {}
        for node in self.nodes.values():
            for ref in node.operands:
                found.setdefault(ref, []).append(node.id)
        return found

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


class Builder:
    """Builds a graph, one node per different computation: equal nodes are the same node."""

    def __init__(self, facts: Facts) -> None:
        self.graph = Graph(facts)
        self.facts = facts
        self._known: dict[Any, int] = {}
        self._where: tuple[Span | None, tuple[Span, ...], str] = (None, (), "")
        self._fresh = 0

    @contextmanager
    def at(
        self, span: Span | None, stack: tuple[Span, ...] = (), label: str = ""
    ) -> Iterator[None]:
        """Nodes made inside carry this place."""
        before, self._where = self._where, (span, stack, label)
        try:
            yield
        finally:
            self._where = before

    def add(
        self, primitive: Primitive, operands: Sequence[Ref], types: Sequence[TensorType]
    ) -> tuple[Ref, ...]:
        """The results of a primitive, made once for equal primitives and operands."""
        key = (primitive, tuple(operands), tuple(types))
        if key not in self._known:
            self._known[key] = len(self.graph.nodes)
            self.graph.add(
                Node(self._known[key], primitive, tuple(operands), tuple(types), *self._where)
            )
        return tuple(Ref(self._known[key], i) for i in range(len(types)))

    def _one(self, primitive: Primitive, operands: Sequence[Ref], type: TensorType) -> Ref:
        return self.add(primitive, operands, (type,))[0]

    def type(self, ref: Ref) -> TensorType:
        return self.graph.type(ref)

    def input(self, name: str, type: TensorType) -> Ref:
        return self._one(Input(name), (), type)

    def state(self, name: str, type: TensorType) -> Ref:
        return self._one(State(name), (), type)

    def weight(self, weights: str, key: str, type: TensorType) -> Ref:
        return self._one(Weight(weights, key), (), type)

    def constant(self, array: np.ndarray[Any, Any], dtype: DType) -> Ref:
        import numpy as np

        data = np.ascontiguousarray(array, dtype.numpy).tobytes()
        return self._one(Constant(data), (), TensorType(dtype, tuple(map(const, array.shape))))

    def scalar(self, value: float | int | bool, dtype: DType, shape: Sequence[Expr] = ()) -> Ref:
        """A number rounded once to `dtype`, broadcast to `shape`."""
        import numpy as np

        if dtype.is_bool:
            value = bool(value)
        elif dtype.is_int:
            value = int(value)
        else:
            value = float(convert(np.asarray(value, np.float64), dtype))
        return self.broadcast(self._one(Scalar(value), (), TensorType(dtype, ())), shape)

    def map(self, fn: str, *operands: Ref, dtype: DType | None = None) -> Ref:
        """A pointwise function; bool for comparisons and predicates, else the last operand's."""
        shape = self.type(operands[0]).shape
        if dtype is None:
            dtype = BOOL if fn in _PREDICATES else self.type(operands[-1]).dtype
        return self._one(Map(fn), operands, TensorType(dtype, shape))

    def cast(self, x: Ref, dtype: DType) -> Ref:
        return x if self.type(x).dtype == dtype else self.map("cast", x, dtype=dtype)

    def reduce(self, kind: str, x: Ref, axes: Sequence[int], dtype: DType | None = None) -> Ref:
        type = self.type(x)
        removed = sorted(a % type.rank for a in axes)
        shape = tuple(d for i, d in enumerate(type.shape) if i not in removed)
        if dtype is None:
            dtype = I64 if kind.startswith("arg") else type.dtype
        return self._one(Reduce(kind, tuple(removed)), (x,), TensorType(dtype, shape))

    def symbols(self, count: int) -> tuple[str, ...]:
        """Index symbols for a map; the same for equal ranks, so that equal maps are equal."""
        return tuple(f"i{n}" for n in range(count))

    def ranges(self, symbols: Sequence[str], shape: Sequence[Expr]) -> Facts:
        """The facts at an element: each index symbol within its axis, no axis empty."""
        return self.facts.at_element(symbols, shape)

    def view(
        self,
        x: Ref,
        shape: Sequence[IntLike],
        indices: Callable[..., Sequence[IntLike]],
        guard: Callable[..., Sequence[IntLike]] | None = None,
        fill: float | int | bool = 0,
    ) -> Ref:
        """result[i...] = x[indices(i...)], or `fill` where a guard is negative."""
        exprs = tuple(map(as_expr, shape))
        names = self.symbols(len(exprs))
        facts = self.ranges(names, exprs)
        syms = [const(0) if d.as_int() == 1 else sym(n) for n, d in zip(names, exprs, strict=True)]
        at = tuple(facts.simplify(as_expr(e)) for e in indices(*syms))
        guards = () if guard is None else tuple(map(as_expr, guard(*syms)))
        guards = tuple(g for g in guards if not facts.is_nonneg(g))
        type = self.type(x)
        if not guards and exprs == type.shape and at == tuple(syms):
            return x
        if guards and type.dtype.is_float:
            fill = float(fill)  # one spelling of a number, so that views of views fold
        return self._one(View(names, at, guards, fill), (x,), TensorType(type.dtype, exprs))

    def broadcast(self, x: Ref, shape: Sequence[IntLike]) -> Ref:
        """NumPy's broadcast: missing leading axes and axes of size 1 repeat."""
        exprs = tuple(map(as_expr, shape))
        own = self.type(x).shape
        lead = len(exprs) - len(own)

        def indices(*at: Expr) -> list[Expr]:
            return [
                const(0) if d.as_int() == 1 and exprs[lead + n].as_int() != 1 else at[lead + n]
                for n, d in enumerate(own)
            ]

        return self.view(x, exprs, indices)

    def reshape(self, x: Ref, shape: Sequence[IntLike]) -> Ref:
        """The same elements in row-major order under another shape."""
        exprs, own = tuple(map(as_expr, shape)), self.type(x).shape

        def indices(*at: Expr) -> list[Expr]:
            facts = self.ranges(self.symbols(len(exprs)), exprs)
            return split_index(flatten_index(at, exprs), own, facts)

        return self.view(x, exprs, indices)

    def transpose(self, x: Ref, perm: Sequence[int]) -> Ref:
        own = self.type(x).shape
        order = [p % len(own) for p in perm] if own else []
        return self.view(
            x, [own[p] for p in order], lambda *at: [at[order.index(n)] for n in range(len(own))]
        )

    def gather(
        self,
        x: Ref,
        index_tensors: Sequence[Ref],
        shape: Sequence[Expr],
        symbols: Sequence[str],
        indices: Sequence[Expr | Indirect],
    ) -> Ref:
        """result[symbols] = x[indices]; `Indirect.operand` counts from 1 in `index_tensors`."""
        type = TensorType(self.type(x).dtype, tuple(shape))
        return self._one(Gather(tuple(symbols), tuple(indices)), (x, *index_tensors), type)

    def within(self, x: Ref, extent: Expr, length: Expr) -> Ref:
        return self._one(Within(extent, length), (x,), self.type(x))

    def update(
        self,
        base: Ref,
        value: Ref,
        index_tensors: Sequence[Ref],
        symbols: Sequence[str],
        indices: Sequence[Expr | Indirect],
        state: str = "",
    ) -> Ref:
        """base with value at indices; `Indirect.operand` counts from 2 in `index_tensors`."""
        primitive = Update(tuple(symbols), tuple(indices), state)
        return self._one(primitive, (base, value, *index_tensors), self.type(base))

    def whole_update(self, base: Ref, value: Ref, state: str) -> Ref:
        """All of a state becomes a value."""
        names = self.symbols(self.type(base).rank)
        return self.update(base, value, (), names, tuple(map(sym, names)), state)

    def position(self, shape: Sequence[IntLike], symbols: Sequence[str], expr: Expr) -> Ref:
        exprs = tuple(map(as_expr, shape))
        return self._one(Position(tuple(symbols), expr), (), TensorType(I64, exprs))

    def concat(self, parts: Sequence[Ref], axis: int) -> Ref:
        types = [self.type(p) for p in parts]
        axis %= types[0].rank
        size = sum((t.shape[axis] for t in types), const(0))
        shape = (*types[0].shape[:axis], size, *types[0].shape[axis + 1 :])
        if len(parts) == 1:
            return parts[0]
        if len(parts) > WIDE:
            chunks = [parts[i : i + WIDE] for i in range(0, len(parts), WIDE)]
            return self.concat([self.concat(chunk, axis) for chunk in chunks], axis)
        return self._one(Concat(axis), parts, TensorType(types[0].dtype, shape))

    def scan(self, kind: str, x: Ref, axis: int) -> Ref:
        return self._one(Scan(kind, axis % self.type(x).rank), (x,), self.type(x))

    def sort(self, x: Ref, axis: int, descending: bool = False) -> tuple[Ref, Ref]:
        type = self.type(x)
        both = (type, type.with_dtype(I64))
        values, order = self.add(Sort(axis % type.rank, descending), (x,), both)
        return values, order

    def scatter(self, kind: str, base: Ref, indices: Ref, updates: Ref, axis: int = 0) -> Ref:
        type = self.type(base)
        return self._one(Scatter(kind, axis % type.rank), (base, indices, updates), type)


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


_PREDICATES = frozenset(("eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "and", "or", "not"))
