"""Writing down the operations of one pipeline while its body is evaluated."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from stagefuse.dsl.dims import Expr, const, expr_of, maximum, minimum, sym
from stagefuse.dsl.dtypes import BOOL, F32, I64, U64, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.program import Apply, Check, ValueId
from stagefuse.dsl.source import Span
from stagefuse.dsl.types import TensorType

from .report import Failed
from .values import Dim, Number, Scope, Space, Tensor

if TYPE_CHECKING:
    from .indexing import Selection


@frozen
class Step:
    """The step of a scan: its name in the source, its first value, and how many there are, if that
    is not negative: where it is, nothing is computed."""

    name: str
    first: Expr
    length: Expr


MAX_RANK = 32
"""Dimensions of a tensor that a plan can hold."""
MAX_TERMS = 2000
"""Terms of a size, counted as it is written: each prover looks at all of them."""


class Recorder:
    """The operations, types and call-time checks of one pipeline, in order."""

    def __init__(self, facts: Facts, name: str) -> None:
        self.facts = facts
        self.types: dict[ValueId, TensorType] = {}
        self.body: list[Apply] = []
        self.checks: list[Check] = []
        self.stack: list[Span] = []
        self.hidden = 0
        self.labels: list[str] = [name]
        self.steps: dict[str, Step] = {}
        self._shared: dict[tuple[Any, ...], Tensor] = {}

    @property
    def calls(self) -> list[Span]:
        """The calls that led here, outermost first, as far as the program has them."""
        return self.stack[self.hidden :]

    @contextmanager
    def inside(self, span: Span, name: str) -> Iterator[None]:
        """Operations recorded within belong to a function called at `span`."""
        self.stack.append(span)
        self.labels.append(name)
        try:
            yield
        finally:
            self.stack.pop()
            self.labels.pop()

    def apply(
        self,
        op: str,
        operands: Sequence[Tensor],
        attributes: Sequence[tuple[str, Any]],
        types: Sequence[TensorType],
        span: Span,
        space: Space = (),
    ) -> tuple[Tensor, ...]:
        """Record one operation and return its results."""
        results = []
        for result_type in types:
            self._require_constant_shape(result_type, span)
            if result_type.rank > MAX_RANK:
                raise Failed("E0207", f"a tensor has at most {MAX_RANK} dimensions", span,
                             f"this has {result_type.rank}")
            if any(size.length() > MAX_TERMS for size in result_type.shape):
                raise Failed("E0107", f"a size here is a formula of more than {MAX_TERMS} terms",
                             span, help="give the least size in `where`: it may be simpler then")
            value = len(self.types)
            self.types[value] = result_type
            results.append(Tensor(value, result_type, space))
        self.body.append(
            Apply(
                op,
                tuple(operand.id for operand in operands),
                tuple(attributes),
                tuple(result.id for result in results),
                span,
                tuple(self.stack),
                ".".join([*self.labels, op]),
            )
        )
        return tuple(results)

    def _once(
        self,
        key: tuple[Any, ...],
        op: str,
        attributes: Sequence[tuple[str, Any]],
        result_type: TensorType,
        span: Span,
    ) -> Tensor:
        if key not in self._shared:
            (self._shared[key],) = self.apply(op, (), attributes, (result_type,), span)
        return self._shared[key]

    def input(self, name: str, declared: TensorType, span: Span) -> Tensor:
        return self.apply("input", (), (("name", name),), (declared,), span)[0]

    def weight(self, scope: Scope, span: Span) -> Tensor:
        """The tensor that has the very name of `scope`; each is recorded once."""
        leaf = scope.leaf
        assert leaf is not None
        attributes = (("weights", scope.handle.name), ("key", scope.prefix))
        key = ("weight", scope.handle.name, scope.prefix)
        return self._once(key, "weight", attributes, leaf, span)

    def number(self, value: int | float | bool, dtype: DType, span: Span) -> Tensor:
        """A literal as a scalar of `dtype`."""
        key = ("constant", type(value), repr(value), dtype)
        return self._once(key, "constant", (("value", value),), TensorType(dtype, ()), span)

    def positions(self, tensor: Tensor, span: Span) -> Tensor:
        """Integers as i64 positions; one beyond i64 is the greatest, which no axis has."""
        if tensor.type.dtype == I64:
            return tensor
        full = tensor.full_type
        if tensor.type.dtype == U64:
            operands = (tensor, self.number((1 << 63) - 1, U64, span))
            (tensor,) = self.apply("minimum", operands, (), (full,), span, tensor.space)
        wide = full.with_dtype(I64)
        return self.apply("cast", (tensor,), (("dtype", I64),), (wide,), span, tensor.space)[0]

    def dim(self, value: Dim, span: Span) -> Tensor:
        """An integer expression as an i64 scalar, or one per position of index notation."""
        if value.space:
            shape = tuple(extent for _, extent in value.space)
            attributes = (
                ("expr", value.expr),
                ("symbols", tuple(name for name, _ in value.space)),
                ("shape", shape),
            )
            types = (TensorType(I64, shape),)
            return self.apply("position", (), attributes, types, span, value.space)[0]
        known = value.expr.as_int()
        if known is not None:
            return self.number(known, I64, span)
        key = ("dim", value.expr)
        return self._once(key, "dim", (("expr", value.expr),), TensorType(I64, ()), span)

    def access(
        self,
        operands: Sequence[Tensor],
        shape: tuple[Expr, ...],
        symbols: tuple[str, ...],
        indices: tuple[Any, ...],
        span: Span,
        space: Space = (),
    ) -> Tensor:
        """The elements of the first operand at `indices`, one per axis of it."""
        text = span.source.text[span.start : span.end]
        attributes = (
            ("shape", shape),
            ("symbols", symbols),
            ("indices", indices),
            ("site", text if len(text) <= 80 else text[:77] + "..."),
        )
        for index, extent in zip(indices, operands[0].full_type.shape, strict=True):
            if isinstance(index, tuple):
                self._require_elements(extent, shape, span)
        result = TensorType(operands[0].full_type.dtype, shape)
        return self.apply("access", operands, attributes, (result,), span, space)[0]

    def within(self, at: Tensor, extent: Expr, length: Expr, span: Span) -> Tensor:
        """Positions from data, checked: each with the `length` that begins there in 0..extent."""
        attributes = (("extent", extent), ("length", length))
        return self.apply("within", (at,), attributes, (at.full_type,), span)[0]

    def update(
        self,
        base: Tensor,
        value: Tensor,
        at: Selection,
        state: str,
        span: Span,
    ) -> Tensor:
        """The base with a value in place of what is selected; `state` is kept for the next call."""
        for index, extent in zip(at.indices, base.type.shape, strict=True):
            if isinstance(index, tuple):
                self._require_elements(extent, value.type.shape, span)
        attributes = (("symbols", at.symbols), ("indices", at.indices), ("state", state))
        operands = (base, value, *at.tensors)
        return self.apply("update", operands, attributes, (base.type,), span)[0]

    def state(self, name: str, declared: TensorType, span: Span) -> Tensor:
        """What the state of a session is before the call."""
        return self.apply("state", (), (("name", name),), (declared,), span)[0]

    def _require_elements(self, extent: Expr, shape: tuple[Expr, ...], span: Span) -> None:
        """Ask that nothing is read from an empty dimension: its kernel could not tell."""
        if self.facts.is_positive(extent):
            return
        count = const(1)
        for size in shape:
            count = count * size
        enough = minimum(extent, 1, self.facts) - minimum(count, 1, self.facts)
        if not self.facts.is_nonneg(enough):
            message = f"no index is in range of a dimension of size {extent}"
            self.check(enough, ">=0", message, span)

    def lifted(self, value: Tensor, space: Space, span: Span) -> Tensor:
        """`value` with one leading axis per index of `space`, repeated along the new ones."""
        if value.space == space:
            return value
        names = tuple(name for name, _ in space)
        shape = tuple(extent for _, extent in space)
        indices = tuple(sym(name) for name, _ in value.space)
        return self.access((value,), shape, names, indices, span, space)

    def step(self, name: str, first: Expr, length: Expr, symbol: str = "") -> str:
        """A new symbol for the steps of a scan, from 0 to before `length`."""
        symbol = symbol or f"step{len(self.steps) + 1}"
        self.steps[symbol] = Step(name, first, length)
        self.facts = self.facts.with_ranges({symbol: (0, length - 1)})
        return symbol

    def shown(self, text: str) -> str:
        """A text with the steps of scans as the source names them."""
        for symbol, step in reversed(self.steps.items()):
            name = step.name
            if step.first != const(0):  # a symbol counts from 0
                first = re.escape(str(step.first))
                text = re.sub(rf"(?<!\*)\b{symbol} \+ {first}\b(?!\*)", name, text)
                name = f"({name} - {step.first})"
            text = re.sub(rf"\b{symbol}\b", name, text)
        return text

    def _require_constant_shape(self, type: TensorType, span: Span) -> None:
        if self.steps and any(d.symbols() & self.steps.keys() for d in type.shape):
            raise Failed(
                "E0221", "the shape of a value changes from step to step", span,
                str(type),
                help="index notation over a range that fits every step has one shape: "
                "`y[j in 0..4] = x[t + j]`; `select(condition, a, b)` leaves elements out",
            )  # fmt: skip

    def _at_every_step(self, expr: Expr, relation: str, message: str, span: Span) -> Expr:
        """A condition that implies one that mentions steps. Raises Failed if none is found."""
        for symbol, step in reversed(self.steps.items()):
            if symbol not in expr.symbols():
                continue
            slope = expr.coefficient(symbol)
            rising = slope is not None and self.facts.is_nonneg(slope)
            falling = slope is not None and self.facts.is_nonneg(-slope)
            if relation == "==0" or not (rising or falling):
                raise Failed("E0221", "this may fail at some step", span, message,
                             notes=["a call checks sizes, and no sizes decide this"])  # fmt: skip
            at = const(0) if rising else step.length - 1
            expr = self.facts.simplify(expr.substitute({symbol: at}, self.facts))
            high = self.facts.bounds(expr)[1]
            if high is not None and high < 0:
                where = f"at `{step.name}` = {at + step.first}"
                raise Failed("E0216", message, span, where)
            if not self.facts.is_positive(step.length):  # it holds where there are no steps
                expr = maximum(expr, -step.length, self.facts)
        return expr

    def check(self, expr: Expr, relation: str, message: str, span: Span) -> None:
        """Ask for a condition to be tested when the pipeline is called. Raises Failed for one
        that some step of a scan always breaks."""
        if expr.symbols() & self.steps.keys():
            expr = self._at_every_step(expr, relation, message, span)
            message = self.shown(message)
            if self.facts.is_nonneg(expr):
                return
        self._at_call(Check(expr, relation, message, span))
        pair = divided(expr) if relation == "==0" else None
        if pair is None:
            return
        whole, by = pair
        at_zero = maximum(1 - maximum(by, -by, self.facts), 0, self.facts) * whole
        if self.facts.simplify(at_zero).terms:  # whole % 0 is 0, whatever whole is
            self._at_call(Check(at_zero, "==0", f"{message}, where 0 divides 0 alone", span))
        if pair not in self.facts.divisible:
            self.facts = Facts(self.facts.ranges, (*self.facts.divisible, pair))

    def _at_call(self, check: Check) -> None:
        if check not in self.checks:
            self.checks.append(check)


def divided(expr: Expr) -> tuple[Expr, Expr] | None:
    """a and b where the expression, which is to be 0, says that b divides a: D - 2 and 4 of
    D % 4 - 2."""
    for monomial, coefficient in expr.terms:
        if abs(coefficient) != 1 or len(monomial) != 1 or monomial[0][1] != 1:
            continue
        atom = monomial[0][0]
        left = (expr_of(atom) - expr * coefficient).as_int()
        if atom.kind == "%" and left is not None:
            return atom.args[0] - left, atom.args[1]
    return None


def default_dtype(number: Number) -> DType:
    """The dtype of a literal that meets no other."""
    if isinstance(number.value, bool):
        return BOOL
    return I64 if isinstance(number.value, int) else F32
