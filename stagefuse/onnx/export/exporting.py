"""`export_onnx`: from a `.pipe` source to a model file."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from stagefuse.compiler.build_graph import build_graph
from stagefuse.compiler.front import check_source
from stagefuse.compiler.graph import Graph
from stagefuse.dsl.diagnostics import CODES, CompileError, Diagnostic, Help, error
from stagefuse.dsl.dims import Expr, as_expr
from stagefuse.dsl.program import Pipeline, Program
from stagefuse.runtime.errors import InputError

from .loops import read_inside
from .lower import Failure, lower
from .model import ELEMENT, Array, Model, Tensor

CODES["E0301"] = "no ONNX form"

OPSET = 21
"""What is written unless another is asked for: read by engines of 2024 and on."""
OLDEST, NEWEST = 17, 26
INLINE_BYTES = (1 << 31) - (1 << 24)
"""Weights of more are stored beside the model: a protocol buffer holds at most 2 GiB."""
ALIGNED = 4096
"""External data begin at multiples of this, so that engines can map them. Source: the ONNX IR
specification, "External Tensor Data"."""
SMALL = 1024
"""Tensors of fewer bytes stay in the model file."""


def export_onnx(
    source: str | Path,
    model: str | Path,
    *,
    pipeline: str | None = None,
    opset: int = OPSET,
    external_data: bool = False,
    weights: Mapping[str, Any] | None = None,
) -> Path:
    """Write a pipeline of a `.pipe` file as an ONNX model; the path of the model.

    `external_data` stores the weights in a file beside the model, `MODEL.data`; above 2 GB they
    always are. `weights` gives, by the name in the source, a path or a mapping of arrays.

    Raises CompileError for a wrong program, and with every line that has no ONNX form in this
    opset; ValueError for an opset that is not written or a pipeline that is not there; OSError.
    """
    target = Path(model)
    export_to(
        source, target, pipeline=pipeline, opset=opset, external_data=external_data,
        weights=weights,
    )  # fmt: skip
    return target


def export_to(
    source: str | Path,
    target: Path,
    *,
    pipeline: str | None = None,
    opset: int = OPSET,
    external_data: bool = False,
    weights: Mapping[str, Any] | None = None,
) -> list[Path]:
    """The same; the files that were written."""
    if not OLDEST <= opset <= NEWEST:
        raise ValueError(f"opset {opset} is not written: {OLDEST} to {NEWEST} are")
    program, found, load = check_source(Path(source), weights or {})
    if found:
        raise CompileError(found)
    chosen = _chosen(program, pipeline)
    proto, arrays = model_of(chosen, build_graph(chosen), load, opset)
    inline = not external_data and sum(a.nbytes for a in arrays.values()) <= INLINE_BYTES
    return _save(proto, arrays, target, inline)


def model_of(
    pipeline: Pipeline, graph: Graph, load: Callable[[str, str], Array], opset: int = OPSET
) -> tuple[onnx.ModelProto, dict[str, Array]]:
    """A model without its tensors, and those by name. Raises CompileError."""
    model, inputs, results, failures = lower(pipeline, graph, opset, load)
    if failures:
        raise CompileError(_diagnostics(pipeline, failures, opset))
    proto = _proto(pipeline, model, inputs, results)
    used = {name for node in proto.graph.node for name in read_inside(node)}
    return proto, {name: array for name, array in model.constants.items() if name in used}


def _chosen(program: Program, name: str | None) -> Pipeline:
    names = [p.name for p in program.pipelines]
    if name is None and len(names) == 1:
        return program.pipelines[0]
    if name is None and names:
        raise ValueError(f"there are several pipelines: name one of {', '.join(names)}")
    if not names:
        raise InputError(f"{program.source.name} holds no pipeline")
    if name not in names:
        raise ValueError(f"no pipeline is called {name!r}; there is {', '.join(names)}")
    return program.pipelines[names.index(name)]


def _diagnostics(
    pipeline: Pipeline, failures: Sequence[Failure], opset: int
) -> tuple[Diagnostic, ...]:
    """One for each cause and place, at the outermost call in the source itself."""
    found: dict[tuple[str, int], Diagnostic] = {}
    for failure in failures:
        spans = [*failure.node.stack, *([failure.node.span] if failure.node.span else [])]
        own = [s for s in spans if not s.source.is_standard] or spans
        span = own[-1] if own else pipeline.span
        if span is None:
            span = pipeline.inputs[0][2]
        help = Help(f"write a newer opset: `--opset {failure.opset}`") if failure.opset else None
        text = failure.message + (f", and this is opset {opset}" if failure.opset else "")
        found.setdefault((text, span.start), error("E0301", text, span, help=help))
    return tuple(found.values())


def _proto(
    pipeline: Pipeline, model: Model, inputs: Sequence[Tensor], results: Sequence[Tensor]
) -> onnx.ModelProto:
    from stagefuse import __version__

    nodes = _live(model.nodes, {t.name for t in results})
    model.nodes = nodes
    ends = {t.name for t in (*inputs, *results)}
    made = [name for node in nodes for name in node.output if name not in ends]
    graph = onnx.helper.make_graph(
        nodes, pipeline.name, [_info(t) for t in inputs], [_info(t) for t in results],
        value_info=[_info(model.values[name]) for name in made], doc_string=pipeline.doc,
    )  # fmt: skip
    opsets = [onnx.helper.make_opsetid("", model.opset)]
    proto = onnx.helper.make_model(
        graph, opset_imports=opsets, producer_name="stagefuse", producer_version=__version__,
        ir_version=onnx.helper.find_min_ir_version_for(opsets),
    )  # fmt: skip
    told = {"where": _where(pipeline), "states": _states(pipeline)}
    onnx.helper.set_model_props(proto, {name: text for name, text in told.items() if text})
    return proto


def _live(nodes: Sequence[onnx.NodeProto], wanted: set[str]) -> list[onnx.NodeProto]:
    """The nodes that the results depend on."""
    found = []
    for node in reversed(nodes):
        if wanted & set(node.output):
            wanted |= read_inside(node)
            found.append(node)
    return found[::-1]


def _info(tensor: Tensor) -> onnx.ValueInfoProto:
    shape = [known if (known := d.as_int()) is not None else str(d) for d in tensor.shape]
    made: onnx.ValueInfoProto = onnx.helper.make_tensor_value_info(
        tensor.name, ELEMENT[tensor.dtype.name], shape
    )
    return made


def _states(pipeline: Pipeline) -> str:
    """What the states are at first: numbers, or tensors of weight files."""
    found = []
    for state in pipeline.states:
        first = state.initial
        found.append(f"{state.name} = {'/'.join(first) if isinstance(first, tuple) else first}")
    return ", ".join(found)


def _where(pipeline: Pipeline) -> str:
    """The ranges of the sizes, as the source writes them."""
    parts = []
    for name in pipeline.dims:
        low, high = pipeline.facts.ranges.get(name, (0, None))
        if high is not None:
            parts.append(f"{name} in {_text(low)}..={_text(high)}")
        elif as_expr(low).as_int() != 0:
            parts.append(f"{name} >= {_text(low)}")
    return ", ".join(parts)


def _text(end: int | Expr) -> str:
    return str(as_expr(end))


def _save(
    proto: onnx.ModelProto, arrays: Mapping[str, np.ndarray[Any, Any]], target: Path, inline: bool
) -> list[Path]:
    """Written under another name in the same folder and renamed, the data first."""
    target.parent.mkdir(parents=True, exist_ok=True)
    data = target.with_name(target.name + ".data")
    written = [target]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".stagefuse-") as folder:
        stored = Path(folder) / "data"
        with stored.open("wb") as file:
            for name, array in arrays.items():
                beside = None if inline or array.nbytes < SMALL else file
                proto.graph.initializer.append(_tensor(name, array, beside, data.name))
        whole = Path(folder) / "model"
        whole.write_bytes(proto.SerializeToString(deterministic=True))
        if stored.stat().st_size:
            os.replace(stored, data)
            written.append(data)
        os.replace(whole, target)
    return written


def _tensor(name: str, array: np.ndarray[Any, Any], file: Any, location: str) -> onnx.TensorProto:
    """A tensor with its bytes, or with its place in `file`, where they are written."""
    from stagefuse.dsl.dtypes import from_numpy

    dtype = from_numpy(array.dtype)
    assert dtype is not None
    tensor = onnx.TensorProto(name=name, data_type=ELEMENT[dtype.name], dims=array.shape)
    little = np.ascontiguousarray(array)
    if file is None:
        tensor.raw_data = little.tobytes()
        return tensor
    file.write(b"\0" * (-file.tell() % ALIGNED))
    tensor.data_location = onnx.TensorProto.EXTERNAL
    places = {"location": location, "offset": file.tell(), "length": array.nbytes}
    for key, value in places.items():
        tensor.external_data.add(key=key, value=str(value))
    file.write(little.tobytes())
    return tensor
