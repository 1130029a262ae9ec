"""Scratch rows in the place of their result: when they may be, and that nothing else changes."""

from __future__ import annotations

import numpy as np
import pytest

from stagefuse.compiler.cpu import streams
from stagefuse.compiler.cpu.result_rows import row_in_result
from stagefuse.compiler.kernel_text import parse_kernel

from .cpu_run import LEVELS, Compiled

HEAD = """stagefuse kernel 1
kernel {name} for test
buffer x : in f32[M, N]
buffer y : {y}
buffer z : out f32[M, N]
dims M N
parallel m in M
alloc row : f32[N]
for s in 0..N vector
  store row[s] = add.f32(x.f32[m, s], f32(1))
fold total = sum over (f in N) : f32 of row.f32[f]
"""
OUT, IN = "out f32[M, N]", "in f32[M, N]"
Y = "  store y[m, n] = mul.f32(row.f32[n], f32(2))\n"
Z = "  store z[m, n] = div.f32(row.f32[n], $total.f32)\n"
LAST = "for n in 0..N vector\n"
CASES = {
    "one": (IN, LAST + Z, "row"),
    "two": (OUT, LAST + Y + Z, "row"),
    "mirrored": (IN, LAST + Z.replace("row.f32[n]", "row.f32[N - 1 - n]"), None),
    "across": (IN, LAST + Z.replace("z[m, n]", "z[n, m]"), None),
    "narrower": ("in f32[M, N]", "for n in 0..N - 1 vector\n" + Z, None),
    "later": (OUT, LAST + Z + LAST + Y, "row"),  # the second loop's result, if any
    "again": (IN, LAST + Z.replace("$total.f32", "x.f32[m, n]") + LAST + Z, None),
}


def kernel(name: str, y: str, rest: str) -> object:
    return parse_kernel(HEAD.format(name=name, y=y) + rest)


@pytest.mark.parametrize("name", CASES)
def test_which_rows_may_be_in_place(name: str) -> None:
    y, rest, expected = CASES[name]
    found = row_in_result(kernel(name, y, rest))
    assert (found.row if found else None) == expected


@pytest.mark.parametrize("large", [1, 1 << 40])
@pytest.mark.parametrize("level", LEVELS)
def test_results_are_those_of_rows_in_scratch(
    level: str, large: int, monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    monkeypatch.setattr(streams, "LARGE_BYTES", large)
    monkeypatch.setattr(streams, "LONG", 1)
    names = ("one", "two", "mirrored")
    compiled = Compiled([kernel(name, *CASES[name][:2]) for name in names], level)
    for m, n in ((1, 1), (3, 63), (2, 64), (4, 200), (5, 0)):
        for name in names:
            x = rng.uniform(0, 1, (m, n)).astype(np.float32)
            y, z = np.zeros_like(x), np.zeros_like(x)
            compiled(name, [x, y, z], {"M": m, "N": n})
            row = x.astype(np.float64) + 1
            top = row[:, ::-1] if name == "mirrored" else row
            wanted = top / row.sum(1, keepdims=True)
            np.testing.assert_allclose(z, wanted, rtol=(n + 3) * 2.0**-24)
            if name == "two":
                np.testing.assert_allclose(y, 2 * row, rtol=2.0**-24)


@pytest.mark.parametrize("n", [5, 7, 9, 17, 31, 33, 63])
@pytest.mark.parametrize("level", LEVELS)
def test_short_rows_of_a_known_length_are_read_once(
    level: str, n: int, rng: np.random.Generator
) -> None:
    """The last vector of a row begins earlier where it may, over elements stored before."""
    text = (HEAD.format(name="two", y=OUT) + LAST + Y + Z).replace("dims M N", "dims M")
    for place in ("[N]", ", N]", "0..N", "in N)"):
        text = text.replace(place, place.replace("N", str(n)))
    compiled = Compiled([parse_kernel(text)], level)
    x = rng.uniform(0, 1, (4, n)).astype(np.float32)
    y, z = np.zeros_like(x), np.zeros_like(x)
    compiled("two", [x, y, z], {"M": 4})
    row = x.astype(np.float64) + 1
    np.testing.assert_allclose(y, 2 * row, rtol=2.0**-24)
    np.testing.assert_allclose(z, row / row.sum(1, keepdims=True), rtol=(n + 3) * 2.0**-24)
