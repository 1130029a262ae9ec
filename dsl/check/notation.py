"""Index notation: definitions and reductions become accesses, pointwise operations, reductions.

The tree is walked twice: first every access is collected and the ranges are inferred, then the
body is evaluated with one leading axis per index that is in scope.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stagefuse.dsl import ast
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.signature import OpError
from stagefuse.dsl.source import Span

from . import expressions, literals
from .apply import Arg, size, unindexed
from .frame import Frame
from .indexing import wrapped
from .ranges import Index, Range, RangeProblem, Ranges, Use
from .report import Failed, text_of
from .values import POISON, Dim, Interval, Poison, Scope, Space, Tensor, Value, describe, is_poison


class Poisoned(Exception):
    """Something inside is wrong and has been reported."""


def children(node: Any) -> Iterator[Any]:
    """The syntax nodes directly below a node; all operands of a chain of operators."""
    if isinstance(node, ast.Binary):
        first, operators = node.chain()
        yield from (first, *(at.right for at in operators))
        return
    for name in node.__match_args__:
        value = getattr(node, name)
        for item in value if isinstance(value, tuple) else (value,):
            if isinstance(item, ast.Node):
                yield item


def mentions(nodes: Sequence[Any], names: Mapping[str, Any]) -> bool:
    """Whether any of the names occurs in the nodes."""
    for node in nodes:
        if isinstance(node, ast.Name):
            if node.name in names:
                return True
        elif isinstance(node, ast.Reduction):
            inner = {n: 0 for n in names if n not in {v.name for v in node.indices}}
            ranges = [v.range for v in node.indices if v.range is not None]
            if mentions([node.body], inner) or mentions(ranges, names):
                return True
        elif mentions(list(children(node)), names):
            return True
    return False


@dataclass
class Notation:
    """One definition or outermost reduction: its bases, indices and ranges."""

    frame: Frame
    bases: dict[int, Tensor] = field(default_factory=dict)
    indices: list[Index] = field(default_factory=list)
    uses: list[Use] = field(default_factory=list)
    symbols: dict[int, tuple[str, ...]] = field(default_factory=dict)
    ranges: dict[str, Range] = field(default_factory=dict)

    def declare(
        self, owner: Any, variables: tuple[ast.IndexVar, ...], scope: Mapping[str, str]
    ) -> dict[str, str]:
        """New symbols for the indices of a definition or reduction. Raises Failed."""
        names: dict[str, str] = {}
        for variable in variables:
            if variable.name in names:
                raise Failed("E0215", f"the index `{variable.name}` is named twice", variable.span)
            self.frame.checker.require_free(variable.name, variable.span)
            others = [*(v.name for v in variables), *scope]
            if variable.range is not None and mentions([variable.range], dict.fromkeys(others)):
                raise Failed(
                    "E0215",
                    "a range cannot depend on another index",
                    variable.range.span,
                    help="run over the whole range, and `select(condition, value, 0)`",
                )
            names[variable.name] = self._symbol(variable.name)
            self.indices.append(
                Index(names[variable.name], variable.name, variable.span, self._stated(variable))
            )
        self.symbols[id(owner)] = tuple(names.values())
        return names

    def _symbol(self, name: str) -> str:
        taken = {index.symbol for index in self.indices}
        taken |= set(self.frame.recorder.facts.ranges) | {n for n, _ in self.frame.space}
        number, symbol = 1, name
        while symbol in taken:
            number += 1
            symbol = f"{name}_{number}"
        return symbol

    def _stated(self, variable: ast.IndexVar) -> Range | None:
        if variable.range is None:
            return None
        value = expressions.evaluate(self.frame, variable.range)
        if isinstance(value, Poison):
            raise Poisoned
        assert isinstance(value, Interval)
        return value.start, value.stop

    def collect(self, node: Any, scope: dict[str, str]) -> None:
        """Every access below a node. Raises Failed, Poisoned."""
        if isinstance(node, ast.Reduction):
            self.collect(node.body, {**scope, **self.declare(node, node.indices, scope)})
            return
        if isinstance(node, ast.Subscript) and mentions(node.items, scope):
            self._collect_access(node, scope)
            return
        for child in children(node):
            self.collect(child, scope)

    def _collect_access(self, node: ast.Subscript, scope: dict[str, str]) -> None:
        if mentions([node.base], scope):
            raise Failed(
                "E0215",
                "the indexed value depends on an index itself",
                node.base.span,
                help="write all indices in one pair of brackets: `x[i, j]`",
            )
        base = self._base(node)
        shape = base.type.shape
        if len(node.items) != len(shape):
            raise Failed(
                "E0215",
                f"{_count(len(node.items), 'index', 'indices')} for "
                f"{_count(len(shape), 'dimension', 'dimensions')}",
                node.span,
                "",
                [(node.base.span, str(base.type))],
                ["index notation takes one index for each dimension"],
            )
        inside = self.frame.within(
            {name: Dim(sym(symbol)) for name, symbol in scope.items()}, self.frame.space, None
        )
        for item, extent in zip(node.items, shape, strict=True):
            if isinstance(item, ast.Slice | ast.EllipsisLit | ast.NoneLit):
                raise Failed(
                    "E0215",
                    "a slice cannot stand among indices",
                    item.span,
                    help="slice the tensor before, on a line of its own",
                )
            if not mentions([item], scope):
                value = expressions.evaluate(self.frame, item)
            elif _is_affine(item):
                value = expressions.evaluate(inside, item)
            else:
                self.collect(item, scope)
                continue
            if isinstance(value, Poison):
                raise Poisoned
            position = size(value)
            if position is not None:
                position = (
                    wrapped(self.frame.recorder, position, extent)
                    if (not mentions([item], scope))
                    else position
                )
                self.uses.append(Use(position, extent, node.span, text_of(node.base.span)))

    def _base(self, node: ast.Subscript) -> Tensor:
        value = expressions.evaluate(self.frame, node.base)
        if isinstance(value, Poison):
            raise Poisoned
        if isinstance(value, Scope) and value.leaf is not None:
            value = self.frame.recorder.weight(value, node.base.span)
        if not isinstance(value, Tensor):
            raise Failed("E0215", "this value cannot be indexed", node.base.span, describe(value))
        self.bases[id(node)] = value
        return value

    def infer(self) -> None:
        """Find every range. Raises Failed."""
        recorder = self.frame.recorder
        ranges = Ranges(self.indices, self.uses, recorder.facts, recorder.steps)
        try:
            self.ranges = ranges.infer()
        except RangeProblem as problem:
            raise Failed(
                "E0215",
                problem.message,
                problem.span,
                problem.label,
                [problem.other] if problem.other else [],
                problem.notes,
                problem.help,
            ) from problem
        for later in ranges.later:
            recorder.check(later.expr, ">=0", later.message, later.span)

    def inside(self, frame: Frame, owner: Any, names: Sequence[str]) -> Frame:
        """The frame below a definition or reduction: more indices, more axes."""
        symbols = self.symbols[id(owner)]
        facts = frame.recorder.facts
        added = []
        for symbol in symbols:
            low, stop = self.ranges[symbol]
            extent = facts.simplify(stop - low)
            if not facts.is_nonneg(extent):
                from stagefuse.dsl.dims import maximum

                extent = maximum(extent, 0, facts)
            added.append((symbol, extent))
        space: Space = (*frame.space, *added)
        indices = {name: Dim(value.expr, space) for name, value in frame.indices.items()}
        for name, symbol in zip(names, symbols, strict=True):
            indices[name] = Dim(sym(symbol) + self.ranges[symbol][0], space)
        return frame.within(indices, space, self)

    def access(self, frame: Frame, node: ast.Subscript) -> Value:
        """The elements of a base at indices, one per position of the space. Raises Failed."""
        base = self.bases[id(node)]
        operands = [base]
        indices: list[Any] = [sym(name) for name, _ in base.space]
        for item, extent in zip(node.items, base.type.shape, strict=True):
            position = self._position(frame, item, extent, operands)
            if position is None:
                return POISON
            indices.append(position)
        names = tuple(name for name, _ in frame.space)
        shape = tuple(extent for _, extent in frame.space)
        return frame.recorder.access(operands, shape, names, tuple(indices), node.span, frame.space)

    def _position(self, frame: Frame, item: ast.Expr, extent: Expr, operands: list[Tensor]) -> Any:
        direct = self._direct_ids(frame, item, operands)
        if direct is not None:
            return direct
        value = expressions.evaluate(frame, item)
        if isinstance(value, Poison):
            return None
        if isinstance(value, Dim) and value.space:
            return value.expr
        position = size(value)
        if position is not None:
            return wrapped(frame.recorder, position, extent)
        if isinstance(value, Scope) and value.leaf is not None:
            value = frame.recorder.weight(value, item.span)
        if not isinstance(value, Tensor) or value.type.rank or not value.type.dtype.is_int:
            raise Failed("E0216", "an index is an integer", item.span, describe(value))
        operands.append(frame.recorder.positions(value, item.span))
        into = tuple(sym(name) for name, _ in value.space)
        return ("tensor", len(operands) - 1, into, const(1), const(0))

    def _direct_ids(
        self, frame: Frame, item: ast.Expr, operands: list[Tensor]
    ) -> tuple[Any, ...] | None:
        """`table[ids[t], d]`: the ids are read in place, without a tensor of positions."""
        if not isinstance(item, ast.Subscript) or id(item) not in self.bases:
            return None
        ids = self.bases[id(item)]
        if ids.space or not ids.type.dtype.is_int or not all(map(_is_affine, item.items)):
            return None
        into = []
        for part, extent in zip(item.items, ids.type.shape, strict=True):
            value = expressions.evaluate(frame, part)
            if isinstance(value, Dim) and value.space:
                into.append(value.expr)
            elif size(value) is not None:
                into.append(wrapped(frame.recorder, size(value) or const(0), extent))
            else:
                return None
        operands.append(frame.recorder.positions(ids, item.span))
        return ("tensor", len(operands) - 1, tuple(into), const(1), const(0))


def _is_affine(node: Any) -> bool:
    """Whether an index expression is made of names and integers alone."""
    if isinstance(node, ast.Subscript | ast.Reduction | ast.Pipe):
        return False
    if isinstance(node, ast.Call):
        named = isinstance(node.fn, ast.Name) and node.fn.name in ("minimum", "maximum")
        return named and all(map(_is_affine, node.args))
    return all(map(_is_affine, children(node)))


def _count(number: int, one: str, many: str) -> str:
    return f"{number} {one if number == 1 else many}"


def definition(frame: Frame, node: ast.IndexDef) -> Value:
    """The tensor of `name[indices] = value`. Raises Failed."""
    notation = Notation(frame)
    try:
        names = notation.declare(node, node.indices, {})
        notation.collect(node.value, names)
    except Poisoned:
        return POISON
    notation.infer()
    inner = notation.inside(frame, node, list(names))
    value = expressions.evaluate(inner, node.value)
    if is_poison(value):
        return POISON
    tensor = _element(inner, value, node.value.span)
    return Tensor(tensor.id, tensor.full_type, frame.space)


def reduction(frame: Frame, node: ast.Reduction) -> Value:
    """The value of `sum[k] ...`. Raises Failed."""
    notation = frame.notation
    if notation is None or id(node) not in notation.symbols:
        notation = Notation(frame)
        try:
            notation.collect(node, {})
        except Poisoned:
            return POISON
        notation.infer()
    inner = notation.inside(frame, node, [v.name for v in node.indices])
    value = expressions.evaluate(inner, node.body)
    if is_poison(value):
        return POISON
    record = frame.checker.builtins.get(node.kind)
    if record is None:
        raise Failed("E0207", f"`{node.kind}` is not supported yet", node.span)
    tensor = _element(inner, value, node.body.span)
    axes = tuple(range(len(frame.space), len(inner.space)))
    arguments: dict[str, Any] = {}
    attributes: list[tuple[str, Any]] = []
    for position, param in enumerate(record.params):
        if position == 0:
            arguments[param.name] = tensor.full_type
            continue
        arguments[param.name] = axes if param.name == "axis" else param.default
        attributes.append((param.name, arguments[param.name]))
    try:
        (result,) = record.infer(arguments, frame.recorder.facts)
    except OpError as error:
        raise Failed(
            "E0207",
            error.message,
            node.span,
            error.label,
            [(node.body.span, describe(tensor))],
            error.notes,
            error.help,
        ) from error
    return frame.recorder.apply(
        record.name, (tensor,), attributes, (result,), node.span, frame.space
    )[0]


def _element(inner: Frame, value: Value, span: Span) -> Tensor:
    """A scalar per position of the whole space. Raises Failed."""
    if isinstance(value, Scope) and value.leaf is not None:
        value = inner.recorder.weight(value, span)
    if literals.own_dtype(value) is None and not hasattr(value, "value"):
        raise Failed("E0204", "index notation computes numbers", span, describe(value))
    tensor = literals.typed(inner.recorder, value, None, span)
    if tensor.type.rank:
        raise unindexed(Arg(tensor, span), tensor)
    return inner.recorder.lifted(tensor, inner.space, span)
