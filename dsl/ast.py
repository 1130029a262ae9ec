"""The syntax tree: what the parser makes of a source, nothing resolved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from .source import Span

# Expressions


@dataclass(frozen=True, slots=True)
class Name:
    span: Span
    name: str


@dataclass(frozen=True, slots=True)
class IntLit:
    span: Span
    value: int


@dataclass(frozen=True, slots=True)
class FloatLit:
    span: Span
    value: float


@dataclass(frozen=True, slots=True)
class StrLit:
    span: Span
    value: str


@dataclass(frozen=True, slots=True)
class BoolLit:
    span: Span
    value: bool


@dataclass(frozen=True, slots=True)
class NoneLit:
    span: Span


@dataclass(frozen=True, slots=True)
class EllipsisLit:
    """`...`, in a subscript."""

    span: Span


@dataclass(frozen=True, slots=True)
class TupleExpr:
    span: Span
    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class ListLit:
    span: Span
    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Attribute:
    span: Span
    base: Expr
    name: str
    name_span: Span


@dataclass(frozen=True, slots=True)
class Slice:
    """`start:stop:step`, in a subscript."""

    span: Span
    start: Expr | None
    stop: Expr | None
    step: Expr | None


@dataclass(frozen=True, slots=True)
class Subscript:
    """`base[items]`: expressions, slices, None and `...`."""

    span: Span
    base: Expr
    items: tuple[Expr, ...]


@dataclass(frozen=True, slots=True)
class Keyword:
    span: Span
    name: str
    value: Expr


@dataclass(frozen=True, slots=True)
class Call:
    span: Span
    fn: Expr
    args: tuple[Expr, ...]
    kwargs: tuple[Keyword, ...]


@dataclass(frozen=True, slots=True)
class Unary:
    """op is `-`, `+`, `~` or `not`."""

    span: Span
    op: str
    operand: Expr


@dataclass(frozen=True, slots=True)
class Binary:
    """op is an arithmetic, bitwise or comparison operator, `and` or `or`."""

    span: Span
    op: str
    left: Expr
    right: Expr
    op_span: Span


@dataclass(frozen=True, slots=True)
class Pipe:
    """`left |> right`."""

    span: Span
    left: Expr
    right: Expr


@dataclass(frozen=True, slots=True)
class RangeExpr:
    """`start..stop`, or `start..=stop` if inclusive."""

    span: Span
    start: Expr
    stop: Expr
    inclusive: bool


@dataclass(frozen=True, slots=True)
class IndexVar:
    """An index of an index definition or reduction, with its stated range or None."""

    span: Span
    name: str
    range: RangeExpr | None


@dataclass(frozen=True, slots=True)
class Reduction:
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


@dataclass(frozen=True, slots=True)
class Star:
    """`*S` in a shape: any number of dimensions."""

    span: Span
    name: str


@dataclass(frozen=True, slots=True)
class TypeExpr:
    """`name[dims]`; `dims` is None where there are no brackets."""

    span: Span
    name: str
    dims: tuple[Expr | Star, ...] | None


@dataclass(frozen=True, slots=True)
class NamedType:
    """One of several results: `name: type`, or a bare type."""

    span: Span
    name: str | None
    type: TypeExpr


@dataclass(frozen=True, slots=True)
class TupleType:
    span: Span
    items: tuple[NamedType, ...]


# Statements


@dataclass(frozen=True, slots=True)
class TargetTuple:
    span: Span
    items: tuple[Target, ...]


Target: TypeAlias = Name | TargetTuple


@dataclass(frozen=True, slots=True)
class Assign:
    span: Span
    target: Target
    value: Expr


@dataclass(frozen=True, slots=True)
class For:
    span: Span
    target: Target
    iterable: Expr
    body: tuple[Stmt, ...]


@dataclass(frozen=True, slots=True)
class Branch:
    span: Span
    condition: Expr
    body: tuple[Stmt, ...]


@dataclass(frozen=True, slots=True)
class If:
    span: Span
    branches: tuple[Branch, ...]
    orelse: tuple[Stmt, ...]


@dataclass(frozen=True, slots=True)
class ExprStmt:
    span: Span
    value: Expr


@dataclass(frozen=True, slots=True)
class IndexDef:
    """`name[indices] = value`."""

    span: Span
    name: str
    name_span: Span
    indices: tuple[IndexVar, ...]
    value: Expr


Stmt: TypeAlias = Assign | For | If | ExprStmt | IndexDef

# Items


@dataclass(frozen=True, slots=True)
class Import:
    span: Span
    name: str


@dataclass(frozen=True, slots=True)
class Const:
    span: Span
    name: str
    name_span: Span
    value: Expr


@dataclass(frozen=True, slots=True)
class WeightsDecl:
    span: Span
    name: str
    name_span: Span
    path: str
    path_span: Span


@dataclass(frozen=True, slots=True)
class Param:
    """`name: type = default`; a type named `weights`, `int`... is a constant's."""

    span: Span
    name: str
    type: TypeExpr
    default: Expr | None


@dataclass(frozen=True, slots=True)
class Generic:
    """`E: float` in the brackets of a function."""

    span: Span
    name: str
    dtype_class: str


@dataclass(frozen=True, slots=True)
class WhereRange:
    """`T in 1..=512`."""

    span: Span
    name: str
    range: RangeExpr


@dataclass(frozen=True, slots=True)
class WhereFact:
    """A comparison that holds for every call, such as `D % HEADS == 0`."""

    span: Span
    fact: Expr


Where: TypeAlias = WhereRange | WhereFact


@dataclass(frozen=True, slots=True)
class Fn:
    span: Span
    name: str
    name_span: Span
    generics: tuple[Generic, ...]
    params: tuple[Param, ...]
    result: TypeExpr | TupleType | None
    where: tuple[Where, ...]
    body: tuple[Stmt, ...]
    doc: str


@dataclass(frozen=True, slots=True)
class Pipeline:
    span: Span
    name: str
    name_span: Span
    params: tuple[Param, ...]
    result: TypeExpr | TupleType | None
    where: tuple[Where, ...]
    body: tuple[Stmt, ...]
    doc: str


Item: TypeAlias = Import | Const | WeightsDecl | Fn | Pipeline


@dataclass(frozen=True, slots=True)
class Module:
    """A source file."""

    span: Span
    doc: str
    items: tuple[Item, ...]
