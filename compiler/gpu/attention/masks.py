"""What a mask that is a comparison of positions says of a block of rows and keys."""

from __future__ import annotations

from dataclasses import replace

from stagefuse.compiler.kernel_ir import Const, Index, Op, Value
from stagefuse.dsl.dims import Expr, const, maximum, minimum, sym
from stagefuse.dsl.dtypes import BOOL
from stagefuse.dsl.frozen import frozen


@frozen
class Kept:
    """Where a mask holds: at least where all expressions are not negative if it is `exact`, and
    nowhere else. Those that step by one with the key, over rows `row` and keys `key`."""

    conditions: tuple[Expr, ...]
    exact: bool
    row: str
    key: str

    def ends(self, rows: int, keys: Expr) -> tuple[Expr, Expr]:
        """The keys that a block of rows may keep, first and behind the last."""
        lo, hi = const(0), keys
        for condition in self.conditions:
            best = self._at(condition, rows, greatest=True)
            step = condition.coefficient(self.key)
            if best is None or step is None:
                continue
            rest = best - sym(self.key) * step
            if step == const(-1):
                hi = minimum(hi, rest + 1)
            elif step == const(1):
                lo = maximum(lo, -rest)
        return lo, hi

    def inside(self, rows: int, first: Expr, count: int) -> list[Expr] | None:
        """Expressions that are not negative only where so many keys from the first one on are kept
        for all rows; None if there are none."""
        found: list[Expr] = []
        for condition in self.conditions:
            least = self._at(condition, rows, greatest=False)
            step = condition.coefficient(self.key)
            if least is None or step is None or step.as_int() is None:
                return None
            last = count - 1 if (step.as_int() or 0) < 0 else 0
            found.append(least.substitute({self.key: first + last}))
        return found if self.exact else None

    def span(self, row: Expr, first: Expr, behind: Expr) -> tuple[Expr, Expr] | None:
        """The keys that a row keeps of those from `first` up to `behind`: the first of them and the
        one behind the last, as distances from `first`; None where they are no such range."""
        low, high = const(0), behind - first
        for condition in self.conditions:
            step = condition.coefficient(self.key)
            left = condition.substitute({self.row: row, self.key: first})
            if step == const(-1):
                high = minimum(high, left + 1)
            elif step == const(1):
                low = maximum(low, -left)
            else:
                return None
        return (low, high) if self.exact else None

    def of_rows(self, start: Expr) -> Kept:
        """The same of the rows from one on."""
        here = {self.row: start + sym(self.row)}
        return replace(self, conditions=tuple(c.substitute(here) for c in self.conditions))

    def _at(self, condition: Expr, rows: int, greatest: bool) -> Expr | None:
        """A condition for the row of a block at which it is greatest or least."""
        slope = condition.coefficient(self.row)
        if slope is None or slope.as_int() is None:
            return None
        last = ((slope.as_int() or 0) > 0) == greatest
        return condition.substitute({self.row: const(rows - 1 if last else 0)})


def kept(mask: Value, row: str, key: str) -> Kept:
    """What is known of a mask, a bool value."""
    conditions, exact = _conditions(mask)
    return Kept(tuple(conditions), exact, row, key)


def _conditions(value: Value) -> tuple[list[Expr], bool]:
    """Expressions that are at least 0 wherever a bool value holds, and whether nowhere else."""
    if isinstance(value, Const):
        return [], bool(value.value)
    if not isinstance(value, Op) or len(value.args) != 2:
        return [], False
    a, b = value.args
    if value.fn in ("and", "bitand") and value.dtype == BOOL:
        (first, all_first), (second, all_second) = _conditions(a), _conditions(b)
        return [*first, *second], all_first and all_second
    x, y = _position(a), _position(b)
    if x is None or y is None:
        return [], False
    found = {"ge": [x - y], "gt": [x - y - 1], "le": [y - x], "lt": [y - x - 1]}.get(value.fn)
    return (found, True) if found is not None else ([], False)


def _position(value: Value) -> Expr | None:
    if isinstance(value, Index):
        return value.expr
    if isinstance(value, Const) and not value.dtype.is_float:
        return const(int(value.value))
    if isinstance(value, Op) and value.fn in ("add", "sub") and value.dtype.name == "i64":
        x, y = map(_position, value.args)
        if x is not None and y is not None:
            return x + y if value.fn == "add" else x - y
    return None


def where_kept(value: Value, mask: Value) -> Value:
    """A value where a mask holds: what it selects by the mask is plain there."""
    if isinstance(value, Op):
        if value.fn == "select" and value.args[0] == mask:
            return where_kept(value.args[1], mask)
        return Op(value.fn, tuple(where_kept(a, mask) for a in value.args), value.dtype, value.to)
    return value
