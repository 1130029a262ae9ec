"""The value of a body against the results that its signature declares."""

from __future__ import annotations

from stagefuse.dsl import ast
from stagefuse.dsl.dtypes import DType
from stagefuse.dsl.source import Span
from stagefuse.dsl.types import TensorType

from . import literals
from .agreement import Agreement, Explaining
from .apply import Arg
from .declared import ConstantSpec, TensorSpec
from .record import default_dtype
from .report import Failed, text_of
from .unify import Mismatch
from .values import Dim, Items, Number, Scope, Tensor, Value, describe


def as_declared(
    agreement: Agreement, value: Value, result: ast.TypeExpr | ast.TupleType | None, span: Span
) -> Value:
    """The value as declared: of one type or of several, with their names. Raises Failed."""
    if result is None:
        return value
    if isinstance(result, ast.TypeExpr):
        return _one(agreement, value, result, span)
    if len(result.items) == 1 and not isinstance(value, Items):
        (only,) = result.items  # parentheses around one type, as around one value
        found = _one(agreement, value, only.type, span)
        return found if only.name is None else Items((found,), "(", (only.name,))
    count = len(result.items)
    if not isinstance(value, Items) or len(value.items) != count:
        raise Failed(
            "E0205",
            f"{agreement.what} declares {count} result{'s' * (count != 1)}",
            span,
            describe(value),
            [(result.span, "declared here")],
        )
    items = [
        _one(agreement, item, part.type, span)
        for item, part in zip(value.items, result.items, strict=True)
    ]
    return Items(tuple(items), "(", tuple(part.name for part in result.items))


def _one(agreement: Agreement, value: Value, node: ast.TypeExpr, span: Span) -> Value:
    """A result as its declared type. Raises Failed."""
    spec = agreement.signature.spec(node)
    if isinstance(spec, ConstantSpec):
        if spec.kind == "bool" and isinstance(value, Tensor) and not value.type.shape:
            return value
        param = ast.Param(node.span, "the result", node, None)
        return agreement.constant(param, spec, Arg(value, span))
    _require_known(agreement, spec)
    if isinstance(value, Scope) and value.leaf is not None:
        value = agreement.recorder.weight(value, span)
    message = f"the result of {agreement.what} must be {spec}"
    place = (node.span, "declared here")
    if not isinstance(value, Tensor | Number | Dim):
        raise Failed("E0205", message, span, describe(value), [place])
    dtype = _dtype(agreement, value, spec)
    own = literals.own_dtype(value)
    if own is not None and own != dtype:
        notes = [f"the dtype is {own}"]
        if isinstance(spec.dtype, str):
            notes.append(f"`{spec.dtype}` is {dtype} here")
        help = f"convert: `{dtype}({text_of(span)})`" if len(text_of(span)) < 60 else None
        raise Failed("E0205", message, span, describe(value), [place], notes, help)
    tensor = literals.typed(agreement.recorder, value, dtype, span)
    with Explaining(agreement, message, span, tensor.type, place):
        pairs = agreement.solver.pairs(spec.shape, tensor.type.shape)
        for pair in agreement.solver.solve_plain(pairs):
            if not agreement.solver.settle(*pair):
                raise Mismatch(f"dimension {pair[2]} cannot be compared with {pair[1]}")
    return _written_as_declared(agreement, tensor, spec)


def _dtype(agreement: Agreement, value: Tensor | Number | Dim, spec: TensorSpec) -> DType:
    """The dtype that a result must have: as declared, or what a generic name stands for."""
    if isinstance(spec.dtype, DType):
        return spec.dtype
    known = agreement.dtypes.get(spec.dtype)
    if known is not None:
        return known[0]
    own = literals.own_dtype(value)
    if own is None:
        assert isinstance(value, Number)
        return default_dtype(value)
    return own


def _require_known(agreement: Agreement, spec: TensorSpec) -> None:
    """The sizes of a result follow from those of the parameters. Raises Failed."""
    unknown = [n for e in (*spec.shape.before, *spec.shape.after)
               for n in agreement.solver.unknowns(e)]
    if spec.shape.rest is not None and spec.shape.rest not in agreement.solver.rests:
        unknown.append(spec.shape.rest)
    if unknown:
        raise Failed(
            "E0219", f"the size `{unknown[0]}` does not follow from the parameters", spec.span,
            f"no parameter of {agreement.what} has it",
            help="write the size as an expression, or leave the result undeclared",
        )


def _written_as_declared(agreement: Agreement, tensor: Tensor, spec: TensorSpec) -> Tensor:
    """The tensor, its shape written as the signature has it where both were proved equal."""
    if tensor.space or spec.shape.rest is not None:
        return tensor
    shape = tuple(agreement.solver.substituted(expr) for expr in spec.shape.before)
    facts = agreement.recorder.facts
    proved = all(facts.prove_eq(a, b) for a, b in zip(shape, tensor.type.shape, strict=True))
    if not proved or shape == tensor.type.shape:
        return tensor
    found = TensorType(tensor.type.dtype, shape)
    agreement.recorder.types[tensor.id] = found
    return Tensor(tensor.id, found)
