"""States, updates of items and slices from data: what they are, and what is wrong with others."""

from __future__ import annotations

import pytest

from stagefuse.dsl.ast import IndexDef, ItemAssign, State
from stagefuse.dsl.diagnostics import render
from stagefuse.dsl.format import formatted
from stagefuse.dsl.parser import parse, parse_or_raise
from stagefuse.dsl.source import Source

from .test_check_errors import errors, only


def pipeline(lines: str, inputs: str = "x: f32[N], at: i64") -> str:
    return f"pipeline p({inputs}):\n" + "".join(f"    {line}\n" for line in lines.split("\n"))


@pytest.mark.parametrize("lines", [
    "state a: f32[4, N] = 0.0\na[at] = x\na",
    "state a: f32[4, N] = 0.0\na[at, 1:] = x[1:]\na[..., None, 0] = 2.0\na",
    "state n: i64 = 0\nn = n + 1\nn",
    "state n: i64 = 0\nn = 3\nn",
    "state b: bool[] = False\nb = x[0] > 0.0\nb",
    "state a: f32[N] = 0.0\na[i] = x[i] * 2.0\na",
    "state a: f32[N] = 0.0\nfor i in 0..3:\n    a[i] = 1.0\na",
    "y = x\ny[at] = 1.0\ny",
    "y = x\ny[0] = y[1]\ny",
    "y = zeros([N, 3])\nfor i in 0..3:\n    y[:, i] = x\ny",
    "a, b = x, x\na[at] = 1.0\na, b",
    "x[at : at + 2]",
    "y = x\ny[at + 1] = 0.0\ny",
    "state a: f32 = 0.0\nscan t in 0..N with a = a:\n    a = a + x[t]\na",
    "scan t in 0..N with s = zeros([3]):\n    s[0] = x[t]\n    y[N - 1 - t] = s\ny",
    "x[at : 2 + at]",
    "x[at + 1 : at + 1 + 2]",
])  # fmt: skip
def test_programs_that_are_right(lines: str) -> None:
    where = "\nwhere N in 4..=9"
    text = pipeline(lines).replace(":\n", f"{where}:\n", 1)
    assert errors(text) == []


def test_what_a_bracket_on_the_left_means() -> None:
    """Names alone are indices of a definition, or positions where they have values."""
    lines = "y[i] = x[i]\na[at] = 1.0\na[0] = 2.0\na[i in 0..2] = x[i]\ny"
    text = pipeline(f"state a: f32[4] = 0.0\n{lines}")
    (item,) = parse_or_raise(Source("t.pipe", text)).items
    kinds = [type(s) for s in item.body[:-1]]  # type: ignore[union-attr]
    assert kinds == [State, IndexDef, IndexDef, ItemAssign, IndexDef]


def test_state_is_a_name_elsewhere() -> None:
    assert errors(pipeline("state = x * 2.0\nstate")) == []


def test_layout() -> None:
    text = "pipeline p(x: f32[N]):\n  state   a : f32[N]=0.0\n  a[0 :2]=x[:2]\n  a\n"
    wanted = "pipeline p(x: f32[N]):\n    state a: f32[N] = 0.0\n    a[0:2] = x[:2]\n    a\n"
    assert formatted(Source("t.pipe", text)) == wanted


@pytest.mark.parametrize(("lines", "code", "words"), [
    ("y[0] = 1.0\nx", "E0222", ["`y` has no items yet to assign to", "y = zeros([4, 8])"]),
    ("sizes = (1, 2)\nsizes[0] = 3\nx", "E0222", ["has no items to assign to", "tuple of 2"]),
    ("y = x\ny[0] = at\ny", "E0202", ["`y[0]` holds f32, and this is i64", "convert: `f32(at)`"]),
    ("y = x\ny[:2] = x\ny", "E0203", ["the value does not fit `y[:2]`", "f32[N]", "f32[2]"]),
    ("y = x\ny[0] = x\ny", "E0203", ["does not fit `y[0]`", "the value has 1 dimension"]),
    ("y = x\ny[0, 1] = 1.0\ny", "E0216", ["too many indices: 2 for 1 dimension"]),
    ("y = x\ny[9] = 1.0\ny", "E0216", ["index 9 is out of bounds"]),
    ("x[at : at * 2]", "E0216", ["the length of this slice is not known", "`at : at + 4`"]),
    ("x[at:]", "E0216", ["the length of this slice is not known"]),
    ("x[: at]", "E0216", ["the bounds of a slice are integers over sizes", "mask"]),
    ("x[x[0] : x[0] + 1]", "E0216", ["a slice starts at a single integer", "f32"]),
    ("x[at : at + 10]", "E0216", ["a slice of 10 positions does not fit"]),
    ("a = x\nstate b: f32[N] = 0.0\na", "E0223", ["`state` comes first in the body of a pipeline"]),
    ("state a: f32[N] = 0.0\na = x[:2]\na", "E0223", ["`a` is f32[N], and this is f32[2]"]),
    ("state a: f32[N] = 0.0\na = 0.0\na", "E0223", ["the state `a` is f32[N]", "`a[...] = ...`"]),
    ("state a: f32[N] = x\na", "E0223", ["begins as a number or as a tensor of weights", "f32[N]"]),
    ("state a: i64[N] = 0.5\na", "E0202", ["0.5 is not an integer and meets i64"]),
    ("state a: bool = True\na", "E0223", ["a fixed number of dimensions", "a scalar is `bool[]`"]),
    ("state x: f32[N] = 0.0\nx", "E0210", ["`x` is named twice"]),
    ("state a: f32[N] = 0.0\nstate a: f32[N] = 0.0\na", "E0210", ["`a` is named twice"]),
    ("state sum: f32[N] = 0.0\nx", "E0210", ["`sum` is built in"]),
    ("state a: f32[n] = 0.0\nx", "E0201", ["unknown size `n`"]),
    ("state a: f33[N] = 0.0\nx", "E0219", ["unknown type `f33`"]),
    ("state a: f32[N] = 0.0\nscan t in 0..N with s = 0.0:\n    s = x[t]\n    a[0] = s\ns", "E0223",
     ["the state `a` is not updated at the steps of a scan", "with a = a:"]),
    ("state a: f32 = 0.0\nscan t in 0..N with s = 0.0:\n    s = x[t]\n    a = s\ns", "E0223",
     ["the state `a` is not updated at the steps of a scan"]),
    ("state a: f32[N] = 0.0", "E0218", ["has no result"]),
    ("state a: f32[N] = 0.0\na[0] = 1.0", "E0218", ["has no result"]),
])  # fmt: skip
def test_programs_that_are_wrong(lines: str, code: str, words: list[str]) -> None:
    text = pipeline(lines).replace(":\n", "\nwhere N in 4..=9:\n", 1)
    found = only(text)
    rendered = render(found)
    assert found.code == code and all(word in rendered for word in words), rendered


def test_a_function_keeps_nothing() -> None:
    found = only("fn f(x: f32[N]) -> f32[N]:\n    state a: f32[N] = 0.0\n    x\n")
    assert found.code == "E0223" and "takes what is kept as an argument" in render(found)


def test_a_function_takes_a_state_and_gives_what_it_becomes() -> None:
    text = (
        "fn append(cache: f32[S, D], at: i64, x: f32[D]) -> f32[S, D]:\n"
        "    cache[at] = x\n    cache\n\n"
        + pipeline("state a: f32[8, N] = 0.0\na = append(a, at, x)\na")
    )  # fmt: skip
    assert errors(text) == []


@pytest.mark.parametrize(("text", "code", "word"), [
    ("state a: f32 = 0.0\n", "E0109", "declared first in the body of its pipeline"),
    ("pipeline p(x: f32):\n    state a: f32\n    x\n", "E0109", "`=`"),
    ("pipeline p(x: f32):\n    x.y[0] = 1.0\n    x\n", "E0113", "only items of a name"),
    ("pipeline p(x: f32[N]):\n    x[0, i in 0..2] = 1.0\n    x\n", "E0113", "or positions"),
])  # fmt: skip
def test_syntax_that_is_wrong(text: str, code: str, word: str) -> None:
    _, problems = parse(Source("t.pipe", text))
    assert [p.code for p in problems] == [code] and word in render(problems[0]), render(problems[0])


def test_items_of_a_value_that_is_wrong_are_no_second_error() -> None:
    found = only(pipeline("y = x + missing\nz = y\nz[at + 1] = 0.0\nz"))
    assert found.code == "E0201" and "missing" in found.message
