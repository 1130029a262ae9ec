"""Tensors from numbers and sizes."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from stagefuse.dsl.dims import Expr, as_expr, floordiv
from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, Val
from stagefuse.onnx.reading import dtype_of
from stagefuse.onnx.record import Written, op
from stagefuse.onnx.text import listed, literal, size_text


@op("Constant")
def _constant(n: Node) -> Written:
    """A tensor or a number of the node itself; strings are refused."""
    kinds = {"value_float": np.float32, "value_floats": np.float32, "value_int": np.int64,
             "value_ints": np.int64}  # fmt: skip
    found = n.attr("value")
    for name, kind in kinds.items():
        if n.has(name):
            found = np.array(n.attr(name), kind)
    if not isinstance(found, np.ndarray):
        raise Refused("a constant that is no tensor of numbers", "strings in the language")
    return n.constant(n.outputs[0], found)


@op("ConstantOfShape")
def _constant_of_shape(n: Node) -> str:
    value = n.attr("value")
    number = np.float32(0) if value is None else value.reshape(-1)[0]
    dtype = dtype_of(1 if value is None else _number(value.dtype))
    shape = n.sizes(0, "shape")
    text = literal(number)
    return f"full({listed(shape)}, {text}, {dtype})"


def _number(dtype: np.dtype[np.generic]) -> int:
    from stagefuse.onnx.reading import _NUMPY

    return next(k for k, v in _NUMPY.items() if np.dtype(v) == dtype)


@op("Range")
def _range(n: Node) -> str:
    """The number of elements must be known, or follow from sizes."""
    dtype = n.val(0).dtype
    start, limit, delta = (_element(n, k, what)
                           for k, what in enumerate(("start", "limit", "delta")))  # fmt: skip
    if any(isinstance(v, Expr) for v in (start, limit, delta)):
        first = as_expr(_size(start))
        gap = _size(limit) - first
        step = as_expr(_size(delta)).as_int()
        if not step:
            raise Refused("a step that varies", "a constant step")
        count = floordiv((gap if step > 0 else -gap) + (abs(step) - 1), abs(step))
        text = _line(count, step, first)
        return text if dtype.name == "i64" else f"{dtype}({text})"
    text = f"iota({max(0, math.ceil((limit - start) / delta))})"
    if dtype.name != "i64":
        text = f"{dtype}({text})"
    if delta != 1:
        text = f"{text} * {literal(delta)}"
    return text if start == 0 else f"{text} + {literal(start)}"


def _line(count: Expr, step: int, first: Expr) -> str:
    """first, first + step and so on, in i64."""
    text = f"iota({size_text(count)})"
    if step != 1:
        text = f"{text} * {step}"
    return text if first.as_int() == 0 else f"{text} + {size_text(first)}"


def _element(n: Node, index: int, what: str) -> Any:
    """The element of an input, or the size that it is as a float."""
    sizes = n.val(index).sizes
    return (n.known(index, what) if sizes is None else sizes).reshape(-1)[0]


def _size(value: Any) -> Expr | int:
    if not isinstance(value, Expr) and value != int(value):
        raise Refused("a range between sizes and fractions", "whole numbers")
    return value if isinstance(value, Expr) else int(value)


@op("OneHot")
def _one_hot(n: Node) -> str:
    """Negative positions count from the end; one out of range gives `off` throughout."""
    ids, values = n.val(0), n.x(2)
    depth = n.sizes(1, "depth")[0]
    axis = n.attr("axis", -1)
    axis = axis + ids.rank + 1 if axis < 0 else axis
    whole = n.let("ids", f"i64({n.x(0)})").text
    at = n.let("at", f"select({whole} < 0, {whole} + {size_text(depth)}, {whole})").text
    spread = ", ".join("None" if k == axis else ":" for k in range(ids.rank + 1))
    kinds = ", ".join(":" if k == axis else "None" for k in range(ids.rank + 1))
    wide = f"{at}[{spread}]" if ids.rank else f"reshape({at}, [1])"
    pair = n.bound(n.val(2), "values") if n.val(2).known is not None else values
    return f"select({wide} == iota({size_text(depth)})[{kinds}], {pair}[1], {pair}[0])"


@op("EyeLike")
def _eye_like(n: Node) -> Written:
    number = n.attr("dtype")
    dtype = dtype_of(number) if number else n.val(0).dtype
    rows, columns = n.val(0).shape
    k = n.attr("k", 0)
    indices = [f"i in 0..{size_text(rows)}", f"j in 0..{size_text(columns)}"]
    return n.define(n.hint, indices, f"{dtype}(j - i == {k})")


@op("Trilu")
def _trilu(n: Node) -> str:
    """The upper or the lower triangle, zeros elsewhere."""
    value = n.val(0)
    k = size_text(n.sizes(1, "k")[0]) if n.maybe(1) is not None else "0"
    rows, columns = value.shape[-2:]
    sign = ">=" if n.attr("upper", 1) else "<="
    kept = f"iota({size_text(columns)})[None, :] - iota({size_text(rows)})[:, None] {sign} {k}"
    zero = "False" if value.dtype.is_bool else "0.0" if value.dtype.is_float else "0"
    return f"select({n.let('kept', kept).text}, {n.x(0)}, {zero})"


@op("Dropout", unread=["seed", "is_test"])
def _dropout(n: Node) -> Written:
    """Without effect outside of training."""
    if n.opset < 12:
        n.attr("ratio")
    elif n.maybe(2) is not None and bool(n.known(2, "training_mode").reshape(-1)[0]):
        if n.maybe(1) is None or float(n.known(1, "ratio").reshape(-1)[0]) != 0.0:
            raise Refused("dropout in training", "random numbers in the language")
    found: list[Val | str] = [n.val(0)]
    if len(n.outputs) > 1 and n.outputs[1]:
        found.append(f"full({listed(n.val(0).shape)}, True, bool)")
    return found
