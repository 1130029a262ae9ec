"""The parser's tables, which Lark needs a quarter of a second to make, kept between processes.

They lie in the user's cache folder, named by a hash of all that they depend on; Lark writes and
reads them itself. Where that folder cannot be used, or a file in it is not what it should be,
they are made anew. `STAGEFUSE_CACHE` names another folder; if it is empty, nothing is kept.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import lark


def kept(make: Callable[[], lark.Lark], *depends: str) -> lark.Lark:
    """The parser that `make` gives, from the cache if it is there for the same `depends`."""
    folder = _folder()
    if folder is None:
        return make()
    versions = (lark.__version__, sys.implementation.cache_tag or "", *map(str, sys.version_info))
    text = "\0".join((*depends, *versions, __file__))
    path = folder / f"grammar-{hashlib.sha256(text.encode()).hexdigest()[:32]}.lark"
    with suppress(Exception), path.open("rb") as file:  # whatever a broken file makes Lark raise
        return lark.Lark.load(file)
    parser = make()
    with suppress(OSError):
        _write(parser, path)
    return parser


def _folder() -> Path | None:
    """Where tables are kept: a folder that only this user can write."""
    named = os.environ.get("STAGEFUSE_CACHE")
    if named is not None:
        return Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):  # no home folder
        return (Path(base) if base else Path.home() / ".cache") / "stagefuse"
    return None


def _write(parser: lark.Lark, path: Path) -> None:
    """Writes tables under another name first, so that no reader sees a part of them."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            parser.save(file)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
