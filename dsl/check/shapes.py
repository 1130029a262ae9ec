"""Broadcasting, with the message that shows both shapes (E0203)."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from stagefuse.dsl.dims import Expr, const
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.types import TensorType

from .report import Failed, text_of
from .unify import differ_for_some, larger_sizes, range_text

if TYPE_CHECKING:
    from .apply import Arg

ONE = const(1)


def broadcast(
    facts: Facts, left: Arg, left_shape: tuple[Expr, ...], right: Arg, right_type: TensorType
) -> tuple[Expr, ...]:
    """The common shape of two operands. Raises Failed."""
    right_shape = right_type.shape
    rank = max(len(left_shape), len(right_shape))
    padded_left = (ONE,) * (rank - len(left_shape)) + left_shape
    padded_right = (ONE,) * (rank - len(right_shape)) + right_shape
    result = []
    for axis, (a, b) in enumerate(zip(padded_left, padded_right, strict=True)):
        if a == ONE:
            result.append(b)
        elif b == ONE or facts.prove_eq(a, b):
            result.append(a)
        else:
            raise _mismatch(facts, left, left_shape, right, right_type, axis, a, b)
    return tuple(result)


def _mismatch(
    facts: Facts,
    left: Arg,
    left_shape: tuple[Expr, ...],
    right: Arg,
    right_type: TensorType,
    axis: int,
    a: Expr,
    b: Expr,
) -> Failed:
    rank = max(len(left_shape), len(right_type.shape))
    note = f"dimension {axis} is {a} on the left and {b} on the right"
    ranges = "".join(
        f"; {name} is {range_text(facts, name)}" for name in sorted(a.symbols() | b.symbols())
    )
    if ranges:
        end = "so they differ for some sizes"
        if not differ_for_some(facts, a, b):
            end = "so they may differ"
        note += f"{ranges}, {end}"
    left_type = TensorType(right_type.dtype, left_shape)
    from .values import Tensor

    if isinstance(left.value, Tensor):
        left_type = TensorType(left.value.type.dtype, left_shape)
    larger = None
    if not differ_for_some(facts, a, b):
        larger = larger_sizes(facts, a.symbols() | b.symbols(), lambda f: f.prove_eq(a, b))
        facts = Facts()
    help_text = larger or (
        _slice_help(facts, left, axis - rank + len(left_shape), a, b)
        or _slice_help(facts, right, axis - rank + len(right_type.shape), b, a)
    )
    return Failed(
        "E0203",
        "these two shapes do not broadcast",
        right.span,
        str(right_type),
        [(left.span, str(left_type))],
        [note],
        help_text or _axis_help(facts, left, left_shape, right, right_type),
    )


def _slice_help(facts: Facts, arg: Arg, axis: int, own: Expr, other: Expr) -> str | None:
    """Cut the longer side to the size of the other, where one is always the longer."""
    if axis < 0 or not facts.prove_le(other, own) or other.as_int() is not None:
        return None
    text = text_of(arg.span)
    if not re.fullmatch(r"[\w.\[\]\"'-]+", text):
        return None
    cut = f"{text}[{':, ' * axis}:{other}]"
    if axis == 0:
        return f"take the first {other} rows: `{cut}`"
    return f"take the first {other} along dimension {axis}: `{cut}`"


def _axis_help(
    facts: Facts, left: Arg, left_shape: tuple[Expr, ...], right: Arg, right_type: TensorType
) -> str | None:
    """Shapes align at their last dimension: a new one may be what is meant."""
    for arg, short, long in (
        (right, right_type.shape, left_shape),
        (left, left_shape, right_type.shape),
    ):
        for ones in range(1, len(long) - len(short) + 1) if short else ():
            moved = (*short, *(ONE,) * ones)
            tail = long[-len(moved) :]
            if all(
                a == ONE or b == ONE or facts.prove_eq(a, b)
                for a, b in zip(moved, tail, strict=True)
            ):
                text = text_of(arg.span)
                if re.fullmatch(r"[\w.\[\]\"'-]+", text):
                    index = "[" + ":, " * len(short) + ", ".join(["None"] * ones) + "]"
                    return f"shapes align at the last dimension: `{text}{index}`"
    return None
