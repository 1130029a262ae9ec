"""From the graph of a model to lines of source: inputs, nodes in order, results."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import onnx

from stagefuse.dsl.dims import Expr, as_expr, sym
from stagefuse.dsl.dtypes import DType, from_numpy
from stagefuse.dsl.types import TensorType

from . import beyond, control, counted, schemas
from .body import Body
from .errors import OnnxError, Problem, Refused
from .folding import fold
from .guesses import Guesses, Range, elements, sizes_in
from .names import Names, safe_key, weight_path
from .node import Node, Rows, Val
from .reading import HELD, array_of, dtype_of
from .record import Written, records
from .text import listed, literal, size_text

MAX_UNFOLDED = 5_000
"""Nodes that functions and loops may unfold to, beside ten times those that the file holds."""
MAX_DEPTH = 40
Env: TypeAlias = "dict[str, Val | None]"
"""Values by the model's names; None for one whose node could not be translated."""


@dataclass
class Translator:
    """One import: what was found so far. `problems` are all that stands in the way; `counts` are
    of results whose rows depend on data."""

    folder: Path | None
    fixed: Mapping[str, np.ndarray[Any, Any]]
    names: Names = field(default_factory=Names)
    problems: list[Problem] = field(default_factory=list)
    arrays: dict[str, np.ndarray[Any, Any]] = field(default_factory=dict)
    inputs: list[tuple[str, str, TensorType]] = field(default_factory=list)
    results: list[tuple[str, str, TensorType]] = field(default_factory=list)
    counts: dict[str, Rows] = field(default_factory=dict)
    sizes: dict[str, str] = field(default_factory=dict)
    ranges: Mapping[str, Range] = field(default_factory=dict)
    equal: Mapping[str, Expr] = field(default_factory=dict)
    functions: dict[tuple[str, str], onnx.FunctionProto] = field(default_factory=dict)
    opsets: dict[str, int] = field(default_factory=dict)
    texts: dict[str, str] = field(default_factory=dict)
    held: set[str] = field(default_factory=set)
    lacking: dict[str, int] = field(default_factory=dict)
    count: int = 0
    most: int = MAX_UNFOLDED

    def __post_init__(self) -> None:
        self.guesses = Guesses(self.sizes, self.ranges)

    def model(self, model: onnx.ModelProto) -> Body:
        """The body of the main graph. Raises OnnxError with everything that is in the way."""
        self.opsets = {e.domain or "ai.onnx": e.version for e in model.opset_import}
        newest = onnx.defs.onnx_opset_version()
        self.opsets.setdefault("ai.onnx", newest)
        if not 1 <= self.opsets["ai.onnx"] <= newest:
            raise OnnxError([Problem(
                f"the model is of opset {self.opsets['ai.onnx']}", need=f"opset 1 to {newest}")])
        self.functions = {(f.domain, f.name): f for f in model.functions}
        held = len(model.graph.node) + sum(len(f.node) for f in model.functions)
        self.most = MAX_UNFOLDED + 10 * held
        graph = model.graph
        env: Env = {}
        self.held = {t.name for t in graph.initializer}
        types = [(i, self._input_type(i)) for i in graph.input if i.name not in self.held]
        self.body = Body.start(self.guesses.factors(), self.names.weights)
        for info, type in types:
            env[info.name] = None if type is None else self._input(info.name, type)
        self.initializers(graph, env)
        self.nodes(graph.node, env, {o.name for o in graph.output}, 0)
        self._results(graph, env)
        if self.problems:
            raise OnnxError(self.problems)
        return self.body

    # Inputs and results

    def _input_type(self, info: onnx.ValueInfoProto) -> TensorType | None:
        kind = info.type.WhichOneof("value")
        if kind != "tensor_type":
            what = (kind or "no type").replace("_type", "")
            why = f", and {beyond.KINDS[what]}" if what in beyond.KINDS else ""
            self.problems.append(Problem(f"the input `{info.name}` is of the kind {what}{why}",
                                         need="" if why else "a tensor"))  # fmt: skip
            return None
        tensor = info.type.tensor_type
        if tensor.elem_type in HELD:
            self.lacking[info.name] = tensor.elem_type
        try:
            dtype = dtype_of(tensor.elem_type)
        except Refused as refusal:
            self.problems.append(Problem(f"the input `{info.name}` has {refusal}",
                                         need=refusal.need))  # fmt: skip
            return None
        if not tensor.HasField("shape") and info.name not in self.fixed:
            self.problems.append(Problem(f"the input `{info.name}` has no shape",
                                         need="its number of dimensions"))  # fmt: skip
            return None
        dims = tensor.shape.dim
        if any(d.WhichOneof("value") == "dim_value" and d.dim_value < -1 for d in dims):
            self.problems.append(Problem(f"the input `{info.name}` has a negative size"))
            return None
        shape = tuple(self._size(d, f"{info.name}.{axis}") for axis, d in enumerate(dims))
        return TensorType(dtype, shape)

    def _size(self, dim: Any, place: str) -> Expr:
        """A size of an input; one that varies and has no name (or -1) is called by its place."""
        if dim.WhichOneof("value") == "dim_value" and dim.dim_value >= 0:
            return as_expr(dim.dim_value)
        named = any(c.isalnum() for c in dim.dim_param)
        wanted = dim.dim_param if named else place
        known = self.guesses.range_of(wanted)
        least, most = known.factors
        if least == most:
            return as_expr(least * known.step)
        if wanted in self.equal:
            parts = self.equal[wanted]
            return parts.substitute({name: self._named(name) for name in parts.symbols()})
        return self._named(wanted)

    def _named(self, size: str) -> Expr:
        """A size that varies, by its name in the source."""
        if size not in self.sizes:
            self.sizes[size] = self.names.size(size)
        return sym(self.sizes[size]) * self.guesses.range_of(size).step

    def _input(self, name: str, type: TensorType) -> Val | None:
        if name in self.fixed:
            return self.constant(name, np.asarray(self.fixed[name]))
        text = self.names.value(name, is_input=True)
        self.body.input(text, type)
        self.inputs.append((name, text, type))
        return Val(text, type, None, frozenset([name]), name, self.lacking.get(name, 0))

    def _results(self, graph: onnx.GraphProto, env: Env) -> None:
        for info in graph.output:
            found = env.get(info.name)
            if found is None:
                if info.name not in env:
                    self.problems.append(Problem(f"nothing computes the result `{info.name}`"))
                continue
            self.results.append((info.name, self.materialize(found), found.type))
            if found.rows is not None:
                self.counts[info.name] = found.rows
        for count in dict.fromkeys(rows.count for rows in self.counts.values()):
            name = next(n for n, rows in self.counts.items() if rows.count == count)
            self.results.append((f"{name}_count", count, self.body.tensor(count)))

    def initializers(self, graph: onnx.GraphProto, env: Env) -> None:
        """The stored tensors of a graph."""
        for tensor in graph.initializer:
            try:
                found = self.constant(tensor.name, array_of(tensor, self.folder))
                held = tensor.data_type if tensor.data_type in HELD else 0
                env[tensor.name] = replace(found, held=held)
            except Refused as refusal:
                env[tensor.name] = None
                self.problems.append(refusal.at("", ""))
        for sparse in graph.sparse_initializer:
            env[sparse.values.name] = None
            self.problems.append(Problem(f"the tensor `{sparse.values.name}` is sparse",
                                         need="dense initializers"))  # fmt: skip

    # Nodes

    def nodes(
        self, nodes: Sequence[onnx.NodeProto], env: Env, wanted: set[str], depth: int
    ) -> None:
        """Translate the nodes that `wanted` needs. Problems are kept, and translation goes on."""
        for node in needed(nodes, wanted):
            try:
                self.node(node, env, depth)
            except Refused as refusal:
                values = [v for i in node.input if i and (v := env.get(i)) is not None]
                refusal.need = refusal.need or self._written_in(node, values)
                self.problems.append(refusal.at(node.op_type, node.name or node.output[0]))
                self.guesses.note(node, values)
                env.update({name: None for name in node.output if name})

    def node(self, proto: onnx.NodeProto, env: Env, depth: int) -> None:
        """One node: folded, written by its record, or replaced by its function. Raises Refused."""
        self.count += 1
        if self.count > self.most or depth > MAX_DEPTH:
            raise OnnxError([Problem("functions and loops of this model unfold without end",
                                     need=f"at most {self.most} nodes, {MAX_DEPTH} deep")])
        missing = [i for i in proto.input if i and i not in env]
        if missing:
            raise Refused(f"nothing before it computes its input `{missing[0]}`")
        if any(i and env[i] is None for i in proto.input):
            env.update({name: None for name in proto.output if name})
            return  # what is wrong with that input has been said
        counted.refuse_branches(proto, env)
        with _faults_refused():
            if control.translate(self, proto, env, depth):
                return
        node = self._node(proto, env)
        counted.refuse_size(node)
        folded = fold(node)
        if folded is not None:
            self._bind(proto, env, [self.constant(name, array, node.depends)
                                    for name, array in zip(proto.output, folded, strict=False)])
            return
        self._write(proto, node, env, depth)

    def _written_in(self, proto: onnx.NodeProto, values: Sequence[Val]) -> str:
        """What is needed where an exporter wrote what several sizes make into a reshape: them."""
        if proto.op_type != "Reshape" or len(values) < 2 or values[1].known is None:
            return ""
        asked = sizes_in(values[1].known)
        rest = elements(values[0].shape) - elements(asked)
        known = {new: old for old, new in self.sizes.items()}
        names = [f"`{known[n]}`" for n in sorted(rest.symbols()) if n in known]
        if len(names) < 2:
            return ""
        if any(v.as_int() == -1 for v in asked):
            return f"multiples for `sizes=`: of one of {', '.join(names)}"
        return f"the sizes that it was exported for, as `sizes=`: of {', '.join(names)}"

    def _write(self, proto: onnx.NodeProto, node: Node, env: Env, depth: int) -> None:
        record = records().get(schemas.full_name(proto))
        local = self.functions.get((proto.domain, proto.op_type))
        if local is not None:
            return control.inline(self, local, proto, env, depth)
        if record is None:
            function = schemas.function_of(proto, node)
            if function is not None:
                return control.inline(self, function, proto, env, depth)
            why = beyond.reason(proto.op_type)
            raise Refused(why or "this op is not supported", "" if why else "a record for it")
        with _faults_refused():
            written = record.write(node)
        given = {a.name for a in proto.attribute}
        schemas.require_read(node, given - record.unread)
        self._bind(proto, env, counted.carried(node, self._values(node, written)))

    def _node(self, proto: onnx.NodeProto, env: Env) -> Node:
        values = [env[i] if i else None for i in proto.input]
        version = self.opsets.get(proto.domain or "ai.onnx", 1)
        attributes = schemas.attributes(proto, version, self.folder)
        hint = next((o for o in proto.output if o), "v")
        return Node(proto.op_type, proto.name, version, attributes, values, list(proto.output),
                    self.body, self.names.value, self.materialize, self.stored, self.constant,
                    self.held.__contains__, hint, _layer_of(proto, hint))  # fmt: skip

    def _values(self, node: Node, written: Written) -> list[Val]:
        items = [written] if isinstance(written, str | Val) else list(written)
        hints = [o or "unused" for o in node.outputs]
        return [
            item if isinstance(item, Val) else node.let(hint, item)
            for item, hint in zip(items, hints, strict=False)
        ]

    def _bind(self, proto: onnx.NodeProto, env: Env, values: Sequence[Val]) -> None:
        for number, name in enumerate(proto.output):
            if not name:
                continue
            if number >= len(values):
                raise Refused(f"result {number}, `{name}`, is not translated")
            env[name] = values[number]

    # Constants

    def constant(
        self, name: str, array: np.ndarray[Any, Any], depends: frozenset[str] = frozenset()
    ) -> Val:
        """A value that is known. Raises Refused for a dtype that the language lacks."""
        dtype = DTYPE_OF_SIZES if array.dtype == object else from_numpy(array.dtype)
        if dtype is None:
            raise Refused(f"`{name}` has the element type {array.dtype}",
                          f"the dtype {array.dtype} in the language")
        shape = tuple(map(as_expr, array.shape))
        return Val("", TensorType(dtype, shape), array, depends, name)

    def materialize(self, value: Val) -> str:
        """The expression of a value; a known one becomes a literal, or a tensor of the file."""
        if value.text:
            return value.text
        known = value.known
        assert known is not None
        if known.dtype == object:
            return _stacked(known)
        if not known.shape:
            return f"{value.dtype}({literal(known[()])})"
        return self._weight(value, known)

    def stored(self, value: Val) -> str:
        """The same, where a known scalar is a tensor of the file too."""
        if value.text or value.known is None or value.known.dtype == object:
            return self.materialize(value)
        return self._weight(value, value.known)

    def _weight(self, value: Val, known: np.ndarray[Any, Any]) -> str:
        if value.name in self.texts and self.arrays[self.texts[value.name]] is known:
            return weight_path(self.texts[value.name], self.names.weights)
        key = safe_key(value.name, self.arrays)
        self.arrays[key] = known
        self.texts[value.name] = key
        self.body.weight(key, value.dtype, known.shape)
        return weight_path(key, self.names.weights)


def _stacked(known: np.ndarray[Any, Any]) -> str:
    """Sizes as a tensor."""
    items = [f"i64({size_text(v)})" for v in known.reshape(-1)]
    if not known.shape:
        return items[0]
    shape = listed(known.shape)
    if known.size == 1:
        return f"reshape({items[0]}, {shape})"
    flat = f"stack([{', '.join(items)}])"
    return flat if known.ndim == 1 else f"reshape({flat}, {shape})"


def needed(nodes: Sequence[onnx.NodeProto], wanted: Iterable[str]) -> list[onnx.NodeProto]:
    """The nodes that some values depend on, in order."""
    alive, kept = set(wanted), []
    for node in reversed(nodes):
        if alive.isdisjoint(node.output):
            continue
        kept.append(node)
        alive.update(node.input)
        for attribute in node.attribute:
            for graph in (attribute.g, *attribute.graphs):
                alive.update(control.outer_names(graph))
    return kept[::-1]


def _layer_of(proto: onnx.NodeProto, output: str) -> str:
    """The path of the layer that a node belongs to, as exporters tell it: empty if they do not."""
    if "/" in output:
        return ""  # the result's own name says it
    if "/" in proto.name:
        return str(proto.name).rpartition("/")[0]
    for entry in proto.metadata_props:
        if entry.key == "pkg.torch.onnx.name_scopes":
            scopes = re.findall(r"'([\w.]*)'", entry.value)
            return scopes[-2] if len(scopes) > 1 else ""
    return ""


DTYPE_OF_SIZES: DType = from_numpy(np.int64)  # type: ignore[assignment]


@contextmanager
def _faults_refused() -> Iterator[None]:
    """What a node that is none of the standard's may raise, as Refused."""
    try:
        yield
    except OnnxError:
        raise
    except (
        ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError,
    ) as error:
        raise Refused(
            f"translating it failed with {type(error).__name__}: {error}",
            "a node as the standard has it; if it is one, this is a fault of stagefuse",
        ) from error
