"""How diagnostics look, and what they hold."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from stagefuse.dsl.diagnostics import (
    CODES,
    CompileError,
    Edit,
    Help,
    Label,
    edit_distance,
    error,
    nearest,
    render,
    render_all,
    render_json,
    render_line,
)
from stagefuse.dsl.parser import parse
from stagefuse.dsl.source import Source, Span

TEXT = "\n" * 19 + (
    "    x = nn.embedding(ids, w.embeddings.word_embeddings)\n"
    "        + w.embeddings.position_embeddings.weight\n"
)
SOURCE = Source("examples/minilm.pipe", TEXT)


def span(text: str, source: Source = SOURCE) -> Span:
    start = source.text.index(text)
    return Span(source, start, start + len(text))


EXAMPLE = error(
    "E0203",
    "these two shapes do not broadcast",
    span("w.embeddings.position_embeddings.weight"),
    "f32[512, 384]",
    secondary=[Label(span("nn.embedding(ids, w.embeddings.word_embeddings)"), "f32[B, T, 384]")],
    notes=[
        "dimension 1 is T on the left and 512 on the right; T is in 1..=512, so they differ for "
        "some sizes"
    ],
    help="take the first T rows: `w.embeddings.position_embeddings.weight[:T]`",
)
RENDERED = """\
error[E0203]: these two shapes do not broadcast
  --> examples/minilm.pipe:20:9
   |
20 |     x = nn.embedding(ids, w.embeddings.word_embeddings)
   |         ----------------------------------------------- f32[B, T, 384]
21 |         + w.embeddings.position_embeddings.weight
   |           ^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^^ f32[512, 384]
   = note: dimension 1 is T on the left and 512 on the right; T is in 1..=512, so they differ for \
some sizes
   = help: take the first T rows: `w.embeddings.position_embeddings.weight[:T]`"""


def test_a_mismatch_shows_both_sides() -> None:
    assert render(EXAMPLE) == RENDERED


def test_color_adds_only_escapes() -> None:
    colored = render(EXAMPLE, color=True)
    assert colored != RENDERED
    assert re.sub(r"\x1b\[[0-9;]*m", "", colored) == RENDERED


def test_one_line() -> None:
    assert render_line(EXAMPLE) == (
        "examples/minilm.pipe:20:9: error[E0203]: these two shapes do not broadcast"
    )


def test_json_has_every_part() -> None:
    edited = error(
        "E0109", "no `:`", span("ids"), help=Help("add it", Edit(span("ids"), "ids:", True))
    )
    first, second = json.loads(render_json([EXAMPLE, edited]))
    assert first["message"] == "no `:`" and first["edit"]["replacement"] == "ids:"
    assert (second["code"], second["line"], second["column"]) == ("E0203", 21, 11)
    assert (second["end_line"], second["end_column"]) == (21, 50)
    assert second["secondary"][0]["label"] == "f32[B, T, 384]"
    assert second["notes"] and second["help"] and "edit" not in second


def test_a_compile_error_shows_its_diagnostics() -> None:
    failure = CompileError([EXAMPLE])
    assert str(failure) == RENDERED
    assert failure.diagnostics == (EXAMPLE,)


def test_labels_far_apart_and_in_other_files() -> None:
    source = Source("a.pipe", "one\ntwo\nthree\nfour\n")
    other = Source("b.pipe", "there\n")
    found = error(
        "E0201",
        "it differs",
        span("four", source),
        "here",
        secondary=[Label(span("one", source), "from here"), Label(span("there", other), "and")],
    )
    assert render(found) == (
        "error[E0201]: it differs\n --> a.pipe:4:1\n  |\n1 | one\n  | --- from here\n...\n"
        "4 | four\n  | ^^^^ here\n ::: b.pipe:1:1\n  |\n1 | there\n  | ----- and"
    )


def test_a_long_line_is_cut_around_its_mark() -> None:
    source = Source("a.pipe", "x" * 5_000 + "HERE" + "y" * 5_000)
    lines = render(error("E0101", "long", span("HERE", source))).splitlines()
    assert all(len(line) < 200 for line in lines)
    at = lines[3].index("HERE")
    assert lines[4].index("^^^^") == at and lines[4].count("^") == 4


def test_a_terminal_is_never_driven_by_the_source() -> None:
    source = Source("a.pipe", "a\x1b[31m\u202eb\tc = d")
    text = render(error("E0101", "odd \x1b", span("d", source), "\x07"))
    assert not re.search("[\x00-\x09\x0b-\x1f\u202e]", text)
    assert text.splitlines()[3].index("d") == text.splitlines()[4].index("^")


def test_wide_characters_keep_marks_below() -> None:
    source = Source("a.pipe", "s = '日本' x")
    lines = render(error("E0109", "x", span("x", source))).splitlines()
    assert lines[4].index("^") == lines[3].index("x") + 2


def test_the_end_of_the_text_can_be_marked() -> None:
    for text in ("", "a", "a\n"):
        source = Source("a.pipe", text)
        assert "^" in render(error("E0109", "end", Span(source, len(text), len(text))))


@pytest.mark.parametrize(
    ("a", "b", "distance"),
    [("", "", 0), ("ab", "ba", 1), ("kitten", "sitting", 3), ("a", "", 1), ("abc", "abc", 0)],
)
def test_edit_distance(a: str, b: str, distance: int) -> None:
    assert edit_distance(a, b) == edit_distance(b, a) == distance


def test_only_near_names_are_offered() -> None:
    assert nearest("sofmax", ["softmax", "sum", "max"]) == "softmax"
    assert nearest("sm", ["sum", "softmax"]) == "sum"
    assert nearest("foo", ["bar", "quux"]) is None


DOCS = Path(__file__).parents[2] / "docs" / "diagnostics.md"
_SECTION = re.compile(r"^### (E\d{4}): (.*?)$\n(.*?)(?=^### |^## |\Z)", re.M | re.S)
_BLOCK = re.compile(r"```\n(.*?)```", re.S)


def sections() -> list[tuple[str, str, str]]:
    return _SECTION.findall(DOCS.read_text("utf-8")) if DOCS.exists() else []


@pytest.mark.parametrize(
    ("code", "title", "body"), sections(), ids=[code for code, _, _ in sections()]
)
def test_the_reference_shows_what_the_parser_says(code: str, title: str, body: str) -> None:
    assert CODES[code] == title
    program, rendered = _BLOCK.findall(body)
    _, problems = parse(Source("wrong.pipe", program))
    assert [problem.code for problem in problems] == [code]
    assert render_all(problems) == rendered.rstrip("\n")


def test_every_code_of_the_syntax_is_in_the_reference() -> None:
    assert {c for c in CODES if c.startswith("E01")} == {code for code, _, _ in sections()}
