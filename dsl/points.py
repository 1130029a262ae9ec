"""Sizes that facts allow, to tell what is not so for all of them without looking for a proof."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from .dims import Expr, IntLike, as_expr, is_size

FAR = 997
"""How far above its least value a size without a greatest one is taken."""
class Point(dict[str, int]):
    """A value of each symbol within its range, chosen when it is asked for.

    `number` says where in its range. Raises KeyError for a symbol whose range is empty here.
    """

    def __init__(
        self, ranges: Mapping[str, tuple[IntLike, IntLike | None]], number: int
    ) -> None:
        super().__init__()
        self.ranges, self.number = ranges, number

    def __missing__(self, name: str) -> int:
        pending = [name]
        while pending:  # without recursion, since chains of ranges may be long
            needed = next((other for other in self._first(pending[-1]) if other not in self), None)
            if needed is None:
                name = pending.pop()
                self[name] = self._chosen(name)
            elif len(pending) > len(self.ranges):
                raise KeyError(name)
            else:
                pending.append(needed)
        return self[name]

    def _first(self, name: str) -> Iterator[str]:
        """The symbols in the ends of a range."""
        for end in self._ends(name):
            if isinstance(end, Expr):
                yield from sorted(end.symbols())

    def _ends(self, name: str) -> tuple[IntLike, IntLike | None]:
        return self.ranges.get(name, (0, None))

    def _chosen(self, name: str) -> int:
        ends = self._ends(name)
        low = as_expr(ends[0]).evaluate(self)
        high = low + FAR if ends[1] is None else as_expr(ends[1]).evaluate(self)
        if high < low:
            raise KeyError(name)
        turn = sum(name.encode()) % 2
        mixed = (low, high)[turn], (high, low)[turn]
        few = min(low + 1, high)  # of sizes, beside the first and the last positions
        apart = (few, high, few) if is_size(name) else (low, low, high)
        choices = (low, high, *mixed, *apart, (low + high) // 2)
        return choices[self.number]


class Start(Point):
    """The middle of the ranges of some sizes, and the least value of every other symbol, whether
    or not its range is empty there. Raises KeyError for a size whose range is."""

    def __init__(
        self, ranges: Mapping[str, tuple[IntLike, IntLike | None]], sizes: frozenset[str]
    ) -> None:
        super().__init__(ranges, POINTS - 1)
        self.sizes = sizes

    def _ends(self, name: str) -> tuple[IntLike, IntLike | None]:
        low, high = super()._ends(name)
        return (low, high) if name in self.sizes else (low, low)


POINTS = 8


def points(ranges: Mapping[str, tuple[IntLike, IntLike | None]]) -> list[Point]:
    """All least values, all greatest, two that mix them, first and last positions among few, first
    ones among the greatest sizes, and all in the middle."""
    return [Point(ranges, number) for number in range(POINTS)]


def is_negative_at(expr: Expr, point: Point) -> bool:
    """Whether an expression is less than 0 there, if there are such sizes."""
    try:
        return expr.evaluate(point) < 0
    except KeyError:
        return False
