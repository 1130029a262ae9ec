"""Running sums, sorting and the greatest elements with their places."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stagefuse.compiler import interpret
from stagefuse.compiler.graph import Ref
from stagefuse.compiler.graph_builder import Builder
from stagefuse.dsl.check.unify import larger_sizes
from stagefuse.dsl.dims import Expr, as_expr
from stagefuse.dsl.dtypes import I64
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.numpy_later import later, np
from stagefuse.dsl.signature import OpError, Param
from stagefuse.dsl.types import TensorType

from .record import Args, Op, Types, X, axis_of, product, range_note, reshape


def _running_rule(name: str) -> Callable[[Args, Facts], Types]:
    def rule(args: Args, facts: Facts) -> Types:
        x, axis = args["x"], args.get("axis")
        dtype = x.dtype if x.dtype.is_float else I64
        if axis is None:
            return (TensorType(dtype, (product(x.shape),)),)
        _single(axis, x, f"`{name}`")
        return (x.with_dtype(dtype),)

    return rule


def _single(axis: Any, x: TensorType, name: str) -> int:
    if not isinstance(axis, int):
        if len(axis) != 1:
            raise OpError(f"{name} takes one axis", "axis", str(tuple(axis)))
        axis = axis[0]
    return axis_of(axis, x.rank, name)


def _lower_running(kind: str) -> Callable[..., list[Ref]]:
    def lower(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
        x, axis = b.cast(refs[0], results[0].dtype), attrs.get("axis")
        if axis is None:
            return [b.scan(kind, reshape(b, x, results[0].shape), 0)]
        return [b.scan(kind, x, _single(axis, results[0], f"`cum{kind}`"))]

    return lower


def _running(fn: Callable[..., Any]) -> Callable[..., Any]:
    def reference(x: Any, axis: int | None = None) -> Any:
        x = np.asarray(x)
        with np.errstate(all="ignore"):
            return fn(x, axis, dtype=np.float64 if x.dtype.kind == "f" else np.int64)

    return reference


def _sort_rule(args: Args, facts: Facts) -> Types:
    axis_of(args.get("axis", -1), args["x"].rank, "`sort`")
    return (args["x"],)


def _lower_sort(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    return [b.sort(refs[0], attrs.get("axis", -1), bool(attrs.get("descending")))[0]]


def _topk_rule(args: Args, facts: Facts) -> Types:
    x, k = args["x"], as_expr(args["k"])
    axis = axis_of(args.get("axis", -1), x.rank, "`topk`")
    extent = x.shape[axis]

    def fits(known: Facts) -> bool:
        return known.is_nonneg(k) and known.prove_le(k, extent)

    if not fits(facts):
        known = range_note((k, extent), facts)
        advice = larger_sizes(facts, k.symbols() | extent.symbols(), fits)
        if advice is None and extent.as_symbol() and k.as_int() is not None:
            advice = f"state the range of the size, such as `where {extent} in {k}..=4096`"
        raise OpError(
            f"`topk` needs {k} of {extent} elements, which may be fewer", "k", str(k),
            [f"x is {x}" + (f"; {known}" if known else "")], advice,
        )  # fmt: skip
    type = TensorType(x.dtype, (*x.shape[:axis], k, *x.shape[axis + 1 :]))
    return (type, type.with_dtype(I64))


def _lower_topk(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    """The first k of a descending sort: a view, so the sort may stop there."""
    shape: tuple[Expr, ...] = results[0].shape
    both = b.sort(refs[0], attrs.get("axis", -1), True)
    return [b.view(ref, shape, lambda *at: at) for ref in both]


def _topk(x: Any, k: int, axis: int = -1) -> Any:
    values, order = interpret.sort(np.asarray(x), axis % np.ndim(x), True)
    first = np.arange(k)
    return np.take(values, first, axis), np.take(order, first, axis)


def _sort(x: Any, axis: int = -1, descending: bool = False) -> Any:
    return interpret.sort(np.asarray(x), axis % np.ndim(x), descending)[0]


AXIS = Param("axis", "int", -1)

OPS = (
    Op("cumsum", (X, Param("axis", "axis", None)),
       "The running sum along an axis, or over all elements in row-major order. Integers and"
       " bools give i64, which wraps. From a NaN on all are NaN.",
       _running_rule("cumsum"), _lower_running("sum"), _running(later.cumsum),
       ("cumsum([1, 2, 3])", "[1, 3, 6]")),
    Op("cumprod", (X, Param("axis", "axis", None)),
       "The running product along an axis, or over all elements in row-major order. Integers and"
       " bools give i64, which wraps. From a NaN on all are NaN.",
       _running_rule("cumprod"), _lower_running("prod"), _running(later.cumprod),
       ("cumprod([1, 2, 3])", "[1, 2, 6]")),
    Op("sort", (X, AXIS, Param("descending", "bool", False, keyword_only=True)),
       "The elements in rising order along an axis, equal ones in the order they had. NaN is"
       " the greatest value.",
       _sort_rule, _lower_sort, _sort, ("sort([3, 1, 2])", "[1, 2, 3]")),
    Op("topk", (X, Param("k", "size"), AXIS),
       "The k greatest elements along an axis in falling order, and their i64 positions; of"
       " equal ones the first. NaN is the greatest value.",
       _topk_rule, _lower_topk, _topk, ("topk([1, 3, 2], 2)", "([3, 2], [1, 2])")),
)  # fmt: skip
