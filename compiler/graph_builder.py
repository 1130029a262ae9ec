"""Nodes added to a graph one by one, with the types of their results."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stagefuse.dsl.dims import Expr, IntLike, as_expr, const, sym
from stagefuse.dsl.dtypes import BOOL, I64, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.source import Span
from stagefuse.dsl.types import TensorType

from .graph import (
    WIDE,
    Concat,
    Constant,
    Gather,
    Graph,
    Indirect,
    Input,
    Map,
    Node,
    Position,
    Primitive,
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
    flatten_index,
    split_index,
)
from .scalar import convert

if TYPE_CHECKING:
    import numpy as np


_PREDICATES = frozenset(("eq", "ne", "lt", "le", "gt", "ge", "isnan", "isinf", "and", "or", "not"))


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
        number = self._known.get(key)
        if number is None:
            made = self.add_apart(*key)
            self._known[key] = made[0].node
            return made
        return tuple([Ref(number, i) for i in range(len(types))])

    def add_apart(
        self, primitive: Primitive, operands: Sequence[Ref], types: Sequence[TensorType]
    ) -> tuple[Ref, ...]:
        """The same of a node of its own, whatever equals it: of a copy, memory is what counts."""
        number = len(self.graph.nodes)
        self.graph.add(Node(number, primitive, tuple(operands), tuple(types), *self._where))
        return tuple([Ref(number, i) for i in range(len(types))])

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

        data = np.asarray(array, dtype.numpy).tobytes()
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

    def result(self, x: Ref, dtype: DType) -> Ref:
        """What was computed in a wider dtype, as a result: infinities stay, where a conversion to
        f8 saturates."""
        found = self.cast(x, dtype)
        if dtype.name != "f8e5m2" or found == x:
            return found
        infinite = self.map("div", found, self.scalar(0.0, dtype, self.type(x).shape))
        return self.map("select", self.map("isinf", x), infinite, found)

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
