"""Tensors from sizes and numbers, and what the checker itself puts in: inputs, weights, sizes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stagefuse.compiler import scalar
from stagefuse.compiler.graph import Ref
from stagefuse.compiler.graph_builder import Builder
from stagefuse.dsl.dims import Expr, as_expr, sym
from stagefuse.dsl.dtypes import BOOL, F32, I64, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.numpy_later import np
from stagefuse.dsl.signature import OpError, Param
from stagefuse.dsl.types import TensorType

from .record import Args, Op, Types, dims

SHAPE = Param("shape", "dims")


def number_dtype(value: Any) -> DType:
    """The dtype of a literal that meets no other."""
    if isinstance(value, bool):
        return BOOL
    return I64 if isinstance(value, int) else F32


def check_shape(shape: Sequence[Any], name: str, facts: Facts) -> tuple[Expr, ...]:
    """A shape as expressions. Raises OpError for a size that is always negative."""
    exprs = dims(shape)
    for size in exprs:
        _, high = facts.bounds(size)
        if high is not None and high < 0:
            raise OpError(f"a size of {name} is negative", "shape", str(size))
    return exprs


def not_negative(name: str, param: str = "shape") -> Callable[..., list[tuple[Expr, str, str]]]:
    """The demand on a call that no size of a shape is negative."""

    def demands(args: Args, facts: Facts) -> list[tuple[Expr, str, str]]:
        given = args[param]
        sizes = dims([given] if param == "n" else given)
        message = f"a size of `{name}` must not be negative: {{}}"
        return [(size, ">=0", message.format(size)) for size in sizes
                if size.as_int() is None and not facts.is_nonneg(size)]

    return demands


def check_number(value: Any, dtype: DType, param: str) -> None:
    """Raises OpError for a number that is not one of the dtype's: 0.5 as i64, 300 as u8."""
    if dtype.is_float:
        return
    if isinstance(value, float) and value != int(value):
        raise OpError(
            f"{value} is not a whole number",
            param,
            str(value),
            help="give a float dtype such as `f32`",
        )
    if dtype.is_int:
        info = np.iinfo(dtype.numpy)
        if not info.min <= int(value) <= info.max:
            raise OpError(f"{value} does not fit {dtype}", param, str(value))


def rounded(value: Any, dtype: DType) -> float | int | bool:
    """A number as the dtype has it."""
    item: float | int | bool = scalar.convert(scalar.wide(np.asarray(value)), dtype).item()
    return item


def _filled(name: str, value: Any) -> tuple[Callable[..., Types], Callable[..., list[Ref]]]:
    """Rule and lowering of a constant tensor; `value` None stands for the argument."""

    def number(args: Args) -> Any:
        return args["value"] if value is None else value

    def rule(args: Args, facts: Facts) -> Types:
        shape = check_shape(args["shape"], f"`{name}`", facts)
        dtype = args.get("dtype") or number_dtype(number(args))
        check_number(number(args), dtype, "value")
        return (TensorType(dtype, shape),)

    def lower(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
        dtype, shape = results[0].dtype, results[0].shape
        return [b.scalar(rounded(number(attrs), dtype), dtype, shape)]

    return rule, lower


def _full(shape: Any, value: Any, dtype: DType | None = None) -> Any:
    whole = np.asarray(shape, np.int64).reshape(-1).tolist()
    chosen = dtype or number_dtype(value)
    return np.broadcast_to(scalar.convert(scalar.wide(np.asarray(value)), chosen), whole)


def _iota_rule(args: Args, facts: Facts) -> Types:
    return (TensorType(I64, check_shape((args["n"],), "`iota`", facts)),)


def _lower_iota(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    return [b.position(results[0].shape, ("i0",), sym("i0"))]


def _given(args: Args, facts: Facts) -> Types:
    """The type of what the checker declares: an input, a weight, a literal."""
    if "type" in args:
        return (args["type"],)
    return (TensorType(args.get("dtype") or number_dtype(args["value"]), ()),)


def _lower_input(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    return [b.input(attrs["name"], results[0])]


def _lower_weight(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    return [b.weight(attrs["weights"], attrs["key"], results[0])]


def _lower_constant(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    dtype, shape = results[0].dtype, results[0].shape
    return [b.scalar(rounded(attrs["value"], dtype), dtype, shape)]


def _position_rule(args: Args, facts: Facts) -> Types:
    return (TensorType(I64, dims(args.get("shape") or ())),)


def _lower_position(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    """The symbols get their canonical names, so that equal positions are one node."""
    shape = results[0].shape
    names = b.symbols(len(shape))
    own = dict(zip(attrs.get("symbols") or (), map(sym, names), strict=True))
    expr = as_expr(attrs["expr"]).substitute(own)
    known = expr.as_int()
    if known is not None:
        return [b.scalar(known, I64, shape)]
    return [b.position(shape, names, expr)]


def _position(expr: Any, symbols: Sequence[str] = (), shape: Sequence[int] = ()) -> Any:
    from stagefuse.compiler.interpret import index_values

    grid = np.indices(tuple(shape), sparse=True)
    values = dict(zip(symbols, grid, strict=True))
    return np.broadcast_to(index_values(as_expr(expr), values), tuple(shape))


_FULL, _ZEROS, _ONES = _filled("full", None), _filled("zeros", 0), _filled("ones", 1)

OPS = (
    Op("zeros", (SHAPE, Param("dtype", "dtype", F32)), "A tensor of zeros, f32 unless told.",
       *_ZEROS, lambda shape, dtype=F32: _full(shape, 0, dtype), ("zeros([2])", "[0.0, 0.0]"),
       demands=not_negative("zeros")),
    Op("ones", (SHAPE, Param("dtype", "dtype", F32)), "A tensor of ones, f32 unless told.",
       *_ONES, lambda shape, dtype=F32: _full(shape, 1, dtype), ("ones([2])", "[1.0, 1.0]"),
       demands=not_negative("ones")),
    Op("full", (SHAPE, Param("value", "scalar"), Param("dtype", "dtype", None)),
       "A tensor of one number, a size or the value of a scalar tensor, converted to the dtype;"
       " without one f32, i64 or bool as the number is written, i64 of a size, or the tensor's.",
       *_FULL, _full, ("full([2], 7)", "[7, 7]"),
       demands=not_negative("full")),
    Op("iota", (Param("n", "size"),), "The i64 numbers from 0 up to n, excluding it.",
       _iota_rule, _lower_iota, lambda n: np.arange(n), ("iota(3)", "[0, 1, 2]"),
       demands=not_negative("iota", "n")),
    Op("input", (Param("name", "str"),), "An argument of the pipeline.",
       _given, _lower_input, lambda name, value=0: value, ("input('x')", "0"),
       user_callable=False),
    Op("weight", (Param("weights", "str"), Param("key", "str")), "A tensor of a weight file.",
       _given, _lower_weight, lambda weights, key, value=0: value, ("weight('w', 'k')", "0"),
       user_callable=False),
    Op("constant", (Param("value", "scalar"), Param("dtype", "dtype", None)),
       "A literal, rounded once to its dtype.",
       _given, _lower_constant, lambda value, dtype=None: _full((), value, dtype),
       ("constant(3)", "3"), user_callable=False),
    Op("dim", (Param("expr", "size"),), "The i64 value of an expression over sizes.",
       _position_rule, _lower_position, _position, ("dim(3)", "3"), user_callable=False),
    Op("position", (Param("expr", "size"), Param("symbols", "str"), SHAPE),
       "The i64 value of an expression over index symbols and sizes, at each position.",
       _position_rule, _lower_position, _position, ("position(3, ['i'], [2])", "[3, 3]"),
       user_callable=False, pointwise=True),
)  # fmt: skip
