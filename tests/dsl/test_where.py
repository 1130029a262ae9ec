"""Conditions of `where` that no sizes meet, and those that some do."""

from __future__ import annotations

import random

import pytest

from stagefuse.dsl.diagnostics import render_all
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, sym
from stagefuse.dsl.facts import Facts

from .test_check_errors import errors, only

HEAD = "pipeline p(x: f32[T], y: f32[S]) -> f32[T]\n"


@pytest.mark.parametrize(
    ("where", "words", "label"),
    [
        ("T in 5..=3, T % 2 == 0", "`T` has an empty range", ""),
        ("T == 4, T == 5", "no size is left for `T`", "T is at least 5 and at most 4"),
        ("T >= 1, T == 4, T == 5", "no size is left for `T`", "T is at least 5 and at most 4"),
        ("T + 1 == 0", "no size is left for `T`", "T is at least 0 and at most -1"),
        ("T < S, S < T", "no size is left for `S`", "S is at least T + 1 and at most T - 1"),
        ("T % 8 == 8", "no size is left for `T`", "`T % 8 == 8` never holds"),
        ("T in 4..=4, T != 4", "no size is left for `T`", "T is in 4..=4, where `T != 4` never"),
        ("T in 1..=4, S in 5..=8, T == S", "no size is left for `T`", "`T == S` never holds"),
        ("T in 1..=7, T % 8 == 0", "no size is left for `T`", "no number in 1..=7 meets this"),
        ("T % 8 == 3, T % 4 == 1", "no size is left for `T`", "no number meets all of these"),
        ("T in 0..=10, T * T == 50", "no size is left for `T`", "no number in 0..=10 meets this"),
    ],
)
def test_conditions_that_contradict_each_other(where: str, words: str, label: str) -> None:
    found = only(f"{HEAD}where {where}:\n    x\n")
    assert found.code == "E0217" and words in found.message
    assert label in found.primary.text


@pytest.mark.parametrize(
    "where",
    [
        "T >= 1, T == 4",
        "T % 8 == 3, T % 4 == 3, T >= 100",
        "T in 1..=8, T % 8 == 0",
        "T in 1..=10, T // 2 == 5",
        "T in 1..=2*S, T % 2 == 0, S in 1..=100000, S % 99999 == 5",
        "T in 0..=9, T * T == 49, T != 6",
        "T in 0..=1000000, T * T == 810000000000",
    ],
)
def test_conditions_that_some_sizes_meet(where: str) -> None:
    found = errors(f"{HEAD}where {where}:\n    x\n")
    assert not found, render_all(found)


def test_ranges_of_multiples_end_at_multiples() -> None:
    """A size in 1..=602 that is a multiple of 4 is in 4..=600."""
    text = """\
pipeline p(x: f32[K]) -> (f32[K - 4], f32[4])
where K in 1..=602, K % 4 == 0:
    x[4:], x[:4]
"""
    assert errors(text) == []


@pytest.mark.parametrize("stride", [1, 2, 3, 5])
@pytest.mark.parametrize("size", [1, 2, 3, 4, 7])
def test_the_halves_of_a_padding_are_each_at_least_0(size: int, stride: int) -> None:
    """Zeros around for ceil(T / stride) windows, of any T."""
    text = f"""\
pipeline p(x: f32[T], w: f32[{size}]) -> f32[(T + {stride - 1}) // {stride}]
where T >= 1:
    more = max((T + {stride - 1}) // {stride} * {stride} - {stride} + {size} - T, 0)
    padded = pad(x, [(more // 2, more - more // 2)])
    y[i] = sum[j] padded[i * {stride} + j] * w[j]
"""
    assert errors(text) == []


@pytest.mark.parametrize("turn", range(40))
def test_what_is_proved_of_quotients_holds_everywhere(turn: int, chance: random.Random) -> None:
    n, m = sym("N"), sym("M")
    facts = Facts({"N": (chance.randint(-3, 3), None), "M": (0, 9)})
    total: Expr = const(chance.randint(-2, 4))
    for _ in range(chance.randint(1, 4)):
        inner = n * chance.randint(-3, 3) + m * chance.randint(-3, 3) + chance.randint(-4, 4)
        part = chance.choice([floordiv(inner, chance.randint(1, 5)), inner, maximum(inner, 0)])
        total = total + part * chance.randint(-3, 3)
    total = total + floordiv(total, chance.randint(2, 4)) * chance.choice([-2, -1, 1])
    least = facts.ranges["N"][0]
    assert isinstance(least, int)
    found = [total.evaluate({"N": a, "M": b}) for a in range(least, least + 40) for b in range(10)]
    assert min(found) >= 0 or not facts.is_nonneg(total)


def test_a_multiple_of_a_quotient_is_as_good_as_the_quotient() -> None:
    """Of 2 * (a // 7), where it is at most 22, a is at most 83, and not 77 or 80."""
    p = sym("p")
    ends = floordiv(minimum(48, 75 - 48 * p) + 48 * p + 6, 7)
    facts = Facts({"p": (0, 1)})
    for times in (1, 2, 3, 10):
        assert facts.is_nonneg(times * 11 - times * ends)
        assert facts.is_nonneg(times * 11 - times * ends + times - 1)
        assert not facts.is_nonneg(times * 11 - times * ends - 1)
