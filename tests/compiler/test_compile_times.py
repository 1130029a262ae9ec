"""Sources that once took time, or code, of a power of two in their length."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate, pairwise

import numpy as np
import pytest

import stagefuse as sf
from stagefuse.compiler.fusion.groups import Group
from stagefuse.compiler.fusion.join import _Joiner
from stagefuse.compiler.fusion.kernel_list import KernelList
from stagefuse.compiler.graph import Ref
from stagefuse.dsl.dims import IntLike, const, floordiv, maximum, minimum, sym
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.points import Point, is_negative_at, points

SLICED = """\
pipeline doubled(x: f32[N]) -> f32
where N in {least}..=1000:
{body}    sum(x)
"""


@pytest.mark.parametrize(("least", "times"), [(2, 9), (0, 7)])
def test_a_sum_of_doublings_is_stored_in_between(least: int, times: int) -> None:
    pipe = sf.compile(SLICED.format(least=least, body="    x = concat([x, x])[1:]\n" * times))
    for size in (least, 3, 7):
        x = np.arange(size, dtype=np.float32)
        expected = x
        for _ in range(times):
            expected = np.concatenate([expected, expected])[1:]
        assert pipe(x=x) == expected.sum()


def test_a_size_that_grows_without_end_is_refused() -> None:
    source = SLICED.format(least=0, body="    x = concat([x, x])[1:]\n" * 40)
    with pytest.raises(sf.CompileError, match="E0107.*a size here is a formula of more than"):
        sf.compile(source)


def test_what_a_size_shares_is_looked_at_once() -> None:
    size, value = sym("N"), 5
    for number in range(60):  # each is read twice by the next
        size = maximum(floordiv(size * 2 + number, 3), minimum(size, const(7) * sym("M")))
        value = max((2 * value + number) // 3, min(value, 21))
    assert size.symbols() == {"N", "M"}
    assert size.length() > 1 << 60
    assert size.evaluate({"N": 5, "M": 3}) == value
    assert size.substitute({"N": sym("K")}).symbols() == {"K", "M"}


def test_points_are_within_ranges() -> None:
    n, m = sym("n"), sym("m")
    facts = Facts({"n": (2, 9), "m": (n + 1, n * 2), "k": (m, 3)})
    for point in points(facts.ranges):
        assert 2 <= point["n"] <= 9
        assert point["n"] + 1 <= point["m"] <= 2 * point["n"]
        assert point["free"] >= 0
    with pytest.raises(KeyError):
        Point({"k": (5, 3)}, 0)["k"]
    with pytest.raises(KeyError):
        Point({"a": (sym("b"), None), "b": (sym("a"), None)}, 0)["a"]


def test_what_is_false_somewhere_is_not_proved() -> None:
    n, m = sym("n"), sym("m")
    facts = Facts({"n": (2, 9), "m": (n + 1, n * 2)})
    assert facts.is_nonneg(m - n - 1) and facts.is_nonneg(2 * n - m)
    assert not facts.is_nonneg(m - n - 2) and not facts.is_nonneg(2 * n - m - 1)


def test_chains_of_sizes_are_looked_through_once() -> None:
    """Each is at least the one before it: differences of two lead to those of all before them."""
    sizes = [sym(f"N{number}") for number in range(100)]
    ranges: dict[str, tuple[IntLike, None]] = {"N0": (3, None)}
    ranges |= {f"N{number + 1}": (size, None) for number, size in enumerate(sizes[:-1])}
    facts = Facts(ranges)
    assert facts.bounds(sizes[-1] - sizes[0]) == (0, None) == facts.bounds(sizes[60] - sizes[30])
    assert facts.bounds(sizes[-1]) == (3, None) and facts.bounds(sizes[5] - sizes[40]) == (None, 0)
    for point in points(ranges):
        assert point["N99"] >= point["N50"] >= point["N0"] >= 3


def test_what_is_below_some_of_many_sizes_is_refuted_by_a_point() -> None:
    """Whichever sizes a chunk of a concatenation's elements is compared with."""
    sizes = [sym(f"N{number}") for number in range(40)]
    ranges: dict[str, tuple[IntLike, IntLike | None]] = {"N0": (0, None)}
    ranges |= {f"N{number + 1}": (size, None) for number, size in enumerate(sizes[:-1])}
    ends = list(accumulate(sizes))
    chunk = sym("chunk")
    ranges["chunk"] = (0, floordiv(ends[-1] + 4095, 4096) - 1)
    for begin, end in pairwise(ends):
        last = minimum(chunk * 4096 + 4096, end) - 1
        inside = {**ranges, "d0": (maximum(begin, chunk * 4096), last)}
        for goal in (chunk * 4096 - begin, sym("d0") - end, begin - 1 - sym("d0")):
            found = [p for p in points(inside) if is_negative_at(goal, p)]
            assert found and all(goal.evaluate(p) < 0 for p in found)


def test_a_part_of_a_concatenation_is_not_compared_with_all_others() -> None:
    def proofs(parts: int) -> int:
        asked = 0
        ask = Facts.is_nonneg

        def counted(facts: Facts, expr: IntLike) -> bool:
            nonlocal asked
            asked += 1
            return ask(facts, expr)

        inputs = ", ".join(f"x{n}: f32[N{n}]" for n in range(parts))
        names = ", ".join(f"x{n}" for n in range(parts))
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Facts, "is_nonneg", counted)
            sf.compile(f"pipeline p({inputs}):\n    concat([{names}])\n")
        return asked

    few, many = proofs(15), proofs(45)
    assert many < 4 * few, (few, many)


def test_attention_is_not_looked_for_among_all_kernels() -> None:
    def pairs(layers: int) -> int:
        asked = 0
        ask = _Joiner._scores

        def counted(joiner: _Joiner, first: Group, middle: Group) -> bool:
            nonlocal asked
            asked += 1
            return ask(joiner, first, middle)

        body = "    x = nn.attend(x, x, x)\n" * layers
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(_Joiner, "_scores", counted)
            sf.compile(f"import nn\n\npipeline p(x: f32[2, 4, T, 16]):\n{body}    x\n")
        return asked

    few, many = pairs(2), pairs(6)
    assert 0 < many <= 3 * few, (few, many)


def test_readers_are_not_looked_for_among_all_kernels() -> None:
    def looked_at(layers: int) -> int:
        seen = 0
        ask = KernelList.reading

        def counted(kernels: KernelList, ref: Ref, users: Iterable[int]) -> Iterator[Group]:
            nonlocal seen
            for group in ask(kernels, ref, users):
                seen += 1
                yield group

        body = "    x = x + sum(nn.softmax(x @ w, axis=1) @ w, axis=0)\n" * layers
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(KernelList, "reading", counted)
            sf.compile(f"import nn\n\npipeline p(x: f32[T, 16], w: f32[16, 16]):\n{body}    x\n")
        return seen

    few, many = looked_at(3), looked_at(12)
    assert 0 < many <= 5 * few, (few, many)
