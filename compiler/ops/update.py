"""Positions read from data, checked, and tensors with some of their elements replaced."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stagefuse.compiler.graph import Indirect, Ref
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.interpret import index_values
from stagefuse.dsl.dims import Expr, as_expr, sym
from stagefuse.dsl.dtypes import I64
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.numpy_later import np
from stagefuse.dsl.signature import Param

from .record import Args, Op, Types, X


def _lower_within(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    return [b.within(b.cast(refs[0], I64), as_expr(attrs["extent"]), as_expr(attrs["length"]))]


def _within(x: Any, extent: int, length: int) -> Any:
    found = np.asarray(x)
    found = np.where(found < 0, found + extent, found)
    if ((found < 0) | (found + length > extent)).any():
        raise IndexError(f"a position is outside an axis of size {extent}")
    return found


def _lower_update(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    base, value, *tensors = refs
    names = b.symbols(b.type(value).rank)
    at = dict(zip(attrs["symbols"], map(sym, names), strict=True))

    def renamed(expr: Any) -> Expr:
        return as_expr(expr).substitute(at)

    found: list[Expr | Indirect] = []
    for index in attrs["indices"]:
        if isinstance(index, tuple):
            _, operand, into, scale, offset = index
            where = tuple(map(renamed, into))
            found.append(Indirect(operand + 1, where, renamed(scale), renamed(offset)))
        else:
            found.append(renamed(index))
    return [b.update(base, value, tensors, names, found, attrs["state"])]


def _update(
    base: Any, value: Any, ids: Sequence[Any], symbols: Sequence[str], indices: Sequence[Any],
    state: str = "",
) -> Any:
    result, value = np.array(base), np.asarray(value)
    at = dict(zip(symbols, np.indices(value.shape, sparse=True), strict=True))

    def place(index: Any) -> Any:
        if not isinstance(index, tuple):
            return index_values(as_expr(index), at)
        _, operand, into, scale, offset = index
        found = np.asarray(ids[operand - 1])[tuple(index_values(as_expr(e), at) for e in into)]
        return found * index_values(as_expr(scale), at) + index_values(as_expr(offset), at)

    *places, value = np.broadcast_arrays(*map(place, indices), value)
    result[tuple(places)] = value
    return result


def _update_rule(args: Args, facts: Facts) -> Types:
    return (args["base"],)


OPS = (
    Op("within", (X, Param("extent", "size"), Param("length", "size")),
       "x as positions in an axis of size extent, of which length follow on each other from there;"
       " negative ones count from the end. One that leaves the axis is an error when the pipeline"
       " runs.",
       lambda args, facts: (args["x"].with_dtype(I64),), _lower_within, _within,
       ("within([-1, 2], 4, 1)", "[3, 2]"), user_callable=False),
    Op("update",
       (Param("base", "tensor", group="x"), Param("value", "tensor", group="x"),
        Param("ids", "tensors"), Param("symbols", "str"), Param("indices", "dims"),
        Param("state", "str", "")),
       "base with base[indices] = value[symbols], each index an expression over the symbols or a"
       " position read from a tensor. Of repeated positions the last holds.",
       _update_rule, _lower_update, _update,
       ("update([1, 2, 3], [9], [], ['i'], [1])", "[1, 9, 3]"), user_callable=False),
)  # fmt: skip
