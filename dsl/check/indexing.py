"""NumPy indexing: slices, integers, None, `...` and integer tensors become one access."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeAlias

from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, sym
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.source import Span

from .record import Recorder
from .report import Failed
from .unify import dimensions
from .values import Tensor


@frozen
class At:
    """A single position."""

    expr: Expr
    span: Span


@frozen
class Cut:
    """A slice; the step is a constant."""

    start: Expr | None
    stop: Expr | None
    step: int
    span: Span


@frozen
class NewAxis:
    span: Span


@frozen
class Dots:
    span: Span


@frozen
class Ids:
    """A tensor of positions."""

    tensor: Tensor
    span: Span


@frozen
class Run:
    """A slice of known length from a position that is read from data."""

    start: Tensor
    length: Expr
    span: Span


Item: TypeAlias = At | Cut | NewAxis | Dots | Ids | Run


@frozen
class Selection:
    """The elements that an index selects: their shape, and where each lies in the base.

    Each of `indices`, one per axis of the base, is an expression over `symbols`, or says how it is
    read from one of `tensors`.
    """

    tensors: tuple[Tensor, ...]
    shape: tuple[Expr, ...]
    symbols: tuple[str, ...]
    indices: tuple[Any, ...]


def index(recorder: Recorder, base: Tensor, items: Sequence[Item], span: Span) -> Tensor:
    """`base[items]`. Raises Failed."""
    found = select(recorder, base, items, span)
    operands = (base, *found.tensors)
    return recorder.access(operands, found.shape, found.symbols, found.indices, span)


def select(
    recorder: Recorder, base: Tensor, items: Sequence[Item], span: Span, checked: bool = False
) -> Selection:
    """What `items` select of the base; `checked`: what they read is checked apart. Raises Failed.
    """
    shape = base.type.shape
    full = _with_dots(items, len(shape), base, span)
    extents = _extents(full, shape)
    arrays = [item for item in full if isinstance(item, Ids)]
    common = _broadcast_ids(recorder.facts, arrays)
    layout = _Layout(recorder, common)
    advanced = [n for n, item in enumerate(full) if isinstance(item, At | Ids)] if arrays else []
    apart = bool(advanced) and advanced[-1] - advanced[0] + 1 != len(advanced)
    if apart:
        layout.place_common()
    for number, (item, extent) in enumerate(zip(full, extents, strict=True)):
        if advanced and not apart and number == advanced[0]:
            layout.place_common()
        layout.add(item, extent, base)
    tensors: list[Tensor] = []
    indices: list[Any] = []
    for entry, extent in zip(layout.indices, shape, strict=True):
        if not isinstance(entry, Ids | tuple):
            indices.append(entry)
            continue
        item, place = entry if isinstance(entry, tuple) else (entry, None)
        into: tuple[Expr, ...] = ()
        if isinstance(item, Ids):
            into, place = layout.into(item.tensor), const(0)
        tensor = item.start if isinstance(item, Run) else item.tensor
        tensor = layout.recorder.positions(tensor, item.span)
        if checked or isinstance(item, Run):
            length = item.length if isinstance(item, Run) else const(1)
            tensor = recorder.within(tensor, extent, length, span)
        tensors.append(tensor)
        indices.append(("tensor", len(tensors), into, const(1), place))
    return Selection(tuple(tensors), tuple(layout.shape), tuple(layout.symbols), tuple(indices))


def _with_dots(items: Sequence[Item], rank: int, base: Tensor, span: Span) -> list[Item]:
    """The items with `...` written out, one per axis besides `None`."""
    used = sum(isinstance(item, At | Cut | Ids | Run) for item in items)
    dots = [item for item in items if isinstance(item, Dots)]
    if len(dots) > 1:
        raise Failed("E0216", "`...` can stand once in an index", dots[1].span)
    if used > rank:
        raise Failed(
            "E0216",
            f"too many indices: {used} for {dimensions(rank)}",
            span,
            f"the value is {base.type}",
        )
    fill: list[Item] = [Cut(None, None, 1, span)] * (rank - used)
    if not dots:
        return [*items, *fill]
    at = list(items).index(dots[0])
    return [*items[:at], *fill, *items[at + 1 :]]


def _extents(items: Sequence[Item], shape: tuple[Expr, ...]) -> list[Expr]:
    axes = iter(shape)
    return [const(1) if isinstance(item, NewAxis) else next(axes) for item in items]


def _broadcast_ids(facts: Facts, arrays: list[Ids]) -> tuple[Expr, ...]:
    """The common shape of the index tensors."""
    common: list[Expr] = []
    for item in arrays:
        shape = list(item.tensor.type.shape)
        while len(common) < len(shape):
            common.insert(0, const(1))
        for back in range(1, len(shape) + 1):
            mine, ours = shape[-back], common[-back]
            if ours == const(1):
                common[-back] = mine
            elif mine != const(1) and not facts.prove_eq(mine, ours):
                raise Failed(
                    "E0203",
                    "these index tensors do not broadcast",
                    item.span,
                    str(item.tensor.type),
                    [(other.span, str(other.tensor.type)) for other in arrays if other != item][:1],
                )
    return tuple(common)


class _Layout:
    """The axes of the result and the index of every axis of the base, as they are found."""

    def __init__(self, recorder: Recorder, common: tuple[Expr, ...]) -> None:
        self.recorder, self.facts, self.common = recorder, recorder.facts, common
        self.shape: list[Expr] = []
        self.symbols: list[str] = []
        self.indices: list[Expr | Ids | tuple[Run, Expr]] = []
        self.common_symbols: list[Expr] = []

    def axis(self, extent: Expr) -> Expr:
        name = f"i{len(self.symbols)}"
        self.symbols.append(name)
        self.shape.append(extent)
        return sym(name)

    def place_common(self) -> None:
        """The broadcast axes of the index tensors go here."""
        self.common_symbols = [self.axis(extent) for extent in self.common]

    def add(self, item: Item, extent: Expr, base: Tensor) -> None:
        match item:
            case NewAxis():
                self.axis(const(1))
            case At():
                self.indices.append(self._position(item, extent, base))
            case Cut():
                start, length = cut_bounds(self.facts, item, extent)
                self.indices.append(start + self.axis(length) * item.step)
            case Run():
                _require_part(self.recorder, item, extent)
                self.indices.append((item, self.axis(item.length)))
            case Ids():
                self.indices.append(item)

    def _position(self, item: At, extent: Expr, base: Tensor) -> Expr:
        at = wrapped(self.recorder, item.expr, extent)
        for gap in (at, extent - 1 - at):
            if self.facts.is_nonneg(gap):
                continue
            text = f"index {item.expr} is out of bounds"
            _, high = self.facts.bounds(gap)
            if high is not None and high < 0:
                label = f"the dimension has size {extent}; the value is {base.type}"
                raise Failed("E0216", text, item.span, label)
            message = f"{text} for a dimension of size {extent}"
            self.recorder.check(gap, ">=0", message, item.span)
        return at

    def into(self, tensor: Tensor) -> tuple[Expr, ...]:
        """The indices into an index tensor, aligned at the last axis."""
        shape = tensor.type.shape
        own = self.common_symbols[len(self.common_symbols) - len(shape) :]
        wide = self.common[len(self.common) - len(shape) :]
        return tuple(
            const(0) if extent == const(1) and full != const(1) else symbol
            for symbol, extent, full in zip(own, shape, wide, strict=True)
        )


def _require_part(recorder: Recorder, item: Run, extent: Expr) -> None:
    """Ask that a slice is no longer than its axis. Raises Failed."""
    gap = extent - item.length
    if recorder.facts.is_nonneg(gap):
        return
    text = f"a slice of {item.length} positions does not fit a dimension of size {extent}"
    _, high = recorder.facts.bounds(gap)
    if high is not None and high < 0:
        raise Failed("E0216", text, item.span)
    recorder.check(gap, ">=0", text, item.span)


def wrapped(recorder: Recorder, expr: Expr, extent: Expr) -> Expr:
    """The position that an index means: a negative one counts from the end.

    One that a step of a scan moves counts from one side at all steps, from the start if it can.
    """
    facts = recorder.facts
    if facts.is_nonneg(expr):
        return expr
    if facts.is_nonneg(-expr - 1):
        return expr + extent
    if expr.symbols() & recorder.steps.keys():
        return expr
    return expr + extent * (const(1) - _is_nonneg(facts, expr))


def _is_nonneg(facts: Facts, expr: Expr) -> Expr:
    """1 where the expression is at least 0, else 0."""
    return maximum(minimum(expr + 1, 1, facts), 0, facts)


def is_part(facts: Facts, part: Expr, whole: Expr) -> bool:
    """Whether part <= whole, also where one of them has a quotient.

    With d >= 1, p >= 0 follows from d*p >= 0, and x - d + 1 <= d*(x // d) <= x.
    """
    gap = whole - part
    if facts.is_nonneg(gap):
        return True
    for monomial, coefficient in gap.terms:
        if len(monomial) == 1 and monomial[0][1] == 1 and monomial[0][0].kind == "//":
            inner, divisor = monomial[0][0].args
            times = divisor.as_int()
            if times is None or times < 1:
                continue
            rest = gap - Expr(((monomial, coefficient),))
            least = inner if coefficient < 0 else inner - times + 1
            if facts.is_nonneg(rest * times + least * coefficient):
                return True
    return False


def _clamped(facts: Facts, expr: Expr, extent: Expr, low: int, high: int) -> Expr:
    """A slice's bound as Python clamps it, to low..extent+high. `low` is 0 or -1."""
    top = extent + high

    def from_start() -> Expr:
        return minimum(expr, top, facts)

    def from_end() -> Expr:
        if low == 0:  # written so that `x[:-1]` and `x[-1:]` add up, and `x[1:]` has its length
            return extent - minimum(extent, -expr, facts)
        return maximum(expr + extent, low, facts)

    if facts.is_nonneg(expr):
        return expr if is_part(facts, expr, top) else from_start()
    if facts.is_nonneg(-expr - 1):
        return from_end()
    positive = _is_nonneg(facts, expr)
    return positive * from_start() + (const(1) - positive) * from_end()


def cut_bounds(facts: Facts, cut: Cut, extent: Expr) -> tuple[Expr, Expr]:
    """The first position and the length of a slice.

    Source: Python's `slice.indices`.
    """
    step = cut.step
    if step == 1 and cut.stop is None and cut.start is not None:
        if facts.is_nonneg(-cut.start - 1):
            length = minimum(extent, -cut.start, facts)
            return extent - length, length
    if step > 1 and cut.stop is None and cut.start is not None:
        first = cut.start.as_int()
        if first is not None and 0 <= first < step:  # an axis that ends before it has no element
            return cut.start, facts.simplify(floordiv(extent + (step - 1 - first), step, facts))
    low, high = (0, 0) if step > 0 else (-1, -1)
    start = const(0) if step > 0 else extent - 1
    stop = extent if step > 0 else const(-1)
    if cut.start is not None:
        start = _clamped(facts, cut.start, extent, low, high)
    if cut.stop is not None:
        stop = _clamped(facts, cut.stop, extent, low, high)
    span = stop - start if step > 0 else start - stop
    steps = floordiv(span + abs(step) - 1, abs(step), facts)
    if not is_part(facts, const(0), span):
        steps = maximum(steps, 0, facts)
    length = facts.simplify(steps)
    is_half = step == 1 and not facts.simplify(length - start).terms
    return start, start if is_half else length
