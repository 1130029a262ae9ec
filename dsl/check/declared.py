"""Declared types: what a signature says, with variables for sizes and dtypes."""

from __future__ import annotations

from dataclasses import dataclass, field

from stagefuse.dsl import ast
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, mod, sym
from stagefuse.dsl.dtypes import CLASSES, DTYPES, DType, dtype_named
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.source import Span

from . import expressions
from .apply import size
from .frame import Frame
from .report import Failed, nearest, text_of
from .unify import Declared, variable
from .values import Poison, describe

CONSTANTS = ("int", "float", "bool", "str", "weights")
_HINTS = {"int": "i64", "float": "f32", "bool": "bool[]"}


@frozen
class TensorSpec:
    """`E[*S, N]`: a dtype or the name of a generic one, and a declared shape."""

    dtype: DType | str
    shape: Declared
    span: Span

    def __str__(self) -> str:
        shape = str(self.shape)
        return f"{self.dtype}[{shape}]" if shape else str(self.dtype)


@frozen
class ConstantSpec:
    """A parameter that is known while compiling: int, float, bool, str or weights."""

    kind: str
    span: Span

    def __str__(self) -> str:
        return self.kind


Spec = TensorSpec | ConstantSpec


@dataclass
class Signature:
    """Reads the types of one function or pipeline; collects its variables."""

    frame: Frame
    generics: dict[str, str] = field(default_factory=dict)
    variables: dict[str, Span] = field(default_factory=dict)
    rests: dict[str, Span] = field(default_factory=dict)
    own_sizes: bool = False

    def spec(self, node: ast.TypeExpr) -> Spec:
        """A type. Raises Failed."""
        if node.dims is None and node.name in CONSTANTS:
            return ConstantSpec(node.name, node.span)
        dtype: DType | str
        if node.name in DTYPES:
            dtype = DTYPES[node.name]
        elif node.name in self.generics:
            dtype = node.name
        else:
            near = nearest(node.name, [*DTYPES, *self.generics, *CONSTANTS])
            hint = _HINTS.get(node.name) or dtype_named(node.name)
            advice = f"the dtype is `{hint}`" if hint else None
            if near and not advice:
                advice = f"the nearest name is `{near}`"
            if len(node.name) <= 2 and node.name.isupper() and not near:
                advice = f"a generic dtype is declared: `fn f[{node.name}: float](...)`"
            raise Failed("E0219", f"unknown type `{node.name}`", node.span, help=advice)
        before: list[Expr] = []
        after: list[Expr] = []
        rest: str | None = None
        for item in node.dims or ():
            if isinstance(item, ast.Star):
                if rest is not None:
                    raise Failed("E0219", "a shape has at most one `*`", item.span)
                rest = item.name
                self.rests.setdefault(item.name, item.span)
            elif rest is None:
                before.append(self.dim(item))
            else:
                after.append(self.dim(item))
        for item, size_of_item in zip(node.dims or (), (*before, *after), strict=False):
            if rest is None and (size_of_item.as_int() or 0) < 0:
                raise Failed("E0219", f"the size {size_of_item} is negative", item.span)
        return TensorSpec(dtype, Declared(tuple(before), rest, tuple(after)), node.span)

    def dim(self, node: ast.Expr) -> Expr:
        """A dimension expression over variables. Raises Failed."""
        if isinstance(node, ast.Binary):
            first, operators = node.chain()
            for at in reversed(operators):
                if at.op not in ("+", "-", "*", "//", "%"):
                    raise _no_size(at.span)
            total = self.dim(first)
            for at in operators:
                total = self._operator(total, at)
            return total
        return self._operand(node)

    def _operator(self, left: Expr, node: ast.Binary) -> Expr:
        right = self.dim(node.right)
        match node.op:
            case "+":
                return left + right
            case "-":
                return left - right
            case "*":
                return left * right
            case "//":
                return floordiv(left, right, Facts())
        return mod(left, right, Facts())

    def _operand(self, node: ast.Expr) -> Expr:
        match node:
            case ast.IntLit() if node.value >= 1 << 63:
                raise Failed("E0219", "this size does not fit 64 bits", node.span)
            case ast.IntLit():
                return const(node.value)
            case ast.Name():
                return self._named(node)
            case ast.Unary(op="-"):
                return -self.dim(node.operand)
            case ast.Call(fn=ast.Name(name="min" | "max" as name), kwargs=()) if (
                len(node.args) == 2
            ):
                pick = minimum if name == "min" else maximum
                return pick(self.dim(node.args[0]), self.dim(node.args[1]), Facts())
            case ast.Attribute():
                return self._constant(node)
        raise _no_size(node.span)

    def _named(self, node: ast.Name) -> Expr:
        name, frame = node.name, self.frame
        if name in frame.locals:
            return self._constant(node)
        item = frame.module.items.get(name)
        if isinstance(item, ast.Const):
            return self._constant(node)
        if isinstance(item, ast.Import | ast.WeightsDecl):
            kind = "a module" if isinstance(item, ast.Import) else "weights"
            raise Failed(
                "E0219",
                f"`{name}` is {kind} and cannot be a dimension",
                node.span,
                others=[(item.span, "bound here")],
            )
        if not name[:1].isupper():
            consts = [n for n, i in frame.module.items.items() if isinstance(i, ast.Const)]
            near = nearest(name, [*consts, *self.variables])
            raise Failed(
                "E0201",
                f"unknown size `{name}`",
                node.span,
                help=f"the nearest name is `{near}`"
                if near
                else f"a dimension variable is capitalised: `{name.capitalize()}`",
            )
        self.variables.setdefault(name, node.span)
        return sym(name if self.own_sizes else variable(name))

    def _constant(self, node: ast.Expr) -> Expr:
        value = expressions.evaluate(self.frame, node)
        if isinstance(value, Poison):
            raise Silent
        found = size(value)
        if found is None:
            raise Failed(
                "E0219", f"`{text_of(node.span)}` is not a size", node.span, describe(value)
            )
        return found


class Silent(Exception):
    """What is needed here is wrong and has been reported."""


def generic_classes(node: ast.Fn) -> dict[str, str]:
    """The class of each generic dtype. Raises Failed."""
    found: dict[str, str] = {}
    for generic in node.generics:
        if generic.dtype_class not in CLASSES:
            raise Failed(
                "E0219",
                f"unknown class of dtypes `{generic.dtype_class}`",
                generic.span,
                help="the classes are " + ", ".join(f"`{name}`" for name in CLASSES),
            )
        found[generic.name] = generic.dtype_class
    return found


Condition = tuple[Expr, str, str, Span]
"""An expression, whether it is zero or not negative, the text, and the place."""


def conditions(signature: Signature, clause: ast.Where) -> list[Condition]:
    """What a clause of `where` asks for. Raises Failed."""
    text = text_of(clause.span)
    if isinstance(clause, ast.WhereRange):
        if clause.name not in signature.variables:
            raise Failed(
                "E0217",
                f"`{clause.name}` is no dimension of this signature",
                clause.span,
                help=_near(clause.name, signature),
            )
        value = sym(clause.name if signature.own_sizes else variable(clause.name))
        low, high = range_ends(signature, clause.range)
        return [(value - low, ">=0", text, clause.span), (high - value, ">=0", text, clause.span)]
    return _comparison(signature, clause.fact, text, clause.span)


def range_ends(signature: Signature, node: ast.RangeExpr) -> tuple[Expr, Expr]:
    """Both ends of a range, inclusive."""
    low, stop = signature.dim(node.start), signature.dim(node.stop)
    return low, stop if node.inclusive else stop - 1


def _no_size(span: Span) -> Failed:
    return Failed("E0219", "a size is made of integers, names, `+ - * // %`, min and max", span)


def _near(name: str, signature: Signature) -> str | None:
    near = nearest(name, signature.variables)
    return f"the nearest name is `{near}`" if near else None


def _comparison(signature: Signature, node: ast.Expr, text: str, span: Span) -> list[Condition]:
    if isinstance(node, ast.Binary) and node.op == "and":
        parts: list[ast.Expr] = []
        while isinstance(node, ast.Binary) and node.op == "and":
            parts.append(node.right)
            node = node.left
        parts.append(node)
        return [c for part in parts[::-1] for c in _comparison(signature, part, text, span)]
    if isinstance(node, ast.Binary) and node.op in ("==", "<=", ">=", "<", ">", "!="):
        known = set(signature.variables)
        gap = signature.dim(node.left) - signature.dim(node.right)
        fresh = sorted(set(signature.variables) - known)
        if fresh:
            for name in fresh:
                del signature.variables[name]
            raise Failed(
                "E0217",
                f"`{fresh[0]}` is no dimension of this signature",
                span,
                help=_near(fresh[0], signature),
            )
        match node.op:
            case "==":
                return [(gap, "==0", text, span)]
            case "<=":
                return [(-gap, ">=0", text, span)]
            case "<":
                return [(-gap - 1, ">=0", text, span)]
            case ">=":
                return [(gap, ">=0", text, span)]
            case ">":
                return [(gap - 1, ">=0", text, span)]
        return [(gap * gap - 1, ">=0", text, span)]
    raise Failed(
        "E0217",
        "a fact compares sizes",
        span,
        help="write a range, `T in 1..=512`, or a comparison, `D % 12 == 0`",
    )
