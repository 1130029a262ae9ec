"""`import_onnx`: from a model file to a `.pipe` source with its weights beside it."""

from __future__ import annotations

import errno
import os
import re
import tempfile
from collections.abc import Mapping
from dataclasses import field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from stagefuse.dsl.dims import Expr
from stagefuse.dsl.format import formatted
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.source import Source

from .body import Body
from .errors import OnnxError, Problem
from .guesses import Range
from .names import Names, weights_name
from .reading import check_model, read_model
from .translate import Translator
from .writer import write_source

Sizes: TypeAlias = Mapping[str, int | tuple[int, ...]]
MAX_STEP = 128
"""The greatest multiple that is tried for a size."""


@frozen
class Imported:
    """A model as source: `text` names the file `weights_file`, which holds `arrays`, `weights`.

    `inputs` and `results` give the pipeline's names by the model's, in the model's order. `counts`
    are of results with as many rows as there can be: their axis, and the place, behind the model's
    results, of the one that tells how many of them are meant.
    """

    text: str
    arrays: dict[str, np.ndarray[Any, Any]]
    inputs: dict[str, str]
    results: dict[str, str]
    pipeline: str
    weights: str
    weights_file: str
    counts: dict[str, tuple[int, int]] = field(default_factory=dict)


def import_onnx(
    model: str | Path,
    folder: str | Path = ".",
    *,
    fixed: Mapping[str, Any] | None = None,
    sizes: Sizes | None = None,
    plain: bool = False,
) -> Path:
    """Write the `.pipe` of a model file, and a `.safetensors` beside it; the path of the `.pipe`.

    Both are called like the model, or like `folder` where that is a `.pipe` file to be made; files
    of these names are written over. `fixed` gives inputs
    of the model values for good: shapes, axes and the like that the program must know while it is
    compiled. `sizes` gives sizes that vary a range, `{"sequence": (1, 512)}`, with a step,
    `{"height": (32, 1024, 32)}`, or one value; a size without a name is `"input.axis"`. Without it
    sizes are at least 1, and what the model's own shapes need beside that. `plain` writes one line
    for each node, under the model's names, instead of layers, functions and loops.

    Raises OnnxError with everything that cannot be imported, OSError.
    """
    target = Path(folder)
    if target.suffix != ".pipe":
        target = target / f"{file_stem(Path(model).stem)}.pipe"
    return import_to(model, target, fixed=fixed, sizes=sizes, plain=plain)


def import_to(
    model: str | Path,
    target: Path,
    *,
    fixed: Mapping[str, Any] | None = None,
    sizes: Sizes | None = None,
    plain: bool = False,
) -> Path:
    """The same, to a `.pipe` file of any name. Nothing is written unless all can be imported.

    Source and weights are written under other names and renamed. Raises OSError, FileExistsError
    for weights of the same name that are not those of an earlier import to the same file.
    """
    path = Path(model)
    try:
        found = import_model(
            read_model(path), name=target.stem, folder=path.parent, fixed=fixed, sizes=sizes,
            plain=plain,
        )  # fmt: skip
    except OnnxError as error:
        raise OnnxError(error.problems, str(path)) from error
    target.parent.mkdir(parents=True, exist_ok=True)
    weights = target.parent / found.weights_file
    if found.arrays and weights.exists() and not _names(target, found.weights_file):
        why = f"these weights were there before {target}: give another name with -o"
        raise FileExistsError(errno.EEXIST, why, str(weights))
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".stagefuse-") as folder:
        stored, source = Path(folder) / "weights", Path(folder) / "source"
        if found.arrays:
            from safetensors.numpy import save_file

            save_file({k: np.ascontiguousarray(a).reshape(a.shape)
                       for k, a in found.arrays.items()}, stored)  # fmt: skip
        source.write_text(found.text, encoding="utf-8")
        if found.arrays:
            os.replace(stored, weights)
        os.replace(source, target)
    return target


def _names(source: Path, file: str) -> bool:
    """Whether a source, if it is there, reads a file."""
    return source.is_file() and f'"{file}"' in source.read_text("utf-8", "replace")


def file_stem(name: str) -> str:
    """A name that a file, and in quotes the source, can have."""
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip(".") or "model"


def import_model(
    model: onnx.ModelProto,
    *,
    name: str = "model",
    folder: Path | None = None,
    fixed: Mapping[str, Any] | None = None,
    sizes: Sizes | None = None,
    plain: bool = False,
) -> Imported:
    """The source of a model in memory. External data are read from `folder` alone.

    `plain` writes one line for each node, instead of functions, loops and layers.

    Raises OnnxError.
    """
    check_model(model)
    stem = file_stem(name)
    given = {k: np.asarray(v) for k, v in (fixed or {}).items()}
    unknown = sorted(set(given) - {i.name for i in model.graph.input})
    if unknown:
        raise OnnxError([Problem(f"`fixed` names {unknown[0]!r}, which is no input of the model")])
    translator, body, pipeline = _inferred(model, stem, folder, given, _ranges(sizes or {}))
    weights_file = f"{stem}.safetensors"
    text, arrays = write_source(translator, body, pipeline, weights_file, model, plain)
    text = formatted(Source(f"{stem}.pipe", text))
    order = list(dict.fromkeys(rows.count for rows in translator.counts.values()))
    own = len(translator.results) - len(order)
    return Imported(
        text, arrays, {a: b for a, b, _ in translator.inputs},
        {a: b for a, b, _ in translator.results[:own]}, pipeline,
        body.weights, weights_file,
        {n: (rows.axis, own + order.index(rows.count)) for n, rows in translator.counts.items()},
    )  # fmt: skip


def _ranges(sizes: Sizes) -> dict[str, Range]:
    """Ranges by the model's name of a size. Raises OnnxError."""
    found: dict[str, Range] = {}
    for name, given in sizes.items():
        ends = (given, given) if isinstance(given, int) else tuple(given)
        whole = len(ends) in (2, 3) and all(isinstance(v, int) for v in ends)
        if not whole or not 0 <= ends[0] <= ends[1] or min(ends[2:], default=1) < 1:
            raise OnnxError([Problem(f"`sizes` gives {name!r} the range {given}")])
        found[name] = Range(*ends)
    return found


def _inferred(
    model: onnx.ModelProto, stem: str, folder: Path | None,
    fixed: Mapping[str, np.ndarray[Any, Any]], ranges: dict[str, Range],
) -> tuple[Translator, Body, str]:
    """The translation; where shapes fit only for some sizes, those are taken.

    That is up to a bound, where a constant is cut to a size, or, where that does not fit, from it
    on: a part of that length is cut out of what has the size. It is one value, where an exporter
    wrote it into a shape; another size or a sum of others that it meets; and multiples of a number
    by which a size is divided, where it is halved and doubled again or cut into windows.
    """
    weights = weights_name(v.name for v in (*model.graph.input, *model.graph.output))
    shown: OnnxError | None = None  # in the widest ranges that are likely
    stepped, equal, given = False, dict[str, Expr](), ranges
    cut: dict[str, int] | None = {}  # bounds, until they have been taken for the least ones too
    while True:
        translator = Translator(folder, fixed, Names(weights=weights), ranges=ranges, equal=equal)
        pipeline = translator.names.value(stem)
        try:
            return translator, _translated(translator, model), pipeline
        except OnnxError as error:
            shown = shown if (stepped or cut is None) and shown else error
        guesses = translator.guesses
        cut = None if cut is None else cut | guesses.cut
        uneven = {
            name: step
            for name, by in guesses.uneven.items()
            if (step := guesses.range_of(name).step * by) <= MAX_STEP
            and given.get(name, Range()).step == 1
        }
        narrower = {
            name: range
            for name, ends in guesses.likely.items()
            if (range := guesses.range_of(name).within(*ends)) != guesses.range_of(name)
        }
        if guesses.meant.keys() - equal:
            equal = guesses.meant | equal
        elif narrower:
            ranges = ranges | narrower
        elif uneven:
            stepped = True
            longer = {n: replace(guesses.range_of(n), step=by) for n, by in uneven.items()}
            ranges = ranges | longer
        elif cut:
            least = {n: given.get(n, Range()).within(low, None) for n, low in cut.items()}
            ranges = given | least
            stepped, equal, cut = False, {}, None
        else:
            raise shown


def _translated(translator: Translator, model: onnx.ModelProto) -> Body:
    """The body; where a model that the standard's checker refuses made us fail, its words."""
    try:
        return translator.model(model)
    except (OnnxError, MemoryError):
        raise
    except Exception as error:
        try:
            onnx.checker.check_model(model)
        except Exception as found:
            reason = str(found).strip().splitlines() or [type(found).__name__]
            raise OnnxError([Problem(f"the model is not valid: {reason[0]}")]) from error
        raise
