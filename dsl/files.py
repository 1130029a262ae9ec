"""Files that are written whole or not at all."""

from __future__ import annotations

import errno
import io
import os
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import IO


def replace_file(path: Path, write: Callable[[IO[bytes]], object], mode: int | None = None) -> None:
    """Writes under another name first, so that a reader sees the old file or the new one.

    The file's permissions are `mode`, without it those that new files have here. A link stays one,
    and what is no file, such as `/dev/null` or a pipe, is written into.
    Raises OSError, which names `path`, and what `write` raises.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        whole = io.BytesIO()
        write(whole)
        _write_into(path, whole.getvalue())
        return
    if path.is_dir():
        raise OSError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
    path = path.resolve() if path.is_symlink() else path
    try:
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error
    try:
        with os.fdopen(handle, "w+b") as file:
            write(file)
            os.fchmod(file.fileno(), _usual_mode() if mode is None else mode)
        os.replace(name, path)
    except BaseException as error:
        with suppress(OSError):
            os.unlink(name)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from error
        raise


def _write_into(path: Path, data: bytes) -> None:
    try:
        with path.open("wb", buffering=0) as file:
            left = memoryview(data)
            while left:
                left = left[file.write(left) :]
    except OSError as error:
        raise OSError(error.errno, error.strerror, str(path)) from error


def _usual_mode() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return 0o666 & ~mask
