"""Integers with scales: QuantizeLinear and DequantizeLinear, found by structure."""

from __future__ import annotations

import numpy as np

from stagefuse.compiler.graph import Map, Node, Ref
from stagefuse.dsl.dims import Expr, sym
from stagefuse.dsl.dtypes import F32, I32, DType
from stagefuse.dsl.frozen import frozen

from .forms import Context, Form, one
from .model import Tensor

_BYTES, _SHORTS = ("u8", "i8"), ("u16", "i16")


@frozen
class _Spread:
    """A stored value that is one for all of a tensor, or one for each place along an axis."""

    root: Ref
    axis: int | None


def quantize(c: Context, node: Node) -> Form | None:
    """round(x / scale) + zero as an integer."""
    if node.primitive != Map("cast") or not _is_code(c, node.type.dtype):
        return None
    rounded, point = node.operands[0], None
    if (terms := c.mapped(rounded, "add")) is not None:
        rounded, point = terms
    inner = c.mapped(rounded, "round")
    parts = None if inner is None else c.mapped(inner[0], "div")
    if parts is None or c.graph.type(parts[0]).dtype != F32:
        return None
    zero = None if point is None else _whole(c, point, node.type.dtype)
    if point is not None and zero is None:
        return None
    return _form(c, "QuantizeLinear", parts[0], parts[1], zero, node.type.dtype)


def dequantize(c: Context, node: Node) -> Form | None:
    """(q - zero) * scale."""
    parts = c.mapped(Ref(node.id), "mul")
    whole = None if parts is None else c.mapped(parts[0], "cast")
    if parts is None or whole is None or node.type.dtype != F32:
        return None
    q, zero = whole[0], None
    terms = c.mapped(q, "sub")
    if terms is not None and c.graph.type(q).dtype == I32:
        codes = c.mapped(terms[0], "cast")
        if codes is None:
            return None
        q = codes[0]
        zero = _whole(c, terms[1], c.graph.type(q).dtype)
        if zero is None:
            return None
    dtype = c.graph.type(q).dtype
    if not _is_code(c, dtype) and (dtype != I32 or zero is not None):
        return None
    return _form(c, "DequantizeLinear", q, parts[1], zero, F32)


def _is_code(c: Context, dtype: DType) -> bool:
    """Whether both ops take these integers in the model's opset."""
    return dtype.name in _BYTES or (c.model.opset >= 21 and dtype.name in _SHORTS)


def _whole(c: Context, ref: Ref, dtype: DType) -> Ref | int | None:
    """The zero point in integers of a dtype, where a value is that, converted."""
    number = c.number(ref)
    if number is not None:
        info = np.iinfo(dtype.numpy)
        return int(number) if info.min <= number <= info.max and number == int(number) else None
    stored = c.mapped(c.traced(ref).root, "cast")
    if stored is None or c.graph.type(stored[0]).dtype != dtype:
        return None
    spread, inner = c.traced(ref), c.traced(stored[0])
    is_plain = c.shape(spread.root) == c.shape(inner.root)
    return ref if is_plain else None


def _form(
    c: Context, op: str, x: Ref, scale: Ref, zero: Ref | int | None, result: DType
) -> Form | None:
    shape = c.shape(x)
    scales = _spread(c, scale, shape)
    if scales is None or scales.root == c.traced(x).root:
        return None
    needs = [x, scales.root]
    if isinstance(zero, Ref):
        points = _spread(c, zero, shape)
        if points is None or points.axis != scales.axis:
            return None
        (stored,) = c.mapped(points.root, "cast") or (points.root,)
        needs.append(stored)
    row = () if scales.axis is None else (shape[scales.axis],)
    axis = {} if scales.axis is None else {"axis": scales.axis}
    code = result if op == "QuantizeLinear" else c.graph.type(x).dtype

    def write(*tensors: Tensor) -> Tensor:
        given = [c.layout.whole(tensors[0], shape), _row(c, tensors[1], row)]
        if isinstance(zero, Ref):
            given.append(_row(c, tensors[2], row))
        elif zero is not None or op == "QuantizeLinear":
            sizes = [d.as_int() or 1 for d in row]
            given.append(c.model.constant(np.full(sizes, zero or 0), code))
        return c.model.node(op, given, result, shape, **axis)

    return one(needs, write)


def _row(c: Context, x: Tensor, row: tuple[Expr, ...]) -> Tensor:
    """A scale or zero point as both ops have it: stored, where it is stored."""
    sizes = [d.as_int() for d in row]
    if x.shape == row or x.name not in c.model.constants or None in sizes:
        return c.layout.reshaped(x, row)
    return c.model.weight_as(x, [d for d in sizes if d is not None])


def _spread(c: Context, ref: Ref, shape: tuple[Expr, ...]) -> _Spread | None:
    """A value of that shape that is the same along all axes, or all but one."""
    found = c.traced(ref)
    own = c.shape(found.root)
    wide = [n for n, d in enumerate(own) if d.as_int() != 1]
    if not wide:
        return _Spread(found.root, None)
    if len(wide) > 1 or c.shape(ref) != shape or own[wide[0]].as_int() is None:
        return None
    axes = [k for k in range(len(shape)) if found.indices[wide[0]] == sym(f"i{k}")]
    return _Spread(found.root, axes[0]) if axes and shape[axes[0]] == own[wide[0]] else None


