"""Tell what kind of file files are by their content, with Magika."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import gallery
import numpy as np

import stagefuse as sf

PACKAGE, FOLDER = "magika", "magika/models/standard_v3_3"
BLOCK, END, NOTHING = 4096, 1024, 256
"""Bytes that are read at each end, and kept of them without spaces; what stands for no byte."""

Array = np.ndarray[Any, Any]


def content(path: Path) -> Array:
    """What the model sees of a file: i32 [2048]."""
    with path.open("rb") as file:
        first = file.read(BLOCK)
        file.seek(-min(BLOCK, path.stat().st_size), 2)
        last = file.read(BLOCK)
    first, last = first.lstrip()[:END], last.rstrip()[-END:]
    seen = np.full(2 * END, NOTHING, np.int32)
    seen[: len(first)] = list(first)
    seen[2 * END - len(last) :] = list(last)
    return seen


def model() -> Path:
    """The model as a source, imported."""
    known = {"sizes": {"unk__214": (1, 65536)}}
    return gallery.imported("magika", PACKAGE, f"{FOLDER}/model.onnx", **known)


def pipeline(threads: int | None = None) -> sf.Pipeline:
    """The model, compiled."""
    return sf.load(gallery.compiled("filetype.pipe", [model().name]), threads=threads)


def kinds() -> list[str]:
    """The names of what the model tells apart."""
    known = json.loads(gallery.package_file(PACKAGE, f"{FOLDER}/config.min.json").read_text())
    return [str(name) for name in known["target_labels_space"]]


def described() -> dict[str, str]:
    """Words for every kind."""
    file = gallery.package_file(PACKAGE, "magika/config/content_types_kb.min.json")
    return {name: about["description"] for name, about in json.loads(file.read_text()).items()}


def own_files() -> list[Path]:
    """Files of this project, of several kinds."""
    root = gallery.HERE.parent
    names = ("README.md", "Makefile", "pyproject.toml", ".ci/run", "conftest.py",
             "tests/runtime/stub_libcuda.c", "examples/sentences.txt",
             "examples/references.npz")  # fmt: skip
    return [root / name for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", type=Path, nargs="*", help="default: some of this project")
    parser.add_argument("--threads", type=int)
    options = parser.parse_args()
    files = options.files or own_files()
    pipe, names, words = pipeline(options.threads), kinds(), described()
    seen = np.stack([content(path) for path in files])
    found = pipe(content=seen)
    for path, probability, kind in zip(files, found.probability, found.kind, strict=True):
        name = names[kind[0]]
        print(f"{probability[0]:4.0%}  {name:<12} {words.get(name) or name:<36} {path}")
    print(f"{gallery.milliseconds(lambda: pipe(content=seen)):.1f} ms for {len(files)} files, "
          f"on {pipe.threads} threads")  # fmt: skip


if __name__ == "__main__":
    main()
