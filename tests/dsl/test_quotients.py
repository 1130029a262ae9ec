"""Quotients of quotients are one quotient, and equal to it."""

from __future__ import annotations

import random

from stagefuse.dsl.dims import Expr, floordiv, mod, sym
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.quotients import unfolded, unnested

N, M = sym("n"), sym("m")


def nested(chance: random.Random, depth: int) -> Expr:
    if depth == 0:
        return chance.choice([N, M, N * M, N - M])
    inside = nested(chance, depth - 1) * chance.choice([1, 1, 1, 2, -1])
    more = chance.choice([M, nested(chance, depth - 1)]) * chance.randrange(-2, 3)
    return floordiv(inside + more + chance.randrange(-3, 4), chance.randrange(1, 7))


def test_quotients_of_quotients_keep_their_value(chance: random.Random) -> None:
    fewer = 0
    for _ in range(400):
        expr = nested(chance, chance.randrange(1, 4))
        flat = unnested(expr)
        fewer += str(flat).count("//") < str(expr).count("//")
        for _ in range(3):
            at = {"n": chance.randrange(200), "m": chance.randrange(200)}
            assert flat.evaluate(at) == expr.evaluate(at), (str(expr), str(flat), at)
    assert fewer > 50


def test_halves_of_halves_are_quarters() -> None:
    half, facts = floordiv(N + 1, 2), Facts()
    assert facts.prove_eq(floordiv(half + 1, 2), floordiv(N + 3, 4))
    assert facts.is_nonneg(floordiv(N + 3, 4) - floordiv(half + 1, 2))
    assert facts.prove_eq(floordiv(6 * N + 5, 4), floordiv(3 * N + 2, 2))
    assert not facts.prove_eq(floordiv(half, 2), floordiv(N + 3, 4))


def test_quotients_have_ends_where_a_range_is_empty() -> None:
    facts = Facts({"n": (0, 9), "m": (1, 0)})
    assert facts.interval(floordiv(N, M)) == (0, 9)


def test_what_is_left_of_a_position_without_its_remainder_is_not_negative() -> None:
    facts = Facts({"n": (0, None), "m": (1, None)})
    assert facts.is_nonneg(N - mod(N, 2)) and facts.is_nonneg(2 * N - 2 * mod(N, M))
    assert not facts.is_nonneg(N - 2 * mod(N, 2)) and not facts.is_nonneg(N - mod(N + 1, M))


def test_remainders_as_quotients_keep_their_value(chance: random.Random) -> None:
    for _ in range(300):
        inner = nested(chance, chance.randrange(0, 3)) * chance.choice([1, -1, 2])
        expr = N + mod(inner + chance.randrange(-3, 4), chance.randrange(2, 7)) * M
        flat = unfolded(expr)
        assert "%" not in str(flat)
        for _ in range(3):
            at = {"n": chance.randrange(200), "m": chance.randrange(200)}
            assert flat.evaluate(at) == expr.evaluate(at), (str(expr), str(flat), at)


def test_what_is_filled_to_a_multiple_is_one() -> None:
    facts = Facts()
    assert facts.divides(N + mod(-N, 16), 16) and facts.divides(N + mod(N, 2), 2)
    assert facts.prove_eq(N + mod(-N, 16), floordiv(N + 15, 16) * 16)
    assert not facts.divides(N + mod(-N, 16), 32) and not facts.divides(N - mod(-N, 16), 16)


def test_a_half_of_a_multiple_of_four_is_even() -> None:
    facts = Facts({}, ((N, 4),))
    assert facts.divides(floordiv(N, 2), 2) and not facts.divides(floordiv(N, 2), 4)
    assert not facts.divides(floordiv(N, 3), 2)
    assert facts.simplify(floordiv(floordiv(N, 2) + 1, 2)) == floordiv(floordiv(N, 2), 2)
