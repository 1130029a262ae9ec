"""`import_onnx`: from a model file to a `.pipe` source with its weights beside it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .errors import OnnxError
from .reading import check_model, read_model
from .translate import Translator
from .writer import write_source


@dataclass(frozen=True)
class Imported:
    """A model as source: `text` names its weights `weights_file`, which holds `arrays`.

    `inputs` and `results` give the pipeline's names by the model's, in the model's order.
    """

    text: str
    arrays: dict[str, np.ndarray[Any, Any]]
    inputs: dict[str, str]
    results: dict[str, str]
    pipeline: str
    weights_file: str


def import_onnx(
    model: str | Path, folder: str | Path = ".", *, fixed: Mapping[str, Any] | None = None
) -> Path:
    """Write the `.pipe` of a model file, and a `.safetensors` beside it; the path of the `.pipe`.

    `fixed` gives inputs of the model values for good: shapes, axes and the like that the program
    must know while it is compiled. Files of the same names are written over.

    Raises OnnxError with everything that cannot be imported, OSError.
    """
    path, folder = Path(model), Path(folder)
    found = import_model(read_model(path), name=path.stem, folder=path.parent, fixed=fixed)
    folder.mkdir(parents=True, exist_ok=True)
    if found.arrays:
        from safetensors.numpy import save_file

        whole = {k: np.ascontiguousarray(a).reshape(a.shape) for k, a in found.arrays.items()}
        save_file(whole, folder / found.weights_file)
    target = folder / f"{Path(found.weights_file).stem}.pipe"
    target.write_text(found.text, encoding="utf-8")
    return target


def import_model(
    model: onnx.ModelProto,
    *,
    name: str = "model",
    folder: Path | None = None,
    fixed: Mapping[str, Any] | None = None,
) -> Imported:
    """The source of a model in memory. External data are read from `folder` alone.

    Raises OnnxError.
    """
    check_model(model)
    stem = re.sub(r"[^A-Za-z0-9_.-]+", "_", name).strip(".") or "model"
    translator = Translator(folder, {k: np.asarray(v) for k, v in (fixed or {}).items()})
    unknown = sorted(set(translator.fixed) - {i.name for i in model.graph.input})
    if unknown:
        from .errors import Problem

        raise OnnxError([Problem(f"`fixed` names {unknown[0]!r}, which is no input of the model")])
    pipeline = translator.names.value(stem)
    body = translator.model(model)
    weights_file = f"{stem}.safetensors"
    text = write_source(translator, body, pipeline, weights_file, model)
    return Imported(
        text, translator.arrays, {a: b for a, b, _ in translator.inputs},
        {a: b for a, b, _ in translator.results}, pipeline, weights_file,
    )  # fmt: skip
