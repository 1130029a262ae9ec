"""What a sort in a kernel must satisfy; `kernel_verify` numbers the invariants."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from stagefuse.dsl.dims import Expr, as_expr, const
from stagefuse.dsl.dtypes import I64, U8, U32

from .kernel_ir import Buffer, SortDigit, SortRow
from .proofs.bounds import size_of

if TYPE_CHECKING:
    from .kernel_verify import Check, Scope


def sort_row(check: Check, s: SortRow, scope: Scope) -> None:
    keys, order = check.buffer(scope, s.keys), check.buffer(scope, s.order)
    check.symbols(scope, as_expr(s.count))
    if order.dtype != I64 or {keys.mode, order.mode} != {"scratch"}:
        check.fail(7, "a sort has scratch keys and scratch i64 order")
    _large_enough(check, as_expr(s.count), (keys, order), scope)
    if s.first is not None:
        check.symbols(scope, s.first)


def sort_digit(check: Check, s: SortDigit, scope: Scope) -> None:
    keys = check.buffer(scope, s.keys)
    for expr in (s.count, s.shift):
        check.symbols(scope, expr)
    if keys.mode != "scratch":
        check.fail(7, f"`{s.keys}`, which is sorted by a digit, is no scratch")
    last = const(keys.dtype.bits - 7)
    why = check.bounds.inside(s.shift, last, scope.facts, scope.guards, check.text)
    if why is not None:
        check.fail(7, f"{keys.dtype} has no such digit: {why}")
    _large_enough(check, s.count, (keys,), scope)
    own = (s.order, U32, s.count), (s.digits, U8, s.count), (s.before, U32, const(257))
    for name, dtype, size in own:
        made = check.buffer(scope, name) if name else None
        if made is not None and (made.dtype != dtype or made.mode != "scratch"):
            check.fail(7, f"`{name}` is {made.dtype}, not scratch of {dtype}")
        if made is not None:
            _large_enough(check, size, (made,), scope)


def _large_enough(check: Check, count: Expr, made: Sequence[Buffer], scope: Scope) -> None:
    """Scratch has so many elements."""
    for buffer in made:
        why = check.bounds.inside(
            count, size_of(buffer.shape) + 1, scope.facts, scope.guards, check.text
        )
        if why is not None:
            check.fail(7, f"`{buffer.name}` is too small: {why}")
