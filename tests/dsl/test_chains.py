"""What is known of two sizes by way of others between them."""

from __future__ import annotations

import random
from itertools import pairwise, product

from stagefuse.dsl.dims import IntLike, as_expr, maximum, minimum, sym
from stagefuse.dsl.facts import Facts


def test_what_chains_of_ranges_say_holds(chance: random.Random) -> None:
    """Of four sizes in random ranges of each other; compared with all that are small."""
    names, proved = "abcd", 0
    for _ in range(60):
        ranges: dict[str, tuple[IntLike, IntLike | None]] = {"a": (0, 5)}
        for name, other in pairwise(names):
            low = sym(other) + chance.randint(-2, 2) if chance.random() < 0.6 else 0
            high = minimum(5, sym(other) + chance.randint(-1, 3))
            ranges[name] = (maximum(0, low), high)
        facts = Facts(ranges)
        points = [dict(zip(names, at, strict=True)) for at in product(range(6), repeat=4)]
        ends = {n: [as_expr(e) for e in ends if e is not None] for n, ends in ranges.items()}
        points = [
            p for p in points
            if all(e[0].evaluate(p) <= p[n] <= e[1].evaluate(p) for n, e in ends.items())
        ]  # fmt: skip
        one, other = chance.sample(names, 2)
        goal = sym(one) - sym(other) + chance.randint(-2, 4)
        if facts.is_chained(goal):
            proved += 1
            assert all(goal.evaluate(p) >= 0 for p in points), (str(goal), ranges)
    assert proved > 3
