"""Sizes and positions: integer expressions as i64 tensors, computed where sizes vary."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from stagefuse.dsl.dims import Atom, Expr, const
from stagefuse.dsl.dtypes import BOOL, I64
from stagefuse.dsl.facts import Facts

from .model import Model, Tensor


class Sizes:
    """Expressions over sizes and index symbols. A size is an i64 tensor of shape [1].

    `sources` says how each size follows from a shape: input, axis, what to take away, divisor.
    `steps` are the turns of the loops around.
    """

    def __init__(self, model: Model, facts: Facts) -> None:
        self.model, self.facts = model, facts
        self.sources: dict[str, tuple[Tensor, int, Expr, int]] = {}
        self.steps: dict[str, Tensor] = {}

    def vector(self, exprs: Sequence[Expr]) -> Tensor:
        """Sizes one after another, i64 [n]."""
        known = [e.as_int() for e in exprs]
        if None not in known:
            return self.model.constant(np.array(known, np.int64))
        parts: list[Tensor] = []
        run: list[int] = []
        for expr, value in zip(exprs, known, strict=True):
            if value is not None:
                run.append(value)
                continue
            if run:
                parts.append(self.model.constant(np.array(run, np.int64)))
            run = []
            parts.append(self.value(expr, {}))
        if run:
            parts.append(self.model.constant(np.array(run, np.int64)))
        if len(parts) == 1:
            return parts[0]
        return self.model.node("Concat", parts, I64, (const(len(exprs)),), axis=0)

    def scalar(self, expr: Expr) -> Tensor:
        """A size of shape []."""
        known = expr.as_int()
        if known is not None:
            return self.model.constant(known)
        axes = self.model.constant([0])
        return self.model.node("Squeeze", [self.value(expr, {}), axes], I64, ())

    def positions(self, extent: Expr, after: int) -> Tensor:
        """0, 1, ... along the first of 1 + `after` axes."""
        known = extent.as_int()
        if known is not None:
            return self.model.constant(np.arange(known).reshape(-1, *(1,) * after))
        ends = (self.model.constant(0), self.scalar(extent), self.model.constant(1))
        line = self.model.node("Range", ends, I64, (extent,))
        if not after:
            return line
        axes = self.model.constant(list(range(1, after + 1)))
        shape = (extent, *(const(1),) * after)
        return self.model.node("Unsqueeze", [line, axes], I64, shape)

    def value(
        self, expr: Expr, symbols: Mapping[str, Tensor], facts: Facts | None = None
    ) -> Tensor:
        """An expression; `symbols` are those that are no sizes. At least of rank 1."""
        facts = facts or self.facts
        total: Tensor | None = None
        for monomial, coefficient in sorted(expr.terms, key=lambda t: t[1] < 0):
            product: Tensor | None = None
            for atom, power in monomial:
                factor = self._atom(atom, symbols, facts)
                for _ in range(power):
                    product = factor if product is None else self.apply("Mul", product, factor)
            scale = abs(coefficient) if total is not None else coefficient
            if product is None:
                product = self.model.constant([scale])
            elif scale != 1:
                product = self.apply("Mul", product, self.model.constant([scale]))
            if total is None:
                total = product
            else:
                total = self.apply("Add" if coefficient > 0 else "Sub", total, product)
        return self.model.constant([0]) if total is None else total

    def _atom(self, atom: Atom, symbols: Mapping[str, Tensor], facts: Facts) -> Tensor:
        if atom.kind == "sym":
            return symbols[atom.name] if atom.name in symbols else self._size(atom.name)
        a, b = (self.value(arg, symbols, facts) for arg in atom.args)
        if atom.kind in ("min", "max"):
            return self.apply("Min" if atom.kind == "min" else "Max", a, b)
        one, positive = self.model.constant([1]), facts.is_positive(atom.args[1])
        safe = b if positive else self.apply("Max", b, one)
        if atom.kind == "%":
            found = self.apply("Mod", a, safe)
        else:
            if not facts.is_nonneg(atom.args[0]):  # Div rounds towards zero
                a = self.apply("Sub", a, self.apply("Mod", a, safe))
            found = self.apply("Div", a, safe)
        return found if positive else self.apply("Mul", found, self.apply("Min", b, one))

    def _size(self, name: str) -> Tensor:
        if name in self.steps:
            return self.steps[name]
        source, axis, rest, factor = self.sources[name]
        found = self.model.node("Shape", [source], I64, (const(1),), start=axis, end=axis + 1)
        if rest.terms:
            found = self.apply("Sub", found, self.value(rest, {}))
        if factor != 1:
            found = self.apply("Div", found, self.model.constant([factor]))
        return found

    def apply(self, op: str, a: Tensor, b: Tensor) -> Tensor:
        """A node of two i64 tensors, or its value where both are known."""
        if a.known is not None and b.known is not None:
            return self.model.constant(_MEANING[op](a.known, b.known))
        return self.model.node(op, [a, b], I64, broadcast(a.shape, b.shape))

    def is_inside(self, expr: Expr, symbols: Mapping[str, Tensor], facts: Facts) -> Tensor:
        """Whether an expression is at least 0."""
        found, zero = self.value(expr, symbols, facts), self.model.constant([0])
        if found.known is not None:
            return self.model.constant(found.known >= 0, BOOL)
        return self.model.node("GreaterOrEqual", [found, zero], BOOL, found.shape)


_MEANING: dict[str, Any] = {
    "Add": np.add, "Sub": np.subtract, "Mul": np.multiply, "Mod": np.mod, "Min": np.minimum,
    "Max": np.maximum, "Div": np.floor_divide,
}  # fmt: skip


def broadcast(*shapes: Sequence[Expr]) -> tuple[Expr, ...]:
    """NumPy's common shape of shapes that are known to broadcast."""
    rank = max(map(len, shapes))
    found = [const(1)] * rank
    for shape in shapes:
        for axis, size in enumerate(shape, rank - len(shape)):
            if size.as_int() != 1:
                found[axis] = size
    return tuple(found)
