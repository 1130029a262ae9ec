"""What the record of an op sees: the node, its inputs as typed values, the body it writes to."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np

from stagefuse.dsl.dims import Expr, as_expr
from stagefuse.dsl.dtypes import DType
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.types import TensorType

from .body import Body
from .errors import Refused
from .names import INDICES
from .text import literal, size_text

Shape: TypeAlias = tuple[Expr, ...]


@frozen
class Rows:
    """An axis of which only the first `count` positions are meant; `count` is a name of an i64."""

    axis: int
    count: str


@frozen
class Val:
    """A value of the model.

    `text` is the expression that names it; empty for a known one that nothing has named yet.
    `known` are its elements where they are known while importing: numbers, or sizes (`Expr`) in
    an array of objects. `depends` are the inputs of the model that its elements depend on. `held`
    is the element type in the model (`TensorProto.DataType`) if the language has none for it.
    `sizes` are those that its elements are, where they were made floats. `rows` tells of an axis
    that is as long as it can be.
    """

    text: str
    type: TensorType
    known: np.ndarray[Any, Any] | None = None
    depends: frozenset[str] = frozenset()
    name: str = ""
    held: int = 0
    sizes: np.ndarray[Any, Any] | None = None
    rows: Rows | None = None

    @property
    def dtype(self) -> DType:
        return self.type.dtype

    @property
    def shape(self) -> Shape:
        return self.type.shape

    @property
    def rank(self) -> int:
        return self.type.rank


@dataclass
class Node:
    """One node under translation."""

    op: str
    name: str
    opset: int
    attributes: dict[str, Any]
    inputs: list[Val | None]
    outputs: list[str]
    body: Body
    fresh: Callable[[str], str]
    materialize: Callable[[Val], str]
    stored: Callable[[Val], str]
    constant: Callable[[str, np.ndarray[Any, Any]], Val]
    is_held: Callable[[str], bool]
    hint: str = "v"
    scope: str = ""
    read: set[str] = field(default_factory=set)

    # Attributes. Each is marked as read; what no record reads is refused.

    def attr(self, name: str, default: Any = None) -> Any:
        self.read.add(name)
        return self.attributes.get(name, default)

    def has(self, name: str) -> bool:
        return name in self.attributes

    def one_of(self, name: str, default: Any, *supported: Any) -> Any:
        """An attribute of which only some values are supported. Raises Refused."""
        value = self.attr(name, default)
        if value not in supported:
            known = ", ".join(map(repr, supported))
            raise Refused(f"`{name}` is {value!r}", f"one of {known}", name)
        return value

    # Inputs

    def val(self, index: int) -> Val:
        """An input that must be there. Raises Refused."""
        found = self.maybe(index)
        if found is None:
            raise Refused(f"input {index} is missing")
        return found

    def maybe(self, index: int) -> Val | None:
        return self.inputs[index] if index < len(self.inputs) else None

    def vals(self) -> list[Val]:
        return [v for v in self.inputs if v is not None]

    def x(self, index: int = 0) -> str:
        """The expression of an input, of its own dtype."""
        return self.materialize(self.val(index))

    def x_of(self, value: Val) -> str:
        """The expression of a value that is no input."""
        return self.materialize(value)

    def layer(self, weight: Val, bias: Val | None) -> str | None:
        """The scope of a layer, where its tensors are named `NAME.weight` and `NAME.bias`."""
        scope, dot, last = weight.name.rpartition(".")
        if not dot or last != "weight" or weight.text or weight.known is None or not scope:
            return None
        if (bias is None) == self.is_held(f"{scope}.bias"):
            return None
        if bias is not None and (bias.name != f"{scope}.bias" or bias.text):
            return None
        paths = [self.materialize(v) for v in (weight, bias) if v is not None]
        ends = (".weight", ".bias")
        plain = all(p.endswith(e) for p, e in zip(paths, ends, strict=False))
        return paths[0].removesuffix(".weight") if plain else None

    def operand(self, index: int) -> str:
        """The same, but a known scalar is a plain literal, which takes the dtype that it meets."""
        found, other = self.val(index), self.maybe(0 if index else 1)
        known = found.known
        if known is None or known.size != 1 or other is None:
            return self.materialize(found)
        if other.known is not None or other.dtype != found.dtype or found.rank > other.rank:
            return self.materialize(found)
        if known.dtype == object:
            return f"i64({size_text(known.item())})"
        return literal(known.reshape(-1)[0])

    def number(self, index: int) -> np.generic | None:
        """The one element of an input that is known and has no more; sizes are none."""
        known = self.val(index).known
        if known is None or known.dtype == object or known.size != 1:
            return None
        found: np.generic = known.reshape(-1)[0]
        return found

    def known(self, index: int, what: str) -> np.ndarray[Any, Any]:
        """The elements of an input, which must be known while importing. Raises Refused."""
        found = self.val(index)
        if found.known is None:
            inputs = sorted(found.depends)
            raise Refused(
                f"`{what}` must be known while importing, and is computed from "
                + (", ".join(f"the input `{i}`" for i in inputs) or "weights in a way not folded"),
                "a constant; `fixed=` gives inputs their values", inputs=inputs,
            )
        return found.known

    def sizes(self, index: int, what: str) -> list[Expr]:
        """Known elements as integer expressions."""
        return [as_expr(_whole(v)) for v in self.known(index, what).reshape(-1)]

    def ints(self, index: int, what: str) -> list[int]:
        """Known elements as plain integers. Raises Refused."""
        found = [e.as_int() for e in self.sizes(index, what)]
        if None in found:
            raise Refused(f"`{what}` depends on sizes that vary", "constants")
        return [n for n in found if n is not None]

    def axes(self, index: int = 1, default: list[int] | None = None) -> list[int] | None:
        """Axes as an attribute (older opsets) or as an input; not negative."""
        given: list[int] | None = self.attr("axes")
        if given is None and self.maybe(index) is not None:
            given = self.ints(index, "axes")
        return default if given is None else list(given)

    # Writing

    def _fresh(self, hint: str) -> str:
        name = self.fresh(hint)
        self.body.hints[name] = f"{self.scope}/{hint}" if self.scope else hint
        return name

    def let(self, hint: str, text: str) -> Val:
        """A line `name = text`. Raises Refused."""
        name = self._fresh(hint)
        self.body.add(f"{name} = {text}")
        return Val(name, self.body.tensor(name), None, self.depends)

    def define(self, hint: str, indices: Sequence[str], text: str) -> Val:
        """A line in index notation: `name[indices] = text`. Raises Refused."""
        name = self._fresh(hint)
        self.body.add(f"{name}[{', '.join(indices)}] = {text}")
        return Val(name, self.body.tensor(name), None, self.depends)

    def many(self, hints: Sequence[str], text: str) -> list[Val]:
        """A line `a, b = text`."""
        names = [self._fresh(hint) for hint in hints]
        self.body.add(f"{', '.join(names)} = {text}")
        return [Val(n, self.body.tensor(n), None, self.depends) for n in names]

    def bound(self, value: Val, hint: str = "") -> str:
        """A name for a value: index notation reads names, not expressions."""
        text = self.materialize(value)
        if text in INDICES:
            return self.let(f"{text}_", text).text
        if text.replace("_", "a").isalnum() and text[0].isalpha():
            return text
        if re.match(rf"{self.body.weights}[.[]", text) and "(" not in text and '"' not in text:
            return text
        return self.let(hint or "c", text).text

    @property
    def depends(self) -> frozenset[str]:
        return frozenset[str]().union(*(v.depends for v in self.vals()))


def axis_of(axis: int, rank: int) -> int:
    """An axis, counted from 0; given below 0 it counts from the end. Raises Refused."""
    if not -rank <= axis < rank:
        raise Refused(f"axis {axis} of {rank} dimensions", attribute="axis")
    return axis % rank


def _whole(value: Any) -> Expr | int:
    return value if isinstance(value, Expr) else int(value)


__all__ = ["Node", "Rows", "Shape", "Val", "axis_of", "size_text"]
