"""The parser's tables are kept between processes, and anything in their place is survived."""

from __future__ import annotations

from pathlib import Path

import lark
import pytest

from stagefuse.dsl import parser
from stagefuse.dsl.cache import cache_folder
from stagefuse.dsl.source import Source

PROGRAM = Source("t.pipe", "fn f(x: f32):\n    x + 1\n")


@pytest.fixture
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parser, "_lark", parser._lark.__wrapped__)


@pytest.mark.usefixtures("fresh")
def test_tables_are_made_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGEFUSE_CACHE", str(tmp_path / "new"))
    first = parser.parse(PROGRAM)
    (path,) = (tmp_path / "new").iterdir()
    monkeypatch.setattr(lark.Lark, "__init__", lambda *_, **__: pytest.fail("made anew"))
    assert parser.parse(PROGRAM) == first
    assert path.stat().st_mode & 0o077 == 0


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("content", [b"", b"no pickle", b"\x80\x04N."])
def test_a_broken_file_is_replaced(
    content: bytes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("STAGEFUSE_CACHE", str(tmp_path))
    first = parser.parse(PROGRAM)
    (path,) = tmp_path.iterdir()
    whole = path.read_bytes()
    path.write_bytes(content)
    assert parser.parse(PROGRAM) == first
    assert len(path.read_bytes()) > 1000  # another process may order sets otherwise
    path.write_bytes(whole[: len(whole) // 2])
    assert parser.parse(PROGRAM) == first


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("folder", ["", "/dev/null/nowhere"])
def test_without_a_folder_nothing_is_kept(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("STAGEFUSE_CACHE", folder)
    assert not parser.parse(PROGRAM)[1]
    assert (cache_folder() is None) == (not folder)
