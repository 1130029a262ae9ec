"""Calls: of built-ins, casts, and functions, which are inlined."""

from __future__ import annotations

from dataclasses import replace

from stagefuse.dsl import ast
from stagefuse.dsl.dtypes import DType
from stagefuse.dsl.signature import Builtin
from stagefuse.dsl.source import Span

from . import expressions
from .apply import Arg, apply, bind, is_stackable, static, whole
from .frame import Frame
from .inlining import Inlining
from .report import Failed
from .values import (
    POISON,
    BuiltinFunction,
    Dim,
    DTypeValue,
    Function,
    Items,
    NoneValue,
    Number,
    Poison,
    Scope,
    Special,
    Tensor,
    Text,
    Value,
    describe,
    is_poison,
)

PAIRWISE = {"min": "minimum", "max": "maximum"}
"""What `min(a, b)` of sizes and constants is; of a tensor the second argument is an axis."""


def call(
    frame: Frame,
    function: Value,
    args: list[Arg],
    keywords: dict[str, Arg],
    span: Span,
    callee: ast.Expr,
) -> Value:
    """The value of a call. Raises Failed."""
    match function:
        case Poison():
            return POISON
        case BuiltinFunction():
            record = function.record
            pairwise = PAIRWISE.get(record.name)
            if pairwise and len(args) == 2 and isinstance(args[0].value, Number | Dim):
                record = frame.checker.builtins[pairwise]
            if record.params and record.params[0].kind == "tensors":
                args = [_nested(frame, arg) for arg in args]
            if record.name == "full":
                args, keywords, record = _full(frame, record, args, keywords, span)
            return apply(frame.recorder, record, args, keywords, span)
        case DTypeValue():
            bound = bind(f"`{function.dtype}`", ["x"], [], ["x"], args, keywords, span)
            return _cast(frame, function.dtype, Arg(bound["x"].value, span))
        case Special():
            return _special(function.name, args, keywords, span)
        case Function():
            return Inlining(frame, function, args, keywords, span).value()
    notes = []
    if isinstance(function, Scope):
        notes = ["weights are passed to a function: `nn.linear(x, w.layer)`"]
    raise Failed("E0204", "this cannot be called", callee.span, describe(function), notes=notes)


def _cast(frame: Frame, dtype: DType, arg: Arg) -> Value:
    """A value in a dtype; of a list a tensor, whose numbers are rounded once: `f16([0.1, 0.2])`."""
    if not isinstance(arg.value, Items) or not is_stackable(arg.value):
        return expressions.cast(frame, dtype, arg)
    items = tuple(_cast(frame, dtype, Arg(item, arg.span)) for item in arg.value.items)
    stack = frame.checker.builtins["stack"]
    return apply(frame.recorder, stack, [Arg(Items(items, "["), arg.span)], {}, arg.span)


def _nested(frame: Frame, arg: Arg) -> Arg:
    """A list of tensors in which lists are tensors of what they hold: `stack([[1, 2], [3, 4]])`."""
    if not isinstance(arg.value, Items):
        return arg
    items = list(arg.value.items)
    for number, item in enumerate(items):
        if isinstance(item, Items) and is_stackable(item):
            inner, stack = _nested(frame, Arg(item, arg.span)), frame.checker.builtins["stack"]
            items[number] = apply(frame.recorder, stack, [inner], {}, arg.span)
    return replace(arg, value=replace(arg.value, items=tuple(items)))


def _full(
    frame: Frame, record: Builtin, args: list[Arg], keywords: dict[str, Arg], span: Span
) -> tuple[list[Arg], dict[str, Arg], Builtin]:
    """`full` of a size or a scalar tensor repeats that, in the dtype that is asked for."""
    params = {param.name: param for param in record.params}
    bound = bind("`full`", list(params), [], ["shape", "value"], args, keywords, span)
    value = bound["value"]
    varies = isinstance(value.value, Tensor | Scope) or (
        isinstance(value.value, Dim) and whole(value.value) is None
    )
    if not varies or any(is_poison(arg.value) for arg in bound.values()):
        return args, keywords, record
    static(params["shape"], bound["shape"], "full")
    if "dtype" in bound and not isinstance(bound["dtype"].value, NoneValue):
        dtype = static(params["dtype"], bound["dtype"], "full")
        value = Arg(expressions.cast(frame, dtype, value), value.span)
    if isinstance(value.value, Tensor) and value.value.type.rank:
        found = describe(value.value)
        raise Failed("E0207", "`value` of `full` is one number", value.span, found,
                     help="`broadcast_to` repeats a tensor")  # fmt: skip
    return [value, bound["shape"]], {}, frame.checker.builtins["broadcast_to"]


def _special(name: str, args: list[Arg], keywords: dict[str, Arg], span: Span) -> Value:
    if name == "len":
        bound = bind("`len`", ["x"], [], ["x"], args, keywords, span)
        value = bound["x"].value
        if is_poison(value):
            return POISON
        if isinstance(value, Items):
            return Number(len(value.items))
        if isinstance(value, Scope):
            return Number(len(value.children()))
        raise Failed(
            "E0204",
            "`len` takes a tuple, a list or a weights scope",
            bound["x"].span,
            describe(value),
            help="name the size in the type: `x: f32[B, T]` makes `B` and `T` known"
            if isinstance(value, Tensor) else None,
        )  # fmt: skip
    bound = bind("`has`", ["scope", "name"], [], ["scope", "name"], args, keywords, span)
    scope, key = bound["scope"].value, bound["name"].value
    if is_poison(scope) or is_poison(key):
        return POISON
    if not isinstance(scope, Scope):
        raise Failed(
            "E0204", "`has` takes a weights scope and a name", bound["scope"].span, describe(scope)
        )
    if isinstance(key, Text):
        return Number(scope.child(key.value) is not None)
    number = whole(key)
    if number is None:
        raise Failed("E0204", "the name is a text or a number", bound["name"].span, describe(key))
    return Number(scope.child(str(number)) is not None)
