"""Reads what a source needs, the file, its imports and weights, and checks it."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Mapping
from importlib.resources import files
from os import PathLike
from pathlib import Path
from typing import Any

from stagefuse.dsl.check.run import check
from stagefuse.dsl.diagnostics import CompileError, Diagnostic, Help, error
from stagefuse.dsl.dtypes import DType, from_numpy
from stagefuse.dsl.numpy_later import np
from stagefuse.dsl.parser import parse
from stagefuse.dsl.program import Program
from stagefuse.dsl.source import Source, Span
from stagefuse.dsl.weights import WeightsError, WeightsFile, open_weights

from .errors import PlanError
from .ops import BUILTINS

MOST_SOURCE_BYTES = 1 << 26
"""The longest source that is read: what has no end, such as `/dev/zero`, is none."""
Loader = Callable[[str, str], "np.ndarray[Any, Any]"]


class _Weights:
    """The weight files of a program, opened once each; arrays given by name stand in for files."""

    def __init__(self, folder: Path, given: Mapping[str, Any]) -> None:
        self.folder = folder
        self.arrays: dict[str, Mapping[str, Any]] = {}
        self.paths: dict[str, str] = {}
        self.opened: dict[str, WeightsFile] = {}
        if not isinstance(given, Mapping):
            raise TypeError(f"weights= is a mapping by name, not a {type(given).__name__}")
        for name, value in given.items():
            if isinstance(value, Mapping):
                self.arrays[f"<{name}>"] = value
                self.paths[name] = f"<{name}>"
            elif isinstance(value, str | PathLike):
                self.paths[name] = str(Path(value).absolute())
            else:
                raise TypeError(f"the weights {name!r} are a {type(value).__name__}, "
                                f"neither a path nor a mapping of arrays")

    def file(self, path: str) -> WeightsFile:
        if path not in self.opened:
            self.opened[path] = open_weights(self.folder / path)
        return self.opened[path]

    def headers(self, path: str) -> Mapping[str, tuple[DType | str, tuple[int, ...]]]:
        """Dtypes and shapes by key. Raises WeightsError."""
        if path not in self.arrays:
            return self.file(path).all_headers()
        found: dict[str, tuple[DType | str, tuple[int, ...]]] = {}
        for key, value in self.arrays[path].items():
            if not isinstance(key, str):
                raise WeightsError(f"the key {key!r} is no text: `layer.0.weight` names an array")
            array = _native(value)
            found[key] = (from_numpy(array.dtype) or str(array.dtype), array.shape)
        return found

    def load(self, path: str, key: str) -> np.ndarray[Any, Any]:
        if path in self.arrays:
            return _native(self.arrays[path][key])
        return self.file(path).array(key)


def _native(value: Any) -> np.ndarray[Any, Any]:
    """An array in this machine's order of bytes, a view where it is."""
    array = np.asarray(value)
    return array if array.dtype.isnative else array.astype(array.dtype.newbyteorder("="))


def check_source(
    path: Path, weights: Mapping[str, Any]
) -> tuple[Program, tuple[Diagnostic, ...], Loader]:
    """The checked program, what is wrong, and the reader of its weights. Raises OSError.

    `weights` gives, by the name in the source, a path or a mapping of arrays by key.
    """
    return check_text(read_source(path), path.parent, weights)


def check_text(
    source: Source, folder: Path, weights: Mapping[str, Any]
) -> tuple[Program, tuple[Diagnostic, ...], Loader]:
    """The same of a text; imports and weights are looked for in `folder`."""
    files_of = _Weights(folder, weights)
    module, problems = parse(source)
    if problems:
        return Program(source, ()), problems, lambda name, key: files_of.load(name, key)
    program, found = check(
        module, source, builtins=BUILTINS, load_module=lambda name: _module(folder, name),
        weights=files_of.headers, overrides=files_of.paths,
    )  # fmt: skip

    def load(name: str, key: str) -> np.ndarray[Any, Any]:
        return files_of.load(program.weights[name], key)

    return program, found, load


def read_source(path: Path) -> Source:
    """The text of a file.

    Raises OSError, also for more than MOST_SOURCE_BYTES, CompileError if it is not UTF-8, PlanError
    if it is a compiled file.
    """
    with path.open("rb") as file:
        data = file.read(MOST_SOURCE_BYTES + 1)
    if len(data) > MOST_SOURCE_BYTES:
        raise OSError(errno.EFBIG, os.strerror(errno.EFBIG), str(path))
    if data.startswith(b"PK\x03\x04"):
        raise PlanError(
            f"{path} is compiled already\n  = help: load it: `stagefuse.load({str(path)!r})`"
        )
    name = str(path).encode("utf-8", "backslashreplace").decode()  # a name may be any bytes
    try:
        return Source(name, data.decode("utf-8"))
    except UnicodeDecodeError as wrong:
        source = Source(name, data.decode("utf-8", "replace"))
        start = len(Source("", data[: wrong.start].decode("utf-8")).text)
        raise CompileError([
            error("E0101", f"the byte 0x{data[wrong.start]:02X} is no UTF-8 here",
                  Span(source, start, start + 1), help=Help("save the file as UTF-8"))
        ]) from wrong  # fmt: skip


def _module(folder: Path, name: str) -> Source | None:
    """An imported module: a file beside the source, or else one of the standard library."""
    beside = folder / f"{name}.pipe"
    if beside.is_file():
        return read_source(beside)
    standard = files("stagefuse.dsl").joinpath("std", f"{name}.pipe")
    if standard.is_file():
        return Source(f"std/{name}.pipe", standard.read_text("utf-8"), is_standard=True)
    return None
