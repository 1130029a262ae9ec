"""What the standard says of an op: its attributes with their defaults, and its function body."""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from .errors import Refused
from .node import Node
from .reading import _NUMPY, array_of


def full_name(proto: onnx.NodeProto) -> str:
    """The op's name in the table of records."""
    domain = "" if proto.domain == "ai.onnx" else proto.domain
    return f"{domain}::{proto.op_type}" if domain else proto.op_type


@cache
def schema_of(op: str, version: int, domain: str) -> Any:
    """The schema of an op as of an opset; None where the standard has none."""
    try:
        return onnx.defs.get_schema(op, version, "" if domain == "ai.onnx" else domain)
    except onnx.defs.SchemaError:
        return None


@cache
def _defaults(op: str, version: int, domain: str) -> dict[str, Any]:
    schema = schema_of(op, version, domain)
    if schema is None:
        return {}
    found = {n: a.default_value for n, a in schema.attributes.items()}
    return {n: value_of(d, None) for n, d in found.items() if d.type}


def default_attributes(
    proto: onnx.NodeProto, opsets: dict[str, int]
) -> dict[str, onnx.AttributeProto]:
    """The defaults of a node's attributes, which the body of its function refers to."""
    schema = schema_of(proto.op_type, opsets.get(proto.domain or "ai.onnx", 1), proto.domain)
    if schema is None:
        return {}
    found = {n: a.default_value for n, a in schema.attributes.items()}
    return {n: d for n, d in found.items() if d.type}


def attributes(proto: onnx.NodeProto, version: int, folder: Path | None) -> dict[str, Any]:
    """The attributes of a node over the defaults of its opset.

    Raises Refused for a node that does not fit its schema: with attributes that it does not have,
    of another kind or missing, or with more inputs.
    """
    found = dict(_defaults(proto.op_type, version, proto.domain))
    schema = schema_of(proto.op_type, version, proto.domain)
    for attribute in proto.attribute:
        found[attribute.name] = value = value_of(attribute, folder)
        if schema is None:
            continue
        wanted = schema.attributes.get(attribute.name)
        if wanted is None:
            raise Refused(f"opset {version} has no such attribute", attribute=attribute.name)
        if attribute.type != wanted.type.value and value != []:
            raise Refused(f"`{attribute.name}` is of the kind {_kind(attribute.type)}",
                          f"one of the kind {_kind(wanted.type.value)}", attribute.name)
    if schema is not None:
        for name, wanted in schema.attributes.items():
            if wanted.required and name not in found:
                raise Refused(f"`{name}` is missing", attribute=name)
        if len(proto.input) > schema.max_input:
            raise Refused(f"it has {len(proto.input)} inputs", f"at most {schema.max_input}")
    return found


def _kind(number: int) -> str:
    return str(onnx.AttributeProto.AttributeType.Name(number)).lower()


def value_of(attribute: onnx.AttributeProto, folder: Path | None) -> Any:
    """An attribute as a Python value: texts decoded, tensors as arrays. Raises Refused."""
    kinds = onnx.AttributeProto
    if attribute.type == kinds.TENSOR:
        return array_of(attribute.t, folder)
    if attribute.type == kinds.STRING:
        return attribute.s.decode("utf-8", "replace")
    if attribute.type == kinds.STRINGS:
        return [s.decode("utf-8", "replace") for s in attribute.strings]
    if attribute.type == kinds.INTS:
        return list(attribute.ints)
    if attribute.type == kinds.FLOATS:
        return list(map(_shortest, attribute.floats))
    if attribute.type == kinds.FLOAT:
        return _shortest(attribute.f)
    if attribute.type == kinds.SPARSE_TENSOR:
        raise Refused("a sparse tensor", "a dense one", attribute.name)
    return onnx.helper.get_attribute_value(attribute)


def _shortest(value: float) -> float:
    """The shortest number that rounds to the same f32: 1e-05 for 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def require_read(node: Node, given: Iterable[str]) -> None:
    """Raises Refused for an attribute that was given and that the record did not look at."""
    for name in sorted(set(given) - node.read):
        raise Refused(f"`{name}` is not translated", f"the meaning of `{name}`", name)


def function_of(proto: onnx.NodeProto, node: Node) -> onnx.FunctionProto | None:
    """The standard's own definition of an op by other ops, for these inputs."""
    schema = schema_of(proto.op_type, node.opset, proto.domain)
    if schema is None:
        return None
    function = onnx.FunctionProto()
    if schema.has_function:
        function.ParseFromString(schema.function_body.SerializeToString())
        return function
    if not schema.has_context_dependent_function:
        return None
    types = [_type_proto(node, n) for n in range(len(proto.input))]
    text = schema.get_context_dependent_function(proto.SerializeToString(), types)
    if not text:
        return None
    function.ParseFromString(text)
    return function


def _type_proto(node: Node, index: int) -> bytes:
    value = node.maybe(index)
    if value is None:
        return b""
    numbers = {np.dtype(v).name: k for k, v in _NUMPY.items()}
    shape = [d.as_int() for d in value.shape]
    made = onnx.helper.make_tensor_type_proto(numbers[value.dtype.numpy.name], shape)
    text: bytes = made.SerializeToString()
    return text
