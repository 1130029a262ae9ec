"""What a rule is, and what it sees of the graph under construction."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeAlias

from stagefuse.compiler.graph import Map, Primitive, Ref, Scalar, View
from stagefuse.compiler.graph_builder import Builder
from stagefuse.dsl.dims import Expr
from stagefuse.dsl.dtypes import DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.types import TensorType

Number: TypeAlias = float | int | bool
Made: TypeAlias = Ref | tuple[Ref, ...] | None
Simplify: TypeAlias = Callable[[Primitive, Sequence[Ref], Sequence[TensorType]], tuple[Ref, ...]]
"""Adds a primitive whose operands are simplified, or what it simplifies to."""


@frozen
class Match:
    """A node that is about to be added: its operands are simplified, it is not yet in the graph.

    `once` says of each operand whether nothing else reads it.
    """

    b: Builder
    primitive: Primitive
    operands: tuple[Ref, ...]
    types: tuple[TensorType, ...]
    once: tuple[bool, ...]
    simplify: Simplify

    @property
    def type(self) -> TensorType:
        return self.types[0]

    @property
    def dtype(self) -> DType:
        """That of the last operand: what the function computes in."""
        return self.b.type(self.operands[-1]).dtype

    @property
    def facts(self) -> Facts:
        return self.b.facts

    def below(self, ref: Ref) -> Primitive:
        return self.b.graph.nodes[ref.node].primitive

    def under(self, ref: Ref) -> tuple[Ref, ...]:
        return self.b.graph.nodes[ref.node].operands

    def number(self, ref: Ref) -> Number | None:
        """The one value of all elements, if it is known."""
        primitive = self.below(ref)
        while isinstance(primitive, View) and not primitive.guard:
            (ref,) = self.under(ref)
            primitive = self.below(ref)
        return primitive.value if isinstance(primitive, Scalar) else None

    def args(self, ref: Ref, *fns: str) -> tuple[Ref, ...] | None:
        """The operands of a map of one of these functions."""
        primitive = self.below(ref)
        is_one = isinstance(primitive, Map) and primitive.fn in fns
        return self.under(ref) if is_one else None

    def map(self, fn: str, *operands: Ref, dtype: DType | None = None) -> Ref:
        """A pointwise function, simplified; its dtype is the node's unless given."""
        shape = self.b.type(operands[0]).shape
        return self.simplify(Map(fn), operands, (TensorType(dtype or self.type.dtype, shape),))[0]

    def full(self, value: Number, dtype: DType | None = None) -> Ref:
        """The node's shape filled with a number."""
        return self.b.scalar(value, dtype or self.type.dtype, self.type.shape)

    def fits(self, shape: Sequence[Expr]) -> bool:
        """Whether a shape is the node's."""
        own = self.type.shape
        return len(shape) == len(own) and all(map(self.facts.prove_eq, shape, own))


@frozen
class Rule:
    """A rewriting of one node: `rewrite` gives what replaces it, or None where a guard fails.

    It looks at primitives of class `kind`, of maps at those of `fns` (none: all). `because` is
    the identity that makes it exact, and for a rule that saves no node what it saves.
    """

    name: str
    kind: type
    fns: tuple[str, ...]
    rewrite: Callable[[Match], Made]
    because: str
