"""Literals and sizes: their arithmetic while compiling, and the dtype they adopt."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, mod
from stagefuse.dsl.dtypes import I64, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.signature import Builtin
from stagefuse.dsl.source import Span

from .record import Recorder, default_dtype
from .report import Failed
from .values import Dim, Number, Scope, Space, Tensor, Value

MAX_POWER = 64
_INT_RANGE = (-(1 << 63), (1 << 63) - 1)


def own_dtype(value: Value) -> DType | None:
    """The dtype a value insists on; None for a literal."""
    if isinstance(value, Tensor):
        return value.type.dtype
    if isinstance(value, Scope) and value.leaf is not None:
        return value.leaf.dtype
    return I64 if isinstance(value, Dim) else None


def typed(recorder: Recorder, value: Value, dtype: DType | None, span: Span) -> Tensor:
    """The value as a tensor; a literal takes `dtype`. Raises Failed."""
    if isinstance(value, Tensor):
        return value
    if isinstance(value, Scope):
        return recorder.weight(value, span)
    if isinstance(value, Dim):
        return recorder.dim(value, span)
    assert isinstance(value, Number)
    target = dtype or default_dtype(value)
    return recorder.number(adopted(value.value, target, span), target, span)


def adopted(value: int | float | bool, dtype: DType, span: Span) -> int | float | bool:
    """A literal as a value of `dtype`. Raises Failed where that would change its meaning."""
    if isinstance(value, bool) != dtype.is_bool:
        kind = "a bool" if isinstance(value, bool) else "a number"
        fix = f"convert the other side: `{dtype}` is not a number" if dtype.is_bool else ""
        raise Failed(
            "E0202",
            f"{value} is {kind} and meets {dtype}",
            span,
            str(value),
            help="compare with `!= 0` to get bools" if fix else None,
        )
    if isinstance(value, bool):
        return value
    if dtype.is_float:
        number = float(value)  # literals and constants are within f64
        if dtype.overflows(number):
            raise Failed(
                "E0202",
                f"{value} does not fit {dtype}",
                span,
                f"{dtype} is at most {dtype.largest:.6g}",
                help=f"write the infinity that it would become: `{'-' * (number < 0)}math.INF`",
            )
        return number
    if isinstance(value, float):
        raise Failed(
            "E0202",
            f"{value} is not an integer and meets {dtype}",
            span,
            str(value),
            help="convert the integer side, for example with `f32(...)`",
        )
    low, high = (
        (0, (1 << dtype.bits) - 1)
        if dtype.kind == "uint"
        else (-(1 << (dtype.bits - 1)), (1 << (dtype.bits - 1)) - 1)
    )
    if not low <= value <= high:
        raise Failed("E0202", f"{value} does not fit {dtype}", span, f"{dtype} is {low}..={high}")
    return value


def checked_number(value: Any, span: Span) -> Number:
    """A folded constant; integers stay within 64 bits."""
    if isinstance(value, int) and not _INT_RANGE[0] <= value <= _INT_RANGE[1]:
        raise Failed("E0207", "this constant does not fit 64 bits", span)
    return Number(value)


def fold_numbers(record: Builtin, values: Sequence[Value], span: Span) -> Number | None:
    """The constant that a built-in gives for literals, or None."""
    numbers = [value.value for value in values if isinstance(value, Number)]
    special = _NUMBERS.get(record.name)
    try:
        if special is not None and len(numbers) == 2:
            found = special(*numbers)
        else:
            if record.name == "pow" and _too_large(numbers):
                raise Failed("E0207", "this constant does not fit 64 bits", span)
            found = record.fold(*numbers)
    except Failed:
        raise
    except (ArithmeticError, ValueError, TypeError):
        return None
    if found is None or isinstance(found, complex):
        return None
    if hasattr(found, "item"):
        found = found.item()
    return checked_number(found, span)


def _too_large(numbers: Sequence[Any]) -> bool:
    if len(numbers) != 2 or any(isinstance(n, float) for n in numbers):
        return False
    base, power = numbers
    return bool(abs(base) > 1 and power > MAX_POWER)


_NUMBERS: dict[str, Callable[[Any, Any], Any]] = {
    "floordiv": lambda a, b: a // b if b or isinstance(a, float) else 0,
    "mod": lambda a, b: a % b if b or isinstance(a, float) else 0,
}


def _power(a: Expr, b: Expr) -> Expr | None:
    exponent = b.as_int()
    if exponent is None or not 0 <= exponent <= 4:
        return None
    result = const(1)
    for _ in range(exponent):
        result = result * a
    return result


def fold_sizes(name: str, values: Sequence[Value], facts: Facts, span: Span) -> Value | None:
    """Integer arithmetic over sizes and indices stays an expression; None if it cannot."""
    exprs: list[Expr] = []
    space: Space = ()
    for value in values:
        if isinstance(value, Dim):
            exprs.append(value.expr)
            space = value.space if len(value.space) > len(space) else space
        elif isinstance(value, Number) and type(value.value) is int:
            exprs.append(const(value.value))
        else:
            return None
    if len(exprs) == 2 and name in _COMPARE:
        truth = _COMPARE[name](facts, exprs[0], exprs[1])
        return None if truth is None else Number(truth)
    found: Expr | None = None
    if len(exprs) == 2 and name in _BINARY:
        found = _BINARY[name](exprs[0], exprs[1], facts)
        if found and name in ("add", "sub") and _rests_on_a_divisor(exprs, found, facts):
            return None
    elif len(exprs) == 1 and name == "neg":
        found = -exprs[0]
    return None if found is None else Dim(found, space)


def _rests_on_a_divisor(exprs: Sequence[Expr], found: Expr, facts: Facts) -> bool:
    """Whether M*(i // M) + i % M became i where M may be 0, by which both are 0."""
    left = {atom for monomial, _ in found.terms for atom, _ in monomial}
    gone = [a for e in exprs for monomial, _ in e.terms for a, _ in monomial if a not in left]
    return any(a.kind == "%" and not facts.is_positive(a.args[1]) for a in gone)


_BINARY: dict[str, Callable[[Expr, Expr, Facts], Expr | None]] = {
    "add": lambda a, b, f: a + b,
    "sub": lambda a, b, f: a - b,
    "mul": lambda a, b, f: a * b,
    "floordiv": floordiv,
    "mod": mod,
    "minimum": minimum,
    "maximum": maximum,
    "pow": lambda a, b, f: _power(a, b),
}


def _decide(yes: bool, no: bool) -> bool | None:
    return True if yes else False if no else None


def _apart(facts: Facts, a: Expr, b: Expr) -> bool:
    return facts.prove_lt(a, b) or facts.prove_lt(b, a)


_COMPARE: dict[str, Callable[[Facts, Expr, Expr], bool | None]] = {
    "eq": lambda f, a, b: _decide(f.prove_eq(a, b), _apart(f, a, b)),
    "ne": lambda f, a, b: _decide(_apart(f, a, b), f.prove_eq(a, b)),
    "lt": lambda f, a, b: _decide(f.prove_lt(a, b), f.prove_le(b, a)),
    "le": lambda f, a, b: _decide(f.prove_le(a, b), f.prove_lt(b, a)),
    "gt": lambda f, a, b: _decide(f.prove_lt(b, a), f.prove_le(a, b)),
    "ge": lambda f, a, b: _decide(f.prove_le(b, a), f.prove_lt(a, b)),
}
