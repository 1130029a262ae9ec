"""Conditions of `where` that no sizes meet, and those that some do."""

from __future__ import annotations

import pytest

from stagefuse.dsl.diagnostics import render_all

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


def test_the_same_holds_where_another_size_is_a_bound_too() -> None:
    text = """\
pipeline p(x: f32[K, N, T]) -> (f32[K - 16, T], f32[T, N - 1])
where K in 1..=602, K % 16 == 0, N <= K, N >= 1, T in 1..=60, T % 4 == 0, T <= N:
    x[16:, 0], transpose(x[0, 1:], [1, 0])
"""
    assert errors(text) == []


@pytest.mark.parametrize(
    ("where", "ends"),
    [
        ("D % 2 == 0", "[::2], [1::2]"),
        ("D % 6 == 0", "[::3], [1::3], [2::3]"),
        ("D % 4 == 2", "[::2], [1::2]"),
    ],
)
def test_parts_of_a_multiple_have_one_size(where: str, ends: str) -> None:
    """What is left of a size by a number is known: every second of an even number are half."""
    parts = [f"x{end.strip()}" for end in ends.split(",")]
    text = f"""\
pipeline p(x: f32[D]) -> f32[{len(parts)}, D // {len(parts)}]
where {where}:
    stack([{", ".join(parts)}])
"""
    assert errors(text) == []


def test_a_size_of_which_a_remainder_is_stated_is_cut_without_a_rest() -> None:
    text = """\
pipeline p(x: f32[D], y: f32[D // 8 * 8]) -> (f32[D - 3], f32[(D + 5) // 8])
where D % 8 == 3:
    x[3:] + y, x[::8]
"""
    assert errors(text) == []


@pytest.mark.parametrize(
    ("result", "lines"),
    [
        ("f32[(N + 15) // 16, 16]", "reshape(pad(x, [(0, -N % 16)]), [-1, 16])"),
        ("f32[N]", "reshape(reshape(pad(x, [(0, -N % 16)]), [-1, 16]), [-1])[:N]"),
        ("f32[(N + 1) // 2]", "y = pad(x, [(0, N % 2)])\n    y[::2] + y[1::2]"),
    ],
)
def test_an_axis_is_filled_to_a_multiple(result: str, lines: str) -> None:
    assert errors(f"pipeline p(x: f32[N]) -> {result}:\n    {lines}\n") == []


def test_halves_of_halves_of_a_multiple_have_one_size() -> None:
    text = """\
pipeline p(x: f32[N]) -> f32[N // 4]
where N % 4 == 0:
    y = x[::2] + x[1::2]
    y[::2] + y[1::2] + x[2::4]
"""
    assert errors(text) == []


def test_a_note_on_a_size_says_what_divides_it() -> None:
    text = """\
pipeline p(x: f32[D], y: f32[E]) -> f32[D]
where D % 2 == 0, D in 2..=256:
    x + y
"""
    assert "D is in 2..=256, a multiple of 2" in render_all(errors(text))


@pytest.mark.parametrize(
    "conditions",
    [
        [f"N{i + 1} == N{i} + 1" for i in range(60)],
        [f"N{i + 2} == N{i} + N{i + 1}" for i in range(58)],
        [f"N{i + 2} >= N{i} + N{i + 1}" for i in range(12)],
    ],
)
def test_sizes_in_chains_are_what_they_are(conditions: list[str]) -> None:
    """However many equalities a size leads through, it equals itself."""
    inputs = ", ".join(f"x{i}: f32[N{i}]" for i in range(61))
    text = f"pipeline p({inputs}) -> f32[N0] where {', '.join(conditions)}:\n    x0\n"
    assert errors(text) == []


@pytest.mark.parametrize("count", [9, 60])
def test_the_ends_of_a_chain_of_sizes_are_compared(count: int) -> None:
    inputs = ", ".join(f"x{i}: f32[N{i}]" for i in range(count))
    where = ", ".join(f"N{i + 1} >= N{i}" for i in range(count - 1))
    text = f"pipeline p({inputs}) -> f32[N0] where {where}:\n    x0 + x{count - 1}[:N0]\n"
    assert errors(text) == []
    found = only(text.replace(f"N{count - 2} >= ", f"N{count - 2} + 1 >= "))
    assert found.code == "E0203"
