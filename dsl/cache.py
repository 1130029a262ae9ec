"""The user's cache folder: what takes long to make and can be made again.

Each file is named by a hash of all that its content depends on, and begins with the hash of that
content. `STAGEFUSE_CACHE` names another folder; if it is empty, nothing is kept. Of more than
`MOST` bytes those go that were used longest ago.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from .files import replace_file

MOST = 1 << 29
"""Bytes that are kept."""
ROUND = 64
"""Of so many files one, when it is kept, has the folder's size looked at."""
_DIGEST = hashlib.sha256().digest_size


def cache_folder() -> Path | None:
    """Where files are kept: a folder that only this user can write. None if nothing is kept."""
    named = os.environ.get("STAGEFUSE_CACHE")
    if named is not None:
        return Path(named) if named else None
    base = os.environ.get("XDG_CACHE_HOME")
    with suppress(RuntimeError):  # no home folder
        return (Path(base) if base else Path.home() / ".cache") / "stagefuse"
    return None


def name_of(kind: str, parts: Iterable[str]) -> str:
    """The file's name of what depends on `parts`."""
    whole = "\0".join(parts).encode()
    return f"{kind}-{hashlib.sha256(whole).hexdigest()[:32]}"


def kept(name: str) -> bytes | None:
    """What is kept under a name; None where there is nothing, or no more what was written.

    Files of other users are not read, nor those that others may write: what is kept is code.
    """
    folder = cache_folder()
    if folder is None:
        return None
    with suppress(OSError), (folder / name).open("rb") as file:
        held = os.fstat(file.fileno())
        whole = file.read()
        content = whole[_DIGEST:]
        is_own = held.st_uid == os.geteuid() and not held.st_mode & 0o022
        if is_own and hashlib.sha256(content).digest() == whole[:_DIGEST]:
            os.utime(file.fileno())
            return content
    return None


def keep(name: str, content: bytes) -> None:
    """Keeps what `kept` shall give; nothing where that can't be written."""
    folder = cache_folder()
    if folder is None:
        return
    digest = hashlib.sha256(content).digest()
    with suppress(OSError):
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        replace_file(folder / name, lambda file: file.write(digest + content), 0o600)
        if int.from_bytes(digest[:4], "big") % ROUND == 0:
            _prune(folder)


def _prune(folder: Path) -> None:
    """Leaves the files used last, of `MOST` bytes in all. Raises OSError."""
    files = [(entry.stat(), entry.path) for entry in os.scandir(folder) if entry.is_file()]
    left = MOST
    for held, path in sorted(files, key=lambda f: f[0].st_mtime_ns, reverse=True):
        left -= held.st_size
        if left < 0:
            with suppress(OSError):  # another process was first
                os.unlink(path)
