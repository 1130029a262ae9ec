"""The one layout of sources: what it looks like, that it keeps the meaning, and that it is one."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stagefuse.dsl import ast
from stagefuse.dsl.diagnostics import CompileError
from stagefuse.dsl.format import formatted
from stagefuse.dsl.lexer import Lexer
from stagefuse.dsl.parser import parse_or_raise
from stagefuse.dsl.source import Source, Span

from .test_parser_fuzz import PROGRAM

ROOT = Path(__file__).parents[2]
FILES = sorted(
    path for folder in ("dsl", "examples", "benchmarks") for path in (ROOT / folder).rglob("*.pipe")
)
SOURCES = [PROGRAM, *(path.read_text("utf-8") for path in FILES)]

UNTIDY = '''\ufeff
# above
"""Doc.
  inner """
import   nn
const B = - A   ** -2 #c
weights w="x.npz"     # aligned



fn f [E:float](x:E[ *S,N ],axis:int=-1)->E[*S,N] :   # header
  """doc
  more"""
  if B==3 :
       x=x+1.0
       # in the block
    # between
  # after the block
  z = nn . linear( x , p = w ["a-b"] . in [0] ) |>g(  )\r
     |> h
      # of the line
      + 1.0
  u[i in 0 .. 3, j in 1. ..=2] = sum [0] + sum[k] - x[ i , k: ] * sum[k](x[k : :2, - 1 :, None])
  (z ,
     (1 ,),
  # in brackets
     not  u , )
pipeline p( x:f32[2*T,T-1],
  y:f32 )
 -> ( a:f32[T],b : i64 )
where T in 1 ..= 3 ,
   T%2==0 :
        x [0] ,y
        # end'''
TIDY = '''\
# above
"""Doc.
  inner """
import nn
const B = -A ** -2    #c
weights w = "x.npz"   # aligned


fn f[E: float](x: E[*S, N], axis: int = -1) -> E[*S, N]:  # header
    """doc
  more"""
    if B == 3:
        x = x + 1.0
        # in the block
    # between
    # after the block
    z = nn.linear(x, p=w["a-b"].in[0]) |> g()
        |> h
        # of the line
        + 1.0
    u[i in 0..3, j in 1. ..=2] = sum [0] + sum[k] -x[i, k:] * sum[k] (x[k::2, -1:, None])
    (z,
        (1,),
        # in brackets
        not u,)

pipeline p(x: f32[2 * T, T - 1],
    y: f32)
    -> (a: f32[T], b: i64)
where T in 1..=3,
    T % 2 == 0:
    x[0], y
    # end
'''


def written(text: str) -> str:
    return formatted(Source("t.pipe", text))


def bare(node: Any) -> Any:
    """A syntax tree without the places of its nodes."""
    if isinstance(node, Span):
        return None
    if isinstance(node, ast.Node):
        return (type(node).__name__, *(bare(getattr(node, n)) for n in node.__match_args__))
    if isinstance(node, tuple | list):
        return [bare(item) for item in node]
    return node


def tree(text: str) -> Any:
    return bare(parse_or_raise(Source("t.pipe", text)))


def comments(text: str) -> list[str]:
    source = Source("t.pipe", text)
    held = [(t.start, t.end) for line in Lexer(source).lines for t in line.tokens]
    starts = (m.start() for m in re.finditer("#", source.text))
    first = {source.text.find("\n", s) % (len(source.text) + 1): s for s in sorted(
        (s for s in starts if not any(a <= s < b for a, b in held)), reverse=True)}
    return [source.text[s:end].rstrip() for end, s in sorted(first.items())]


def test_the_layout() -> None:
    assert written(UNTIDY) == TIDY


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_source_here_has_the_layout(path: Path) -> None:
    text = path.read_text("utf-8")
    assert written(text) == text


def test_nothing_stays_nothing() -> None:
    assert written("") == written("\n\n  \n") == ""
    assert written("# alone") == "# alone\n"


def test_what_does_not_parse_is_reported() -> None:
    with pytest.raises(CompileError) as found:
        written("pipeline p(x: f32[N]):\n    x +\n")
    assert found.value.diagnostics


@st.composite
def untidy(draw: st.DrawFn) -> str:
    """A program of this repository with other white space and more comments."""
    source = Source("t.pipe", draw(st.sampled_from(SOURCES)))
    choose = draw(st.randoms(use_true_random=False))
    out, columns, before = [], [0], [0]
    for line in Lexer(source).lines:
        while line.indent < before[-1]:
            before.pop()
            columns.pop()
        if line.indent > before[-1]:
            before.append(line.indent)
            columns.append(columns[-1] + choose.randint(1, 9))
        out.append(choose.choice(["", "", "\n", "\n\n\n", " \n# x\n", "      #y\n"]))
        out.append(" " * columns[-1])
        end, depth, kept = line.tokens[0].start, 0, ""
        for token in line.tokens:
            gap = source.text[end : token.start]
            if "\n" in gap and not depth:
                gap = "\n" + " " * (columns[-1] + choose.randint(1, 9))
            elif depth and kept != "REDUCE":
                gap = choose.choice([gap, gap, gap + " ", "\n   ", " # z\n\n#w\n "])
            elif end != line.tokens[0].start and kept != "REDUCE":
                gap += " " * choose.choice([0, 0, 1, 3])
            out.append(gap + source.text[token.start : token.end])
            depth += (token.kind in ("LPAR", "LSQB")) - (token.kind in ("RPAR", "RSQB"))
            end, kept = token.end, token.kind
        out.append(choose.choice(["\n", "\n", "  \n", " #v\n", "   # u  \n"]))
    return "".join(out)


@settings(max_examples=60, deadline=None)
@given(untidy())
def test_the_layout_keeps_the_meaning_and_is_one(text: str) -> None:
    once = written(text)
    assert written(once) == once
    assert tree(once) == tree(text)
    assert comments(once) == comments(text)
    assert all(line == line.rstrip() for line in once.split("\n") if '"""' not in once)
