"""The parser: trees of valid text, every error of invalid text, and nothing else for any text."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from stagefuse.dsl import ast
from stagefuse.dsl.diagnostics import render_all
from stagefuse.dsl.parser import parse
from stagefuse.dsl.source import Source

EXAMPLE = '''"""Doc."""
import nn

const HEADS = 12
weights w = "a.safetensors"

fn f[E: float](x: E[*S, N], p: weights, axis: int = -1) -> (a: E[*S, N], b: i64[N + 1]):
    """What f does."""
    y = x
        |> nn.linear(p["a-b"])
        + 1
    z[b, o in 0..3] = sum[i, j in 0..=2] -x[b, 2*i + j] * w[o, i] + 3
    for i, (k, v) in w.layers:
        if i == 0 and not k:
            y = y[..., None, ::2, -1]
        elif True:
            y = [1, 2.5e3, .5, "s"]
        else:
            y = ()
    y, z

pipeline main(ids: i64[B, T]) -> f32[B]
where B in 1..=256, T % 2 == 0:
    ids
'''


def problems(text: str) -> list[str]:
    return [d.message for d in parse(Source("t.pipe", text))[1]]


def test_every_construct_parses() -> None:
    module, found = parse(Source("t.pipe", EXAMPLE))
    assert not found, render_all(found)
    assert module.doc == "Doc."
    kinds = [type(item).__name__ for item in module.items]
    assert kinds == ["Import", "Const", "WeightsDecl", "Fn", "Pipeline"]
    function = module.items[3]
    assert isinstance(function, ast.Fn)
    assert function.doc == "What f does."
    assert [type(s).__name__ for s in function.body] == ["Assign", "IndexDef", "For", "ExprStmt"]
    definition = function.body[1]
    assert isinstance(definition, ast.IndexDef) and isinstance(definition.value, ast.Binary)
    assert definition.value.op == "+" and isinstance(definition.value.left, ast.Reduction)


@pytest.mark.parametrize(
    ("text", "help"),
    [
        ("fn f(x: f32):\n    0 < x < 1\n", "write `a < b and b < c`"),
        ("fn f(x: f32):\n    x > 0 & x < 1\n", "`&` binds tighter than comparisons"),
        ("fn f(x: f32[N])\nwhere 1 <= N <= 8:\n    x\n", "`N in 1..=512`"),
        ("fn f(x: f32):\n    x > 0 ? x : 1\n", "`select(condition, a, b)`"),
    ],
)
def test_help_says_what_is_written_instead(text: str, help: str) -> None:
    (problem,) = parse(Source("f.pipe", text))[1]
    assert problem.help is not None and help in problem.help.text


@pytest.mark.parametrize("ending", ["\n", "\r\n"])
def test_line_ends_and_a_byte_order_mark_are_accepted(ending: str) -> None:
    text = "\ufeff" + EXAMPLE.replace("\n", ending)
    assert not problems(text) and not problems(text.rstrip())


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("pipeline f(x: f32):\n    return x\n", "`return` is not a statement of this language"),
        ("pipeline f(x: f32):\n\tx\n", "a tab in the indentation"),
        ("pipeline f(x: f32)\n    x\n", "the header of a block ends with `:`"),
        ("pipeline f(é: f32):\n    1\n", "the name `é` has a character beyond ASCII"),
        ("pipeline f(x: f32):\n    x < 1 < 2\n", "comparisons are not chained"),
        ("pipeline f(x: f32):\n    where(x > 0, x, 0)\n", "`where` belongs to a header"),
        ("fn f():\n", "a block has no lines"),
        ("extern f\n", "`extern` is reserved for a later version"),
        ("fn f(x: f32):\n    (x\n", "`(` is never closed"),
        ("fn f(x: f32):\n    'x\n    1\n", "this string has no end"),
        ("fn f(x: f32):\n    x.y[0] = 1\n    x", "only items of a name can be assigned to"),
        ("fn f(x: f32):\n    all[i] = x[i]\n    x", "`all` is built in and cannot be redefined"),
        *(
            (f"fn f(x: f32):\n    {line}\n", "`max[...]` begins a reduction, and nothing follows "
             "that it reduces")
            for line in ("x - max[:, None]", "(x - max[x[0]]) * 2", "max[0] * x", "f(max[0], 1)")
        ),
        ("fn f(x: f32):\n    max[:1] + x", "an index is a name, with a range if it needs one"),
    ],
)
def test_errors_are_named(text: str, message: str) -> None:
    assert message in problems(text)


def test_every_independent_error_is_reported() -> None:
    text = "fn f(x: f32):\n    y = x +\n    z = * 3\n    return x\n    x\nfn g(:\n    1\n"
    assert len(problems(text)) == 4


@pytest.mark.parametrize("unit", ["(", "[", "-", "not ", "2**", "x.", "f(x)(", "x |> ", "if x:\n"])
def test_deep_nesting_is_an_error(unit: str) -> None:
    assert problems("fn f(x: f32):\n    " + unit * 10_000 + "x\n")


def test_operands_of_a_long_chain_are_not_nested() -> None:
    assert not problems("fn f(x: f32):\n    " + "1+" * 10_000 + "x\n")
    assert problems("fn f(x: f32):\n    1 + " + "-" * 101 + "x + 1\n")


def test_random_and_mutated_text_gives_only_diagnostics(chance: random.Random) -> None:
    samples = [EXAMPLE, *(p.read_text() for p in sorted(Path("dsl/std").glob("*.pipe")))]
    for _ in range(40):
        text = list(chance.choice(samples))
        for _ in range(chance.randrange(1, 12)):
            at = chance.randrange(len(text))
            char = chance.choice([*"()[]:,.=*+-|>\n \t\"'#é\x00", "in ", "sum[", "..", "where "])
            text[at : at + 1] = [char, text[at]] if chance.random() < 0.5 else []
        noise = chance.randbytes(chance.randrange(60)).decode("utf-8", "replace")
        for sample in ("".join(text), noise):
            module, found = parse(Source("fuzz.pipe", sample))
            render_all(found)
            assert isinstance(module, ast.Module)
