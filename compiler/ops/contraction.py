"""Matrix products, as views, a product and a sum; compilation finds them by that structure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stagefuse.compiler.graph import Ref
from stagefuse.compiler.graph_builder import Builder
from stagefuse.dsl.dims import Expr, const
from stagefuse.dsl.dtypes import I32, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.numpy_later import np
from stagefuse.dsl.signature import OpError
from stagefuse.dsl.types import TensorType

from .pointwise import PAIR
from .record import Args, Op, Types, broadcast_shape, difference, require, reshape, same_dtype


def _result_dtype(dtype: DType) -> DType:
    """Products of 8-bit integers are summed in i32."""
    return I32 if dtype.name in ("i8", "u8") else dtype


def _matmul_rule(args: Args, facts: Facts) -> Types:
    a, b = args["a"], args["b"]
    for name in ("a", "b"):
        require(args[name], ("number",), "`@`", name, "convert: `f32(x)`")
        if args[name].rank == 0:
            raise OpError(
                "`@` needs at least one dimension on each side",
                name,
                str(args[name]),
                help="use `*` for scalars",
            )
    dtype = same_dtype("`@`", [("a", a), ("b", b)])
    depth = b.shape[-2] if b.rank > 1 else b.shape[-1]
    if not facts.prove_eq(a.shape[-1], depth):
        raise OpError(
            "these two shapes do not multiply",
            "b",
            str(b),
            [difference(a.shape[-1], depth, "the dimension summed over (the last of the left,"
                        f" the {'last' if b.rank == 1 else 'second to last'} of the right)",
                        facts)],
            _transposed(a, b, facts),
        )  # fmt: skip
    batch = broadcast_shape(
        "`@`",
        [("a", TensorType(dtype, a.shape[:-2])), ("b", TensorType(dtype, b.shape[:-2]))],
        facts,
    )
    shape = (*batch, *a.shape[-2:-1], *(b.shape[-1:] if b.rank > 1 else ()))
    return (TensorType(_result_dtype(dtype), shape),)


def _transposed(a: TensorType, b: TensorType, facts: Facts) -> str | None:
    if b.rank > 1 and facts.prove_eq(a.shape[-1], b.shape[-1]):
        order = [*range(b.rank - 2), b.rank - 1, b.rank - 2]
        return f"transpose the right side: `transpose(b, {order})`"
    return None


def _lower_matmul(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    """Both sides over [batch..., row, column, depth], multiplied, summed over depth."""
    dtype = results[0].dtype
    left, right = (b.cast(ref, dtype) for ref in refs)
    u, v = b.type(left), b.type(right)
    rows = u.shape[-2] if u.rank > 1 else const(1)
    columns = v.shape[-1] if v.rank > 1 else const(1)
    batch = results[0].shape[: max(u.rank, v.rank, 2) - 2]
    domain = (*batch, rows, columns, u.shape[-1])

    def batch_index(at: Sequence[Expr], type: TensorType) -> list[Expr]:
        own = type.shape[:-2]
        lead = len(batch) - len(own)
        return [const(0) if d.as_int() == 1 else at[lead + n] for n, d in enumerate(own)]

    def left_index(*at: Expr) -> list[Expr]:
        return [*batch_index(at, u), *((at[-3],) if u.rank > 1 else ()), at[-1]]

    def right_index(*at: Expr) -> list[Expr]:
        return [*batch_index(at, v), at[-1], *((at[-2],) if v.rank > 1 else ())]

    parts = b.view(left, domain, left_index), b.view(right, domain, right_index)
    found = b.reduce("sum", b.map("mul", *parts, dtype=dtype), [len(domain) - 1], dtype)
    return [reshape(b, found, results[0].shape)]


def _matmul(a: Any, b: Any) -> Any:
    a, b = np.asarray(a), np.asarray(b)
    if a.dtype.itemsize == 1 and a.dtype.kind in "iu":
        a, b = a.astype(np.int32), b.astype(np.int32)
    with np.errstate(all="ignore"):
        return np.matmul(a, b)


OPS = (
    Op("matmul", PAIR,
       "The matrix product: sum over k of a[..., i, k] * b[..., k, j]; leading axes broadcast, a"
       " 1-D side is a vector. i8 and u8 give i32; small floats are summed in f32, wider"
       " integers wrap. NaN gives NaN; over nothing the sum is 0.",
       _matmul_rule, _lower_matmul, _matmul, ("matmul([[1, 2]], [[3], [4]])", "[[11]]"),
       user_callable=False, symbol="@"),
)  # fmt: skip
