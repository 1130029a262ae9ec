"""Small pieces of kernel IR: identities, conditions, index arithmetic, what statements mention."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

from stagefuse.compiler.kernel_ir import (
    Alloc,
    Attend,
    Checked,
    Const,
    Fold,
    For,
    ForEqual,
    If,
    Index,
    Let,
    Load,
    Op,
    SortDigit,
    SortRow,
    Statement,
    Store,
    TileProduct,
    Value,
)
from stagefuse.compiler.scalar import identity
from stagefuse.dsl.dims import Expr, as_expr, const, maximum, sym
from stagefuse.dsl.dtypes import BOOL, I64, DType

COMBINE = {
    "sum": "add",
    "prod": "mul",
    "any": "or",
    "all": "and",
    "max": "maximum",
    "min": "minimum",
}
"""The scalar function that a reduction repeats."""


def start_of(kind: str, dtype: DType) -> Const:
    """The accumulator of a reduction before its first element."""
    return Const(identity(kind, dtype), dtype)


def product_of(shape: Sequence[Expr]) -> Expr:
    total = const(1)
    for size in shape:
        total = total * size
    return total


def at_least_one(expr: Expr) -> Expr:
    return maximum(expr, 1)


def as_dtype(value: Value, dtype: DType) -> Value:
    return value if value.dtype == dtype else Op("cast", (value,), dtype)


def minus(value: Value, amount: Expr) -> Value:
    if isinstance(value, Index):
        return Index(value.expr - amount)
    return Op("sub", (value, Index(amount)), I64)


def all_of(conditions: Sequence[Value]) -> Value:
    result = conditions[0]
    for condition in conditions[1:]:
        result = Op("and", (result, condition), BOOL)
    return result


_FUNCTIONS = {"//": "floordiv", "%": "mod", "min": "minimum", "max": "maximum"}


def expand(expr: Expr, at: Mapping[str, Value]) -> Value:
    """An index expression as arithmetic on i64 values."""
    total: Value | None = None
    for monomial, coefficient in expr.terms:
        factor: Value | None = None if coefficient == 1 and monomial else Const(coefficient, I64)
        for atom, power in monomial:
            value: Value
            if atom.kind == "sym":
                value = at.get(atom.name, Index(sym(atom.name)))
            else:
                args = tuple(expand(a, at) for a in atom.args)
                value = Op(_FUNCTIONS[atom.kind], args, I64)
            for _ in range(power):
                factor = value if factor is None else Op("mul", (factor, value), I64)
        assert factor is not None
        total = factor if total is None else Op("add", (total, factor), I64)
    return total or Const(0, I64)


def _parts(values: Sequence[Value], seen: set[int]) -> Iterator[Value]:
    """Values and what they are computed of, each once; those that are not `seen` yet."""
    pending = list(values)
    while pending:
        value = pending.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, Load):
            pending.extend((*value.indices, *value.guard))
        elif isinstance(value, Op):
            pending.extend(value.args)
        elif isinstance(value, Checked):
            pending.append(value.value)


def symbols_of(values: Sequence[Value]) -> frozenset[str]:
    """Index symbols in values."""
    parts = _parts(values, set())
    return frozenset[str]().union(*(v.expr.symbols() for v in parts if isinstance(v, Index)))


def _add_exprs(found: set[Expr], seen: set[int], root: Value) -> None:
    """Add every index expression in a value, those of parts that were not `seen` yet."""
    for part in _parts([root], seen):
        if isinstance(part, Index):
            found.add(part.expr)
        elif isinstance(part, Checked):
            found.update((part.extent, part.length))


def exprs_of(body: Sequence[Statement]) -> set[Expr]:
    """Every index expression in statements."""
    found: set[Expr] = set()
    value = partial(_add_exprs, found, set())
    for s in body:
        if isinstance(s, Let):
            value(s.value)
        elif isinstance(s, Store):
            for part in (*s.indices, s.value):
                value(part)
        elif isinstance(s, For):
            found |= {s.lo, s.hi} | exprs_of(s.body)
        elif isinstance(s, ForEqual):
            value(s.first)
            found |= {s.count} | exprs_of(s.body)
        elif isinstance(s, If):
            value(s.condition)
            found |= exprs_of(s.body)
        elif isinstance(s, Fold):
            found |= {e for _, e in s.loops}
            value(s.value)
        elif isinstance(s, Alloc):
            found |= set(s.shape)
        elif isinstance(s, TileProduct):
            found |= {
                s.dst_offset, s.dst_row, s.a_offset, s.a_row, s.a_col, s.panel_offset, s.rows,
                s.depth,
            }  # fmt: skip
            others = (s.width, s.panel_row, s.panel_col, s.panel_place, *s.a_indices, *s.a_guard)
            found |= {e for e in others if e is not None}
            for made in (*s.positions, *(() if s.element is None else (s.element,))):
                value(made)
        elif isinstance(s, Attend):
            found |= {s.dst_row, s.rows, s.lo, s.hi, *(() if s.extent is None else (s.extent,))}
            for x in (s.queries, s.keys, s.values):
                found |= {x.offset, x.along, x.across, x.step}
            for made in (s.score, s.keep, s.key_element, s.value_element):
                if made is not None:
                    value(made)
        elif isinstance(s, SortRow):
            found |= {as_expr(s.count), *(() if s.first is None else (s.first,))}
        elif isinstance(s, SortDigit):
            found |= {s.count, s.shift}
    return found


def bound_names(body: Sequence[Statement]) -> set[str]:
    found: set[str] = set()
    for s in body:
        if isinstance(s, For | ForEqual):
            found |= {s.index} | bound_names(s.body)
        elif isinstance(s, If):
            found |= bound_names(s.body)
        elif isinstance(s, Fold):
            found |= {n for n, _ in s.loops}
        elif isinstance(s, TileProduct):
            found |= {"k"} if s.panel_place is not None else set()
            found |= {"i", "k"} if s.a_indices else set()
            found |= set(s.chosen)
            found |= {s.k, s.c} if s.element is not None else set()
        elif isinstance(s, Attend):
            found |= {s.row, s.key, *filter(None, [s.feature])}
    return found
