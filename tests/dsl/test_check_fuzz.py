"""Programs made of pieces of right ones: the checker answers with diagnostics, never otherwise."""

from __future__ import annotations

import random
import re
from pathlib import Path

import pytest

from stagefuse.compiler.ops import BUILTINS
from stagefuse.dsl.check import check
from stagefuse.dsl.diagnostics import render_all, render_json
from stagefuse.dsl.dtypes import F32
from stagefuse.dsl.parser import parse
from stagefuse.dsl.source import Source

STD = Path(__file__).parents[2] / "dsl" / "std"
WEIGHTS = {
    "a.weight": (F32, (4, 4)), "a.bias": (F32, (4,)), "b.0.weight": (F32, (4,)),
    "b.1.weight": (F32, (4,)), "c": (F32, ()),
}  # fmt: skip
PROGRAM = """
import nn
import math
const N = 4
const PAIRS = [(1, 2.0), (3, 4.0)]
weights w = "w.npz"
fn f[E: float](x: E[*S, K], p: weights, n: int = 2) -> E[*S, K]
where K % 2 == 0:
    y = nn.linear(x, p) * E(K)
    if has(p, "bias") and n > 1:
        y = y + p.bias
    y
fn g(x: f32[B, T], m: bool[B, T]) -> (u: f32[B], v: f32[T, B]):
    s = nn.masked_softmax(x, m)
    q[t, b] = s[b, t] * f32(t)
    sum(s, axis=1), q
pipeline one(x: f32[B, T, 4], ids: i64[B, M], m: bool[B, T]) -> f32[B, 2*T]
where B in 1..=8, T in 2..33, M <= T, B % 1 == 0:
    for layer in w.b:
        x = x * layer.weight + nn.gelu(x)
    for a, b in PAIRS:
        x = x + b * f32(a) |> exp
    r = g(x[:, :, 0], m & True)
    y = f(x, w.a) @ transpose(x, [0, 2, 1])
    z[b, t] = sum[k, j in 0..2] x[b, t, k] * y[b, t, j] / (1.0 + abs(r.v[t, b]))
    e[b, i, d] = x[b, ids[b, i], d] - x[b, 0, 3 - d] ** 2
    c = concat([z, max(y[..., ::-1], axis=-1)], axis=1)
    top, at = topk(c, 2)
    c[:, -2 * T:] + sum(e[:, None, :, 1:3]) * f32(at[0, 1]) + select(top > 0, top, 0)[0, 0]
pipeline two(h: u8[H, W, 3]) -> i64[H]:
    s = sum(i64(h[:, ::2]), axis=(1, 2))
    s // 3 % 5 << 1
"""
TOKENS = re.findall(r"\w+|\n\s*|[^\w\s]+|[ ]", PROGRAM)
WORDS = [t for t in TOKENS if t.strip()] + ["0", "-1", "1e400", "99999999999", "None", "x[i]", "["]


def load(name: str) -> Source | None:
    path = STD / f"{name}.pipe"
    return Source(f"std/{name}.pipe", path.read_text()) if path.exists() else None


def answer(text: str) -> str:
    source = Source("fuzz.pipe", text)
    tree, problems = parse(source)
    _, found = check(
        tree, source, builtins=BUILTINS, load_module=load, weights=lambda path: WEIGHTS
    )
    render_json(found)
    return render_all([*problems, *found])


def test_the_program_itself_is_right() -> None:
    assert answer(PROGRAM) == ""


@pytest.mark.parametrize("head", ["pipeline p() -> f32:", "fn f() -> f32:", "fn f():"])
def test_a_body_of_which_no_line_is_syntax(head: str) -> None:
    found = answer(f"{head}\n    for y in w:\npipeline q(x: f32[B]) -> f32[B]:\n    x + f()\n")
    assert "E0109" in found and "has no result" not in found


@pytest.mark.parametrize("turn", range(60))
def test_words_exchanged(turn: int, chance: random.Random) -> None:
    tokens = list(TOKENS)
    for _ in range(chance.choice([1, 1, 2, 4])):
        at = chance.choice([n for n, t in enumerate(tokens) if t.strip()])
        tokens[at] = chance.choice(WORDS)
    answer("".join(tokens))


@pytest.mark.parametrize("turn", range(40))
def test_lines_exchanged_dropped_and_cut(turn: int, chance: random.Random) -> None:
    lines = PROGRAM.splitlines()
    for _ in range(chance.randrange(1, 4)):
        a, b = chance.randrange(len(lines)), chance.randrange(len(lines))
        action = chance.randrange(3)
        if action == 0:
            lines[a], lines[b] = lines[b], lines[a]
        elif action == 1:
            lines[a] = ""
        else:
            lines[a] = lines[a][: chance.randrange(len(lines[a]) + 1)]
    answer("\n".join(lines) + "\n")


@pytest.mark.parametrize(
    "text",
    [
        "pipeline p(x: f32[N]):\n    " + "-" * 3000 + "x\n",
        "pipeline p(x: f32[N]):\n    x" + " + x" * 3000 + "\n",
        "const A = 2 ** 63\nconst B = 1 << 62 << 62\nconst C = -9223372036854775808 - 1\n",
        "const A = 10.0 ** 400\nconst B = 0.0 / 0.0\nconst C = (-8) ** 0.5\nconst D = 1 % 0\n",
        "".join(f"fn f{n}(x: f32[N]):\n    f{n + 1}(f{n + 1}(x))\n" for n in range(40))
        + "fn f40(x: f32[N]):\n    x\n",
        "pipeline p(x: f32[99999999999999999999999]):\n    reshape(x, [-1, -1])\n",
        "pipeline p(x: f32[N]):\n    for i in 0..60000:\n        for j in 0..60000:\n"
        "            x = x + 1\n    x\n",
        "pipeline p(x: f32[A // 0]) where A % 0 == 0:\n    x\n",
        "pipeline p(x: f32[A, B]) where A <= B, B <= A, A == B, A != 3:\n    x\n",
        "import nn\nfn f(x: f32[N]):\n    nn.f(x)\nimport f\n",
        "",
    ],
)
def test_extremes(text: str) -> None:
    answer(text)
