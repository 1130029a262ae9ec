"""The text of an expression reads back as the same expression: plans hold sizes as text."""

from __future__ import annotations

import random

from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, mod, sym
from stagefuse.dsl.dims_text import parse

SYMBOLS = [sym("k"), sym("n"), sym("m")]


def expression(chance: random.Random, depth: int) -> Expr:
    if depth == 0:
        return chance.choice([*SYMBOLS, const(chance.randrange(-3, 4))])
    a, b = expression(chance, depth - 1), expression(chance, depth - 1)
    makes = [
        lambda: a + b, lambda: a - b, lambda: a * b, lambda: floordiv(a, b), lambda: mod(a, b),
        lambda: minimum(a, b), lambda: maximum(a, b), lambda: -a,
    ]  # fmt: skip
    return chance.choice(makes)()


def test_a_negated_remainder_is_not_the_remainder_of_a_negation() -> None:
    k, n = SYMBOLS[:2]
    assert str(-mod(k, 3)) == "-(k % 3)" and str(mod(-k, 3)) == "(-k) % 3"
    assert str(1 - floordiv(k, n)) == "-(k // n) + 1"
    for expr in (-mod(k, 3), mod(-k, 3), 1 - floordiv(k, n), -mod(k, 3) * n, -mod(k, 3) * 2):
        assert parse(str(expr)) == expr


def test_random_expressions_read_back(chance: random.Random) -> None:
    for _ in range(1500):
        expr = expression(chance, chance.randrange(1, 5))
        read = parse(str(expr))
        for _ in range(3):
            at = {name: chance.randrange(10) for name in "knm"}
            assert read.evaluate(at) == expr.evaluate(at), (str(expr), str(read), at)


def test_a_quotient_of_a_multiple_is_written_without_the_remainder() -> None:
    k, n = SYMBOLS[:2]
    for p in (k, k - 1, 2 * k + n, floordiv(k, 2), maximum(k, n)):
        for by in (2, 3, 8):
            below = p - mod(p, by)
            assert floordiv(below, by) == floordiv(p, by)
            assert floordiv(below + by - 1, by) == floordiv(p, by)
            assert floordiv(below + 5 * n * by - 1, by) == floordiv(p, by) + 5 * n - 1


def test_quotients_of_what_has_remainders_keep_their_value(chance: random.Random) -> None:
    for _ in range(300):
        p, by = expression(chance, 2), chance.randrange(2, 6)
        whole = p + chance.choice([-1, -1, -1, 1, -2]) * mod(p, by) + chance.randrange(-9, 9)
        found = floordiv(whole + chance.choice([0, by]) * SYMBOLS[1], by)
        at = {name: chance.randrange(10) for name in "knm"}
        given = (whole.evaluate(at) // by, whole.evaluate(at) // by + at["n"])
        assert found.evaluate(at) in given, (str(whole), by, str(found), at)
