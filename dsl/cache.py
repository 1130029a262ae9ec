"""The user's cache folder: what takes long to make and can be made again.

Each kind of file is named by a hash of all that it depends on. `STAGEFUSE_CACHE` names another
folder; if it is empty, nothing is kept.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO

from .files import replace_file


def cache_folder() -> Path | None:
    """Where files are kept: a folder that only this user can write. None if nothing is kept."""
    named = os.environ.get("STAGEFUSE_CACHE")
    if named is not None:
        return Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):  # no home folder
        return (Path(base) if base else Path.home() / ".cache") / "stagefuse"
    return None


def keep(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes a file of the cache, whole or not at all. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    replace_file(path, write, 0o600)
