"""Whatever the text, the parser ends soon, and nothing but diagnostics comes out."""

from __future__ import annotations

import random
import time

import pytest

from stagefuse.dsl.diagnostics import render, render_json, render_line
from stagefuse.dsl.parser import parse
from stagefuse.dsl.source import Source

PROGRAM = '''"""A program with every construct."""
import nn

const HEADS = 12
const EPS = 1e-12

weights w = "minilm.safetensors"   # a comment

fn softmax[E: float](x: E[*S, N], axis: int = -1) -> E[*S, N]:
    """Documented."""
    e = exp(x - max(x, axis=axis, keepdims=True))
    e / sum(e, axis=axis, keepdims=True)

pipeline embed(ids: i64[B, T], mask: i64[B, 2*T]) -> (scores: f32[B, 384], labels: i64[B])
where B in 1..=256, T in 1..=512, T % HEADS == 0:
    x = nn.embedding(ids, w["a-b"][0])
        + w.position.weight[:T, None, ..., ::2]
    for i, (a, b) in w.encoder.layer:
        if i == 0 and not True:
            x = x |> nn.linear(a) |> nn.gelu
        elif i >= 3:
            x = -x ** 2 @ a
        else:
            x = x / 2.5
    y[b, o in 0..3] = sum[i, k in 0..=4] x[b, i] * w[o, i + k] + 1
    (x, [y, 1])
'''
FRAGMENTS = tuple(
    """( ) [ ] : , . .. ..= ... = == |> | -> * ** - + \\ # \" \"\"\" ' $ { } ; ! é ½ 1 1e 0x 1. 1_
    x and None True else: sum[ while \ufeff \U0001f600 \0""".split()
) + (
    "\n", "\n    ", "\n        ", "\t", "\r", "\f", " ", "not ", "in ", "if ", "elif ", "for ",
    "where ", "fn ", "pipeline ", "const ", "import ", "weights ", "sum[i] ", "return ", "lambda ",
    "extern ", "\u2028",
)  # fmt: skip


def survives(text: str, limit_s: float = 2.0) -> None:
    source = Source("fuzz.pipe", text)
    start = time.process_time()
    _, problems = parse(source)
    assert time.process_time() - start < limit_s
    for problem in problems:
        for label in (problem.primary, *problem.secondary):
            assert 0 <= label.span.start <= label.span.end <= len(source.text) + 1
        assert problem.message
        assert render(problem) and render_line(problem)
    render_json(problems)


def test_the_program_is_valid() -> None:
    module, problems = parse(Source("valid.pipe", PROGRAM))
    assert not problems
    assert len(module.items) == 6


@pytest.mark.parametrize("turn", range(8))
def test_random_text(turn: int, chance: random.Random) -> None:
    for _ in range(100):
        survives(chance.randbytes(chance.randrange(200)).decode("utf-8", "replace"))
        survives("".join(chance.choices(FRAGMENTS, k=chance.randrange(60))))


@pytest.mark.parametrize("turn", range(8))
def test_random_mutations_of_a_valid_program(turn: int, chance: random.Random) -> None:
    for _ in range(50):
        text = PROGRAM
        for _ in range(chance.choice((1, 1, 1, 2, 5, 20))):
            at = chance.randrange(len(text) + 1)
            upto = min(len(text), at + chance.choice((0, 1, 1, 4, 30)))
            text = text[:at] + chance.choice(("", *FRAGMENTS)) + text[upto:]
        survives(text)


@pytest.mark.parametrize("seed", range(3))
def test_a_program_cut_anywhere(seed: int) -> None:
    for at in range(seed, len(PROGRAM), 7):
        survives(PROGRAM[:at])


@pytest.mark.parametrize(
    "text",
    [
        "const A = " + "(" * 10_000 + "1" + ")" * 10_000,
        "const A = " + "[" * 10_000,
        "const A = " + "-" * 10_000 + "1",
        "const A = " + "not " * 10_000 + "1",
        "const A = 1" + " + 1" * 10_000,
        "const A = 2" + " ** 2" * 10_000,
        "const A = x" + ".y" * 10_000,
        "const A = x" + " |> f" * 10_000,
        "const A = " + "sum[i] " * 10_000 + "1",
        "const A = " + "1, " * 10_000,
        "fn f():\n" + "".join(" " * (i + 1) + "if x:\n" for i in range(1_000)) + " " * 1_001 + "y",
        "fn f():\n    x = = 1\n" + "    y = = 2\n" * 1_000 + "    y\n",
        "fn f():\n    if x:\n        1\n" + "    elif x:\n        2\n" * 1_000,
        "const A = " + "9" * 10_000,
        "const A = 0x" + "f" * 10_000,
        "const A = 1e" + "9" * 10_000,
        "const A = '" + "\\" * 9_999,
        ")" * 10_000,
        "$" * 10_000,
        "x = (\n" * 1_000,
        "fn f(" + "x: f32, " * 5_000 + "):\n    x",
    ],
    ids=range(21),
)
def test_large_and_deep_texts(text: str) -> None:
    survives(text, limit_s=4.0)


@pytest.mark.parametrize(
    "text",
    [
        "x" + " + x" * 99,
        "x" + " |> exp" * 98,
        "-" * 98 + "x",
        "exp(" * 60 + "x" + ")" * 60,
        "[" + "-1, " * 1_000 + "]",
        "f(" + "g(x, [1, 2]), " * 1_000 + ")",
    ],
)
def test_what_stays_within_the_limits_is_accepted(text: str) -> None:
    assert not parse(Source("t.pipe", f"fn f(x: f32):\n    {text}\n"))[1]


def test_recovery_reports_each_cause_once() -> None:
    text = """\
fn f(x: f32[T])
    y = g(x
    z = 1 1
    while z:
        z = z +
    if x = 1:
        a
    else:
        b b
      c
    c

fun g(x: f32):
    x x

fn h(x):
    x
"""
    found = [(d.primary.span.line, d.code) for d in parse(Source("t.pipe", text))[1]]
    assert found == [
        (1, "E0109"), (2, "E0106"), (3, "E0109"), (4, "E0110"), (5, "E0109"), (6, "E0109"),
        (9, "E0109"), (10, "E0108"), (13, "E0109"), (14, "E0109"), (16, "E0109"),
    ]  # fmt: skip
