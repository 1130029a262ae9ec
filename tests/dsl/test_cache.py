"""What is kept in the user's cache folder, and what of it is not taken."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from stagefuse.dsl import cache


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("STAGEFUSE_CACHE", str(tmp_path / "kept"))
    return tmp_path / "kept"


def test_what_is_kept_is_found(folder: Path) -> None:
    name = cache.name_of("object", ("a", "bc"))
    assert name != cache.name_of("object", ("ab", "c")) != cache.name_of("cubin", ("ab", "c"))
    assert cache.kept(name) is None
    for content in (b"", b"code", os.urandom(100_000)):
        cache.keep(name, content)
        assert cache.kept(name) == content
    assert folder.stat().st_mode & 0o777 == 0o700
    assert [p.name for p in folder.iterdir()] == [name]


def test_what_was_damaged_or_others_may_write_is_not_taken(folder: Path) -> None:
    cache.keep("object-1", b"code")
    path = folder / "object-1"
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[:20], whole + b"x", b"x" + whole):
        path.write_bytes(damaged)
        assert cache.kept("object-1") is None
    path.write_bytes(whole)
    assert cache.kept("object-1") == b"code"
    path.chmod(0o620)
    assert cache.kept("object-1") is None


def test_without_a_folder_nothing_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for where in ("", str(tmp_path / "file"), str(tmp_path / "file" / "inside")):
        monkeypatch.setenv("STAGEFUSE_CACHE", where)
        cache.keep("object-1", b"code")
        assert cache.kept("object-1") is None


def test_what_was_used_longest_ago_goes_first(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cache, "MOST", 1000)
    monkeypatch.setattr(cache, "ROUND", 1)
    for number in range(4):  # of 200 bytes and 32 more: there is room for four
        cache.keep(f"object-{number}", bytes(200))
        os.utime(folder / f"object-{number}", (number, number))
    assert cache.kept("object-1") is not None
    cache.keep("object-4", bytes(200))
    cache.keep("object-5", bytes(200))
    assert sorted(p.name for p in folder.iterdir()) == [f"object-{n}" for n in (1, 3, 4, 5)]
