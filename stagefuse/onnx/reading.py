"""Reading model files that may be damaged or hostile: nothing outside the model's folder is read.

Source: the ONNX IR specification, "Serialization" and "External Tensor Data".
"""

from __future__ import annotations

import math
import os
from collections import Counter
from functools import cache
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
from google.protobuf.descriptor import Descriptor, FieldDescriptor
from google.protobuf.message import DecodeError, Message

from stagefuse.dsl.dtypes import F32, I8, U8, DType, from_numpy

from .beyond import STRINGS
from .errors import OnnxError, Problem, Refused

MAX_ELEMENTS = 1 << 40
MAX_RANK = 32
MAX_FILE_BYTES = (1 << 31) - 1
"""Protocol buffers hold at most 2 GiB; larger models keep their weights in files beside them."""

_NUMPY: dict[int, Any] = {
    1: np.float32, 2: np.uint8, 3: np.int8, 4: np.uint16, 5: np.int16, 6: np.int32, 7: np.int64,
    9: np.bool_, 10: np.float16, 11: np.float64, 12: np.uint32, 13: np.uint64,
    16: ml_dtypes.bfloat16, 17: ml_dtypes.float8_e4m3fn, 19: ml_dtypes.float8_e5m2,
}  # fmt: skip
"""Source: `TensorProto.DataType` of onnx.proto."""

HELD: dict[int, tuple[DType, Any]] = {
    18: (F32, ml_dtypes.float8_e4m3fnuz), 20: (F32, ml_dtypes.float8_e5m2fnuz),
    21: (U8, ml_dtypes.uint4), 22: (I8, ml_dtypes.int4), 23: (F32, ml_dtypes.float4_e2m1fn),
    24: (F32, ml_dtypes.float8_e8m0fnu), 25: (U8, ml_dtypes.uint2), 26: (I8, ml_dtypes.int2),
}  # fmt: skip
"""Element types that the language lacks: the dtype that holds their values, and the array's."""


def read_model(path: str | Path) -> onnx.ModelProto:
    """The model of a file, which `check_model` has not seen. Raises OnnxError, OSError."""
    path = Path(path)
    if path.stat().st_size > MAX_FILE_BYTES:
        raise OnnxError([Problem("the file is larger than a protocol buffer can be")], str(path))
    model = onnx.ModelProto()
    try:
        model.ParseFromString(path.read_bytes())
    except (DecodeError, RecursionError, ValueError) as error:
        raise OnnxError([Problem(f"this is no ONNX model: {error}")], str(path)) from error
    return model


def check_model(model: onnx.ModelProto) -> None:
    """Whether there is a graph to import at all. Raises OnnxError."""
    if not model.HasField("graph") or not model.graph.output:
        raise OnnxError([Problem("the model has no graph with results: is the file whole?")])
    if not model.opset_import:
        raise OnnxError([Problem("the model does not say which opset it uses")])
    damaged = _no_text(model)
    if damaged is not None:
        raise OnnxError([Problem(f"this is no ONNX model: {damaged!r} is no UTF-8 text")])
    twice = _named_twice(model.graph)
    if twice:
        raise OnnxError([Problem(f"several values of one graph are named `{twice[0]}`")])


def _no_text(model: onnx.ModelProto) -> bytes | None:
    """A name or other text of a model, descriptions aside, that is not UTF-8.

    Syntax proto2 leaves such bytes to the reader: protobuf returns them in place of a string.
    """
    open_: list[Message] = [model]
    while open_:
        message = open_.pop()
        for name, is_text, is_repeated in _fields(message.DESCRIPTOR):
            if not is_repeated and not message.HasField(name):
                continue
            held = getattr(message, name)
            held = held if is_repeated else (held,)
            if is_text:
                damaged = next((v for v in held if isinstance(v, bytes)), None)
                if damaged is not None:
                    return damaged
            else:
                open_.extend(held)
    return None


@cache
def _fields(kind: Descriptor) -> list[tuple[str, bool, bool]]:
    """The fields of a kind of message that are text or messages: name, text, repeated.

    Descriptions are left out: nothing reads them.
    In proto2 a field has presence unless it is repeated.
    """
    return [
        (f.name, f.type == FieldDescriptor.TYPE_STRING, not f.has_presence)
        for f in kind.fields
        if f.type in (FieldDescriptor.TYPE_STRING, FieldDescriptor.TYPE_MESSAGE)
        and f.name != "doc_string"
    ]


def _named_twice(graph: onnx.GraphProto) -> list[str]:
    """Names that a graph, or one inside its nodes, gives to several values.

    A stored tensor may have the name of an input, whose value it is.
    """
    stored = Counter(t.name for t in graph.initializer)
    stored.update(t.values.name for t in graph.sparse_initializer)
    given = Counter(i.name for i in graph.input)
    made = Counter(o for node in graph.node for o in node.output if o)
    found = [n for names in (stored, given, made) for n, count in names.items() if count > 1]
    found += [n for n in made if n in stored or n in given]
    for attribute in (a for node in graph.node for a in node.attribute):
        for inner in (*([attribute.g] if attribute.HasField("g") else ()), *attribute.graphs):
            found += _named_twice(inner)
    return found


def type_name(number: int) -> str:
    """The name of a TensorProto data type."""
    names: dict[int, str] = {v: k.lower() for k, v in onnx.TensorProto.DataType.items()}
    return names.get(number, f"number {number}")


def dtype_of(number: int) -> DType:
    """The language's dtype for a TensorProto data type. Raises Refused.

    Where it has none, that of `HELD`, which holds the same values in more bits.
    """
    if number in HELD:
        return HELD[number][0]
    found = from_numpy(_NUMPY[number]) if number in _NUMPY else None
    if found is None:
        name = type_name(number)
        if name == "string":
            raise Refused(f"the element type string, and {STRINGS}")
        raise Refused(f"the element type {name}", f"the dtype {name} in the language")
    return found


def array_of(tensor: onnx.TensorProto, folder: Path | None) -> np.ndarray[Any, Any]:
    """The elements of a tensor; external ones come from a file in `folder`. Raises Refused."""
    if tensor.data_type in HELD:
        return _held(tensor, folder)
    if tensor.data_type not in _NUMPY:
        name = type_name(tensor.data_type)
        raise Refused(f"a tensor of the element type {name}", f"the dtype {name} in the language")
    dtype, shape = np.dtype(_NUMPY[tensor.data_type]), tuple(tensor.dims)
    count = _count(tensor)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raw: Any = _external(tensor, folder, count * dtype.itemsize)
    elif tensor.HasField("raw_data"):
        raw = tensor.raw_data
    else:
        return _typed_fields(tensor, dtype, shape, count)
    if len(raw) != count * dtype.itemsize:
        raise Refused(
            f"the tensor `{tensor.name}` of shape {list(shape)} has {len(raw)} bytes of data, "
            f"not {count * dtype.itemsize}"
        )
    return np.frombuffer(raw, dtype).reshape(shape)


def _count(tensor: onnx.TensorProto) -> int:
    """How many elements a tensor has. Raises Refused."""
    shape = tuple(tensor.dims)
    count: int = math.prod(shape)
    if len(shape) > MAX_RANK or any(d < 0 for d in shape) or count > MAX_ELEMENTS:
        raise Refused(f"the tensor `{tensor.name}` has the impossible shape {list(shape)[:8]}")
    return count


def _held(tensor: onnx.TensorProto, folder: Path | None) -> np.ndarray[Any, Any]:
    """The elements of a type that the language lacks, as one that it has. Raises Refused."""
    dtype, kind = HELD[tensor.data_type]
    bits = next(n for n in (2, 4, 8) if type_name(tensor.data_type) in _OF_BITS[n])
    size = -(-_count(tensor) * bits // 8)
    if tensor.data_location == onnx.TensorProto.EXTERNAL:
        raw = bytes(_external(tensor, folder, size))
        tensor = onnx.TensorProto(data_type=tensor.data_type, dims=tensor.dims, raw_data=raw)
    held = len(tensor.raw_data) if tensor.HasField("raw_data") else len(tensor.int32_data)
    if held != size:
        raise Refused(f"the tensor `{tensor.name}` needs {size} bytes of data and has {held}")
    array: np.ndarray[Any, Any] = onnx.numpy_helper.to_array(tensor).astype(kind)
    return array.astype(np.float32 if dtype.is_float else np.int32).astype(dtype.numpy)


_OF_BITS = {
    2: ("int2", "uint2"), 4: ("int4", "uint4", "float4e2m1"),
    8: ("float8e4m3fnuz", "float8e5m2fnuz", "float8e8m0"),
}  # fmt: skip


def _typed_fields(
    tensor: onnx.TensorProto, dtype: np.dtype[Any], shape: tuple[int, ...], count: int
) -> np.ndarray[Any, Any]:
    """Elements kept as numbers; the small floats as the bits of an int32."""
    fields: dict[str, Any] = {
        "float32": tensor.float_data, "float64": tensor.double_data, "int64": tensor.int64_data,
        "uint64": tensor.uint64_data, "uint32": tensor.uint64_data,
    }  # fmt: skip
    held = fields.get(dtype.name, tensor.int32_data)
    if len(held) != count:
        raise Refused(
            f"the tensor `{tensor.name}` of shape {list(shape)} has {len(held)} elements of data, "
            f"not {count}"
        )
    if dtype.name in ("float16", "bfloat16", "float8_e4m3fn", "float8_e5m2"):
        bits = np.array(held, np.int64).astype(f"uint{8 * dtype.itemsize}")
        return bits.view(dtype).reshape(shape)
    return np.array(held).astype(dtype).reshape(shape)


def _external(tensor: onnx.TensorProto, folder: Path | None, size: int) -> Any:
    """The bytes of a tensor in a file beside the model. Raises Refused."""
    if folder is None:
        raise Refused(f"the tensor `{tensor.name}` is in a file, and the model is in none")
    entries = {e.key: e.value for e in tensor.external_data}
    location = entries.get("location", "")
    path = inside(folder, location)
    try:
        offset, length = int(entries.get("offset", 0)), int(entries.get("length", size))
        available = path.stat().st_size
    except ValueError as error:
        raise Refused(f"the place of the tensor `{tensor.name}` is no number: {error}") from error
    except OSError as error:
        raise Refused(f"the file `{location}` of the tensor `{tensor.name}`: {error.strerror}"
                      ) from error  # fmt: skip
    if offset < 0 or length != size or offset + length > available:
        raise Refused(
            f"the tensor `{tensor.name}` needs {size} bytes and has {length} at {offset} of "
            f"`{location}`, which holds {available}"
        )
    if size == 0:
        return b""
    return np.memmap(path, np.uint8, "r", offset, (size,))


def inside(folder: Path, location: str) -> Path:
    """A file of a folder, whatever links it goes through. Raises Refused."""
    root = os.path.realpath(folder)
    parts = location.replace("\\", "/").split("/")
    found = root
    if location.isprintable() and not os.path.isabs(location) and ".." not in parts:
        found = os.path.realpath(os.path.join(root, location))
    if found == root or os.path.commonpath([root, found]) != root:
        raise Refused(f"the external data `{location}` is outside the model's folder")
    if not os.path.isfile(found):
        raise Refused(f"there is no file `{location}` beside the model")
    return Path(found)
