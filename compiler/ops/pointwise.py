"""Operators and functions that compute each element from the elements at the same place."""

from __future__ import annotations

import math
import operator
import re
from collections.abc import Callable, Sequence
from typing import Any

from stagefuse.compiler import scalar
from stagefuse.compiler.graph import Ref, Scalar
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.scalar import FUNCTIONS, ScalarFn
from stagefuse.dsl.dtypes import BOOL, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.numpy_later import later, np
from stagefuse.dsl.signature import OpError, Param
from stagefuse.dsl.types import TensorType

from .record import Args, Op, Types, X, broadcast_shape, require, same_dtype

PAIR = (Param("a", "tensor", group="x"), Param("b", "tensor", group="x"))
UNARY = (Param("x", "tensor", group="x"),)


def _help(fn: ScalarFn, type: TensorType) -> str:
    if fn.accepts == scalar.BOOLS:
        sign = {"and": "`&`", "or": "`|`", "not": "`~`"}[fn.name]
        return f"compare first (`x != 0`), or use {sign} for bits"
    if fn.name == "div" and type.dtype.is_int:
        return "use `//` for whole numbers, or convert both sides: `f32(a) / f32(b)`"
    if fn.accepts == scalar.FLOAT:
        return "convert: `f32(x)`"
    if type.dtype.is_bool:
        return "convert: `f32(x)` or `i64(x)`"
    if fn.name == "bitxor":
        return "a power is written `x ** 2`; for bits convert: `i64(x)`"
    return "convert: `i64(x)`" if type.dtype.is_float else "convert it first"


def _written(fn: ScalarFn, symbol: str | None) -> str:
    return f"`{symbol or fn.name}`"


def _rule(fn: ScalarFn, symbol: str | None, names: Sequence[str]) -> Callable[[Args, Facts], Types]:
    def rule(args: Args, facts: Facts) -> Types:
        operands = [(name, args[name]) for name in names]
        dtype = same_dtype(_written(fn, symbol), operands)
        for name, type in operands:
            if fn.name in WHOLE and type.dtype.is_int:
                continue
            if fn.name == "div" and type.dtype.is_int:
                raise OpError(
                    "`/` does not divide integers", None, str(type),
                    ["`//` floors; `/` is for floats, and nothing converts by itself"],
                    _help(fn, type),
                )  # fmt: skip
            require(type, fn.accepts, _written(fn, symbol), name, _help(fn, type))
        shape = broadcast_shape(_written(fn, symbol), operands, facts)
        return (TensorType(BOOL if fn.result == "bool" else dtype, shape),)

    return rule


WHOLE = ("floor", "ceil", "round", "trunc")
"""Functions that leave integers as they are."""


def _lower(fn: ScalarFn) -> Callable[..., list[Ref]]:
    def lower(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
        if fn.name in WHOLE and results[0].dtype.is_int:
            return [refs[0]]
        if fn.name == "pow":
            quick = _small_power(b, refs, results[0])
            if quick is not None:
                return [quick]
        whole = [b.broadcast(ref, results[0].shape) for ref in refs]
        return [b.map(fn.name, *whole, dtype=results[0].dtype)]

    return lower


def _small_power(b: Builder, refs: Sequence[Ref], result: TensorType) -> Ref | None:
    """Products for the powers 1 to 4: at most two roundings, within the bound of pow."""
    exponent = b.graph.nodes[refs[1].node].primitive
    if not isinstance(exponent, Scalar) or exponent.value not in (1, 2, 3, 4):
        return None
    x = b.broadcast(refs[0], result.shape)
    if exponent.value == 1:
        return x
    square = b.map("mul", x, x)
    if exponent.value == 2:
        return square
    return b.map("mul", square, x if exponent.value == 3 else square)


def _folded(fn: ScalarFn) -> Callable[..., Any] | None:
    """Literals fold as Python computes with them: integers exactly, floats in 64 bits."""
    python = PYTHON.get(fn.name)

    def fold(*numbers: Any) -> Any:
        if any(not isinstance(n, bool | int | float) for n in numbers):
            return None
        is_logic = fn.accepts == scalar.BOOLS
        if is_logic != all(isinstance(n, bool) for n in numbers) and fn.accepts != scalar.ANY:
            if is_logic or fn.accepts != scalar.BITS:
                return None
        try:
            if python is not None:
                found = python(*numbers)
            elif fn.name in WHOLE and isinstance(numbers[0], int):
                found = numbers[0]
            elif fn.accepts == scalar.FLOAT:
                with np.errstate(all="ignore"):
                    wide = fn.meaning(*(np.asarray(float(n)) for n in numbers))
                found = bool(wide) if fn.result == "bool" else float(wide)
            else:
                return None
        except (ArithmeticError, ValueError, TypeError):
            return None
        return None if isinstance(found, complex) else found

    return fold


def _by_zero(divide: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    def fold(a: Any, b: Any) -> Any:
        if b == 0 and isinstance(a, int) and isinstance(b, int):
            return 0
        return divide(a, b)

    return fold


def _python_power(a: Any, b: Any) -> Any:
    if isinstance(a, int) and isinstance(b, int) and (b < 0 or abs(a) > 1 and b > 64):
        return float(a) ** b if b < 0 else None
    return a**b


def _count_ok(shift: Callable[[int, int], int]) -> Callable[[int, int], int | None]:
    return lambda a, n: shift(a, n) if 0 <= n < 64 else None


PYTHON: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "div": operator.truediv,
    "floordiv": _by_zero(operator.floordiv), "mod": _by_zero(operator.mod),
    "pow": _python_power, "neg": operator.neg, "abs": abs,
    "sign": lambda x: x if x != x else type(x)((x > 0) - (x < 0)),
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le,
    "gt": operator.gt, "ge": operator.ge,
    "and": lambda a, b: a and b, "or": lambda a, b: a or b, "not": operator.not_,
    "bitand": operator.and_, "bitor": operator.or_, "bitxor": operator.xor,
    "invert": lambda x: not x if isinstance(x, bool) else ~x,
    "shl": _count_ok(operator.lshift), "shr": _count_ok(operator.rshift),
    "maximum": lambda a, b: a if a != a else (b if b != b else max(a, b)),
    "minimum": lambda a, b: a if a != a else (b if b != b else min(a, b)),
}  # fmt: skip


def _reference(fn: ScalarFn) -> Callable[..., Any]:
    def reference(*args: Any) -> Any:
        arrays = [np.asarray(a) for a in args]
        if fn.name in WHOLE and arrays[0].dtype.kind in "iu":
            return arrays[0]
        with np.errstate(all="ignore"):
            return np.asarray(fn.meaning(*arrays))

    return reference


def _op(
    name: str, note: str, example: tuple[str, str], symbol: str | None = None,
    params: tuple[Param, ...] | None = None,
) -> Op:  # fmt: skip
    """The operation of one scalar function."""
    fn = FUNCTIONS[name]
    params = params or (UNARY if fn.arity == 1 else PAIR)
    names = [p.name for p in params]
    # a formula stays as it is written
    first = fn.doc[0].upper() if re.match(r"[a-z]{2,}\b(?!\()", fn.doc) else fn.doc[0]
    text = f"{first}{fn.doc[1:]}. {note}".strip()
    return Op(
        name, params, text, _rule(fn, symbol, names), _lower(fn), _reference(fn), example,
        fn.ulp, symbol is None, True, symbol, name, _folded(fn),
    )  # fmt: skip


NAN = "NaN gives NaN."

_OPERATORS = (
    _op("add", "NaN gives NaN; `inf + -inf` is NaN.", ("add(2, 3)", "5"), "+"),
    _op("sub", "NaN gives NaN; `inf - inf` is NaN.", ("sub(2, 3)", "-1"), "-"),
    _op("mul", "NaN gives NaN; `0 * inf` is NaN.", ("mul(2, 3)", "6"), "*"),
    _op("div", "For floats; `x / 0` is infinite, `0 / 0` NaN.", ("div(1.0, 4.0)", "0.25"), "/"),
    _op("floordiv", NAN, ("floordiv(-7, 2)", "-4"), "//"),
    _op("mod", "NaN gives NaN; for floats `x % 0` is NaN.", ("mod(-7, 2)", "1"), "%"),
    _op("pow", "`x ** 0` is 1, for NaN too; a negative float to a fraction is NaN.",
        ("pow(2, 10)", "1024"), "**"),
    _op("neg", "The sign of NaN and 0 flips.", ("neg(2.5)", "-2.5"), "-"),
    _op("eq", "", ("eq(2, 2)", "True"), "=="),
    _op("ne", "NaN differs from all.", ("ne(2, 2)", "False"), "!="),
    _op("lt", "False for NaN.", ("lt(1, 2)", "True"), "<"),
    _op("le", "False for NaN.", ("le(2, 2)", "True"), "<="),
    _op("gt", "False for NaN.", ("gt(1, 2)", "False"), ">"),
    _op("ge", "False for NaN.", ("ge(1, 2)", "False"), ">="),
    _op("and", "Both sides are computed.", ("and_(True, False)", "False"), "and"),
    _op("or", "Both sides are computed.", ("or_(True, False)", "True"), "or"),
    _op("not", "", ("not_(True)", "False"), "not"),
    _op("bitand", "On bools it is `and`.", ("bitand(6, 3)", "2"), "&"),
    _op("bitor", "On bools it is `or`.", ("bitor(6, 3)", "7"), "|"),
    _op("bitxor", "On bools whether they differ.", ("bitxor(6, 3)", "5"), "^"),
    _op("invert", "On bools it is `not`.", ("invert(0)", "-1"), "~"),
    _op("shl", "", ("shl(1, 3)", "8"), "<<"),
    _op("shr", "", ("shr(-8, 1)", "-4"), ">>"),
)  # fmt: skip

_FUNCTIONS = (
    _op("abs", NAN, ("abs(-2.5)", "2.5")),
    _op("sign", "`sign(-0.0)` is 0.", ("sign(-2.5)", "-1.0")),
    _op("floor", NAN + " Integers stay.", ("floor(-1.5)", "-2.0")),
    _op("ceil", NAN + " Integers stay.", ("ceil(1.5)", "2.0")),
    _op("round", NAN + " Integers stay.", ("round(2.5)", "2.0")),
    _op("trunc", NAN + " Integers stay.", ("trunc(-1.5)", "-1.0")),
    _op("exp", "`exp(-inf)` is 0. " + NAN, ("exp(0.0)", "1.0")),
    _op("log", "`log(0)` is -inf; NaN below 0.", ("log(1.0)", "0.0")),
    _op("log2", "`log2(0)` is -inf; NaN below 0.", ("log2(8.0)", "3.0")),
    _op("log1p", "`log1p(-1)` is -inf; NaN below -1.", ("log1p(0.0)", "0.0")),
    _op("expm1", "`expm1(-inf)` is -1. " + NAN, ("expm1(0.0)", "0.0")),
    _op("sqrt", "`sqrt(-0.0)` is -0.0.", ("sqrt(2.25)", "1.5")),
    _op("rsqrt", "`rsqrt(0)` is inf; NaN below 0.", ("rsqrt(4.0)", "0.5")),
    _op("sin", "NaN for infinity.", ("sin(0.0)", "0.0")),
    _op("cos", "NaN for infinity.", ("cos(0.0)", "1.0")),
    _op("tan", "NaN for infinity.", ("tan(0.0)", "0.0")),
    _op("tanh", "`tanh(inf)` is 1. " + NAN, ("tanh(0.0)", "0.0")),
    _op("sigmoid", "0 at -inf, 1 at inf. " + NAN, ("sigmoid(0.0)", "0.5")),
    _op("erf", "`erf(inf)` is 1. " + NAN, ("erf(0.0)", "0.0")),
    _op("isnan", "", ("isnan(1.0)", "False")),
    _op("isinf", "False for NaN.", ("isinf(inf)", "True")),
    _op("maximum", "Of bools it is `or`.", ("maximum(2, 3)", "3")),
    _op("minimum", "Of bools it is `and`.", ("minimum(2, 3)", "2")),
)


# Composed of others


def _floats(name: str) -> Callable[[Args, Facts], Types]:
    def rule(args: Args, facts: Facts) -> Types:
        require(args["x"], ("float",), f"`{name}`", "x", "convert: `f32(x)`")
        return (args["x"],)

    return rule


def _lower_exp2(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    """2 ** x: scaling the argument of exp would lose digits."""
    return [b.map("pow", b.scalar(2.0, results[0].dtype, results[0].shape), refs[0])]


def _lower_log10(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    dtype, shape = results[0].dtype.compute, results[0].shape
    scaled = b.map("log2", b.cast(refs[0], dtype))
    found = b.map("mul", scaled, b.scalar(math.log10(2.0), dtype, shape))
    return [b.result(found, results[0].dtype)]


def _lower_isfinite(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    return [b.map("not", b.map("or", b.map("isnan", refs[0]), b.map("isinf", refs[0])))]


def _quiet(fn: Callable[..., Any]) -> Callable[..., Any]:
    def reference(*args: Any) -> Any:
        with np.errstate(all="ignore"):
            return np.asarray(fn(*(np.asarray(a) for a in args)))

    return reference


def _fold_float(fn: Callable[..., Any]) -> Callable[..., Any]:
    def fold(*numbers: Any) -> Any:
        if any(isinstance(n, bool) or not isinstance(n, int | float) for n in numbers):
            return None
        with np.errstate(all="ignore"):
            return fn(*map(float, numbers)).item()

    return fold


def _isfinite_rule(args: Args, facts: Facts) -> Types:
    return (_floats("isfinite")(args, facts)[0].with_dtype(BOOL),)


def _clamp_rule(args: Args, facts: Facts) -> Types:
    operands = [(name, args[name]) for name in ("x", "lo", "hi")]
    dtype = same_dtype("`clamp`", operands)
    require(args["x"], ("number",), "`clamp`", "x", "convert: `i64(x)`")
    return (TensorType(dtype, broadcast_shape("`clamp`", operands, facts)),)


_MAXIMUM, _MINIMUM = FUNCTIONS["maximum"].meaning, FUNCTIONS["minimum"].meaning


def _lower_clamp(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    x, low, high = (b.broadcast(ref, results[0].shape) for ref in refs)
    return [b.map("minimum", b.map("maximum", x, low), high)]


def _fold_clamp(x: Any, lo: Any, hi: Any) -> Any:
    return x if x != x else min(max(x, lo), hi)


def _select_rule(args: Args, facts: Facts) -> Types:
    require(args["c"], ("bool",), "the condition of `select`", "c", "compare first: `x != 0`")
    dtype = same_dtype("`select`", [("a", args["a"]), ("b", args["b"])])
    operands = [(name, args[name]) for name in ("c", "a", "b")]
    return (TensorType(dtype, broadcast_shape("`select`", operands, facts)),)


def _lower_select(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    whole = [b.broadcast(ref, results[0].shape) for ref in refs]
    return [b.map("select", *whole, dtype=results[0].dtype)]


def _cast_rule(args: Args, facts: Facts) -> Types:
    return (args["x"].with_dtype(args["dtype"]),)


def _lower_cast(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    return [b.cast(refs[0], results[0].dtype)]


def _cast(x: Any, dtype: DType) -> Any:
    return scalar.convert(scalar.wide(np.asarray(x)), dtype)


_COMPOSED = (
    Op("exp2", UNARY, "2 to the power x. `exp2(-inf)` is 0. NaN gives NaN.",
       _floats("exp2"), _lower_exp2, _quiet(later.exp2), ("exp2(3.0)", "8.0"), 4.0,
       pointwise=True, folding=_fold_float(later.exp2)),
    Op("log10", UNARY, "The logarithm to base 10. `log10(0)` is -inf; NaN below 0.",
       _floats("log10"), _lower_log10, _quiet(later.log10), ("log10(1.0)", "0.0"), 4.0,
       pointwise=True, folding=_fold_float(later.log10)),
    Op("isfinite", UNARY, "Whether x is neither infinite nor NaN.",
       _isfinite_rule, _lower_isfinite, _quiet(later.isfinite), ("isfinite(inf)", "False"),
       pointwise=True, folding=_fold_float(later.isfinite)),
    Op("clamp", tuple(Param(n, "tensor", group="x") for n in ("x", "lo", "hi")),
       "x, but at least lo and at most hi: `minimum(maximum(x, lo), hi)`. NaN stays.",
       _clamp_rule, _lower_clamp,
       _quiet(lambda x, lo, hi: _MINIMUM(_MAXIMUM(x, lo), hi)),
       ("clamp(9, 0, 6)", "6"), pointwise=True, folding=_fold_clamp),
    Op("select", (Param("c", "tensor"), *PAIR),
       "a where the condition c holds, else b. Both sides are computed; a NaN on the other side"
       " does not matter.",
       _select_rule, _lower_select, _quiet(later.where), ("select(True, 1, 2)", "1"),
       pointwise=True, scalar="select", folding=lambda c, a, b: a if c else b),
    Op("cast", (X, Param("dtype", "dtype")),
       "x in another dtype, written `f32(x)`. Rounds to nearest even; to f8 and from float to"
       " integer it saturates (NaN gives integer 0), to a narrower integer it wraps, to bool"
       " it is `x != 0`.",
       _cast_rule, _lower_cast, _cast, ("cast(300.7, u8)", "255"), 0.5, False, True,
       scalar="cast"),
)  # fmt: skip

OPS = _OPERATORS + _FUNCTIONS + _COMPOSED
