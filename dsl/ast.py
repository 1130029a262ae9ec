"""The syntax tree: what the parser makes of a source, nothing resolved."""

from __future__ import annotations

from typing import TypeAlias

from .frozen import frozen
from .source import Span


@frozen
class Node:
    """A part of a syntax tree."""


# Expressions


@frozen
class Name(Node):
    span: Span
    name: str


@frozen
class IntLit(Node):
    span: Span
    value: int


@frozen
class FloatLit(Node):
    span: Span
    value: float


@frozen
class StrLit(Node):
    span: Span
    value: str


@frozen
class BoolLit(Node):
    span: Span
    value: bool


@frozen
class NoneLit(Node):
    span: Span


@frozen
class EllipsisLit(Node):
    """`...`, in a subscript."""

    span: Span


@frozen
class TupleExpr(Node):
    span: Span
    items: tuple[Expr, ...]


@frozen
class ListLit(Node):
    span: Span
    items: tuple[Expr, ...]


@frozen
class Attribute(Node):
    span: Span
    base: Expr
    name: str
    name_span: Span


@frozen
class Slice(Node):
    """`start:stop:step`, in a subscript."""

    span: Span
    start: Expr | None
    stop: Expr | None
    step: Expr | None


@frozen
class Subscript(Node):
    """`base[items]`: expressions, slices, None and `...`."""

    span: Span
    base: Expr
    items: tuple[Expr, ...]


@frozen
class Keyword(Node):
    span: Span
    name: str
    value: Expr


@frozen
class Call(Node):
    span: Span
    fn: Expr
    args: tuple[Expr, ...]
    kwargs: tuple[Keyword, ...]


@frozen
class Unary(Node):
    """op is `-`, `+`, `~` or `not`."""

    span: Span
    op: str
    operand: Expr


@frozen
class Binary(Node):
    """op is an arithmetic, bitwise or comparison operator, `and` or `or`."""

    span: Span
    op: str
    left: Expr
    right: Expr
    op_span: Span

    def chain(self) -> tuple[Expr, list[Binary]]:
        """The first operand of `a + b - c` and its operators from there on: what walks along them
        may be long."""
        first: Expr = self
        found: list[Binary] = []
        while isinstance(first, Binary):
            found.append(first)
            first = first.left
        return first, found[::-1]


@frozen
class Pipe(Node):
    """`left |> right`."""

    span: Span
    left: Expr
    right: Expr


@frozen
class RangeExpr(Node):
    """`start..stop`, or `start..=stop` if inclusive."""

    span: Span
    start: Expr
    stop: Expr
    inclusive: bool


@frozen
class IndexVar(Node):
    """An index of an index definition or reduction, with its stated range or None."""

    span: Span
    name: str
    range: RangeExpr | None


@frozen
class Reduction(Node):
    """`kind[indices] body`."""

    span: Span
    kind: str
    indices: tuple[IndexVar, ...]
    body: Expr


Expr: TypeAlias = (
    Name | IntLit | FloatLit | StrLit | BoolLit | NoneLit | EllipsisLit | TupleExpr | ListLit
    | Attribute | Slice | Subscript | Call | Unary | Binary | Pipe | RangeExpr | Reduction
)  # fmt: skip

# Types


@frozen
class Star(Node):
    """`*S` in a shape: any number of dimensions."""

    span: Span
    name: str


@frozen
class TypeExpr(Node):
    """`name[dims]`; `dims` is None where there are no brackets."""

    span: Span
    name: str
    dims: tuple[Expr | Star, ...] | None


@frozen
class NamedType(Node):
    """One of several results: `name: type`, or a bare type."""

    span: Span
    name: str | None
    type: TypeExpr


@frozen
class TupleType(Node):
    span: Span
    items: tuple[NamedType, ...]


# Statements


@frozen
class TargetTuple(Node):
    span: Span
    items: tuple[Target, ...]


Target: TypeAlias = Name | TargetTuple


@frozen
class Assign(Node):
    span: Span
    target: Target
    value: Expr


@frozen
class For(Node):
    span: Span
    target: Target
    iterable: Expr
    body: tuple[Stmt, ...]


@frozen
class Start(Node):
    """`name = value` of a scan: a carried value before the first step."""

    span: Span
    name: str
    name_span: Span
    value: Expr


@frozen
class Scan(Node):
    """`scan name in range with starts:`."""

    span: Span
    name: str
    name_span: Span
    range: Expr
    starts: tuple[Start, ...]
    body: tuple[Stmt, ...]


@frozen
class Branch(Node):
    span: Span
    condition: Expr
    body: tuple[Stmt, ...]


@frozen
class If(Node):
    span: Span
    branches: tuple[Branch, ...]
    orelse: tuple[Stmt, ...]


@frozen
class ExprStmt(Node):
    span: Span
    value: Expr


@frozen
class IndexDef(Node):
    """`name[indices] = value`, a definition; an update where name and indices have values."""

    span: Span
    name: str
    name_span: Span
    indices: tuple[IndexVar, ...]
    value: Expr


@frozen
class StepDef(Node):
    """`name[at, indices] = value`: what a step of a scan gives, at a position that it computes.

    Where the name has a value and no step is in the position, an update of items.
    """

    span: Span
    name: str
    name_span: Span
    at: Expr
    indices: tuple[IndexVar, ...]
    value: Expr


@frozen
class ItemAssign(Node):
    """`name[items] = value`: expressions, slices and `...`."""

    span: Span
    name: str
    name_span: Span
    items: tuple[Expr, ...]
    value: Expr


@frozen
class State(Node):
    """`state name: type = initial`: what a session keeps between calls."""

    span: Span
    name: str
    name_span: Span
    type: TypeExpr
    initial: Expr


Stmt: TypeAlias = (
    Assign | For | Scan | If | ExprStmt | IndexDef | StepDef | ItemAssign | State
)  # fmt: skip

# Items


@frozen
class Import(Node):
    span: Span
    name: str


@frozen
class Const(Node):
    span: Span
    name: str
    name_span: Span
    value: Expr


@frozen
class WeightsDecl(Node):
    span: Span
    name: str
    name_span: Span
    path: str
    path_span: Span


@frozen
class Param(Node):
    """`name: type = default`; a type named `weights`, `int`... is a constant's."""

    span: Span
    name: str
    type: TypeExpr
    default: Expr | None


@frozen
class Generic(Node):
    """`E: float` in the brackets of a function."""

    span: Span
    name: str
    dtype_class: str


@frozen
class WhereRange(Node):
    """`T in 1..=512`."""

    span: Span
    name: str
    range: RangeExpr


@frozen
class WhereFact(Node):
    """A comparison that holds for every call, such as `D % HEADS == 0`."""

    span: Span
    fact: Expr


Where: TypeAlias = WhereRange | WhereFact


@frozen
class Fn(Node):
    span: Span
    name: str
    name_span: Span
    generics: tuple[Generic, ...]
    params: tuple[Param, ...]
    result: TypeExpr | TupleType | None
    where: tuple[Where, ...]
    body: tuple[Stmt, ...]
    doc: str


@frozen
class Pipeline(Node):
    span: Span
    name: str
    name_span: Span
    params: tuple[Param, ...]
    result: TypeExpr | TupleType | None
    where: tuple[Where, ...]
    body: tuple[Stmt, ...]
    doc: str


Item: TypeAlias = Import | Const | WeightsDecl | Fn | Pipeline


@frozen
class Module(Node):
    """A source file."""

    span: Span
    doc: str
    items: tuple[Item, ...]
