"""Intervals of min, max, quotients and remainders against all numbers in small ones."""

from __future__ import annotations

import operator
from collections.abc import Callable
from itertools import product

import pytest

from stagefuse.dsl.intervals import BY_KIND, Interval

ENDS = range(-4, 5)


def by_zero(function: Callable[[int, int], int]) -> Callable[[int, int], int]:
    return lambda x, y: function(x, y) if y else 0


MEANINGS: dict[str, Callable[[int, int], int]] = {
    "min": min, "max": max, "%": by_zero(operator.mod), "//": by_zero(operator.floordiv),
}  # fmt: skip


def is_within(value: int, interval: Interval) -> bool:
    low, high = interval
    return (low is None or low <= value) and (high is None or value <= high)


@pytest.mark.parametrize("kind", MEANINGS)
def test_intervals_hold_all_values(kind: str) -> None:
    meaning, interval_of = MEANINGS[kind], BY_KIND[kind]
    for a, b, c, d in product(ENDS, repeat=4):
        if a > b or c > d:
            continue
        whole = interval_of((a, b), (c, d))
        opened = interval_of((a, None), (c, None)), interval_of((None, b), (c, d))
        for x, y in product((a, b, (a + b) // 2), (c, d, (c + d) // 2)):
            value = meaning(x, y)
            assert is_within(value, whole), (a, b, c, d, x, y)
            assert all(is_within(value, found) for found in opened), (a, b, c, d, x, y)


def test_intervals_are_narrow() -> None:
    for (x, y), kind, expected in [
        (((3, 9), (2, 4)), "//", (0, 4)),
        (((8, 9), (2, 4)), "//", (2, 4)),
        (((-9, -3), (2, 4)), "//", (-5, -1)),
        (((0, None), (3, 3)), "%", (0, 2)),
        (((1, 2), (5, 9)), "%", (0, 2)),
        (((1, None), (4, 7)), "min", (1, 7)),
        (((1, None), (4, 7)), "max", (4, None)),
    ]:
        assert BY_KIND[kind](x, y) == expected
