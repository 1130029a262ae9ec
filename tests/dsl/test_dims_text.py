"""The text of an expression reads back as the same expression: plans hold sizes as text."""

from __future__ import annotations

import numpy as np

from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, mod, sym
from stagefuse.dsl.dims_text import parse

SYMBOLS = [sym("k"), sym("n"), sym("m")]


def expression(rng: np.random.Generator, depth: int) -> Expr:
    if depth == 0:
        return [*SYMBOLS, const(int(rng.integers(-3, 4)))][rng.integers(4)]
    a, b = expression(rng, depth - 1), expression(rng, depth - 1)
    makes = [
        lambda: a + b, lambda: a - b, lambda: a * b, lambda: floordiv(a, b), lambda: mod(a, b),
        lambda: minimum(a, b), lambda: maximum(a, b), lambda: -a,
    ]  # fmt: skip
    return makes[rng.integers(len(makes))]()


def test_a_negated_remainder_is_not_the_remainder_of_a_negation() -> None:
    k, n = SYMBOLS[:2]
    assert str(-mod(k, 3)) == "-(k % 3)" and str(mod(-k, 3)) == "(-k) % 3"
    assert str(1 - floordiv(k, n)) == "-(k // n) + 1"
    for expr in (-mod(k, 3), mod(-k, 3), 1 - floordiv(k, n), -mod(k, 3) * n, -mod(k, 3) * 2):
        assert parse(str(expr)) == expr


def test_random_expressions_read_back(rng: np.random.Generator) -> None:
    for _ in range(1500):
        expr = expression(rng, int(rng.integers(1, 5)))
        read = parse(str(expr))
        for _ in range(3):
            at = {name: int(rng.integers(0, 10)) for name in "knm"}
            assert read.evaluate(at) == expr.evaluate(at), (str(expr), str(read), at)
