"""Reductions along axes: sums, products, extremes, their positions, means and variances."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stagefuse.compiler import interpret
from stagefuse.compiler.graph import Ref
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.scalar import wide
from stagefuse.dsl.dims import Expr, const
from stagefuse.dsl.dtypes import F32, F64, I64, DType, from_numpy
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.numpy_later import later, np
from stagefuse.dsl.signature import OpError, Param
from stagefuse.dsl.types import TensorType

from .record import (
    Args,
    Op,
    Types,
    X,
    axes_of,
    count_as,
    product,
    range_note,
    require,
    reshape,
)

PARAMS = (X, Param("axis", "axis", None), Param("keepdims", "bool", False))


def _shape(type: TensorType, axes: Sequence[int], keepdims: bool) -> tuple[Expr, ...]:
    if keepdims:
        return tuple(const(1) if n in axes else d for n, d in enumerate(type.shape))
    return tuple(d for n, d in enumerate(type.shape) if n not in axes)


def _summed(dtype: DType) -> DType:
    """Sums and products of integers and bools are i64."""
    return dtype if dtype.is_float else I64


def _same(dtype: DType) -> DType:
    return dtype


def _averaged(dtype: DType) -> DType:
    return dtype if dtype.is_float else F32


def _rule(
    name: str, classes: Sequence[str], result: Callable[[DType], DType], needs_one: bool = False
) -> Callable[[Args, Facts], Types]:
    def rule(args: Args, facts: Facts) -> Types:
        x = args["x"]
        help = "compare first: `x != 0`" if classes == ("bool",) else "convert: `f32(x)`"
        require(x, classes, f"`{name}`", "x", help)
        axes = axes_of(args.get("axis"), x.rank, f"`{name}`")
        if needs_one:
            _refuse_empty(name, x, axes, facts)
        return (TensorType(result(x.dtype), _shape(x, axes, bool(args.get("keepdims")))),)

    return rule


def _refuse_empty(name: str, x: TensorType, axes: Sequence[int], facts: Facts) -> None:
    for axis in axes:
        _, high = facts.bounds(x.shape[axis])
        if high is not None and high <= 0:
            known = range_note((x.shape[axis],), facts)
            raise OpError(
                f"`{name}` of an empty axis has no answer", "x", str(x),
                [f"dimension {axis} is {x.shape[axis]}" + (f"; {known}" if known else "")],
            )  # fmt: skip


def _not_empty(name: str) -> Callable[[Args, Facts], list[tuple[Expr, str, str]]]:
    def demands(args: Args, facts: Facts) -> list[tuple[Expr, str, str]]:
        x = args["x"]
        sizes = [x.shape[a] for a in axes_of(args.get("axis"), x.rank, f"`{name}`")]
        message = f"`{name}` of an empty axis has no answer"
        return [(d - 1, ">=0", message) for d in sizes if not facts.is_positive(d)]

    return demands


def _reduced(b: Builder, kind: str, x: Ref, axes: Sequence[int], dtype: DType) -> Ref:
    """The reduction without its axes; the operand itself where there are none."""
    if not axes and not kind.startswith("arg"):
        return b.cast(x, dtype)
    return b.reduce(kind, x, axes, dtype)


def _axes(b: Builder, x: Ref, attrs: Args) -> tuple[int, ...]:
    return axes_of(attrs.get("axis"), b.type(x).rank, "a reduction")


def _lower(kind: str) -> Callable[..., list[Ref]]:
    def lower(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
        (x,), result = refs, results[0]
        axes = _axes(b, x, attrs)
        if kind.startswith("arg") and not axes:
            return [b.scalar(0, I64, result.shape)]
        found = _reduced(b, kind, x, axes, result.dtype)
        return [reshape(b, found, result.shape)]

    return lower


def _mean(b: Builder, x: Ref, axes: Sequence[int], dtype: DType, less: int = 0) -> Ref:
    """The mean in `dtype`, without its axes; `less` is taken from the divisor.

    Integers are summed exactly; those of 64 bits in f64, since their sum may need more bits.
    """
    type = b.type(x)
    if type.dtype.is_int and type.dtype.bits == 64:
        exact, source = F64, b.cast(x, F64)
    else:
        exact = dtype if type.dtype.is_float else I64
        source = x if not type.dtype.is_float else b.cast(x, dtype)
    total = b.cast(_reduced(b, "sum", source, axes, exact), dtype)
    count = product([type.shape[a] for a in axes]) - less
    return b.map("div", total, count_as(b, count, dtype, b.type(total).shape))


def _lower_mean(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    """In f32 or wider, so that the sum of small floats does not overflow."""
    (x,), result = refs, results[0]
    found = _mean(b, x, _axes(b, x, attrs), result.dtype.compute)
    return [reshape(b, b.result(found, result.dtype), result.shape)]


def _lower_var(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    """In two passes: the mean of squared distances from the mean never cancels."""
    (x,), result = refs, results[0]
    axes, dtype = _axes(b, x, attrs), result.dtype.compute
    type = b.type(x)
    mean = reshape(b, _mean(b, x, axes, dtype), _shape(type, axes, True))
    gap = b.map("sub", b.cast(x, dtype), b.broadcast(mean, type.shape))
    found = _mean(b, b.map("mul", gap, gap), axes, dtype, int(attrs.get("ddof") or 0))
    return [reshape(b, b.result(found, result.dtype), result.shape)]


def _var_rule(args: Args, facts: Facts) -> Types:
    if int(args.get("ddof") or 0) < 0:
        raise OpError("`ddof` is at least 0", "ddof")
    return _rule("var", ("number",), _averaged)(args, facts)


def _reference(kind: str) -> Callable[..., Any]:
    def reference(x: Any, axis: Any = None, keepdims: bool = False) -> Any:
        x = np.asarray(x)
        axes = axes_of(axis, x.ndim, kind)
        own = from_numpy(x.dtype)
        assert own is not None
        dtype = _summed(own) if kind in ("sum", "prod") else own
        found = interpret.reduce(kind, wide(x), axes, dtype)
        kept = tuple(1 if n in axes else d for n, d in enumerate(x.shape))
        return found.reshape(kept) if keepdims else found

    return reference


def _floating(fn: Callable[..., Any]) -> Callable[..., Any]:
    def reference(x: Any, axis: Any = None, keepdims: bool = False, **more: Any) -> Any:
        with np.errstate(all="ignore"):
            x = np.asarray(x, np.float64)
            axes = axes_of(axis, x.ndim, "the reference")
            count = int(np.prod([x.shape[n] for n in axes]))
            if 0 in x.shape or count - more.get("ddof", 0) <= 0:
                mean = np.sum(x, axis=axes, keepdims=True) / np.float64(count)
                top = x if fn is np.mean else (x - mean) ** 2
                total = np.sum(top, axis=axes, keepdims=keepdims)
                return total / np.float64(count - more.get("ddof", 0))
            return fn(x, axis=axes, keepdims=keepdims, **more)

    return reference


ALL = "`axis` is one axis or a tuple, negative from the end; without it all."

OPS = (
    Op("sum", PARAMS, f"The sum of x along axes. {ALL} Integers and bools sum to i64, which"
       " wraps; floats accumulate in f32 or wider, in an order that the plan fixes. NaN gives"
       " NaN; of nothing it is 0.",
       _rule("sum", ("any",), _summed), _lower("sum"), _reference("sum"),
       ("sum([[1, 2], [3, 4]], axis=0)", "[4, 6]")),
    Op("prod", PARAMS, f"The product of x along axes. {ALL} Integers and bools give i64, which"
       " wraps. NaN gives NaN; of nothing it is 1.",
       _rule("prod", ("any",), _summed), _lower("prod"), _reference("prod"),
       ("prod([1, 2, 3])", "6")),
    Op("mean", PARAMS, f"sum(x) / count along axes. {ALL} Integers and bools give f32; small"
       " floats are summed and divided in f32. NaN gives NaN; of nothing it is NaN.",
       _rule("mean", ("any",), _averaged), _lower_mean, _floating(later.mean),
       ("mean([1.0, 2.0])", "1.5"), 1.0),
    Op("max", PARAMS, f"The greatest element along axes. {ALL} NaN gives NaN; of nothing it is"
       " the dtype's lowest value.",
       _rule("max", ("any",), _same), _lower("max"), _reference("max"),
       ("max([1, 3, 2])", "3")),
    Op("min", PARAMS, f"The least element along axes. {ALL} NaN gives NaN; of nothing it is the"
       " dtype's highest value.",
       _rule("min", ("any",), _same), _lower("min"), _reference("min"),
       ("min([1, 3, 2])", "1")),
    Op("any", PARAMS, f"Whether an element (bool) is true. {ALL} Of nothing it is False.",
       _rule("any", ("bool",), _same), _lower("any"), _reference("any"),
       ("any([True, False])", "True")),
    Op("all", PARAMS, f"Whether all elements (bools) are true. {ALL} Of nothing it is True.",
       _rule("all", ("bool",), _same), _lower("all"), _reference("all"),
       ("all([True, False])", "False")),
    Op("argmax", PARAMS, f"The i64 position of the first greatest element; of several axes in"
       f" row-major order. {ALL} The first NaN counts as greatest; an empty axis is refused.",
       _rule("argmax", ("any",), lambda d: I64, True), _lower("argmax"), _reference("argmax"),
       ("argmax([1, 3, 2])", "1"),
       demands=_not_empty("argmax")),
    Op("argmin", PARAMS, f"The i64 position of the first least element; of several axes in"
       f" row-major order. {ALL} The first NaN counts as least; an empty axis is refused.",
       _rule("argmin", ("any",), lambda d: I64, True), _lower("argmin"), _reference("argmin"),
       ("argmin([3, 1, 2])", "1"),
       demands=_not_empty("argmin")),
    Op("var", (*PARAMS, Param("ddof", "int", 0, keyword_only=True)),
       f"The variance: the mean of (x - mean(x)) ** 2 along axes, divided by count - ddof. {ALL}"
       " Integers give f32. NaN gives NaN; of nothing it is NaN.",
       _var_rule, _lower_var, _floating(later.var), ("var([1.0, 3.0])", "1.0"), 4.0),
)  # fmt: skip
