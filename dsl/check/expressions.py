"""Expressions: from a node of the syntax tree to a value; errors are reported on the way."""

from __future__ import annotations

import math

from stagefuse.dsl import ast
from stagefuse.dsl.dtypes import DType
from stagefuse.dsl.types import TensorType

from . import calls, notation, subscripts
from .apply import Arg, apply, size
from .frame import Frame
from .literals import own_dtype
from .report import Failed, text_of
from .values import (
    NONE,
    POISON,
    Dim,
    DTypeValue,
    Interval,
    Items,
    Module,
    NoneValue,
    Number,
    Poison,
    Scope,
    Tensor,
    Text,
    Value,
    describe,
    is_poison,
)

BINARY = {
    "+": "add", "-": "sub", "*": "mul", "/": "div", "//": "floordiv", "%": "mod", "**": "pow",
    "@": "matmul", "==": "eq", "!=": "ne", "<": "lt", "<=": "le", ">": "gt", ">=": "ge",
    "&": "bitand", "|": "bitor", "^": "bitxor", "<<": "shl", ">>": "shr", "and": "and", "or": "or",
}  # fmt: skip
UNARY = {"-": "neg", "~": "invert", "not": "not"}
_METHODS = {
    "T": "`transpose({})`", "permute": "`transpose({}, [...])`", "view": "`reshape({}, [...])`",
    **dict.fromkeys(("astype", "to", "type", "float"), "the dtype as a function: `f32({})`"),
}  # fmt: skip
"""What is written for attributes of tensors in other libraries."""


def evaluate(frame: Frame, node: ast.Expr) -> Value:
    """The value of an expression; POISON if it is wrong, which is then reported."""
    try:
        return _evaluate(frame, node)
    except Failed as failure:
        frame.report(failure)
        return POISON


def _evaluate(frame: Frame, node: ast.Expr) -> Value:
    match node:
        case ast.Name():
            found = frame.find(node.name)
            if found is None:
                raise frame.checker.unknown(node.name, node.span, frame.names())
            return found
        case ast.IntLit() | ast.FloatLit() | ast.BoolLit():
            return Number(node.value)
        case ast.StrLit():
            return Text(node.value)
        case ast.NoneLit():
            return NONE
        case ast.TupleExpr():
            return Items(tuple(evaluate(frame, item) for item in node.items))
        case ast.ListLit():
            return Items(tuple(evaluate(frame, item) for item in node.items), "[")
        case ast.RangeExpr():
            return interval(frame, node)
        case ast.Attribute():
            return attribute(frame, node)
        case ast.Subscript():
            return subscripts.subscript(frame, node)
        case ast.Call():
            return _call(frame, node, [])
        case ast.Pipe():
            return _pipe(frame, node)
        case ast.Unary():
            return _unary(frame, node)
        case ast.Binary():
            return _chain(frame, node)
        case ast.Reduction():
            return notation.reduction(frame, node)
    raise Failed("E0204", f"`{text_of(node.span)}` stands only inside an index", node.span)


def interval(frame: Frame, node: ast.RangeExpr) -> Value:
    ends = []
    for part in (node.start, node.stop):
        value = evaluate(frame, part)
        if isinstance(value, Poison):
            return POISON
        end = size(value)
        if end is None:
            raise Failed(
                "E0204", "the ends of a range are integers over sizes", part.span, describe(value)
            )
        ends.append(end)
    return Interval(ends[0], ends[1] + 1 if node.inclusive else ends[1])


def attribute(frame: Frame, node: ast.Attribute) -> Value:
    base = evaluate(frame, node.base)
    match base:
        case Poison():
            return POISON
        case Scope():
            child = base.child(node.name)
            if child is None:
                raise subscripts.no_weight(frame, base, node.name, node.name_span)
            return child
        case Module():
            found = frame.checker.value(base.scope, node.name)
            if found is None:
                raise frame.checker.missing(base, node.name, node.name_span)
            return found
        case Items() if node.name in base.names:
            return base.items[base.names.index(node.name)]
    help_text = None
    if node.name in ("shape", "size", "ndim"):
        help_text = "name the size in the type: `x: f32[B, T]` makes `B` and `T` known"
    elif node.name == "dtype":
        help_text = "name the dtype in the signature: `fn f[E: float](x: E[N])`"
    elif isinstance(base, Tensor) and node.name in _METHODS:
        help_text = f"write {_METHODS[node.name].format(text_of(node.base.span))}"
    elif isinstance(base, Tensor) and frame.checker.is_builtin(node.name):
        help_text = f"write `{node.name}({text_of(node.base.span)})`"
    elif isinstance(base, Tensor):
        help_text = frame.checker.elsewhere(node.name)
    raise Failed(
        "E0220",
        f"{describe(base)} has no attribute `{node.name}`",
        node.name_span,
        "",
        [(node.base.span, describe(base))],
        help=help_text,
    )


def _callee(frame: Frame, node: ast.Expr) -> Value:
    """What is called: a built-in stays one, even where a body bound its name by mistake."""
    if isinstance(node, ast.Name) and node.name not in frame.module.values:
        return frame.checker.builtin(node.name) or evaluate(frame, node)
    return evaluate(frame, node)


def _call(frame: Frame, node: ast.Call, first: list[Arg]) -> Value:
    function = _callee(frame, node.fn)
    args = first + [Arg(evaluate(frame, arg), arg.span) for arg in node.args]
    keywords: dict[str, Arg] = {}
    for keyword in node.kwargs:
        if keyword.name in keywords:
            raise Failed("E0206", f"`{keyword.name}` is given twice", keyword.span)
        keywords[keyword.name] = Arg(
            evaluate(frame, keyword.value), keyword.value.span, keyword.span
        )
    return calls.call(frame, function, args, keywords, node.span, node.fn)


def _pipe(frame: Frame, node: ast.Pipe) -> Value:
    left = Arg(evaluate(frame, node.left), node.left.span)
    if isinstance(node.right, ast.Call):
        return _call(frame, node.right, [left])
    function = _callee(frame, node.right)
    return calls.call(frame, function, [left], {}, node.right.span, node.right)


def _unary(frame: Frame, node: ast.Unary) -> Value:
    operand = Arg(evaluate(frame, node.operand), node.operand.span)
    value = operand.value
    if is_poison(value):
        return POISON
    if node.op == "not" and isinstance(value, Number) and isinstance(value.value, bool):
        return Number(not value.value)
    if isinstance(value, Number) and not isinstance(value.value, bool):
        if node.op == "-":
            return Number(-value.value)
        if node.op == "~" and isinstance(value.value, int):
            return Number(~value.value)
    if node.op == "+":
        dtype = own_dtype(value)
        if isinstance(value, Number | Dim) or (dtype is not None and not dtype.is_bool):
            return value
        raise Failed("E0204", "`+` needs a number", node.operand.span, describe(value))
    return _operator(frame, node.op, UNARY[node.op], [operand], node)


def _chain(frame: Frame, node: ast.Binary) -> Value:
    """The value of operators one after the other, each of which may be wrong."""
    first, operators = node.chain()
    value = evaluate(frame, first)
    for at in operators:
        try:
            value = _binary(frame, Arg(value, at.left.span), at)
        except Failed as failure:
            frame.report(failure)
            value = POISON
    return value


def _binary(frame: Frame, left: Arg, node: ast.Binary) -> Value:
    known = left.value.value if isinstance(left.value, Number) else None
    if (node.op, known) in (("and", False), ("or", True)) and isinstance(known, bool):
        return Number(known)
    right = Arg(evaluate(frame, node.right), node.right.span)
    if is_poison(left.value) or is_poison(right.value):
        return POISON
    if node.op in ("and", "or") and isinstance(known, bool):
        return right.value
    if node.op in ("==", "!="):
        same = _same_constant(left.value, right.value)
        if same is not None:
            return Number(same if node.op == "==" else not same)
    if node.op == "/":
        _require_division(left, right, node)
    if node.op == "+" and isinstance(left.value, Text) and isinstance(right.value, Text):
        return Text(left.value.value + right.value.value)
    if node.op == "+" and isinstance(left.value, Items) and isinstance(right.value, Items):
        return Items(left.value.items + right.value.items, left.value.bracket)
    return _operator(frame, node.op, BINARY[node.op], [left, right], node)


def _same_constant(left: Value, right: Value) -> bool | None:
    """Equality of two constants that are not numbers; None if it is a matter of tensors."""
    if isinstance(left, NoneValue) or isinstance(right, NoneValue):
        return isinstance(left, NoneValue) and isinstance(right, NoneValue)
    for kind in (Text, DTypeValue):
        if isinstance(left, kind) and isinstance(right, kind):
            return left == right
    return None


def _require_division(left: Arg, right: Arg, node: ast.Binary) -> None:
    """`/` on integers is refused with both fixes; on literals it is Python's."""
    numbers = [a.value.value for a in (left, right) if isinstance(a.value, Number)]
    if len(numbers) == 2:
        if numbers[1] == 0 and not isinstance(numbers[1], bool):
            fix = "import `math` and write `math.INF` or `math.NAN` if that is meant"
            raise Failed("E0207", "division by zero", node.right.span, help=fix)
        return
    dtypes = [own_dtype(a.value) for a in (left, right)]
    integers = [d is not None and d.is_int for d in dtypes]
    literal = [isinstance(a.value, Number) and type(a.value.value) is int for a in (left, right)]
    if any(integers) and all(i or n for i, n in zip(integers, literal, strict=True)):
        a, b = text_of(left.span), text_of(right.span)
        a, b = _atom(a), _atom(b)
        raise Failed(
            "E0207",
            "`/` on integers",
            node.span,
            "",
            [
                (arg.span, describe(arg.value))
                for arg in (left, right)
                if not isinstance(arg.value, Number)
            ],
            ["`/` is the division of floats"],
            f"`{a} // {b}` for the quotient rounded down, or `f32({a}) / f32({b})`",
        )


def _atom(text: str) -> str:
    return text if text.replace("_", "").replace(".", "").isalnum() else f"({text})"


def _operator(
    frame: Frame, symbol: str, name: str, args: list[Arg], node: ast.Unary | ast.Binary
) -> Value:
    record = frame.checker.builtins.get(name)
    if record is None:
        raise Failed("E0207", f"`{symbol}` is not supported yet", node.span)
    for arg in args:
        if not isinstance(arg.value, Tensor | Number | Dim) and own_dtype(arg.value) is None:
            from .apply import not_a_tensor

            raise not_a_tensor(f"an operand of `{symbol}`", arg)
    keywords: dict[str, Arg] = {}
    return apply(frame.recorder, record, args, keywords, node.span, f"`{symbol}`")


def cast(frame: Frame, dtype: DType, arg: Arg) -> Value:
    """`f32(x)`. Raises Failed."""
    value, recorder = arg.value, frame.recorder
    if isinstance(value, Poison):
        return POISON
    if isinstance(value, Dim) and value.expr.as_int() is not None:
        value = Number(value.expr.as_int() or 0)
    if isinstance(value, Number):
        return recorder.number(converted(value.value, dtype), dtype, arg.span)
    if isinstance(value, Dim):
        value = recorder.dim(value, arg.span)
    if isinstance(value, Scope) and value.leaf is not None:
        value = recorder.weight(value, arg.span)
    if not isinstance(value, Tensor):
        from .apply import not_a_tensor

        raise not_a_tensor(f"the argument of `{dtype}`", arg)
    if value.type.dtype == dtype:
        return value
    result = TensorType(dtype, value.full_type.shape)
    return recorder.apply("cast", (value,), (("dtype", dtype),), (result,), arg.span, value.space)[
        0
    ]


def converted(value: int | float | bool, dtype: DType) -> int | float | bool:
    """A literal converted as a tensor would be: integers wrap, floats saturate to integers."""
    if dtype.is_bool:
        return value != 0
    if dtype.is_float:
        try:
            return float(value)
        except OverflowError:
            return math.inf if value > 0 else -math.inf
    low, high = (0, (1 << dtype.bits) - 1)
    if dtype.kind == "int":
        low, high = -(1 << (dtype.bits - 1)), (1 << (dtype.bits - 1)) - 1
    if isinstance(value, float):
        if math.isnan(value):
            return 0
        if math.isinf(value):
            return high if value > 0 else low
        return max(low, min(high, math.trunc(value)))
    return (int(value) - low) % (1 << dtype.bits) + low
