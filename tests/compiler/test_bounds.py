"""Proofs of bounds: what is true is proved, what is false has a counterexample."""

import random
from fractions import Fraction

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagefuse.compiler.proofs import bounds
from stagefuse.compiler.proofs.bounds import Bounds, _assign
from stagefuse.dsl.dims import Expr, IntLike, as_expr, maximum, minimum, sym
from stagefuse.dsl.dims_text import parse
from stagefuse.dsl.facts import Facts

SIZES = {"B": (1, 256), "T": (0, 512), "H": (0, None)}
LOOPS = {
    "i": ("0", "T - 1"),
    "m": ("0", "(B*T + 143) // 144 - 1"),
    "t": ("0", "(min(144*m + 144, B*T) + 35) // 36 - 4*m - 1"),
    "r": ("0", "min(36, min(144*m + 144, B*T) - 144*m - 36*t) - 1"),
    "j": ("0", "(H*T + 47) // 48 - 1"),
    "k": ("0", "47"),
    "h": ("0", "1"),
    "p": ("max(0, 7*m - 9)", "min(T + 1, 7*m) - 1"),
}
FACTS = Facts({**SIZES, **{n: (parse(a), parse(b)) for n, (a, b) in LOOPS.items()}})


@pytest.mark.parametrize(
    "h, w", [("H", "T"), ("H // 2", "T // 2"), ("(H // 2 + 1) // 2", "T // 8")]
)
def test_quotients_of_sizes_are_as_good_as_sizes(h: str, w: str) -> None:
    """The row of an image from the places that a panel of 48 of them has in common with it."""
    ends = {
        "p": ("0", "(@h*@w*B + 47) // 48 - 1"),
        "s": ("(48*p) // @w", "(@w + min(48, @h*@w*B - 48*p) + 48*p - 1) // @w - 1"),
        "c": ("max(0, 48*p - @w*s)", "min(@w, min(48, @h*@w*B - 48*p) + 48*p - @w*s) - 1"),
    }  # fmt: skip

    def read(text: str) -> Expr:
        return parse(text.replace("@h", f"({h})").replace("@w", f"({w})"))

    facts = Facts({**SIZES, **{n: (read(a), read(b)) for n, (a, b) in ends.items()}})
    guards = [read("@w - 1"), read("@h - 1"), read("B - 1")]
    bounds = Bounds()
    assert bounds.inside(read("((@w*s + c) // @w) // @h"), sym("B"), facts, guards, str) is None
    assert bounds.inside(read("((@w*s + c) // @w) % @h"), read("@h"), facts, guards, str) is None
    assert bounds.inside(read("(@w*s + c) % @w"), read("@w"), facts, guards, str) is None
    assert not bounds.open


def test_quotients_and_remainders_of_positions_are_bounded() -> None:
    """A place in images of 7 x 7 in 16 channels, by the number of a row of panels of 48 places."""
    ends = {
        "p": ("0", "(64*B + 47) // 48 - 1"),
        "s": ("6*p", "(min(48, 64*B - 48*p) + 7) // 8 + 6*p - 1"),
        "c": ("max(0, 48*p - 8*s)", "min(7, min(8, min(48, 64*B - 48*p) + 48*p - 8*s)) - 1"),
        "k": ("0", "31"),
    }
    facts = Facts({"B": (1, None), **{n: (parse(a), parse(b)) for n, (a, b) in ends.items()}})
    guards = [parse("k % 2 + s % 8 - 1"), parse("-(k % 2) - s % 8 + 7")]
    guards.append(parse(ends["c"][1]) - parse(ends["c"][0]))
    bounds, place = Bounds(), parse("49*(k // 2) + 7*(k % 2 + s % 8 - 1) + c")
    assert bounds.inside(place, as_expr(784), facts, guards, str) is None
    assert not bounds.open


@pytest.mark.parametrize(
    ("goal", "guards"),
    [
        ("i", []),
        ("T - 1 - i", []),
        ("i - 3", ["i - 3"]),
        ("T - i - 2", ["T - i - 2"]),
        ("H*T - 48*j - k - 1", ["H*T - 48*j - k - 1"]),
        ("H - (48*j + k) // T - 1", ["H*T - 48*j - k - 1"]),
        ("T - (48*j + k) % T - 1", ["H*T - 48*j - k - 1"]),
        ("H - 2*((48*j + k) // ((T + 1) // 2)) - 1",
         ["((H + 1) // 2)*((T + 1) // 2) - 48*j - k - 1"]),
        ("H - 3*((48*j + k) // (T // 3)) - 3", ["(H // 3)*(T // 3) - 48*j - k - 1"]),
        ("H - 2*((48*j + k) // ((T + 1) // 2 - 1)) - 3",
         ["((H + 1) // 2 - 1)*((T + 1) // 2 - 1) - 48*j - k - 1", "T - 3"]),
        ("B*T - 144*m - 36*t - r - 1", ["B*T - 1"]),
        ("B - (144*m + 36*t + r) // T - 1", ["B*T - 1"]),
        ("T - (144*m + 36*t + r) % T - 1", ["B*T - 1"]),
        ("384*B*T - 55296*m - 13824*t - 384*r - 384", []),
        ("H*T - 1", ["H - 1", "T - 1"]),
        ("H - 1", ["3*H*T - 1"]),
        ("H - 1", ["H*H - 1"]),
        ("H - (48*k + j) // H - 1", ["H*H - 48*k - j - 1"]),
        ("H*H - H + 5", ["H - 1"]),
        ("H*min(r + 1, H) + min(512, H) - H - 1", ["H - 1", "min(r + 1, H) - 1"]),
        (
            "6*T*H - 36*t*H - min(36, B - 36*t)*H - min(40, H) - 5*T*H + H",
            ["T - B", "min(36, B - 36*t) - 1", "H - 1"],
        ),
        ("T - 6", ["(T // 3)*H - 1", "T // 3 - 2"]),
        ("384*(T // 48) - 192*(T // 48)*h - 192*h - p % 48 - 192*(p // 48) + 383", []),
        ("12 - 2*((min(64, 112 - 64*h) + 64*h + 18) // 19)", []),
    ],
)
def test_true_bounds_are_proved(goal: str, guards: list[str]) -> None:
    bounds = Bounds()
    assert bounds.broken(parse(goal), FACTS, [parse(g) for g in guards], str) is None
    assert not bounds.open


JOINED = Facts(
    {
        **dict.fromkeys(("M", "K", "N"), (0, 600)),
        "i": (0, parse("K*M + 2")),
        "q": (0, parse("K*M - 1")),
        "p": (0, parse("K*M*N - 1")),
        "s": (0, parse("min(K*M, 9*N) - 1")),
        "j": (0, parse("K - 1")),
        "l": (0, parse("(M + 7) // 8 - 1")),
        "b": (0, parse("(M + 479) // 480 - 1")),
        "g": (0, parse("(min(480, M - 480*b) + 47) // 48 - 1")),
    }
)
"""Positions on axes that are products of sizes which may be 0."""


@pytest.mark.parametrize(
    ("goal", "guards"),
    [
        ("K - (i - 2) // M - 1", ["i - 2", "K*M - i + 1"]),
        ("M - (i - 2) % M - 1", ["i - 2", "K*M - i + 1"]),
        ("2*K - (i - 2) // M - 1", ["i - 2", "2*K*M - i + 1"]),
        ("K - (i - 2) // (2*M) - 1", ["i - 2", "2*K*M - i + 1"]),
        ("K + 2 - i // M", ["K*M + 3*M - i - 1"]),
        ("K - (2*i - 2) // M - 1", ["i - 2", "K*M - 2*i + 1"]),
        ("K - q // M - 1", []),
        ("M - q % M - 1", []),
        ("K - p // (M*N) - 1", []),
        ("K*N - p // M - 1", []),
        ("M - p // N % M - 1", []),
        ("K - p // N // M - 1", []),
        ("K - s // M - 1", []),
        ("N - s // 9 - 1", []),
        ("M - 1", ["q - 3"]),
        ("M - 1", ["i - 2", "K*M - 2*i + 1"]),
        ("K - 1", ["i - j - 2", "K*M - i + j + 1"]),
        ("N - 1", ["(i - 2)*N - 1", "K*M - i + 1"]),
        ("M - 2", ["i - 2", "M // 2 - i + 1"]),
        ("(M + N) - (i - 2) % (M + N) - 1", ["i - 2", "K*M + K*N - i + 1"]),
        ("M - 8*l - 1", []),
        ("N - 1", ["N - min(1, N - min(1, N)) - min(1, N) - i - 1"]),
        ("K - q // 3 - 1", ["2 - q // K"]),
        ("K - (q + 2*K) // 3 - 1", ["2 - (q + 2*K) // K"]),
        ("q // 2 - K", ["q // K - 2"]),
        ("M*j + 8*M*min(32, M) + min(48, min(480, M - 480*b) - 48*g) + 480*b + 48*g - 8*M - 1", []),
        ("K - (K*u + v - K) // (M + 1) - 1", ["u - 1", "M + 1 - u", "K - v - 1"]),
        ("M - (i // 4 - 1) // K - 1", ["i // 4 - 1", "K*M - i // 4"]),
        ("M - (M*h + v) // 2 - 1", ["M - v - 1", "1 - h"]),
        ("(j % (2*M + 5) - 1) // M", ["j % (2*M + 5) - 1"]),
        ("1 - (j % (2*M + 5) - 1) // M", ["j % (2*M + 5) - 1", "2*M - j % (2*M + 5)"]),
        ("0 - 1", ["i - 2", "1 - i"]),
        ("0 - 1", ["0 - 1"]),
    ],
)
def test_a_position_shows_that_no_factor_of_its_axis_is_zero(goal: str, guards: list[str]) -> None:
    bounds = Bounds()
    assert bounds.broken(parse(goal), JOINED, [parse(g) for g in guards], str) is None
    assert not bounds.open


@pytest.mark.parametrize("times", ["3", "(K + 3)", "(M + 1)*K"])
def test_a_position_shows_that_its_axis_is_not_no_rows(times: str) -> None:
    """`K - 16` may be 0, but not where one of so many times `K - 16` places is."""
    ranges = {"K": (16, None), "M": (0, None), "i": (parse("0"), parse(f"(K - 16)*{times} - 1"))}
    goal, bounds = parse("(K - 16) - i % (K - 16) - 1"), Bounds()
    assert bounds.broken(goal, Facts(ranges), [], str) is None
    assert not bounds.open
    ranges["i"] = (parse("0"), parse(f"(K - 16)*{times}"))
    bounds = Bounds()
    assert bounds.broken(goal, Facts(ranges), [], str) or bounds.open


def test_nor_where_a_chunk_of_such_an_axis_is_gone_through() -> None:
    last = minimum(parse("(K - 1)*(K - 1)"), parse("2048*c + 2048")) - 1
    chunks = parse("(K*K - 2*K) // 2048")
    facts = Facts({"K": (1, 600), "c": (0, chunks), "i": (parse("2048*c"), last)})
    for goal in ("K - i // (K - 1) - 2", "K - i % (K - 1) - 2"):
        bounds = Bounds()
        assert bounds.broken(parse(goal), facts, [], str) is None
        assert not bounds.open


def test_whole_tiles_of_rows_of_two_sizes_are_within_them() -> None:
    ranges: dict[str, tuple[IntLike, IntLike]] = {
        "M": (2, 600),
        "N": (0, 600),
        "b": (0, parse("(1024*N + 191) // 192 - 1")),
        "c": (0, parse("((M + 15) // 16 + 3) // 4 - 1")),
        "p": (parse("4*c"), parse("min(4*c + 4, (M + 15) // 16) - 1")),
        "t": (0, parse("(min(192*b + 192, 1024*N) + 95) // 96 - 2*b - 1")),
    }
    whole = [parse("M - 16*p - 16"), parse("1024*N - 192*b - 96*t - 96")]
    goal, bounds = parse("1024*M*N - 192*M*b - 96*M*t - 95*M - 16*p - 16"), Bounds()
    assert bounds.broken(goal, Facts(ranges), whole, str) is None
    assert not bounds.open


def test_a_part_of_a_concatenation_in_a_chunk_shows_that_it_has_elements() -> None:
    whole, part = parse("K*M + 6*K"), parse("K*M + 3*K")
    begin, end = parse("4096*c"), parse("4096*c + 4096")
    ranges = {"c": (0, parse("(K*M + 6*K + 4095) // 4096 - 1")), "K": (0, 600), "M": (0, 600)}
    last = minimum(minimum(end, whole), part) - 1
    facts = Facts({**ranges, "i": (maximum(parse("3*K"), begin), last)})
    for goal in ("(i - 3*K) // M", "K - (i - 3*K) // M - 1"):
        bounds = Bounds()
        assert bounds.broken(parse(goal), facts, [], str) is None
        assert not bounds.open, goal
    assert Bounds().broken(sym("c") - 1, facts, [], str)


def test_the_first_of_some_rows_of_a_padded_matrix_is_in_it() -> None:
    ranges = {"M": (2, 600), "i": (0, parse("(M + 127) // 128 - 1"))}
    goal, bounds = parse("8*((2*M + 7) // 8)*M - 1024*((2*M + 7) // 8)*i - 1"), Bounds()
    assert bounds.broken(goal, Facts(ranges), [], str) is None
    assert not bounds.open


@pytest.mark.parametrize(
    "less", ["(0 - i) // 2", "min(0 - i, M)", "(M - N)", "min(M - min(2, M + 1), 1)"]
)
def test_what_may_be_negative_says_nothing_of_the_rest(less: str) -> None:
    found = Bounds().broken(parse("K - 1"), JOINED, [parse(f"K - {less} - 1")], str)
    assert found is not None


@pytest.mark.parametrize(
    ("goal", "guards"),
    [
        ("T - 2 - i", []),
        ("i - 1", []),
        ("T - 1", []),
        ("H*T - 1", ["H - 1"]),
        ("i - 3", ["i - 2"]),
        ("B*T - 144*m - 36*t - r - 2", []),
        ("H*T - 48*j - k - 1", []),
    ],
)
def test_false_bounds_have_a_counterexample(goal: str, guards: list[str]) -> None:
    expr = parse(goal)
    found = Bounds().broken(expr, FACTS, [parse(g) for g in guards], str)
    assert found is not None
    assert expr.evaluate(found) < 0


@pytest.mark.parametrize(
    ("goal", "given", "ranges"),
    [
        ("N*i + N + 2", "N*N - 3", {"N": ("1", "3"), "i": ("0 - 2", "N - 1")}),
        ("(0 - 1) // M*max(0 - 3, i) + 1", "N - 1",
         {"N": ("0", "5"), "M": ("0", "20"), "i": ("0", "N - 1")}),
    ],
)  # fmt: skip
def test_a_condition_times_what_may_be_negative_says_nothing(
    goal: str, given: str, ranges: dict[str, tuple[str, str]]
) -> None:
    bounds = Bounds((parse(given),))
    facts = Facts({n: (parse(low), parse(high)) for n, (low, high) in ranges.items()})
    assert bounds.broken(parse(goal), facts, (), str) or bounds.open


def test_conditions_on_sizes_hold_everywhere() -> None:
    facts = Facts({"T": (0, 512), "K": (0, 512)})
    goal = parse("T - K")
    assert Bounds().broken(goal, facts, [], str)
    bounds = Bounds((goal,))
    assert bounds.broken(goal, facts, [], str) is None
    assert not bounds.open


def test_divisibility_is_kept_by_counterexamples() -> None:
    facts = Facts({"T": (0, 512)}, ((parse("T"), 4),))
    found = Bounds().broken(parse("T - 5"), facts, [parse("T - 1")], str)
    assert found == {"T": 4}


@given(st.lists(st.tuples(st.integers(-9, 9), st.integers(1, 9)), min_size=2, max_size=3))
def test_quotients_of_one_size_by_different_numbers(parts: list[tuple[int, int]]) -> None:
    """What holds for real quotients with the worst remainder of each is proved; what is proved
    holds."""
    total = sum((parse(f"(N + {n % 3}) // {by}") * n for n, by in parts), as_expr(0))
    slope = sum(Fraction(n, by) for n, by in parts)
    least = sum(Fraction(n * (n % 3) - max(0, n) * (by - 1), by) for n, by in parts)
    proved = Facts({"N": (0, None)}).is_nonneg(total)
    assert proved or min(slope, least) < 0
    assert not proved or all(total.evaluate({"N": n}) >= 0 for n in range(200))


def test_products_of_sizes_above_their_least() -> None:
    facts = Facts({"A": (3, None), "B": (3, 100)})
    assert facts.is_nonneg(parse("A*B - 2*A - 2*B + 4"))
    assert not facts.is_nonneg(parse("A*B - 2*A - 2*B + 2"))


def exprs() -> st.SearchStrategy[Expr]:
    names = st.sampled_from(["B", "T", "H", "i", "m", "j", "k"])
    leaves = names.map(parse) | st.integers(-40, 40).map(as_expr)

    def grown(inner: st.SearchStrategy[Expr]) -> st.SearchStrategy[Expr]:
        pairs = st.tuples(inner, inner)
        return st.one_of(
            pairs.map(lambda p: p[0] + p[1]),
            pairs.map(lambda p: p[0] * p[1]),
            pairs.map(lambda p: parse(f"min({p[0]}, {p[1]})")),
            pairs.map(lambda p: parse(f"max({p[0]}, {p[1]})")),
            st.tuples(inner, st.integers(1, 9)).map(lambda p: parse(f"({p[0]}) // {p[1]}")),
            st.tuples(inner, st.integers(1, 9)).map(lambda p: parse(f"({p[0]}) % {p[1]}")),
        )

    return st.recursive(leaves, grown, max_leaves=6)


@given(exprs(), exprs(), st.randoms(use_true_random=False))
@settings(max_examples=300, deadline=None)
def test_what_is_proved_holds(goal: Expr, guard: Expr, rng: random.Random) -> None:
    """Tries sizes and positions where a proof says that there is nothing to find."""
    bounds = Bounds()
    if bounds.broken(goal, FACTS, [guard], str) is not None or bounds.open:
        return
    for _ in range(60):
        values: dict[str, int] = {}
        wanted = sorted(goal.symbols() | guard.symbols())
        if all(_assign(n, FACTS, values, rng, 0) for n in wanted):
            if guard.evaluate(values) >= 0:
                assert goal.evaluate(values) >= 0, values


def test_sizes_that_nest_and_are_read_twice_are_bounded_at_once() -> None:
    size = sym("N")
    for _ in range(50):
        size = 2 * size - minimum(1, 2 * size)  # concat([x, x])[1:]
    low, high = Facts({"N": (0, 1)}).interval(size)
    assert low is not None and low <= 0 and high is not None and high >= 1


@given(st.integers(1, 4), st.integers(-4, 4), st.integers(-4, 4), st.integers(-4, 4))
def test_a_maximum_of_multiples_of_a_maximum(times: int, a: int, b: int, c: int) -> None:
    n = sym("N")
    found = maximum(times * maximum(n + a, b) + c, 0)
    assert str(found).count("max") <= 1
    for value in range(12):
        assert found.evaluate({"N": value}) == max(times * max(value + a, b) + c, 0)


def test_a_condition_is_its_own_proof(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing is looked for: parts of a concatenation begin at sums of many sizes."""
    begins = sym("i") - sum((sym(f"N{n}") for n in range(80)), as_expr(0))
    assert Bounds().broken(begins, Facts(), (), str) is not None
    monkeypatch.setattr(bounds, "_Search", None)
    assert Bounds().broken(begins, Facts(), (sym("K"), begins), str) is None
    assert Bounds((begins,)).broken(begins, Facts(), (), str) is None


def test_a_stretch_of_a_scan_is_one_of_all() -> None:
    """Their number is a quotient by one that is always 0."""
    count = "(M + 64*(M // 16384) + 64) // (64*(M // 16384) + 64)"
    facts = Facts({"M": (1, as_expr(600)), "ks": (0, parse(f"{count} - 1"))})
    bounds = Bounds()
    assert bounds.broken(parse(f"{count} - ks - 1"), facts, [parse(f"{count} - 1")], str) is None
    assert not bounds.open
