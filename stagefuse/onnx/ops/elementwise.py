"""Arithmetic, comparisons and functions of single elements."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from math import copysign, inf

from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, Val
from stagefuse.onnx.reading import HELD, dtype_of, type_name
from stagefuse.onnx.record import op
from stagefuse.onnx.text import literal

from .norms import per_channel


def _infix(sign: str) -> Callable[[Node], str]:
    def write(n: Node) -> str:
        return f"{n.operand(0)} {sign} {aligned(n)}"

    return write


def aligned(n: Node) -> str:
    """The second operand; before opset 7, `axis` says which axis of the first its own begin at."""
    if n.opset >= 7 or not n.attr("broadcast", 0):
        return n.operand(1)
    first, second, axis = n.val(0), n.val(1), n.attr("axis")
    behind = 0 if axis is None else first.rank - axis % first.rank - second.rank
    if behind <= 0:
        return n.operand(1)
    return f"{n.bound(second, 'c')}[{', '.join([':'] * second.rank + ['None'] * behind)}]"


for _name, _sign in {
    "Add": "+", "Sub": "-", "Mul": "*", "Equal": "==", "Less": "<", "LessOrEqual": "<=",
    "Greater": ">", "GreaterOrEqual": ">=", "And": "&", "Or": "|", "Xor": "^",
    "BitwiseAnd": "&", "BitwiseOr": "|", "BitwiseXor": "^",
}.items():  # fmt: skip
    op(_name)(_infix(_sign))


@op("Div")
def _div(n: Node) -> str:
    """Integers divide towards zero."""
    if n.val(0).dtype.is_float:
        return f"{n.operand(0)} / {aligned(n)}"
    return f"onnx.truncated_div({n.x(0)}, {n.x(1)})"


@op("Mod")
def _mod(n: Node) -> str:
    if n.attr("fmod", 0):
        return f"onnx.fmod({n.x(0)}, {n.x(1)})"
    return f"{n.operand(0)} % {n.operand(1)}"


@op("Pow")
def _pow(n: Node) -> str:
    """The result has the dtype of the base."""
    base, power = n.val(0), n.val(1)
    if base.dtype == power.dtype:
        return f"{n.operand(0)} ** {aligned(n)}"
    if base.dtype.is_float:
        return f"{n.x(0)} ** {base.dtype}({n.x(1)})"
    if power.dtype.is_float:
        return f"{base.dtype}({power.dtype}({n.x(0)}) ** {n.x(1)})"
    return f"{n.x(0)} ** {base.dtype}({n.x(1)})"


@op("BitShift")
def _shift(n: Node) -> str:
    sign = {"LEFT": "<<", "RIGHT": ">>"}[n.one_of("direction", "", "LEFT", "RIGHT")]
    return f"{n.x(0)} {sign} {n.x(1)}"


def _call(form: str) -> Callable[[Node], str]:
    def write(n: Node) -> str:
        return form.format(x=n.x(0))

    return write


for _name, _form in {
    "Abs": "abs({x})", "Acos": "math.acos({x})", "Acosh": "math.acosh({x})",
    "Asin": "math.asin({x})", "Asinh": "math.asinh({x})", "Atan": "math.atan({x})",
    "Atanh": "math.atanh({x})", "BitwiseNot": "~{x}", "Ceil": "ceil({x})", "Cos": "cos({x})",
    "Cosh": "math.cosh({x})", "Erf": "erf({x})", "Exp": "exp({x})", "Floor": "floor({x})",
    "IsNaN": "isnan({x})", "Log": "log({x})", "Neg": "-{x}", "Not": "not {x}",
    "Reciprocal": "1.0 / {x}", "Relu": "nn.relu({x})", "Round": "round({x})",
    "Sigmoid": "sigmoid({x})", "Sign": "sign({x})", "Sin": "sin({x})", "Sinh": "math.sinh({x})",
    "Softplus": "nn.softplus({x})", "Sqrt": "sqrt({x})", "Tan": "tan({x})", "Tanh": "tanh({x})",
    "HardSwish": "nn.hard_swish({x})", "Softsign": "nn.softsign({x})", "Mish": "nn.mish({x})",
}.items():  # fmt: skip
    op(_name)(_call(_form))


@op("IsInf")
def _isinf(n: Node) -> str:
    x = n.x(0)
    up, down = n.attr("detect_positive", 1), n.attr("detect_negative", 1)
    if up and down:
        return f"isinf({x})"
    if not up and not down:
        return f"isinf({x}) & False"
    return f"isinf({x}) & ({x} {'>' if up else '<'} 0.0)"


def _variadic(sign: str, function: str = "") -> Callable[[Node], str]:
    def write(n: Node) -> str:
        parts = [n.x(k) for k in range(len(n.inputs))]
        if not function:
            return f" {sign} ".join(parts)
        text = parts[0]
        for part in parts[1:]:
            text = f"{function}({text}, {part})"
        return text

    return write


op("Sum")(_variadic("+"))
op("Max")(_variadic("", "maximum"))
op("Min")(_variadic("", "minimum"))


@op("Mean")
def _mean(n: Node) -> str:
    total = " + ".join(n.x(k) for k in range(len(n.inputs)))
    return f"({total}) / {float(len(n.inputs))}"


@op("Clip")
def _clip(n: Node) -> str:
    """Bounds are attributes before opset 11, optional inputs since."""
    if n.opset < 11:
        low, high = (n.attr(k) for k in ("min", "max"))
        low, high = (None if b is None else _bound(n, float(b)) for b in (low, high))
    else:
        low = n.operand(1) if n.maybe(1) is not None else None
        high = n.operand(2) if n.maybe(2) is not None else None
    x = n.x(0)
    if low is not None and high is not None:
        return f"clamp({x}, {low}, {high})"
    if low is not None:
        return f"maximum({x}, {low})"
    return f"minimum({x}, {high})" if high is not None else x


def _bound(n: Node, value: float) -> str:
    """A bound of the input's dtype: exporters write the greatest f32 where there is none."""
    dtype = n.val(0).dtype
    beyond = dtype.is_float and dtype.overflows(value)
    return literal(copysign(inf, value) if beyond else value)


@op("Where")
def _where(n: Node) -> str:
    """A single number is a literal, where it does not make the result larger; of two the first
    must tell the dtype, unless that is what a literal has."""
    choice, *values = (n.val(k) for k in range(3))
    numbers = [n.number(1), n.number(2)]
    texts = []
    for k, (value, number) in enumerate(zip(values, numbers, strict=True)):
        is_alone = numbers[1 - k] is None
        rank = max(choice.rank, values[1 - k].rank if is_alone else 0)
        if number is None or value.rank > rank:
            texts.append(n.x(1 + k))
        elif is_alone or value.dtype.name in ("f32", "i64", "bool"):
            texts.append(literal(number))
        else:
            texts.append(f"{value.dtype}({literal(number)})")
    return f"select({n.x(0)}, {', '.join(texts)})"


@op("Cast", "CastLike", unread=["saturate", "round_mode"])
def _cast(n: Node) -> Val | str:
    """By the language's conversions, or by functions for element types that it lacks."""
    like = n.val(1) if n.op == "CastLike" else None
    number = n.attr("to") if like is None else like.held
    saturate = bool(n.attributes.get("saturate", 1))
    if number in HELD:
        return narrowed(n, number, n.x(0), saturate)
    if like is not None:
        to = like.dtype
    else:
        try:
            to = dtype_of(number)
        except Refused as refusal:
            what = str(refusal).replace("the element type", "a conversion to")
            raise Refused(what, refusal.need, "to") from refusal
    if to.name in OVERFLOWING and not saturate:
        return f"onnx.{OVERFLOWING[to.name]}(f32({n.x(0)}))"
    known = n.val(0).known
    if to.is_float and known is not None and known.dtype == object:
        return replace(n.let(n.hint, f"{to}({n.x(0)})"), sizes=known)
    return f"{to}({n.x(0)})"


OVERFLOWING = {"f8e4m3": "f8e4m3_or_nan", "f8e5m2": "f8e5m2_or_inf"}


def narrowed(n: Node, number: int, text: str, saturate: bool = True) -> Val:
    """A conversion to an element type that the language lacks, in the dtype that holds it.

    Integers wrap.
    """
    name, dtype = type_name(number), HELD[number][0]
    if dtype.is_int:
        bits, signed = int(name[-1]), name[0] == "i"
        text = f"{dtype}(onnx.wrapped(i32({text}), {bits}, signed={signed}))"
    elif name == "float4e2m1":
        text = f"onnx.float4e2m1(f32({text}))"
    elif name == "float8e8m0":
        mode = n.one_of("round_mode", "up", "up", "down", "nearest")
        text = f"onnx.float8e8m0(f32({text}), mode=\"{mode}\", saturate={saturate})"
    else:
        text = f"onnx.{name}(f32({text}), saturate={saturate})"
    return replace(n.let(n.hint, text), held=number)


@op("LeakyRelu")
def _leaky(n: Node) -> str:
    return f"nn.leaky_relu({n.x(0)}, {n.attr('alpha', 0.01)!r})"


@op("Elu")
def _elu(n: Node) -> str:
    return f"nn.elu({n.x(0)}, {n.attr('alpha', 1.0)!r})"


@op("Celu")
def _celu(n: Node) -> str:
    alpha = n.attr("alpha", 1.0)
    x = n.x(0)
    return f"maximum({x}, 0.0) + minimum({alpha!r} * expm1({x} / {alpha!r}), 0.0)"


@op("Selu")
def _selu(n: Node) -> str:
    """Source: the defaults of the op's definition."""
    alpha, gamma = n.attr("alpha", 1.67326319217681885), n.attr("gamma", 1.05070102214813232)
    return f"{gamma!r} * nn.elu({n.x(0)}, {alpha!r})"


@op("Gelu")
def _gelu(n: Node) -> str:
    kind = n.one_of("approximate", "none", "none", "tanh")
    return f"{'nn.gelu' if kind == 'none' else 'nn.gelu_tanh'}({n.x(0)})"


@op("HardSigmoid")
def _hard_sigmoid(n: Node) -> str:
    return f"clamp({n.x(0)} * {n.attr('alpha', 0.2)!r} + {n.attr('beta', 0.5)!r}, 0.0, 1.0)"


@op("ThresholdedRelu")
def _thresholded(n: Node) -> str:
    x = n.x(0)
    return f"select({x} > {n.attr('alpha', 1.0)!r}, {x}, 0.0)"


@op("Shrink")
def _shrink(n: Node) -> str:
    """Source: the op's definition; integers are computed in f32."""
    x, dtype = n.x(0), n.val(0).dtype
    lambd, bias = n.attr("lambd", 0.5), n.attr("bias", 0.0)
    if not dtype.is_float:
        x = n.let("wide", f"f32({x})").text
    body = f"select({x} < {-lambd!r}, {x} + {bias!r}, select({x} > {lambd!r}, {x} - {bias!r}, 0.0))"
    return body if dtype.is_float else f"{dtype}({body})"


@op("PRelu")
def _prelu(n: Node) -> str:
    """Before opset 7 a vector of slopes is one per channel."""
    x, slope = n.x(0), n.operand(1)
    if n.opset < 7 and n.val(1).rank == 1 and n.val(1).shape[0].as_int() != 1:
        slope = per_channel(n.bound(n.val(1), "slope"), n.val(0).rank)
    zero = "0.0" if n.val(0).dtype.is_float else "0"
    return f"select({x} < {zero}, {x} * {slope}, {x})"


@op("Swish")
def _swish(n: Node) -> str:
    x, alpha = n.x(0), n.attr("alpha", 1.0)
    return f"nn.silu({x})" if alpha == 1.0 else f"{x} * sigmoid({alpha!r} * {x})"


@op("Identity")
def _identity(n: Node):  # type: ignore[no-untyped-def]
    return n.val(0)
