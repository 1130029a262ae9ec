"""Records without the price of a dataclass, and with its behaviour."""

from __future__ import annotations

import pytest

from stagefuse.dsl.frozen import Frozen


class Point(Frozen):
    x: int
    y: int = 2


class Named(Point):
    name: str = ""


def test_fields_by_position_and_by_name() -> None:
    assert Point(1) == Point(x=1, y=2) == Point(1, y=2)
    assert Named(1, 2, "a").name == "a" and Named(1, name="b").y == 2
    match Named(3, 4, "c"):
        case Named(x=x, name="c"):
            assert x == 3
        case _:
            raise AssertionError
    match Point(5, 6):
        case Point(a, b):
            assert (a, b) == (5, 6)


def test_equal_records_are_one_key() -> None:
    assert len({Point(1), Point(1, 2), Point(2)}) == 2
    assert Point(1) != Named(1) and Point(1) != (1, 2)
    assert repr(Point(1)) == "Point(x=1, y=2)"


def test_wrong_fields_are_refused() -> None:
    for values, named in ([(), {}], [(1, 2, 3), {}], [(1,), {"x": 1}], [(1,), {"z": 1}]):
        with pytest.raises(TypeError, match="Point"):
            Point(*values, **named)


def test_nothing_changes() -> None:
    point = Point(1)
    with pytest.raises(AttributeError):
        point.x = 2  # type: ignore[misc]
    with pytest.raises(AttributeError):
        del point.x
