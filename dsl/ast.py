"""The syntax tree: what the parser makes of a source, nothing resolved."""

from __future__ import annotations

from typing import TypeAlias

from .frozen import Frozen
from .source import Span

# Expressions


class Name(Frozen):
    span: Span
    name: str


class IntLit(Frozen):
    span: Span
    value: int


class FloatLit(Frozen):
    span: Span
    value: float


class StrLit(Frozen):
    span: Span
    value: str


class BoolLit(Frozen):
    span: Span
    value: bool


class NoneLit(Frozen):
    span: Span


class EllipsisLit(Frozen):
    """`...`, in a subscript."""

    span: Span


class TupleExpr(Frozen):
    span: Span
    items: tuple[Expr, ...]


class ListLit(Frozen):
    span: Span
    items: tuple[Expr, ...]


class Attribute(Frozen):
    span: Span
    base: Expr
    name: str
    name_span: Span


class Slice(Frozen):
    """`start:stop:step`, in a subscript."""

    span: Span
    start: Expr | None
    stop: Expr | None
    step: Expr | None


class Subscript(Frozen):
    """`base[items]`: expressions, slices, None and `...`."""

    span: Span
    base: Expr
    items: tuple[Expr, ...]


class Keyword(Frozen):
    span: Span
    name: str
    value: Expr


class Call(Frozen):
    span: Span
    fn: Expr
    args: tuple[Expr, ...]
    kwargs: tuple[Keyword, ...]


class Unary(Frozen):
    """op is `-`, `+`, `~` or `not`."""

    span: Span
    op: str
    operand: Expr


class Binary(Frozen):
    """op is an arithmetic, bitwise or comparison operator, `and` or `or`."""

    span: Span
    op: str
    left: Expr
    right: Expr
    op_span: Span


class Pipe(Frozen):
    """`left |> right`."""

    span: Span
    left: Expr
    right: Expr


class RangeExpr(Frozen):
    """`start..stop`, or `start..=stop` if inclusive."""

    span: Span
    start: Expr
    stop: Expr
    inclusive: bool


class IndexVar(Frozen):
    """An index of an index definition or reduction, with its stated range or None."""

    span: Span
    name: str
    range: RangeExpr | None


class Reduction(Frozen):
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


class Star(Frozen):
    """`*S` in a shape: any number of dimensions."""

    span: Span
    name: str


class TypeExpr(Frozen):
    """`name[dims]`; `dims` is None where there are no brackets."""

    span: Span
    name: str
    dims: tuple[Expr | Star, ...] | None


class NamedType(Frozen):
    """One of several results: `name: type`, or a bare type."""

    span: Span
    name: str | None
    type: TypeExpr


class TupleType(Frozen):
    span: Span
    items: tuple[NamedType, ...]


# Statements


class TargetTuple(Frozen):
    span: Span
    items: tuple[Target, ...]


Target: TypeAlias = Name | TargetTuple


class Assign(Frozen):
    span: Span
    target: Target
    value: Expr


class For(Frozen):
    span: Span
    target: Target
    iterable: Expr
    body: tuple[Stmt, ...]


class Start(Frozen):
    """`name = value` of a scan: a carried value before the first step."""

    span: Span
    name: str
    name_span: Span
    value: Expr


class Scan(Frozen):
    """`scan name in range with starts:`."""

    span: Span
    name: str
    name_span: Span
    range: Expr
    starts: tuple[Start, ...]
    body: tuple[Stmt, ...]


class Branch(Frozen):
    span: Span
    condition: Expr
    body: tuple[Stmt, ...]


class If(Frozen):
    span: Span
    branches: tuple[Branch, ...]
    orelse: tuple[Stmt, ...]


class ExprStmt(Frozen):
    span: Span
    value: Expr


class IndexDef(Frozen):
    """`name[indices] = value`, a definition; an update where name and indices have values."""

    span: Span
    name: str
    name_span: Span
    indices: tuple[IndexVar, ...]
    value: Expr


class StepDef(Frozen):
    """`name[at, indices] = value`: what a step of a scan gives, at a position that it computes.

    Where the name has a value and no step is in the position, an update of items.
    """

    span: Span
    name: str
    name_span: Span
    at: Expr
    indices: tuple[IndexVar, ...]
    value: Expr


class ItemAssign(Frozen):
    """`name[items] = value`: expressions, slices and `...`."""

    span: Span
    name: str
    name_span: Span
    items: tuple[Expr, ...]
    value: Expr


class State(Frozen):
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


class Import(Frozen):
    span: Span
    name: str


class Const(Frozen):
    span: Span
    name: str
    name_span: Span
    value: Expr


class WeightsDecl(Frozen):
    span: Span
    name: str
    name_span: Span
    path: str
    path_span: Span


class Param(Frozen):
    """`name: type = default`; a type named `weights`, `int`... is a constant's."""

    span: Span
    name: str
    type: TypeExpr
    default: Expr | None


class Generic(Frozen):
    """`E: float` in the brackets of a function."""

    span: Span
    name: str
    dtype_class: str


class WhereRange(Frozen):
    """`T in 1..=512`."""

    span: Span
    name: str
    range: RangeExpr


class WhereFact(Frozen):
    """A comparison that holds for every call, such as `D % HEADS == 0`."""

    span: Span
    fact: Expr


Where: TypeAlias = WhereRange | WhereFact


class Fn(Frozen):
    span: Span
    name: str
    name_span: Span
    generics: tuple[Generic, ...]
    params: tuple[Param, ...]
    result: TypeExpr | TupleType | None
    where: tuple[Where, ...]
    body: tuple[Stmt, ...]
    doc: str


class Pipeline(Frozen):
    span: Span
    name: str
    name_span: Span
    params: tuple[Param, ...]
    result: TypeExpr | TupleType | None
    where: tuple[Where, ...]
    body: tuple[Stmt, ...]
    doc: str


Item: TypeAlias = Import | Const | WeightsDecl | Fn | Pipeline


class Module(Frozen):
    """A source file."""

    span: Span
    doc: str
    items: tuple[Item, ...]
