"""Sizes that facts allow, to tell what is not so for all of them without looking for a proof."""

from __future__ import annotations

from collections.abc import Mapping

from .dims import Expr, IntLike, as_expr

FAR = 997
"""How far above its least value a size without a greatest one is taken."""
DEPTH = 12
"""Ranges that a value is looked for through, as `Facts` has it."""


class Point(dict[str, int]):
    """A value of each symbol within its range, chosen when it is asked for.

    `number` says where in its range. Raises KeyError for a symbol whose range is empty here.
    """

    def __init__(
        self, ranges: Mapping[str, tuple[IntLike, IntLike | None]], number: int
    ) -> None:
        super().__init__()
        self.ranges, self.number, self.depth = ranges, number, 0

    def __missing__(self, name: str) -> int:
        if self.depth > DEPTH:
            raise KeyError(name)
        self.depth += 1
        try:
            ends = self.ranges.get(name, (0, None))
            low = as_expr(ends[0]).evaluate(self)
            high = low + FAR if ends[1] is None else as_expr(ends[1]).evaluate(self)
        finally:
            self.depth -= 1
        if high < low:
            raise KeyError(name)
        turn = sum(name.encode()) % 2
        choices = (low, high, (low, high)[turn], (high, low)[turn], (low + high) // 2)
        self[name] = choices[self.number]
        return self[name]


class Start(Point):
    """The middle of the ranges of some sizes, and the least value of every other symbol, whether
    or not its range is empty there. Raises KeyError for a size whose range is."""

    def __init__(
        self, ranges: Mapping[str, tuple[IntLike, IntLike | None]], sizes: frozenset[str]
    ) -> None:
        super().__init__(ranges, POINTS - 1)
        self.sizes = sizes

    def __missing__(self, name: str) -> int:
        if name in self.sizes:
            return super().__missing__(name)
        self[name] = as_expr(self.ranges.get(name, (0, None))[0]).evaluate(self)
        return self[name]


POINTS = 5


def points(ranges: Mapping[str, tuple[IntLike, IntLike | None]]) -> list[Point]:
    """All least values, all greatest, two that mix them, and all in the middle."""
    return [Point(ranges, number) for number in range(POINTS)]


def is_negative_at(expr: Expr, point: Point) -> bool:
    """Whether an expression is less than 0 there, if there are such sizes."""
    try:
        return expr.evaluate(point) < 0
    except KeyError:
        return False
