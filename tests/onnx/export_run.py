"""Exports pipelines and runs the models by the standard's reference or by ONNX Runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx.reference import ReferenceEvaluator

from stagefuse.onnx.export.exporting import export_onnx

try:
    import onnxruntime
except ImportError:
    onnxruntime = None

Arrays = list[np.ndarray[Any, Any]]


def exported(
    text: str, folder: Path, weights: Mapping[str, Any] | None = None, **options: Any
) -> onnx.ModelProto:
    """The model of a source, which the standard's checker and its strict inference accept."""
    source, target = folder / "p.pipe", folder / "p.onnx"
    source.write_text(text)
    export_onnx(source, target, weights=weights, **options)
    return checked(onnx.load(target))


def checked(model: onnx.ModelProto) -> onnx.ModelProto:
    onnx.checker.check_model(model, full_check=True)
    onnx.shape_inference.infer_shapes(model, check_type=True, strict_mode=True, data_prop=True)
    return model


def by_reference(model: onnx.ModelProto, inputs: Mapping[str, Any]) -> Arrays:
    """The results by the package `onnx`."""
    with np.errstate(all="ignore"):
        return [np.asarray(a) for a in ReferenceEvaluator(model).run(None, dict(inputs))]


SMALL = ("bfloat16", "float8_e4m3fn", "float8_e5m2")


def by_runtime(model: onnx.ModelProto, inputs: Mapping[str, Any]) -> Arrays:
    """The results by ONNX Runtime, whose Python has no bf16 and no f8: those go as bytes."""
    onnxruntime.set_default_logger_severity(4)
    wide = onnx.ModelProto()
    wide.CopyFrom(model)
    for info in wide.graph.output:
        kind = onnx.helper.tensor_dtype_to_np_dtype(info.type.tensor_type.elem_type)
        if kind.name in SMALL:
            old, info.name = info.name, f"{info.name}_f32"
            info.type.tensor_type.elem_type = onnx.TensorProto.FLOAT
            wide.graph.node.append(onnx.helper.make_node("Cast", [old], [info.name], to=1))
    session = onnxruntime.InferenceSession(
        wide.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    given = {}
    for info in model.graph.input:
        array = np.asarray(inputs[info.name])
        if array.dtype.name in SMALL:
            raw = array.view(np.uint16 if array.dtype.itemsize == 2 else np.uint8)
            number = info.type.tensor_type.elem_type
            made = onnxruntime.OrtValue.ortvalue_from_numpy_with_onnx_type(raw, number)
        else:
            made = onnxruntime.OrtValue.ortvalue_from_numpy(array)
        given[info.name] = made
    names = [o.name for o in wide.graph.output]
    found = [value.numpy() for value in session.run_with_ort_values(names, given)]
    kinds = [onnx.helper.tensor_dtype_to_np_dtype(o.type.tensor_type.elem_type)
             for o in model.graph.output]  # fmt: skip
    return [a.astype(kind) for a, kind in zip(found, kinds, strict=True)]


def ops_of(model: onnx.ModelProto) -> list[str]:
    return [node.op_type for node in model.graph.node]


def as_list(found: Any) -> Arrays:
    return list(found) if isinstance(found, tuple) else [found]
