"""Updates: `x[items] = value` makes a new value of `x`, and what a session keeps: `state`."""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.dsl import ast
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.dtypes import DType
from stagefuse.dsl.source import Span
from stagefuse.dsl.types import TensorType

from . import expressions, indexing, literals, subscripts
from .apply import Arg, not_a_tensor
from .frame import Frame
from .record import Recorder
from .report import Failed, text_of
from .unify import dimensions
from .values import POISON, Dim, Number, Poison, Scope, Tensor, Value, describe, is_tensor

Items = ast.IndexDef | ast.StepDef | ast.ItemAssign


def is_update(frame: Frame, node: ast.IndexDef) -> bool:
    """Whether `x[i, j] = ...` assigns to items: x has a value, and so has each name in brackets."""
    if not is_tensor(frame.locals.get(node.name)):
        return False
    if any(index.range is not None for index in node.indices):
        return False
    values = [frame.find(index.name) for index in node.indices]
    return all(is_tensor(value) or isinstance(value, Number | Dim | Poison) for value in values)


def update(frame: Frame, node: Items) -> Value | None:
    """Bind the name to its value with other items. Raises Failed."""
    base = frame.locals.get(node.name)
    new = Arg(expressions.evaluate(frame, node.value), node.value.span)
    if isinstance(base, Poison):
        return None
    if not is_tensor(base):
        raise _no_base(frame, node, base)
    base = literals.typed(frame.recorder, base, None, node.name_span)
    if node.name in frame.states:
        _require_no_step(frame, node.name, node.name_span)
    nodes: Sequence[ast.Expr]
    if isinstance(node, ast.ItemAssign):
        nodes = node.items
    else:
        nodes = [ast.Name(index.span, index.name) for index in node.indices]
        if isinstance(node, ast.StepDef):
            nodes = [node.at, *nodes]
    where = Span(node.span.source, node.name_span.start, nodes[-1].span.end)
    try:
        items = subscripts.index_items(frame, nodes)
    except subscripts.Poisoned:
        frame.locals[node.name] = POISON
        return POISON
    recorder = frame.recorder
    found = indexing.select(recorder, base, items, where, checked=True)
    if isinstance(new.value, Poison):
        frame.locals[node.name] = POISON
        return None
    what = f"`{text_of(where)}]`"
    value = _fitted(recorder, new, TensorType(base.type.dtype, found.shape), what, where)
    is_state = frame.states.get(node.name) == base
    new_base = recorder.update(base, value, found, node.name if is_state else "", where)
    frame.locals[node.name] = new_base
    if is_state:
        frame.states[node.name] = new_base
    return None


def _no_base(frame: Frame, node: Items, base: Value | None) -> Failed:
    if base is None:
        message, label = f"`{node.name}` has no items yet to assign to", ""
    else:
        message, label = f"`{node.name}` has no items to assign to", describe(base)
    return Failed(
        "E0222",
        message,
        node.name_span,
        label,
        help=f"bind it first, such as `{node.name} = zeros([4, 8])`" if base is None else None,
    )


def _tensor(recorder: Recorder, arg: Arg, dtype: DType, what: str) -> Tensor:
    value = arg.value
    if isinstance(value, Scope) and value.leaf is None:
        raise not_a_tensor(what, arg)
    if not isinstance(value, Tensor | Number | Dim | Scope):
        raise not_a_tensor(what, arg)
    return literals.typed(recorder, value, dtype, arg.span)


def _fitted(recorder: Recorder, arg: Arg, wanted: TensorType, what: str, where: Span) -> Tensor:
    """The value that is assigned, repeated to the shape of what it replaces. Raises Failed."""
    tensor = _tensor(recorder, arg, wanted.dtype, "what is assigned")
    found = tensor.type
    if found.dtype != wanted.dtype:
        raise Failed(
            "E0202",
            f"{what} holds {wanted.dtype}, and this is {found.dtype}",
            arg.span,
            describe(arg.value),
            [(where, str(wanted))],
            ["there is no implicit conversion"],
            f"convert: `{wanted.dtype}({text_of(arg.span)})`",
        )
    if found.shape == wanted.shape:
        return tensor
    lead = wanted.rank - found.rank
    symbols = tuple(f"i{axis}" for axis in range(wanted.rank))
    indices: list[Expr] = []
    for axis, size in enumerate(found.shape):
        full = wanted.shape[lead + axis] if lead >= 0 else const(1)
        if lead < 0 or not (size.as_int() == 1 or recorder.facts.prove_eq(size, full)):
            notes = [f"the value has {dimensions(found.rank)}"] if lead < 0 else []
            raise Failed(
                "E0203",
                f"the value does not fit {what}",
                arg.span,
                str(found),
                [(where, str(wanted))],
                notes,
            )
        is_one = size.as_int() == 1 and full.as_int() != 1
        indices.append(const(0) if is_one else sym(symbols[lead + axis]))
    return recorder.access((tensor,), wanted.shape, symbols, tuple(indices), arg.span)


# What a session keeps


def kept(frame: Frame, name: str, value: Value, span: Span) -> Value:
    """What a state becomes; its type stays as declared. Raises Failed."""
    _require_no_step(frame, name, span)
    if isinstance(value, Poison):
        return value
    declared = frame.states[name].type
    tensor = _tensor(frame.recorder, Arg(value, span), declared.dtype, f"the state `{name}`")
    found = tensor.type
    same = found.rank == declared.rank and all(
        frame.recorder.facts.prove_eq(a, b)
        for a, b in zip(found.shape, declared.shape, strict=True)
    )
    if found.dtype == declared.dtype and same:
        return tensor
    fill = f"to fill it: `{name}[...] = ...`"
    raise Failed(
        "E0223",
        f"the state `{name}` is {declared}, and this is {found}",
        span,
        str(found),
        help=fill if not found.rank and found.dtype == declared.dtype else None,
    )


def _require_no_step(frame: Frame, name: str, span: Span) -> None:
    """Raises Failed in the body of a scan."""
    if frame.steps is not None:
        raise Failed(
            "E0223",
            f"the state `{name}` is not updated at the steps of a scan",
            span,
            help=f"carry it: `scan {frame.steps.name} in ... with {name} = {name}:`",
        )


def misplaced(frame: Frame, node: ast.State) -> Failed:
    """`state` where it cannot stand."""
    return Failed(
        "E0223",
        "`state` comes first in the body of a pipeline",
        node.span,
        notes=["a `fn` takes what is kept as an argument and gives back what it becomes"],
    )


def initial(
    frame: Frame, node: ast.State, declared: TensorType
) -> int | float | bool | tuple[str, str]:
    """What a state is at first: a number, or a tensor of the weights by name and key."""
    value = expressions.evaluate(frame, node.initial)
    if isinstance(value, Poison):
        raise subscripts.Poisoned
    if isinstance(value, Dim) and value.expr.as_int() is not None:
        value = Number(value.expr.as_int() or 0)
    if isinstance(value, Number):
        return literals.adopted(value.value, declared.dtype, node.initial.span)
    if isinstance(value, Scope) and value.leaf is not None:
        if value.leaf == declared:
            return value.handle.name, value.prefix
        raise Failed(
            "E0223",
            f"the state `{node.name}` is {declared}, and this is {value.leaf}",
            node.initial.span,
            str(value.leaf),
        )
    raise Failed(
        "E0223",
        f"the state `{node.name}` begins as a number or as a tensor of weights",
        node.initial.span,
        describe(value),
    )
