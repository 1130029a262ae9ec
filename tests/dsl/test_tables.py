"""The parser's tables are a file of the package: that of the grammar, and used only if it is."""

from __future__ import annotations

import json
from importlib.resources import files
from types import SimpleNamespace

import lark
import pytest

from stagefuse.dsl import parser, tables
from stagefuse.dsl.source import Source

PROGRAM = Source("t.pipe", "fn f(x: f32):\n    x + 1\n")
WRONG = Source("t.pipe", "fn f(x: f32):\n    x + = 1\n    x +\n")


KEPT = files("stagefuse.dsl").joinpath("grammar.json").read_text("utf-8")
same_lark = pytest.mark.skipif(
    json.loads(KEPT)["of"]["lark"] != lark.__version__, reason="the file is of another Lark"
)


@same_lark
def test_the_file_is_that_of_the_grammar() -> None:
    assert KEPT == tables.tables(), "run `python -m stagefuse.dsl.tables --write`"


@same_lark
def test_no_tables_are_made(monkeypatch: pytest.MonkeyPatch) -> None:
    parser._lark.cache_clear()
    monkeypatch.setattr(lark.Lark, "__init__", lambda *_, **__: pytest.fail("made anew"))
    assert not parser.parse(PROGRAM)[1]


def test_with_another_lark_they_are_made_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    made, broken = parser.parse(PROGRAM), parser.parse(WRONG)
    other = SimpleNamespace(Lark=lark.Lark, __version__="another")
    monkeypatch.setattr(tables, "lark", other)
    monkeypatch.setattr(parser, "_lark", parser._lark.__wrapped__)
    assert parser.parse(PROGRAM) == made
    assert parser.parse(WRONG) == broken
