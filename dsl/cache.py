"""The user's cache folder: what takes long to make and can be made again.

Each kind of file is named by a hash of all that it depends on. `STAGEFUSE_CACHE` names another
folder; if it is empty, nothing is kept.
"""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO


def cache_folder() -> Path | None:
    """Where files are kept: a folder that only this user can write. None if nothing is kept."""
    named = os.environ.get("STAGEFUSE_CACHE")
    if named is not None:
        return Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):  # no home folder
        return (Path(base) if base else Path.home() / ".cache") / "stagefuse"
    return None


def replace_file(path: Path, write: Callable[[IO[bytes]], object]) -> None:
    """Writes under another name first, so that no reader sees a part. Raises OSError."""
    path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            write(file)
        os.replace(name, path)
    except BaseException:
        with suppress(OSError):
            os.unlink(name)
        raise
