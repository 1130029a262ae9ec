"""Bodies: assignments, loops unrolled, branches chosen, and the result on the last line."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from stagefuse.dsl import ast

from . import expressions, notation, recurrence, updates
from .apply import size
from .frame import Frame
from .report import Failed, text_of
from .values import (
    POISON,
    Interval,
    Items,
    Number,
    Poison,
    Scope,
    Tensor,
    Value,
    describe,
    is_poison,
)

MAX_ITERATIONS = 65_536


def body(frame: Frame, statements: Sequence[ast.Stmt], what: str) -> Value:
    """Run the statements; the value of the last one. Raises Failed if it has none.

    A body without statements had some that are no syntax, which has been reported.
    """
    if not statements:
        return POISON
    result = run(frame, statements, True)
    if result is None:
        last = statements[-1]
        advice = "end the body with an expression"
        if isinstance(last, ast.Assign) and isinstance(last.target, ast.Name):
            advice = f"add a last line: `{last.target.name}`"
        raise Failed(
            "E0218",
            f"the body of {what} has no result",
            last.span,
            "the last line is the result, and this has no value",
            help=advice,
        )
    return result


def run(frame: Frame, statements: Sequence[ast.Stmt], wants_result: bool) -> Value | None:
    """The value of the last statement where a result is wanted and it has one."""
    result: Value | None = None
    for number, statement in enumerate(statements):
        is_result = wants_result and number == len(statements) - 1
        try:
            frame.checker.step(statement.span)
            result = _statement(frame, statement, is_result)
        except Failed as failure:
            frame.report(failure)
            poison(frame, [statement])
            result = POISON
    return result


def _statement(frame: Frame, statement: ast.Stmt, is_result: bool) -> Value | None:
    match statement:
        case ast.Assign():
            value = expressions.evaluate(frame, statement.value)
            assign(frame, statement.target, value)
            return POISON if is_poison(value) and is_result else None
        case ast.IndexDef() if recurrence.is_gathered(frame, statement):
            recurrence.gather(frame, statement)
        case ast.StepDef() if recurrence.is_gathered(frame, statement):
            recurrence.gather(frame, statement)
        case ast.StepDef():
            return updates.update(frame, statement)
        case ast.IndexDef():
            if updates.is_update(frame, statement):
                return updates.update(frame, statement)
            frame.checker.require_free(statement.name, statement.name_span)
            value = notation.definition(frame, statement)
            frame.bind(statement.name, value, statement.name_span)
            return value if is_result else None
        case ast.ItemAssign():
            return updates.update(frame, statement)
        case ast.State():
            raise updates.misplaced(frame, statement)
        case ast.ExprStmt():
            value = expressions.evaluate(frame, statement.value)
            if is_result:
                return value
            _require_used(value, statement)
        case ast.For():
            _loop(frame, statement)
        case ast.Scan():
            recurrence.scan(frame, statement)
        case ast.If():
            return _branch(frame, statement, is_result)
    return None


def _require_used(value: Value, statement: ast.ExprStmt) -> None:
    if is_poison(value):
        return
    raise Failed(
        "E0209",
        "nothing uses the value of this expression",
        statement.span,
        describe(value) if isinstance(value, Tensor) else "",
        help="bind it to a name, `y = ...`, or remove the line",
    )


def assign(frame: Frame, target: ast.Target, value: Value) -> None:
    """Bind a name or a tuple of names. Raises Failed."""
    if isinstance(target, ast.Name):
        frame.bind(target.name, value, target.span)
        return
    if isinstance(value, Poison):
        for item in target.items:
            assign(frame, item, POISON)
        return
    if not isinstance(value, Items) or len(value.items) != len(target.items):
        raise Failed(
            "E0204",
            f"{len(target.items)} names need a tuple of {len(target.items)}",
            target.span,
            describe(value),
        )
    for item, part in zip(target.items, value.items, strict=True):
        assign(frame, item, part)


def poison(frame: Frame, statements: Sequence[ast.Stmt]) -> None:
    """The names that the statements would bind are wrong from here on."""
    for name in _bound(statements):
        frame.locals[name] = POISON


def _bound(statements: Sequence[ast.Stmt]) -> Iterator[str]:
    for statement in statements:
        match statement:
            case ast.Assign():
                yield from _targets(statement.target)
            case ast.IndexDef() | ast.StepDef() | ast.ItemAssign() | ast.State():
                yield statement.name
            case ast.Scan():
                yield from (start.name for start in statement.starts)
                yield from _gathered(statement.body)
            case ast.For():
                yield from _targets(statement.target)
                yield from _bound(statement.body)
            case ast.If():
                for branch in statement.branches:
                    yield from _bound(branch.body)
                yield from _bound(statement.orelse)


def _gathered(statements: Sequence[ast.Stmt]) -> Iterator[str]:
    """The names that the body of a scan may gather."""
    for statement in statements:
        match statement:
            case ast.IndexDef() | ast.StepDef():
                yield statement.name
            case ast.For():
                yield from _gathered(statement.body)
            case ast.If():
                for branch in statement.branches:
                    yield from _gathered(branch.body)
                yield from _gathered(statement.orelse)


def _targets(target: ast.Target) -> Iterator[str]:
    if isinstance(target, ast.Name):
        yield target.name
    else:
        for item in target.items:
            yield from _targets(item)


def _loop(frame: Frame, node: ast.For) -> None:
    value = expressions.evaluate(frame, node.iterable)
    if is_poison(value):
        poison(frame, [node])
        return
    for item in _iterated(value, node):
        assign(frame, node.target, item)
        run(frame, node.body, False)


def _iterated(value: Value, node: ast.For) -> list[Value]:
    """The values of a loop's target. Raises Failed."""
    span = node.iterable.span
    match value:
        case Items():
            return list(value.items)
        case Interval():
            low, stop = value.start.as_int(), value.stop.as_int()
            if low is None or stop is None:
                raise Failed(
                    "E0208",
                    "the ends of this range are not known while compiling",
                    span,
                    describe(value),
                    notes=["a loop is unrolled while compiling"],
                    help="index notation runs over sizes: `y[i] = ...`, `sum[i] ...`",
                )
            if stop - low > MAX_ITERATIONS:
                raise Failed(
                    "E0208",
                    f"this loop unrolls {stop - low} times",
                    span,
                    f"at most {MAX_ITERATIONS}",
                    help="index notation runs over long ranges: `y[i in 0..N] = ...`",
                )
            return [Number(i) for i in range(low, stop)]
        case Scope():
            names = value.children()
            wrong = [name for name in names if not name.isascii() or not name.isdigit()]
            if not names or wrong:
                at = f"`{value.prefix}`" if value.prefix else f"`{value.handle.name}`"
                held = f"{at} holds `{wrong[0]}`" if wrong else f"{at} is a tensor"
                raise Failed("E0204", "a loop over weights needs numbered scopes", span, held)
            ordered = sorted(names, key=lambda name: (int(name), name))
            return [child for name in ordered if (child := value.child(name)) is not None]
    raise Failed(
        "E0204",
        "a loop runs over a range, a list or tuple of constants, or numbered weights",
        span,
        describe(value),
        notes=["it is unrolled while compiling"] if isinstance(value, Tensor) else [],
    )


def _branch(frame: Frame, node: ast.If, is_result: bool) -> Value | None:
    for branch in node.branches:
        value = expressions.evaluate(frame, branch.condition)
        truth = value.value if isinstance(value, Number) else None
        if not isinstance(truth, bool):
            undecided = isinstance(value, Tensor) and frame.checker.symbolic
            if not is_poison(value) and not undecided:
                raise _not_constant(frame, branch, value)
            poison(frame, [node])
            return POISON if is_result else None
        if truth:
            return run(frame, branch.body, is_result)
    return run(frame, node.orelse, is_result) if node.orelse else None


def _not_constant(frame: Frame, branch: ast.Branch, value: Value) -> Failed:
    notes = ["`if` chooses while compiling"]
    help_text = None
    if isinstance(value, Tensor):
        help_text = "for a choice per element use `select(condition, a, b)`"
    elif isinstance(value, Number) or size(value) is not None:
        help_text = f"compare: `{text_of(branch.condition.span)} != 0`"
    code = "E0208" if isinstance(value, Tensor) else "E0204"
    message = "the condition of `if` must be known while compiling"
    if code == "E0204":
        message = "the condition of `if` must be True or False"
    return Failed(
        code, message, branch.condition.span, describe(value), notes=notes, help=help_text
    )
