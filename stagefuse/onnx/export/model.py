"""The ONNX model under construction: nodes, constants, names."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import numpy as np
import onnx

from stagefuse.dsl.dims import Expr, const
from stagefuse.dsl.dtypes import BF16, BOOL, F32, I64, DType
from stagefuse.dsl.frozen import frozen

Array: TypeAlias = np.ndarray[Any, Any]

ELEMENT: dict[str, int] = {
    "f32": 1, "u8": 2, "i8": 3, "u16": 4, "i16": 5, "i32": 6, "i64": 7, "bool": 9, "f16": 10,
    "f64": 11, "u32": 12, "u64": 13, "bf16": 16, "f8e4m3": 17, "f8e5m2": 19,
}  # fmt: skip
"""`TensorProto.DataType` by dtype. Source: onnx.proto."""


@frozen
class Tensor:
    """A value of the model. Its shape broadcasts to that of the graph's value it stands for.

    `known` are its elements where it is a constant.
    """

    name: str
    dtype: DType
    shape: tuple[Expr, ...]
    known: Array | None = None

    @property
    def rank(self) -> int:
        return len(self.shape)


class Unsupported(Exception):
    """A node without an ONNX form, or without one in this opset."""

    def __init__(self, message: str, opset: int = 0) -> None:
        super().__init__(message)
        self.message, self.opset = message, opset


def carrier(dtype: DType) -> DType:
    """The dtype that holds a value in the model.

    bf16 and f8 are stored and converted by ONNX, and computed with by few engines: they are f32
    between, as in our own kernels.
    """
    return F32 if dtype.is_float and (dtype.bits == 8 or dtype == BF16) else dtype


class Model:
    """Nodes in order, each different one once; constants by content; unique names."""

    def __init__(self, opset: int) -> None:
        self.opset = opset
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, Array] = {}
        self.elements: dict[str, int] = {}
        self.values: dict[str, Tensor] = {}
        self.reshaped: dict[str, Tensor] = {}  # by a reshape's result, what it is of
        self.path, self.result = "", ""
        self._taken: set[str] = set()
        self._made: dict[Any, tuple[Tensor, ...]] = {}

    def begin(self, around: Model) -> None:
        """Become the body of a loop in another model, whose names, constants and values it has."""
        self.constants, self.elements = around.constants, around.elements
        self.values, self._taken = around.values, around._taken
        self._made, self.path = dict(around._made), around.path

    def need(self, opset: int, what: str) -> None:
        """Raises Unsupported if the opset is older."""
        if self.opset < opset:
            raise Unsupported(f"{what} needs opset {opset}", opset)

    def fresh(self, name: str) -> str:
        """A name that nothing has yet."""
        found, count = name, 1
        while found in self._taken:
            count += 1
            found = f"{name}_{count}"
        self._taken.add(found)
        return found

    def node(
        self,
        op: str,
        inputs: Sequence[Tensor | None],
        dtype: DType,
        shape: Sequence[Expr],
        **attributes: Any,
    ) -> Tensor:
        """One node with one result."""
        return self.many(op, inputs, [(dtype, tuple(shape))], **attributes)[0]

    def many(
        self,
        op: str,
        inputs: Sequence[Tensor | None],
        results: Sequence[tuple[DType, tuple[Expr, ...]]],
        **attributes: Any,
    ) -> tuple[Tensor, ...]:
        """One node; the same node again gives the same results."""
        names = [t.name if t else "" for t in inputs]
        key = (
            op,
            tuple(names),
            tuple((d.name, s) for d, s in results),
            repr([(k, _content(v)) for k, v in sorted(attributes.items())]),
        )
        if key in self._made:
            return self._made[key]
        own = self.fresh(f"{self.path}{op}")
        outputs = [own, *(self.fresh(f"{self.path}{op}.{n}") for n in range(1, len(results)))]
        self.nodes.append(onnx.helper.make_node(op, names, outputs, name=own, **attributes))
        made = tuple(Tensor(n, d, s) for n, (d, s) in zip(outputs, results, strict=True))
        self.values.update((t.name, t) for t in made)
        self._made[key] = made
        return made

    def copy(self, x: Tensor, name: str = "Identity") -> Tensor:
        """The same value under a name that nothing else has: a result of its own."""
        own = self.fresh(f"{self.path}{name}")
        self.nodes.append(onnx.helper.make_node("Identity", [x.name], [own], name=own))
        made = self.values[own] = Tensor(own, x.dtype, x.shape)
        return made

    def input(self, name: str, dtype: DType, shape: Sequence[Expr]) -> Tensor:
        made = Tensor(self.fresh(name), dtype, tuple(shape))
        self.values[made.name] = made
        return made

    def weight(self, name: str, array: Array, dtype: DType) -> Tensor:
        """A tensor of a weights file under its own name."""
        name = self.fresh(name)
        self.constants[name], self.elements[name] = array, ELEMENT[dtype.name]
        return Tensor(name, dtype, tuple(map(const, array.shape)))

    def weight_as(self, x: Tensor, shape: Sequence[int]) -> Tensor:
        """A stored tensor under another shape, with the same elements in order."""
        array = self.constants[x.name].reshape(shape)
        key = ("weight", x.name, tuple(shape))
        if key not in self._made:
            self._made[key] = (self.weight(f"{x.name}.flat", array, x.dtype),)
        return self._made[key][0]

    def constant(self, values: Any, dtype: DType = I64) -> Tensor:
        """A constant, called after what it holds; the same one again is the same tensor."""
        array = np.ascontiguousarray(np.asarray(values).astype(dtype.numpy)).reshape(
            np.shape(values)
        )
        key = ("constant", dtype.name, array.shape, hashlib.sha256(array.tobytes()).digest())
        if key not in self._made:
            flat = [str(v) for v in array.reshape(-1)[:5].tolist()]
            text = "_".join([dtype.name, *(flat if array.size < 5 else ["constant"])])
            name = self.fresh(text)
            self.constants[name], self.elements[name] = array, ELEMENT[dtype.name]
            shape = tuple(map(const, array.shape))
            self._made[key] = (Tensor(name, dtype, shape, array),)
        return self._made[key][0]

    def cast(self, x: Tensor, dtype: DType) -> Tensor:
        """ONNX's own conversion."""
        if x.dtype == dtype:
            return x
        if x.known is not None and x.known.size == 1 and dtype.bits > 8 and x.dtype != BOOL:
            return self.constant(x.known, dtype)
        return self.node("Cast", [x], dtype, x.shape, to=ELEMENT[dtype.name])

    def renamed(self, old: Tensor, new: Tensor) -> None:
        """Equal nodes give the renamed tensor from now on."""
        if old.name in self.reshaped:
            self.reshaped[new.name] = self.reshaped.pop(old.name)
        for key, made in self._made.items():
            if old in made:
                self._made[key] = tuple(new if t == old else t for t in made)

    def rename(self, old: str, new: str, since: int = 0) -> str:
        """Call a node's result something else, if that name is free; the name it has then.

        Nodes before `since` don't use it.
        """
        new = self.fresh(new)
        _rename(self.nodes[since:], old, new)
        self.values[new] = self.values.pop(old)
        return new


def _content(attribute: Any) -> Any:
    """What an attribute holds: the text of a graph or tensor may say only where it lies."""
    if isinstance(attribute, onnx.GraphProto | onnx.TensorProto):
        return attribute.SerializeToString(deterministic=True)
    return attribute


def _rename(nodes: Iterable[onnx.NodeProto], old: str, new: str) -> None:
    """Call a value something else, in the bodies of loops too."""
    for proto in nodes:
        for names in (proto.input, proto.output):
            for place, name in enumerate(names):
                if name == old:
                    names[place] = new
        for attribute in proto.attribute:
            _rename(attribute.g.node, old, new)
