"""Checks that a dataflow graph is one.

Invariants, as `VerifyError` numbers them:

1. A node is stored under its id, after every node whose result it reads; each operand and each
   result of the graph is a result that its node has.
2. The NetworkX topology, once made, has the same nodes, and an edge from each operand's node to
   its user.
3. Inputs have different names.
4. A primitive has as many operands as it takes, of the dtypes and ranks that it takes, and its
   axes, kinds and symbols are ones that exist.
5. A node's types are those that its primitive gives for its operands.
6. A symbol in a shape is a size: it has a range, or stands in the shape of an input. An index map
   mentions its own symbols and sizes only.
7. For all sizes, and where the guards hold, an index map stays within its operand.
8. A constant has the bytes that its type needs; a scalar is a number of its dtype.
9. A product's axes are different axes of the result, the others have size 1; its panels have the
   shape that `Contract` states, and its rows lie within its first operand.
10. A recurrence reads its `carried` nodes in order, the values for the next step have the type
   of those that they replace, and its step has the range 0..count. Nothing reads what a step
   computes but the other nodes of the step and its recurrence, and no shape depends on a step.
11. States have different names; an update of one is based on it, or on another update of it.
12. What an update reads as a position is inside its base, whatever the data is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stagefuse.dsl.dims import Expr, as_expr, const, floordiv, maximum, sym
from stagefuse.dsl.dtypes import BOOL, F32, F64, I32, I64, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.types import TensorType

from .errors import VerifyError
from .graph import (
    Carried,
    Concat,
    Constant,
    Contract,
    Gather,
    Graph,
    Indirect,
    Input,
    Map,
    Node,
    Position,
    Recurrence,
    Reduce,
    Ref,
    Scalar,
    Scan,
    Scatter,
    Sort,
    State,
    Update,
    View,
    Weight,
    Within,
)
from .graph_text import place_of, print_node
from .patterns.byte_operands import is_byte
from .proofs.bounds import Bounds, nonempty, positions, size_of
from .proofs.value_ranges import is_position
from .recurrence import Nests, gathered_type
from .scalar import FUNCTIONS

REDUCTIONS = ("sum", "prod", "max", "min", "any", "all", "argmax", "argmin")


def verify_graph(graph: Graph, bounds: Bounds | None = None) -> Bounds:
    """The bounds as left by the checks: what is open in them could be neither proved nor broken.

    `bounds` holds conditions on the sizes and remembers what is proved, also from graph to graph.
    Raises VerifyError.
    """
    check = _Check(graph, Bounds() if bounds is None else bounds)
    check.topology()
    for node in graph.nodes.values():
        check.node(node)
    return check.bounds


class _Check:
    def __init__(self, graph: Graph, bounds: Bounds) -> None:
        self.graph, self.bounds, self.facts = graph, bounds, graph.facts
        inputs = [n for n in graph.nodes.values() if isinstance(n.primitive, Input)]
        shapes = [d.symbols() for n in inputs for t in n.types for d in t.shape]
        shapes += [
            d.symbols() for n in graph.nodes.values() if isinstance(n.primitive, State)
            for d in n.type.shape
        ]  # fmt: skip
        self.sizes = frozenset(self.facts.ranges).union(*shapes)
        self.nests = Nests(graph)
        kept = [n.primitive.name for n in graph.nodes.values() if isinstance(n.primitive, State)]
        if len(set(kept)) != len(kept):
            raise VerifyError(11, f"states share a name: {', '.join(sorted(kept))}")
        names = [n.primitive.name for n in inputs if isinstance(n.primitive, Input)]
        if len(set(names)) != len(names):
            raise VerifyError(3, f"inputs share a name: {', '.join(sorted(names))}")

    def topology(self) -> None:
        seen: set[int] = set()
        edges: set[tuple[int, int]] = set()
        for number, node in self.graph.nodes.items():
            if node.id != number:
                self.fail(node, 1, f"this node is stored as %{number}")
            for ref in node.operands:
                if ref.node not in seen:
                    self.fail(node, 1, f"%{ref.node} is read before it is defined")
                if not 0 <= ref.result < len(self.graph.nodes[ref.node].types):
                    self.fail(node, 1, f"%{ref.node} has no result {ref.result}")
                edges.add((ref.node, number))
            seen.add(number)
        for ref in self.graph.results:
            if ref.node not in seen or not (
                0 <= ref.result < len(self.graph.nodes[ref.node].types)
            ):
                raise VerifyError(1, f"the result %{ref.node}.{ref.result} does not exist")
            if self.nests.depends.get(ref.node):
                self.fail(self.graph.nodes[ref.node], 10, "a result depends on a step")
        made = self.graph.made
        if made is not None and (set(made.nodes) != seen or set(made.edges) != edges):
            raise VerifyError(2, "the topology differs from the operands of the nodes")

    def node(self, node: Node) -> None:
        operands = tuple(self.graph.type(ref) for ref in node.operands)
        key = (self.facts.divisible, node.primitive, operands, node.types)
        if key in self.bounds.known and not isinstance(
            node.primitive, Carried | Recurrence | Update
        ):  # what holds of these depends on other nodes too
            return
        for type in node.types:
            for size in type.shape:
                self.symbols(node, size, frozenset())
                if size.symbols() & self.nests.ends.keys():
                    self.fail(node, 10, f"the size {size} depends on a step")
        RULES[type_of(node)](self, node, node.primitive, operands)
        self.bounds.known.add(key)

    # What the rules share

    def fail(self, node: Node, invariant: int, message: str) -> None:
        raise VerifyError(invariant, message, print_node(node), place_of(node))

    def require(self, node: Node, condition: bool, message: str) -> None:
        if not condition:
            self.fail(node, 4, message)

    def types(self, node: Node, *expected: TensorType) -> None:
        """Invariant 5."""
        same = len(expected) == len(node.types) and all(
            a.dtype == b.dtype and self.same_shape(a.shape, b.shape)
            for a, b in zip(expected, node.types, strict=True)
        )
        if not same:
            self.fail(node, 5, f"the type should be {', '.join(map(str, expected))}")

    def same_shape(self, a: Sequence[Expr], b: Sequence[Expr]) -> bool:
        return tuple(a) == tuple(b) or (
            len(a) == len(b) and all(self.facts.prove_eq(x, y) for x, y in zip(a, b, strict=True))
        )

    def symbols(self, node: Node, expr: Expr, own: frozenset[str]) -> None:
        """Invariant 6."""
        unknown = expr.symbols() - own - self.sizes
        if unknown:
            self.fail(node, 6, f"`{min(unknown)}` in {expr} is neither a size nor an index")

    def map_symbols(self, node: Node, symbols: Sequence[str]) -> frozenset[str]:
        self.require(node, len(symbols) == node.type.rank, "an index map has a symbol per axis")
        self.require(node, len(set(symbols)) == len(symbols), "an index map repeats a symbol")
        self.require(node, not set(symbols) & self.sizes, "an index map hides a size")
        return frozenset(symbols)

    def indices(
        self, node: Node, primitive: Gather | Update, own: frozenset[str],
        operands: tuple[TensorType, ...], shape: tuple[Expr, ...],
    ) -> None:  # fmt: skip
        """What a gather or an update reads of its first operand, at each position in a shape;
        index tensors are the last operands."""
        first = 2 if isinstance(primitive, Update) else 1
        facts = positions(self.facts, primitive.symbols, shape)
        guards = nonempty(shape)
        for index, extent in zip(primitive.indices, operands[0].shape, strict=True):
            if not isinstance(index, Indirect):
                self.symbols(node, index, own)
                self.inside(node, index, extent, facts, (*guards, *nonempty(operands[0].shape)))
                continue
            is_there = first <= index.operand < len(operands)
            self.require(node, is_there, "an index operand is missing")
            tensor = operands[index.operand]
            self.require(node, tensor.dtype == I64, "an index tensor is i64")
            same = len(index.indices) == tensor.rank
            self.require(node, same, "an index tensor's rank differs")
            for expr in (*index.indices, index.scale, index.offset):
                self.symbols(node, expr, own)
            for expr, size in zip(index.indices, tensor.shape, strict=True):
                self.inside(node, expr, size, facts, guards)

    def inside(
        self, node: Node, index: Expr, extent: Expr, facts: Facts, guards: Sequence[Expr]
    ) -> None:
        """Invariant 7."""
        why = self.bounds.inside(index, extent, facts, guards, lambda: print_node(node))
        if why is not None:
            self.fail(node, 7, why)


def type_of(node: Node) -> type:
    return type(node.primitive)


def _leaf(check: _Check, node: Node, p: Any, operands: tuple[TensorType, ...]) -> None:
    check.require(node, not operands and len(node.types) == 1, "a source has no operands")
    if isinstance(p, Constant):
        count = size_of(node.type.shape).as_int()
        if count is None or len(p.data) != count * node.type.dtype.itemsize:
            check.fail(node, 8, f"{len(p.data)} bytes are not those of {node.type}")
    if isinstance(p, Scalar):
        kind = bool if node.type.dtype.is_bool else int if node.type.dtype.is_int else float
        if node.type.shape or type(p.value) is not kind:
            check.fail(node, 8, f"{p.value!r} is not a scalar of {node.type}")


def _map(check: _Check, node: Node, p: Map, operands: tuple[TensorType, ...]) -> None:
    fn = FUNCTIONS.get(p.fn)
    if fn is None:
        return check.fail(node, 4, f"there is no scalar function `{p.fn}`")
    check.require(node, len(operands) == fn.arity, f"`{p.fn}` takes {fn.arity} operands")
    own = operands[1:] if p.fn == "select" else operands
    check.require(node, p.fn != "select" or operands[0].dtype == BOOL, "a condition is bool")
    dtypes = {t.dtype for t in own}
    check.require(node, len(dtypes) == 1, "operands have different dtypes")
    check.require(node, fn.takes(own[0].dtype), f"`{p.fn}` does not take {own[0].dtype}")
    for type in operands:
        check.require(
            node, check.same_shape(type.shape, operands[0].shape), "operands have different shapes"
        )
    given: dict[str, DType] = {"bool": BOOL, "given": node.type.dtype, "same": own[0].dtype}
    check.types(node, TensorType(given[fn.result], operands[0].shape))


def _reduce(check: _Check, node: Node, p: Reduce, operands: tuple[TensorType, ...]) -> None:
    check.require(node, len(operands) == 1, "a reduction has one operand")
    check.require(node, p.kind in REDUCTIONS, f"there is no reduction `{p.kind}`")
    x = operands[0]
    ascending = list(p.axes) == sorted(set(p.axes))
    check.require(node, ascending and all(0 <= a < x.rank for a in p.axes), "its axes are wrong")
    shape = tuple(d for i, d in enumerate(x.shape) if i not in p.axes)
    if p.kind in ("any", "all"):
        check.require(node, x.dtype == BOOL, f"`{p.kind}` takes bools")
    wide = node.type.dtype if p.kind in ("sum", "prod") else x.dtype
    check.types(node, TensorType(I64 if p.kind.startswith("arg") else wide, shape))


def _view(check: _Check, node: Node, p: View, operands: tuple[TensorType, ...]) -> None:
    check.require(node, len(operands) == 1, "a view has one operand")
    own = check.map_symbols(node, p.symbols)
    check.require(node, len(p.indices) == operands[0].rank, "a view has an index per axis")
    check.types(node, TensorType(operands[0].dtype, node.type.shape))
    for expr in (*p.indices, *p.guard):
        check.symbols(node, expr, own)
    facts = positions(check.facts, p.symbols, node.type.shape)
    guards = (*p.guard, *nonempty(node.type.shape))
    for index, extent in zip(p.indices, operands[0].shape, strict=True):
        check.inside(node, index, extent, facts, guards)


def _gather(check: _Check, node: Node, p: Gather, operands: tuple[TensorType, ...]) -> None:
    check.require(node, len(operands) > 1, "a gather has a table and index tensors")
    own = check.map_symbols(node, p.symbols)
    check.require(node, len(p.indices) == operands[0].rank, "a gather has an index per axis")
    check.types(node, TensorType(operands[0].dtype, node.type.shape))
    check.indices(node, p, own, operands, node.type.shape)


def _position(check: _Check, node: Node, p: Position, operands: tuple[TensorType, ...]) -> None:
    check.require(node, not operands, "a position has no operands")
    check.symbols(node, p.expr, check.map_symbols(node, p.symbols))
    check.types(node, TensorType(I64, node.type.shape))


def _axis(check: _Check, node: Node, axis: int, rank: int) -> None:
    check.require(node, 0 <= axis < rank, f"there is no axis {axis}")


def _concat(check: _Check, node: Node, p: Concat, operands: tuple[TensorType, ...]) -> None:
    check.require(node, len(operands) > 1, "a concatenation has several operands")
    first = operands[0]
    _axis(check, node, p.axis, first.rank)
    size = const(0)
    for type in operands:
        same = type.rank == first.rank and type.dtype == first.dtype
        check.require(node, same, "operands have different dtypes or ranks")
        rest = (*type.shape[: p.axis], first.shape[p.axis], *type.shape[p.axis + 1 :])
        check.require(node, check.same_shape(rest, first.shape), "operands have different shapes")
        size = size + type.shape[p.axis]
    shape = (*first.shape[: p.axis], size, *first.shape[p.axis + 1 :])
    check.types(node, TensorType(first.dtype, shape))


def _scan(check: _Check, node: Node, p: Scan, operands: tuple[TensorType, ...]) -> None:
    check.require(node, len(operands) == 1, "a scan has one operand")
    check.require(node, p.kind in ("sum", "prod"), f"there is no scan `{p.kind}`")
    _axis(check, node, p.axis, operands[0].rank)
    check.types(node, operands[0])


def _sort(check: _Check, node: Node, p: Sort, operands: tuple[TensorType, ...]) -> None:
    check.require(node, len(operands) == 1, "a sort has one operand")
    _axis(check, node, p.axis, operands[0].rank)
    check.types(node, operands[0], operands[0].with_dtype(I64))


def _scatter(check: _Check, node: Node, p: Scatter, operands: tuple[TensorType, ...]) -> None:
    check.require(node, len(operands) == 3, "a scatter has a base, indices and updates")
    check.require(node, p.kind in ("add", "max", "set"), f"there is no scatter `{p.kind}`")
    base, indices, updates = operands
    _axis(check, node, p.axis, base.rank)
    check.require(node, indices.dtype == I64 and indices.rank == 1, "indices are i64[N]")
    shape = (*base.shape[: p.axis], indices.shape[0], *base.shape[p.axis + 1 :])
    same = updates.dtype == base.dtype and check.same_shape(updates.shape, shape)
    check.require(node, same, f"updates should be {TensorType(base.dtype, shape)}")
    check.types(node, base)


def _within(check: _Check, node: Node, p: Within, operands: tuple[TensorType, ...]) -> None:
    check.require(node, len(operands) == 1, "positions have one operand")
    check.require(node, operands[0].dtype == I64, "positions are i64")
    for expr in (p.extent, p.length):
        check.symbols(node, expr, frozenset())
    check.types(node, operands[0])


def _update(check: _Check, node: Node, p: Update, operands: tuple[TensorType, ...]) -> None:
    check.require(node, len(operands) >= 2, "an update has a base and a value")
    base, value = operands[:2]
    check.require(node, base.dtype == value.dtype, "a base and a value have one dtype")
    check.require(node, len(p.indices) == base.rank, "an update has an index per axis")
    check.types(node, base)
    own = frozenset(p.symbols)
    check.require(node, len(own) == len(p.symbols) == value.rank, "a symbol per axis of the value")
    check.require(node, not own & check.sizes, "an index map hides a size")
    if p.state and _state_of(check.graph, node.operands[0]) != p.state:
        check.fail(node, 11, f"its base is neither the state `{p.state}` nor an update of it")
    check.indices(node, p, own, operands, value.shape)
    for index, extent in zip(p.indices, base.shape, strict=True):
        if not isinstance(index, Indirect):
            continue
        at = check.facts.at_element(p.symbols, value.shape)
        ref = node.operands[index.operand]
        plain = index.scale == const(1)
        if not plain or not is_position(check.graph, ref, extent, index.offset, at):
            check.fail(node, 12, f"%{ref.node} is not proved to be a position in {extent}")


def _state_of(graph: Graph, ref: Ref) -> str:
    """The state that a value is, before or after updates; "" for another value."""
    p = graph.nodes[ref.node].primitive
    if isinstance(p, State):
        return p.name
    return p.state if isinstance(p, Update) else ""


def _contract(check: _Check, node: Node, p: Contract, operands: tuple[TensorType, ...]) -> None:
    few = len(operands) in (2, 3) and len(node.types) == 1
    check.require(node, few, "a product has two operands, or three")
    a, panels, *taps = operands
    known = all(t.dtype == a.dtype and t.rank == len(p.batch) + 3 for t in taps)
    check.require(node, known, "transformed weights have positions, rows and channels")
    dtypes = {a.dtype, panels.dtype}
    if all(is_byte(d) and d.is_int for d in dtypes):
        dtypes = {I32}
    known = dtypes == {node.type.dtype} and node.type.dtype in (F32, F64, I32)
    check.require(node, known, "a product is of f32, f64 or i32, or of 8-bit integers into i32")
    shape, axes = node.type.shape, (*p.batch, *p.rows, *p.columns)
    if sorted(set(axes)) != sorted(axes) or any(
        not 0 <= x < len(shape) or (x not in axes and shape[x].as_int() != 1)
        for x in {*axes, *range(len(shape))}
    ):
        check.fail(node, 9, "its axes are not the axes of the result")
    columns = size_of([shape[x] for x in p.columns])
    count = floordiv(columns + (p.panel - 1), p.panel, check.facts)
    wanted = (*(shape[x] for x in p.batch), count, p.depth, const(p.panel))
    if p.panel <= 0 or not check.same_shape(panels.shape, wanted):
        check.fail(node, 9, f"its panels should be {TensorType(panels.dtype, wanted)}")
    own = tuple(f"i{x}" for x in p.batch)
    for expr in (p.base, p.row_stride, p.depth):
        check.symbols(node, expr, frozenset(own))
    facts = positions(check.facts, own, [shape[x] for x in p.batch])
    guards = (*nonempty(shape), p.depth - 1)
    last = p.base + (size_of([shape[x] for x in p.rows]) - 1) * p.row_stride + p.depth - 1
    for index in (p.base, last):
        why = check.bounds.inside(index, size_of(a.shape), facts, guards, lambda: print_node(node))
        if why is not None:
            check.fail(node, 9, f"its rows leave the first operand: {why}")


def _carried(check: _Check, node: Node, p: Carried, operands: tuple[TensorType, ...]) -> None:
    check.require(node, len(operands) == 1, "what is carried has one start")
    check.types(node, TensorType(operands[0].dtype, (const(2), *operands[0].shape)))
    if p.step not in check.nests.ends:
        check.fail(node, 10, f"no recurrence ends the steps of `{p.step}`")


def _recurrence(check: _Check, node: Node, p: Recurrence, operands: tuple[TensorType, ...]) -> None:
    n, places = p.carried, p.places
    check.require(node, len(operands) == 2 * n + len(places), "its operands are too many or few")
    for number, ref in enumerate(node.operands[:n]):
        if check.graph.nodes[ref.node].primitive != Carried(p.step, number):
            check.fail(node, 10, f"operand {number} is not what it carries")
    low, high = check.facts.ranges.get(p.step, (None, None))
    length = const(0) if high is None else as_expr(high) + 1
    if low != 0 or p.count not in (length, maximum(length, 0)):
        check.fail(node, 10, f"`{p.step}` does not run over 0..{p.count}")
    if check.nests.ends[p.step] != node.id:
        check.fail(node, 10, f"`{p.step}` has two recurrences")
    held, following, gathered = operands[:n], operands[n : 2 * n], operands[2 * n :]
    for one, other in zip(held, following, strict=True):
        if one.dtype != other.dtype or not check.same_shape(one.shape[1:], other.shape):
            check.fail(node, 10, f"the next value of {one} is {other}")
    for place in places:
        if place not in (sym(p.step), p.count - 1 - sym(p.step)):
            check.fail(node, 10, f"a step has no place {place}")
    check.types(node, *held, *(gathered_type(t, p.count) for t in gathered))


Rule = Callable[[_Check, Node, Any, tuple[TensorType, ...]], None]
RULES: dict[type, Rule] = {
    Input: _leaf,
    State: _leaf,
    Weight: _leaf,
    Constant: _leaf,
    Scalar: _leaf,
    Map: _map,
    Reduce: _reduce,
    View: _view,
    Gather: _gather,
    Position: _position,
    Concat: _concat,
    Scan: _scan,
    Sort: _sort,
    Scatter: _scatter,
    Within: _within,
    Update: _update,
    Contract: _contract,
    Carried: _carried,
    Recurrence: _recurrence,
}
"""What each primitive must satisfy."""
