"""`scan`: a recurrence over the positions of a range, with values carried from step to step.

The body is checked once, at a step that is a symbol; its operations are recorded between one
`carried` for each carried value and the `recurrence` that ends it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace

from stagefuse.dsl import ast
from stagefuse.dsl.dims import Expr, const, maximum, sym
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.source import Span
from stagefuse.dsl.types import TensorType

from . import expressions, literals, notation
from .apply import size
from .frame import Frame
from .report import Failed, text_of
from .unify import range_notes
from .values import (
    POISON,
    Dim,
    Interval,
    Number,
    Poison,
    Scope,
    Tensor,
    Value,
    describe,
    is_poison,
    is_tensor,
)


@frozen
class Gathered:
    """What every step gives for a tensor: its value, and the position along the first axis."""

    value: Value
    at: Expr
    span: Span


@dataclass
class Steps:
    """The scan whose body is being checked: the step's symbol and name, the names of what it
    carries, and what is gathered."""

    symbol: str
    name: str
    first: Expr
    count: Expr
    carried: frozenset[str]
    gathered: dict[str, Gathered] = field(default_factory=dict)


@frozen
class _Carried:
    """A carried value: its name, where it starts, and its tensors before the first step and
    at the step at hand."""

    name: str
    span: Span
    start: Tensor
    here: Tensor


def scan(frame: Frame, node: ast.Scan) -> None:
    """Check a scan and bind what it carried last and what it gathered. Raises Failed."""
    header = Span(node.span.source, node.span.start, node.range.span.end)
    interval = expressions.evaluate(frame, node.range)
    starts = [(s, _start(frame, s)) for s in node.starts]
    _require_distinct(node)
    if isinstance(interval, Poison) or any(tensor is None for _, tensor in starts):
        return _poison(frame, node)
    if not isinstance(interval, Interval):
        raise Failed("E0204", "a scan runs over a range", node.range.span, describe(interval),
                     help=f"write `{node.name} in 0..N`")  # fmt: skip
    recorder = frame.recorder
    count = length = recorder.facts.simplify(interval.stop - interval.start)
    if not recorder.facts.is_nonneg(length):
        count = maximum(length, 0, recorder.facts)
    symbol = recorder.step(node.name, interval.start, length)
    own = frozenset(start.name for start in node.starts)
    steps = Steps(symbol, node.name, interval.start, count, own)
    kept = {name: state for name, state in frame.states.items() if name not in own}
    inner = replace(frame, locals=dict(frame.locals), steps=steps, states=kept)
    inner.bind(node.name, Dim(sym(steps.symbol) + interval.start), node.name_span)
    carried = [
        _carry(inner, steps, number, start, tensor)
        for number, (start, tensor) in enumerate(starts)
        if tensor is not None
    ]
    from . import statements

    statements.run(inner, node.body, False)
    following = [_next(inner, c, node) for c in carried]
    values = [*(g.value for g in steps.gathered.values())]
    if any(f is None for f in following) or any(map(is_poison, values)):
        return _poison(frame, node)
    nexts = [f for f in following if f is not None]
    _finish(frame, steps, carried, nexts, header)


def _poison(frame: Frame, node: ast.Scan) -> None:
    from . import statements

    statements.poison(frame, [node])


def _require_distinct(node: ast.Scan) -> None:
    names = [node.name, *(s.name for s in node.starts)]
    for start in node.starts:
        if names.count(start.name) > 1:
            raise Failed("E0221", f"`{start.name}` is named twice in this scan", start.name_span)


def _start(frame: Frame, start: ast.Start) -> Tensor | None:
    """The value before the first step; None if it is wrong."""
    value = expressions.evaluate(frame, start.value)
    if is_poison(value):
        return None
    if isinstance(value, Scope) and value.leaf is not None:
        value = frame.recorder.weight(value, start.value.span)
    if literals.own_dtype(value) is None and not hasattr(value, "value"):
        raise Failed("E0204", "a scan carries tensors", start.value.span, describe(value))
    return literals.typed(frame.recorder, value, None, start.value.span)


def _carry(
    frame: Frame, steps: Steps, number: int, start: ast.Start, tensor: Tensor
) -> _Carried:
    attributes = (("step", steps.symbol), ("number", number))
    type = tensor.full_type
    (here,) = frame.recorder.apply("carried", (tensor,), attributes, (type,), start.span)
    frame.bind(start.name, here, start.name_span)
    return _Carried(start.name, start.span, tensor, here)


def _next(frame: Frame, carried: _Carried, node: ast.Scan) -> Tensor | None:
    """The value at the next step, of the same type; None if it is wrong. Raises Failed."""
    value = frame.locals[carried.name]
    if is_poison(value):
        return None
    span = next(_bindings(node.body, carried.name), None)
    if value is carried.here or span is None:
        raise Failed(
            "E0221",
            f"`{carried.name}` is carried but never gets a next value",
            carried.span,
            help=f"bind it in the body, `{carried.name} = ...`, or leave it out",
        )
    if isinstance(value, Scope) and value.leaf is not None:
        value = frame.recorder.weight(value, span)
    if literals.own_dtype(value) is None and not hasattr(value, "value"):
        raise Failed("E0204", "a scan carries tensors", span, describe(value))
    dtype = carried.start.type.dtype
    tensor = literals.typed(frame.recorder, value, dtype, span)
    _require_same(frame, carried, tensor, span)
    return tensor


def _require_same(frame: Frame, carried: _Carried, tensor: Tensor, span: Span) -> None:
    before, after = carried.start.type, tensor.type
    facts = frame.recorder.facts
    notes: list[str] = []
    same = before.dtype == after.dtype and before.rank == after.rank
    if same:
        differ = [
            (a, b)
            for a, b in zip(before.shape, after.shape, strict=True)
            if not facts.prove_eq(a, b)
        ]
        if not differ:
            return
        notes = range_notes(facts, *differ[0])
    raise Failed(
        "E0221",
        f"`{carried.name}` would change its type from one step to the next",
        span,
        f"{after} after a step",
        [(carried.span, f"{before} at the start")],
        notes or ["what a scan carries has one type"],
        f"start with that dtype: `{after.dtype}(...)`" if before.dtype != after.dtype
        else None if before.rank >= after.rank
        else f"start with the whole shape: `zeros([...], {before.dtype})`",
    )


def _bindings(statements: Sequence[ast.Stmt], name: str) -> Iterator[Span]:
    """Where statements bind a name, the last place first."""
    for statement in reversed(statements):
        match statement:
            case ast.Assign() if name in _targets(statement.target):
                yield statement.span
            case ast.IndexDef() | ast.StepDef() | ast.ItemAssign() if statement.name == name:
                yield statement.name_span
            case ast.For():
                yield from _bindings(statement.body, name)
            case ast.Scan():
                if name in (s.name for s in statement.starts):
                    yield statement.name_span
                yield from _bindings(statement.body, name)
            case ast.If():
                for branch in (statement.orelse, *(b.body for b in statement.branches)):
                    yield from _bindings(branch, name)


def _targets(target: ast.Target) -> Iterator[str]:
    if isinstance(target, ast.Name):
        yield target.name
    else:
        for item in target.items:
            yield from _targets(item)


def _finish(
    frame: Frame,
    steps: Steps,
    carried: Sequence[_Carried],
    nexts: Sequence[Tensor],
    span: Span,
) -> None:
    recorder = frame.recorder
    gathered = [
        (name, literals.typed(recorder, g.value, None, g.span), g)
        for name, g in steps.gathered.items()
    ]
    operands = [*(c.here for c in carried), *nexts, *(tensor for _, tensor, _ in gathered)]
    attributes = (
        ("step", steps.symbol),
        ("count", steps.count),
        ("carried", len(carried)),
        ("places", tuple(g.at for *_, g in gathered)),
    )
    types = [c.start.type for c in carried]
    types += [TensorType(t.type.dtype, (steps.count, *t.type.shape)) for _, t, _ in gathered]
    results = recorder.apply("recurrence", operands, attributes, types, span)
    names = [(c.name, c.span) for c in carried] + [(name, g.span) for name, _, g in gathered]
    for (name, where), result in zip(names, results, strict=True):
        frame.bind(name, result, where)


def is_gathered(frame: Frame, node: ast.IndexDef | ast.StepDef) -> bool:
    """Whether the first index of a definition is the step of the scan around it, or made of it.

    Items of what the scan carries are updated."""
    if frame.steps is not None and node.name in frame.steps.carried:
        return False
    if isinstance(node, ast.StepDef):
        name = "" if frame.steps is None else frame.steps.name
        base = frame.locals.get(node.name)
        in_update = base is not None and (is_tensor(base) or is_poison(base))
        return not in_update or notation.mentions([node.at], {name: None})
    if frame.steps is None or not node.indices or node.indices[0].range is not None:
        return False
    value = frame.locals.get(node.indices[0].name)
    return isinstance(value, Dim) and frame.steps.symbol in value.expr.symbols()


def gather(frame: Frame, node: ast.IndexDef | ast.StepDef) -> None:
    """`y[t] = value`: what this step gives for a tensor. Raises Failed."""
    steps = frame.steps
    if isinstance(node, ast.IndexDef):
        first = node.indices[0]
        position, rest, span = frame.find(first.name) or POISON, node.indices[1:], first.span
    else:
        span, rest = node.at.span, node.indices
        position = Number(0) if steps is None else expressions.evaluate(frame, node.at)
    if isinstance(position, Poison):
        return
    at = size(position)
    if steps is None or at is None or steps.symbol not in at.symbols():
        raise Failed(
            "E0113",
            "an index is a name, with a range if it needs one",
            span,
            help="write `y[i, j in 0..3] = ...`; values are never assigned in place",
        )
    frame.checker.require_free(node.name, node.name_span)
    if node.name in steps.gathered:
        raise Failed(
            "E0221", f"`{node.name}` is gathered twice", node.name_span, "",
            [(steps.gathered[node.name].span, "here too")],
        )  # fmt: skip
    steps.gathered[node.name] = Gathered(
        _step_value(frame, node, rest), _position(frame, node.name, at, span), node.name_span
    )


def _position(frame: Frame, name: str, at: Expr, span: Span) -> Expr:
    """The position as the step or as its mirror image. Raises Failed."""
    steps, facts = frame.steps, frame.recorder.facts
    assert steps is not None
    forward = sym(steps.symbol)
    for place in (forward, steps.count - 1 - forward):
        if facts.prove_eq(at, place):
            return place
    t, low = steps.name, steps.first
    if low == const(0):
        advice = f"`{name}[{t}]`, or `{name}[{steps.count} - 1 - {t}]` from the end"
    else:
        advice = f"`{name}[{t} - {text_of_expr(low)}]`: positions count from 0"
    raise Failed(
        "E0221", f"the steps do not give every position of `{name}` from 0", span, help=advice
    )


def text_of_expr(expr: Expr) -> str:
    text = str(expr)
    return text if text.isalnum() else f"({text})"


def _step_value(
    frame: Frame, node: ast.IndexDef | ast.StepDef, indices: tuple[ast.IndexVar, ...]
) -> Value:
    """What is gathered: the value, or what index notation makes of it."""
    if indices:
        inner = ast.IndexDef(node.span, node.name, node.name_span, indices, node.value)
        return notation.definition(frame, inner)
    value = expressions.evaluate(frame, node.value)
    if isinstance(value, Scope) and value.leaf is not None:
        return frame.recorder.weight(value, node.value.span)
    if not is_poison(value) and literals.own_dtype(value) is None and not hasattr(value, "value"):
        raise Failed("E0204", f"`{text_of(node.value.span)}` is no tensor", node.value.span,
                     describe(value))  # fmt: skip
    return value
