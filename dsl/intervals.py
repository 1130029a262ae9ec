"""Intervals of whole numbers; an end that is None is open."""

from __future__ import annotations

from collections.abc import Callable

from .dims import Expr, IntLike

Interval = tuple[int | None, int | None]


def is_open(end: IntLike | None) -> bool:
    """Whether an end of a range follows from other symbols."""
    return isinstance(end, Expr) and end.as_int() is None


def within_both(x: Interval, y: Interval) -> Interval:
    """What is within both of two intervals."""
    low = x[0] if y[0] is None or (x[0] is not None and x[0] >= y[0]) else y[0]
    high = x[1] if y[1] is None or (x[1] is not None and x[1] <= y[1]) else y[1]
    return low, high


def chosen(choose: Callable[[int, int], int], a: int | None, b: int | None) -> int | None:
    """The lesser or the greater of two ends; open where one of them is."""
    return None if a is None or b is None else choose(a, b)


def least(x: Interval, y: Interval) -> Interval:
    """The interval of `min(x, y)`."""
    known = [end for _, end in (x, y) if end is not None]
    return chosen(min, x[0], y[0]), min(known, default=None)


def greatest(x: Interval, y: Interval) -> Interval:
    """The interval of `max(x, y)`."""
    known = [end for end, _ in (x, y) if end is not None]
    return max(known, default=None), chosen(max, x[1], y[1])


def remainder(x: Interval, y: Interval) -> Interval:
    """The interval of `x % y`, which is 0 for a y of 0; open where y may be negative."""
    (a, b), (c, d) = x, y
    if c is None or c < 0:
        return None, None
    ends = [] if d is None else [max(c - 1, d - 1, 0)]
    if a is not None and a >= 0 and b is not None:
        ends.append(b)
    return 0, min(ends, default=None)


def quotient(x: Interval, y: Interval) -> Interval:
    """The interval of `x // y`, which is 0 for a y of 0; open where y may be negative."""
    (a, b), (c, d) = x, y
    if c is None or c < 0:
        return None, None
    if d is not None:
        d = max(c, d)  # of an empty range all holds
    if a is None:
        low = None
    elif a < 0:
        low = a // max(c, 1)
    else:
        low = 0 if d is None or c == 0 else a // d
    if b is None:
        high = None
    elif c == 0:
        high = max(b, 0)
    elif b >= 0:
        high = b // c
    else:
        high = 0 if d is None else b // d
    return low, high


BY_KIND: dict[str, Callable[[Interval, Interval], Interval]] = {
    "min": least, "max": greatest, "%": remainder, "//": quotient,
}  # fmt: skip
"""What the kinds of atoms with two arguments do to intervals."""


def product(x: Interval, y: Interval) -> Interval:
    """The interval of a product; None stands for minus infinity below and infinity above."""
    (a, b), (c, d) = x, y
    if a is not None and c is not None and b is not None and d is not None:
        if a >= 0 and c >= 0:
            return a * c, b * d
        ends = (a * c, a * d, b * c, b * d)
        return min(ends), max(ends)
    inf = float("inf")
    ends_x = (-inf if x[0] is None else x[0], inf if x[1] is None else x[1])
    ends_y = (-inf if y[0] is None else y[0], inf if y[1] is None else y[1])
    corners = [0 if a == 0 or b == 0 else a * b for a in ends_x for b in ends_y]
    low, high = min(corners), max(corners)
    return (None if low == -inf else int(low), None if high == inf else int(high))
