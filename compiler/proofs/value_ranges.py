"""Proofs that the elements of an integer tensor lie in a range, whatever the inputs are.

A position that is clamped, or made by `iota`, `argmax` or a remainder, needs no check when it
indexes. Proofs go down the operands of a node; where nothing is known, nothing is proved.
"""

from __future__ import annotations

import numpy as np

from stagefuse.compiler.graph import (
    Concat,
    Constant,
    Gather,
    Graph,
    Map,
    Node,
    Position,
    Reduce,
    Ref,
    Scalar,
    Sort,
    View,
    Within,
)
from stagefuse.dsl.dims import Expr, IntLike, as_expr, const
from stagefuse.dsl.dtypes import F64
from stagefuse.dsl.facts import Facts

DEPTH = 40
"""Operands of operands that a proof may go down."""
SAFE = 1 << 62
"""Sums of two numbers below this do not wrap."""
_NONE = const(0)
SAME = ("floor", "trunc", "round", "ceil")
"""Functions that keep a whole limit: what is at most 3 stays at most 3."""


def is_position(
    graph: Graph, ref: Ref, extent: Expr, offset: Expr = _NONE, facts: Facts | None = None
) -> bool:
    """Whether every element plus `offset` is proved to be in 0..extent, where `facts` hold."""
    proof = _Proof(graph, facts or graph.facts)
    return proof.at_least(ref, -offset) and proof.at_most(ref, extent - 1 - offset)


class _Proof:
    def __init__(self, graph: Graph, facts: Facts) -> None:
        self.graph = graph
        self.facts = facts

    def at_most(self, ref: Ref, limit: Expr, depth: int = DEPTH) -> bool:
        return self._bounded(ref, limit, True, depth)

    def at_least(self, ref: Ref, limit: Expr, depth: int = DEPTH) -> bool:
        return self._bounded(ref, limit, False, depth)

    def _bounded(self, ref: Ref, limit: Expr, above: bool, depth: int) -> bool:
        """Whether no element is greater (`above`) or less than the limit; NaN is neither."""
        node = self.graph.nodes[ref.node]
        if depth == 0:
            return False
        match node.primitive:
            case Map():
                return self._map(node, limit, above, depth - 1)
            case Scalar(value=value):
                return self._number(value, limit, above)
            case Constant():
                return self._constant(node, limit, above)
            case Position():
                return self._position(node, limit, above)
            case Reduce(kind="argmax" | "argmin", axes=axes):
                shape = self.graph.type(node.operands[0]).shape
                count = const(1)
                for axis in axes:
                    count = count * shape[axis]
                return self._between(const(0), count - 1, limit, above)
            case Sort(axis=axis) if ref.result == 1:
                return self._between(const(0), node.type.shape[axis] - 1, limit, above)
            case View(guard=guard, fill=fill):
                filled = not guard or self._number(fill, limit, above)
                return filled and self._bounded(node.operands[0], limit, above, depth - 1)
            case Within(extent=extent, length=length):
                return self._between(const(0), extent - length, limit, above)
            case Gather():
                return self._bounded(node.operands[0], limit, above, depth - 1)
            case Concat():
                return all(self._bounded(r, limit, above, depth - 1) for r in node.operands)
        return False

    def _order(self, value: IntLike, limit: Expr, above: bool) -> bool:
        prove = self.facts.prove_le
        return prove(value, limit) if above else prove(limit, value)

    def _between(self, low: Expr, high: Expr, limit: Expr, above: bool) -> bool:
        return self._order(high if above else low, limit, above)

    def _number(self, value: float | int | bool, limit: Expr, above: bool) -> bool:
        if value != value or abs(value) >= SAFE:
            return False
        whole = int(np.ceil(value) if above else np.floor(value))
        return self._order(whole, limit, above)

    def _constant(self, node: Node, limit: Expr, above: bool) -> bool:
        assert isinstance(node.primitive, Constant)
        dtype = node.type.dtype
        if dtype.is_small_float or dtype.is_bool:
            return False
        found = np.frombuffer(node.primitive.data, dtype.numpy)
        if not found.size or np.isnan(found).any():
            return False
        return self._number((found.max() if above else found.min()).item(), limit, above)

    def _position(self, node: Node, limit: Expr, above: bool) -> bool:
        assert isinstance(node.primitive, Position)
        facts = self.facts.at_element(node.primitive.symbols, node.type.shape)
        value = node.primitive.expr
        return facts.prove_le(value, limit) if above else facts.prove_le(limit, value)

    def _map(self, node: Node, limit: Expr, above: bool, depth: int) -> bool:
        assert isinstance(node.primitive, Map)
        fn, args = node.primitive.fn, node.operands

        def bounded(ref: Ref, to: Expr = limit) -> bool:
            return self._bounded(ref, to, above, depth)

        if fn in ("minimum", "maximum"):
            enough = any if (fn == "minimum") == above else all
            return enough(map(bounded, args))
        if fn == "select":
            return all(map(bounded, args[1:]))
        if fn in SAME:
            return bounded(args[0])
        if fn == "cast":
            return self._cast(node, limit, above, depth)
        if fn == "mod" and node.type.dtype.is_int:
            return self._remainder(args[1], limit, above, depth)
        if fn in ("add", "sub") and node.type.dtype.is_int:
            return self._moved(node, limit, above, depth)
        return False

    def _cast(self, node: Node, limit: Expr, above: bool, depth: int) -> bool:
        """Through a conversion: exact as long as the limit is, and NaN becomes 0."""
        source, target = self.graph.type(node.operands[0]).dtype, node.type.dtype
        floats = [t for t in (source, target) if t.is_float]
        if any(t.is_small_float for t in floats) or target.is_bool or source.is_bool:
            return False
        if target.is_int and target.bits < 64:
            return False
        low, high = self.facts.bounds(limit)
        exact = 1 << (52 if all(t == F64 for t in floats) else 23)
        if floats and (low is None or high is None or max(-low, high) > exact):
            return False
        if source.is_float and not self._order(0, limit, above):
            return False
        return self._bounded(node.operands[0], limit, above, depth)

    def _remainder(self, divisor: Ref, limit: Expr, above: bool, depth: int) -> bool:
        """Of a divisor that is never negative: at least 0, and less than it or 0."""
        if not self.at_least(divisor, const(0), depth):
            return False
        if not above:
            return self._order(0, limit, False)
        return self._order(0, limit, True) and self.at_most(divisor, limit + 1, depth)

    def _moved(self, node: Node, limit: Expr, above: bool, depth: int) -> bool:
        """A sum or difference with a known number, or a sum with what has the limit's sign, which
        must not wrap."""
        assert isinstance(node.primitive, Map)
        if node.type.dtype.bits < 64:
            return False
        sign = 1 if node.primitive.fn == "add" else -1
        for other, step in ((0, 1), (1, 0)) if sign > 0 else ((0, 1),):
            by = self._known(node.operands[step])
            if by is None or abs(by) >= SAFE:
                continue
            source = node.operands[other]
            left = limit - sign * by
            if self._is_small(source, depth) and self._bounded(source, left, above, depth):
                return True
        first, second = node.operands
        return (
            sign > 0
            and any(
                self._bounded(a, _NONE, above, depth) and self._bounded(b, limit, above, depth)
                for a, b in ((first, second), (second, first))
            )
            and self._is_small(first, depth)
            and self._is_small(second, depth)
        )

    def _is_small(self, ref: Ref, depth: int) -> bool:
        """Whether a number added to it does not wrap; the lower size is one that floats hold."""
        return all(
            any(self._bounded(ref, const(sign * size), sign > 0, depth) for size in (SAFE, 1 << 22))
            for sign in (1, -1)
        )

    def _known(self, ref: Ref) -> int | None:
        """The one number that all elements are."""
        node = self.graph.nodes[ref.node]
        while isinstance(node.primitive, View) and not node.primitive.guard:
            node = self.graph.nodes[node.operands[0].node]
        if isinstance(node.primitive, Scalar):
            return int(node.primitive.value)
        if isinstance(node.primitive, Constant) and node.type.dtype.is_int:
            found = np.frombuffer(node.primitive.data, node.type.dtype.numpy)
            if found.size and (found == found[0]).all():
                return int(found[0])
        if isinstance(node.primitive, Position):
            return as_expr(node.primitive.expr).as_int()
        return None
