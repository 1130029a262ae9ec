"""Additions and maxima at positions read from data, and access by index notation."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stagefuse.compiler.graph import Indirect, Ref
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.interpret import index_values
from stagefuse.dsl.dims import Expr, as_expr, sym
from stagefuse.dsl.dtypes import I64, U64
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.numpy_later import later, np
from stagefuse.dsl.signature import OpError, Param
from stagefuse.dsl.types import TensorType

from .record import Args, Op, Types, X, axis_of, difference, dims, require, same_dtype


def _access_rule(args: Args, facts: Facts) -> Types:
    return (TensorType(args["x"].dtype, dims(args["shape"])),)


def _lower_access(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    """A view where every index is known, else a gather; the symbols get canonical names."""
    shape = results[0].shape
    own = tuple(attrs["symbols"])
    indices = tuple(attrs["indices"])

    def renamed(at: Sequence[Expr], expr: Any) -> Expr:
        return as_expr(expr).substitute(dict(zip(own, at, strict=True)))

    if not any(isinstance(index, tuple) for index in indices):
        return [b.view(refs[0], shape, lambda *at: [renamed(at, e) for e in indices])]
    names = b.symbols(len(shape))
    at = tuple(map(sym, names))
    tensors = [b.cast(ref, I64) for ref in refs[1:]]
    found: list[Expr | Indirect] = []
    for index in indices:
        if isinstance(index, tuple):
            _, operand, into, *rest = index
            scale, offset = rest or (1, 0)
            where = tuple(renamed(at, e) for e in into)
            found.append(Indirect(operand, where, renamed(at, scale), renamed(at, offset)))
        else:
            found.append(renamed(at, index))
    return [b.gather(refs[0], tensors, shape, names, found)]


def _access(
    x: Any, ids: Sequence[Any], shape: Any, symbols: Sequence[str], indices: Sequence[Any]
) -> Any:
    values = dict(zip(symbols, np.indices(tuple(shape), sparse=True), strict=True))

    def value(index: Any) -> Any:
        if not isinstance(index, tuple):
            return index_values(as_expr(index), values)
        _, operand, into, *rest = index
        scale, offset = rest or (1, 0)
        at = tuple(index_values(as_expr(e), values) for e in into)
        scaled = np.asarray(ids[operand - 1])[at] * index_values(as_expr(scale), values)
        return scaled + index_values(as_expr(offset), values)

    return np.broadcast_to(np.asarray(x)[tuple(map(value, indices))], tuple(shape))


SCATTER = (Param("base", "tensor", group="x"), Param("indices", "tensor"),
           Param("updates", "tensor", group="x"), Param("axis", "int", 0))  # fmt: skip


def _scatter_rule(name: str) -> Callable[[Args, Facts], Types]:
    def rule(args: Args, facts: Facts) -> Types:
        base, ids, updates = args["base"], args["indices"], args["updates"]
        same_dtype(name, [("base", base), ("updates", updates)])
        classes = ("number",) if name == "`scatter_add`" else ("any",)
        require(base, classes, name, "base", "convert: `i64(x)`")
        require(ids, ("int",), f"the positions of {name}", "indices", "convert: `i64(x)`")
        if ids.rank != 1:
            raise OpError(
                f"{name} takes one row of positions",
                "indices",
                str(ids),
                help="flatten first: `reshape(indices, [-1])`",
            )
        axis = axis_of(args.get("axis", 0), base.rank, name)
        want = (*base.shape[:axis], ids.shape[0], *base.shape[axis + 1 :])
        if updates.rank != len(want):
            raise OpError(
                f"{name} needs updates of shape {TensorType(base.dtype, want)}",
                "updates",
                str(updates),
            )
        for place, (a, b) in enumerate(zip(want, updates.shape, strict=True)):
            if not facts.prove_eq(a, b):
                raise OpError(
                    f"{name} needs updates of shape {TensorType(base.dtype, want)}",
                    "updates",
                    str(updates),
                    [difference(a, b, f"dimension {place}", facts)],
                )
        return (base,)

    return rule


def _lower_scatter(kind: str) -> Callable[..., list[Ref]]:
    def lower(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
        base, ids, updates = refs
        axis = attrs.get("axis", 0) % results[0].rank
        if b.type(ids).dtype == U64:  # one beyond i64 is out of range, and not negative
            ids = b.map("minimum", ids, b.scalar((1 << 63) - 1, U64, b.type(ids).shape))
        return [b.scatter(kind, base, b.cast(ids, I64), updates, axis)]

    return lower


def _scatter(combine: np.ufunc) -> Callable[..., Any]:
    def reference(base: Any, indices: Any, updates: Any, axis: int = 0) -> Any:
        result = np.moveaxis(np.array(base), axis, 0)
        with np.errstate(all="ignore"):
            combine.at(result, np.asarray(indices), np.moveaxis(np.asarray(updates), axis, 0))
        return np.moveaxis(result, 0, axis)

    return reference


def _scatter_set(base: Any, indices: Any, updates: Any, axis: int = 0) -> Any:
    result = np.moveaxis(np.array(base), axis, 0)
    for at, row in zip(np.asarray(indices), np.moveaxis(np.asarray(updates), axis, 0), strict=True):
        result[at] = row
    return np.moveaxis(result, 0, axis)


OPS = (
    Op("access",
       (X, Param("ids", "tensors"), Param("shape", "dims"), Param("symbols", "str"),
        Param("indices", "dims")),
       "result[symbols] = x[indices], each index an expression over the symbols or a value read"
       " from a tensor (times a scale plus an offset; negative counts from the end; one out of"
       " range is an error when the pipeline runs).",
       _access_rule, _lower_access, _access,
       ("access([1, 2, 3], [], [2], ['i'], [1])", "[2, 2]"), user_callable=False,
       pointwise=True),
    Op("scatter_add", SCATTER,
       "base with updates added at positions along an axis: row n of updates to row indices[n]."
       " Repeated positions add up in order; negative ones count from the end; one out of range"
       " is an error when the pipeline runs. NaN gives NaN.",
       _scatter_rule("`scatter_add`"), _lower_scatter("add"), _scatter(later.add),
       ("scatter_add([0, 0], [1, 1], [2, 3])", "[0, 5]")),
    Op("scatter_max", SCATTER,
       "base with the maximum of itself and the updates at positions along an axis. Negative"
       " positions count from the end; one out of range is an error when the pipeline runs. NaN"
       " gives NaN.",
       _scatter_rule("`scatter_max`"), _lower_scatter("max"), _scatter(later.maximum),
       ("scatter_max([0, 0], [1, 1], [2, 3])", "[0, 3]")),
    Op("scatter_set", SCATTER,
       "base with updates in place of what is at positions along an axis. Of repeated positions"
       " the last holds; negative ones count from the end; one out of range is an error when the"
       " pipeline runs.",
       _scatter_rule("`scatter_set`"), _lower_scatter("set"), _scatter_set,
       ("scatter_set([0, 0], [1, 1], [2, 3])", "[0, 3]")),
)  # fmt: skip
