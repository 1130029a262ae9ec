"""`base[...]`: weights by name or number, items of tuples, tensors by NumPy's rules."""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.dsl import ast
from stagefuse.dsl.dims import Expr
from stagefuse.dsl.source import Span

from . import expressions, indexing, notation
from .apply import is_stackable, size, stacked, whole
from .frame import Frame
from .report import Failed, nearest, text_of
from .values import (
    POISON,
    Dim,
    Items,
    NoneValue,
    Poison,
    Scope,
    Tensor,
    Text,
    Value,
    describe,
)


class Poisoned(Exception):
    """Something inside is wrong and has been reported."""


def subscript(frame: Frame, node: ast.Subscript) -> Value:
    """The value of a subscript. Raises Failed."""
    if frame.notation is not None and notation.mentions(node.items, frame.indices):
        return frame.notation.access(frame, node)
    base = expressions.evaluate(frame, node.base)
    if isinstance(base, Poison):
        return POISON
    if isinstance(base, Scope):
        found = _scope_item(frame, base, node)
        if found is not None:
            return found
        base = frame.recorder.weight(base, node.base.span)
    if isinstance(base, Items):
        return _item(frame, base, node)
    if isinstance(base, Dim):
        base = frame.recorder.dim(base, node.base.span)
    if not isinstance(base, Tensor):
        raise Failed("E0216", "this value cannot be indexed", node.base.span, describe(base))
    if base.space:
        raise Failed(
            "E0216",
            "a single element cannot be indexed",
            node.base.span,
            "inside index notation every value is a single element",
        )
    try:
        items = index_items(frame, node.items)
    except Poisoned:
        return POISON
    return indexing.index(frame.recorder, base, items, node.span)


def index_items(frame: Frame, nodes: Sequence[ast.Expr]) -> list[indexing.Item]:
    """The items of an index. Raises Failed, Poisoned."""
    return [_index_item(frame, node) for node in nodes]


def _scope_item(frame: Frame, base: Scope, node: ast.Subscript) -> Value | None:
    """The weights below a scope, by text or number; None if its own tensor is meant."""
    if len(node.items) == 1 and not isinstance(node.items[0], ast.Slice | ast.EllipsisLit):
        key = node.items[0]
        value = expressions.evaluate(frame, key)
        if isinstance(value, Poison):
            return POISON
        name: str | None = None
        if isinstance(value, Text):
            name = value.value
        elif whole(value) is not None:
            name = str(whole(value))
        if name is not None:
            child = base.child(name)
            if child is not None:
                return child
            if base.leaf is None or isinstance(value, Text):
                raise no_weight(frame, base, name, key.span)
    if base.leaf is None:
        raise Failed(
            "E0214",
            "a weights scope is indexed by a text or a number",
            node.span,
            describe(base),
            notes=[holds(base)],
        )
    return None


def holds(scope: Scope) -> str:
    """What there is in a scope, for a note."""
    names = scope.children()
    if not names:
        return "it holds nothing"
    shown = ", ".join(f"`{name}`" for name in names[:8])
    return f"it holds {shown}" + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def no_weight(frame: Frame, scope: Scope, name: str, span: Span) -> Failed:
    path = scope.path_of(name)
    for key, dtype in scope.handle.unread.items():
        if f"{key}.".startswith(f"{path}."):  # that tensor, or one of a scope that has no others
            what = f"the tensor `{key}` has the dtype {dtype}, which is not supported"
            return Failed("E0214", what, span)
    where = f" at `{scope.prefix}`" if scope.prefix else ""
    near = nearest(name, scope.children())
    leaf = scope.leaf
    notes = [f"`{scope.prefix}` is a tensor, {leaf}"] if leaf is not None else [holds(scope)]
    advice = f"the nearest name is `{near}`" if near else None
    if leaf is not None and "." in scope.prefix:
        advice = f"name what holds it: `{scope.handle.name}.{scope.prefix.rpartition('.')[0]}`"
    if not frame.checker.weights:
        notes = []
    return Failed(
        "E0214",
        f"the weights `{scope.handle.name}` have no `{name}`{where}",
        span,
        "",
        notes=notes,
        help=advice,
    )


def _item(frame: Frame, base: Items, node: ast.Subscript) -> Value:
    if len(node.items) == 1 and not isinstance(node.items[0], ast.Slice):
        value = expressions.evaluate(frame, node.items[0])
        if isinstance(value, Poison):
            return POISON
        at = whole(value)
        if at is not None and -len(base.items) <= at < len(base.items):
            return base.items[at]
        if at is not None:
            raise Failed(
                "E0216", f"index {at} is out of bounds", node.items[0].span, describe(base)
            )
    raise Failed(
        "E0216",
        "an item of a tuple or list is picked by one constant integer",
        node.span,
        describe(base),
    )


def _index_item(frame: Frame, node: ast.Expr) -> indexing.Item:
    """One item of an index. Raises Failed, Poisoned."""
    if isinstance(node, ast.EllipsisLit):
        return indexing.Dots(node.span)
    if isinstance(node, ast.Slice):
        return _slice(frame, node)
    value = expressions.evaluate(frame, node)
    if isinstance(value, Poison):
        raise Poisoned
    if isinstance(value, NoneValue):
        return indexing.NewAxis(node.span)
    at = size(value)
    if at is not None:
        return indexing.At(at, node.span)
    if isinstance(value, Scope) and value.leaf is not None:
        value = frame.recorder.weight(value, node.span)
    if isinstance(value, Tensor) and not value.space:
        if value.type.dtype.is_int:
            return indexing.Ids(value, node.span)
        note, advice = [], f"convert: `i64({text_of(node.span)})`"
        if value.type.dtype.is_bool:
            note = ["a mask would make the size of the result depend on the data"]
            advice = "keep the shape: `select(mask, x, 0)`"
        raise Failed(
            "E0216",
            "a tensor index holds integers",
            node.span,
            describe(value),
            notes=note,
            help=advice,
        )
    help_text = stacked(node.span) if isinstance(value, Items) and is_stackable(value) else None
    raise Failed("E0216", "this is not an index", node.span, describe(value), help=help_text)


def _slice(frame: Frame, node: ast.Slice) -> indexing.Cut | indexing.Run:
    ends: list[Expr | None] = []
    for part in (node.start, node.stop, node.step):
        value = None if part is None else expressions.evaluate(frame, part)
        if isinstance(value, Poison):
            raise Poisoned
        if isinstance(value, Tensor) and part is node.start:
            return _run(frame, node, value)
        if part is None or value is None or isinstance(value, NoneValue):
            ends.append(None)
            continue
        end = size(value)
        if end is None:
            raise Failed(
                "E0216",
                "the bounds of a slice are integers over sizes",
                part.span,
                describe(value),
                help="the length of a slice is known: `x[n : n + 4]`, or mask what is not wanted",
            )
        ends.append(end)
    step = 1 if ends[2] is None else ends[2].as_int()
    if not step:
        assert node.step is not None
        raise Failed("E0216", "the step of a slice is a constant other than 0", node.step.span)
    return indexing.Cut(ends[0], ends[1], step, node.span)


def _run(frame: Frame, node: ast.Slice, start: Tensor) -> indexing.Run:
    """`x[n : n + T]`, where n is read from data. Raises Failed, Poisoned."""
    assert node.start is not None
    if start.type.rank or start.space or not start.type.dtype.is_int:
        raise Failed(
            "E0216", "a slice starts at a single integer", node.start.span, describe(start)
        )
    own = text_of(node.start.span)
    if node.step is None and isinstance(node.stop, ast.Binary) and node.stop.op == "+":
        for same, rest in ((node.stop.left, node.stop.right), (node.stop.right, node.stop.left)):
            if text_of(same.span) != own:
                continue
            value = expressions.evaluate(frame, rest)
            if isinstance(value, Poison):
                raise Poisoned
            length = size(value)
            if length is not None and frame.recorder.facts.is_nonneg(length):
                return indexing.Run(start, length, node.span)
    raise Failed(
        "E0216",
        "the length of this slice is not known while compiling",
        node.span,
        "",
        [(node.start.span, f"{describe(start)}, read from data")],
        help=f"repeat the start and add a size: `{own} : {own} + 4`",
    )
