"""Records without the price of a dataclass, and with its behaviour."""

from __future__ import annotations

from copy import copy
from dataclasses import asdict, field, fields, replace
from typing import ClassVar

import pytest

from stagefuse.dsl.frozen import frozen


@frozen
class Point:
    x: int
    y: int = 2


@frozen
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


@frozen
class Kept:
    """A record with all that fields can be."""

    kind: ClassVar[str] = "kept"
    a: int
    b: list[int] = field(default_factory=list)
    c: str = field(default="", compare=False, repr=False)


class Looser:
    def __eq__(self, other: object) -> bool:
        return isinstance(other, Looser)

    def __hash__(self) -> int:
        return 7


@frozen
class Own(Looser):
    """A record with a hash of its own."""

    a: int

    def __hash__(self) -> int:
        return 11


@frozen
class Empty:
    pass


def test_what_dataclasses_does_with_records() -> None:
    kept = Kept(1, c="x")
    assert [f.name for f in fields(Kept)] == ["a", "b", "c"]
    assert asdict(kept) == {"a": 1, "b": [], "c": "x"}
    assert kept.b is not Kept(1).b and kept == Kept(1) and repr(kept) == "Kept(a=1, b=[])"
    assert replace(kept, a=2) == Kept(2) and replace(kept, a=2).c == "x"
    assert copy(kept) == kept and copy(kept).c == "x"
    with pytest.raises(TypeError, match="unexpected keyword argument 'd'"):
        replace(kept, d=2)  # type: ignore[call-arg]


def test_methods_of_the_class_stay_and_those_of_bases_do_not() -> None:
    assert hash(Own(1)) == 11 and Own(1) != Own(2) and Own(1) == Own(1)
    assert Empty() == Empty() and len({Empty(), Empty()}) == 1
    nan = float("nan")
    assert Point(nan) == Point(nan)  # as in tuples, what is the same is equal
