"""What an expression can be while a program is checked.

Only tensors exist when a pipeline runs; everything else is known while compiling.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, TypeAlias, TypeGuard

from stagefuse.dsl.dims import Expr, const
from stagefuse.dsl.dtypes import DType
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.program import ValueId
from stagefuse.dsl.signature import Builtin
from stagefuse.dsl.types import TensorType

if TYPE_CHECKING:
    from stagefuse.dsl import ast

    from .modules import ModuleScope

Axis: TypeAlias = tuple[str, Expr]
"""An index of index notation: its symbol and the length of its range."""
Space: TypeAlias = tuple[Axis, ...]


class Value:
    """Anything an expression evaluates to."""


@frozen
class Poison(Value):
    """The value of an expression that is wrong and has been reported."""


@frozen
class NoneValue(Value):
    """`None`."""


@frozen
class Number(Value):
    """A literal or folded constant without a dtype of its own."""

    value: int | float | bool


@frozen
class Dim(Value):
    """An integer expression over dimensions and indices: i64 where it meets tensors."""

    expr: Expr
    space: Space = ()


@frozen
class Tensor(Value):
    """A value of the running pipeline.

    Inside index notation it has one leading axis per index of `space`, which the language does
    not show: there it is a scalar.
    """

    id: ValueId
    full_type: TensorType
    space: Space = ()

    @property
    def type(self) -> TensorType:
        """The type that the language shows."""
        return TensorType(self.full_type.dtype, self.full_type.shape[len(self.space) :])


@frozen
class Text(Value):
    value: str


@frozen
class DTypeValue(Value):
    dtype: DType


@frozen
class Items(Value):
    """A tuple (`bracket` "(") or a list ("["); a tuple of results may have names."""

    items: tuple[Value, ...]
    bracket: str = "("
    names: tuple[str | None, ...] = ()


@frozen
class Interval(Value):
    """`a..b`: from `start` to before `stop`."""

    start: Expr
    stop: Expr


@frozen
class WeightsHandle:
    """An opened weights file as the checker sees it: headers by tensor key.

    `unread` has the keys of tensors whose dtypes the language lacks, with what the file says.
    """

    name: str
    path: str
    tensors: dict[str, tuple[DType, tuple[int, ...]]]
    unread: dict[str, str] = field(default_factory=dict)

    @cached_property
    def below(self) -> dict[str, dict[str, None]]:
        """The names one level below every prefix, in the file's order."""
        found: dict[str, dict[str, None]] = {"": {}}
        for key in self.tensors:
            parts = key.split(".")
            for depth, part in enumerate(parts):
                found.setdefault(".".join(parts[:depth]), {})[part] = None
        return found


@frozen
class Scope(Value):
    """Part of a weights file: the tensors below `prefix`, and perhaps one of that very name."""

    handle: WeightsHandle
    prefix: str

    @property
    def leaf(self) -> TensorType | None:
        """The type of the tensor with this very name."""
        header = self.handle.tensors.get(self.prefix)
        if header is None:
            return None
        dtype, shape = header
        return TensorType(dtype, tuple(const(n) for n in shape))

    def path_of(self, name: str) -> str:
        return f"{self.prefix}.{name}" if self.prefix else name

    def children(self) -> list[str]:
        """The names one level down, in the file's order."""
        return list(self.handle.below.get(self.prefix, {}))

    def child(self, name: str) -> Scope | None:
        path = self.path_of(name)
        if path in self.handle.tensors or path in self.handle.below:
            return Scope(self.handle, path)
        return None


@dataclass(frozen=True, eq=False)
class Function(Value):
    """An `fn` of a module, or a pipeline, called as one."""

    node: ast.Fn
    module: ModuleScope


@dataclass(frozen=True, eq=False)
class BuiltinFunction(Value):
    record: Builtin


@frozen
class Special(Value):
    """A function of the checker itself, such as `has`."""

    name: str


@dataclass(frozen=True, eq=False)
class Module(Value):
    name: str
    scope: ModuleScope


POISON = Poison()
NONE = NoneValue()


def is_poison(value: Value) -> bool:
    """Whether an error inside `value` has been reported already."""
    if isinstance(value, Items):
        return any(is_poison(item) for item in value.items)
    return isinstance(value, Poison)


def describe(value: Value) -> str:
    """What the value is, in words for a message: `f32[B, 3]`, the number 3, a list."""
    match value:
        case Tensor():
            return str(value.type)
        case Scope():
            leaf = value.leaf
            return (
                str(leaf)
                if leaf
                else f"the weights scope `{value.handle.name}`"
                + (f" at `{value.prefix}`" if value.prefix else "")
            )
        case Number(value=bool() as truth):
            return f"the constant {truth}"
        case Number():
            return f"the number {value.value}"
        case Dim():
            return f"the size {value.expr}" if not value.space else f"the index {value.expr}"
        case Text():
            return f'the text "{value.value}"'
        case DTypeValue():
            return f"the dtype {value.dtype}"
        case Items():
            kind = "tuple" if value.bracket == "(" else "list"
            return f"a {kind} of {len(value.items)}"
        case Interval():
            return f"the range {value.start}..{value.stop}"
        case Function():
            return f"the function `{value.node.name}`"
        case BuiltinFunction():
            return f"the built-in `{value.record.name}`"
        case Special():
            return f"the built-in `{value.name}`"
        case Module():
            return f"the module `{value.name}`"
        case NoneValue():
            return "None"
    return "a value that is wrong"


def is_tensor(value: Value | None) -> TypeGuard[Tensor | Scope]:
    """Whether it is a tensor, be it one of the weights."""
    return isinstance(value, Tensor) or (isinstance(value, Scope) and value.leaf is not None)
