"""What is chosen by data: its number is known when it runs; there is room for all there can be."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np

from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, Rows, Val, axis_of
from stagefuse.onnx.record import Written, op
from stagefuse.onnx.text import literal, size_text

from .shapes import subscript

MANY = 1 << 31
"""So many boxes of a class, and more, are all."""


def first_rows(found: Val, count: Val, axis: int) -> Val:
    return replace(found, rows=Rows(axis, count.text))


@op("NonZero")
def _nonzero(n: Node) -> Written:
    """Positions of what is not 0, a column for each."""
    value = n.val(0)
    if value.known is not None and value.known.dtype != object:
        places = np.array(np.nonzero(np.atleast_1d(value.known)), np.int64)
        return n.constant(n.hint, places)
    if not value.rank:
        raise Refused("the position of a single element", "a tensor with dimensions")
    flat = n.x(0) if value.rank == 1 else f"reshape({n.x(0)}, [-1])"
    at, count = n.many(["at", "count"], f"onnx.nonzero_flat({flat})")
    parts = []
    for k, size in enumerate(value.shape):
        inner = math.prod(value.shape[k + 1 :], start=1)
        step = f"{at.text} // ({size_text(inner)})" if k < value.rank - 1 else at.text
        parts.append(f"{step} % {size_text(size)}" if k else step)
    text = f"stack([{', '.join(parts)}])"
    return first_rows(n.let(n.hint, text), count, 1)


@op("Compress")
def _compress(n: Node) -> Written:
    """The elements where a condition holds, along an axis or of all in one row."""
    value, axis, condition = n.val(0), n.attr("axis"), n.val(1)
    if axis is None:
        text, rank, axis = n.let("flat", f"reshape({n.x(0)}, [-1])").text, 1, 0
    else:
        text, rank, axis = n.bound(value), value.rank, axis_of(axis, value.rank)
    if condition.known is not None:
        keep = np.flatnonzero(condition.known)
        places = n.x_of(n.constant("places", keep.astype(np.int64)))
        return f"{text}[{subscript(rank, **{f'a{axis}': places})}]"
    at, count = n.many(["at", "count"], f"onnx.nonzero_flat({n.x(1)})")
    found = n.let(n.hint, f"{text}[{subscript(rank, **{f'a{axis}': at.text})}]")
    return first_rows(found, count, axis)


@op("NonMaxSuppression")
def _non_max_suppression(n: Node) -> Written:
    """Rows (batch, class, box). Inputs: boxes, scores, most of a class, limits of overlap and of
    scores. Boxes and scores may be counted themselves."""
    (most,) = n.ints(2, "max_output_boxes_per_class") if n.maybe(2) is not None else (0,)
    limit = _number(n, 3) if n.maybe(3) is not None else "0.0"
    options = [f"most={max(most, 0)}"] if most < MANY else []
    least = f"least={_number(n, 4)}" if n.maybe(4) is not None else ""
    scores = n.x(1)
    rows = n.val(1).rows
    if rows is not None:
        size = size_text(n.val(1).shape[2])
        inside = f"iota({size})[None, None, :] < {rows.count}"
        scores = n.let("scores", f"select({inside}, {scores}, -math.INF)").text
        least = least or "least=-3.4e38"
    if n.attr("center_point_box", 0):
        options.append("centred=True")
    given = ", ".join(filter(None, [n.x(0), scores, limit, *options, least]))
    found, count = n.many([n.hint, "count"], f"onnx.non_max_suppression({given})")
    return first_rows(found, count, 0)


def _number(n: Node, index: int) -> str:
    """One number, which may be in a vector."""
    value = n.val(index)
    if value.known is not None:
        return literal(value.known.reshape(-1)[0])
    return f"reshape({n.x(index)}, [])" if value.rank else n.x(index)


@op("Unique")
def _unique(n: Node) -> Written:
    """Each element once, or each part along an axis: in rising order, or in that of the first ones.

    Results: they, where each is first, which of them each is, how often each is there.
    """
    value, axis = n.val(0), n.attr("axis")
    order = list(range(value.rank))
    if axis is not None:
        order = [axis_of(axis, value.rank), *(k for k in order if k != axis_of(axis, value.rank))]
    moved = n.x(0) if order == sorted(order) else f"transpose({n.x(0)}, {order})"
    sizes = [value.shape[k] for k in order]
    rows = size_text(math.prod(sizes[: None if axis is None else 1], start=1))
    width = size_text(math.prod(sizes[1:], start=1))
    flat = f"reshape({moved}, [{rows}])" if axis is None else f"reshape({moved}, [{rows}, {width}])"
    is_bool = value.dtype.is_bool
    flat = f"u8({flat})" if is_bool else flat
    made = "unique_numbers" if axis is None else "unique"
    call = f"onnx.{made}({flat}, {bool(n.attr('sorted', 1))})"
    y, first, which, often, count = n.many(["unique", "first", "which", "often", "count"], call)
    text = y.text
    if axis is not None:
        text = f"reshape({text}, [{', '.join(map(size_text, sizes))}])"
    back = [order.index(k) for k in range(value.rank)]
    if axis is not None and back != sorted(back):
        text = f"transpose({text}, {back})"
    found = n.let(n.hint, f"bool({text})" if is_bool else text)
    return [first_rows(found, count, 0 if axis is None else axis_of(axis, value.rank)),
            first_rows(first, count, 0), which, first_rows(often, count, 0)]  # fmt: skip


@op("OptionalGetElement")
def _element(n: Node) -> Val:
    """Of what is a tensor: itself."""
    return n.val(0)


@op("OptionalHasElement")
def _has_element(n: Node) -> Val:
    """Whether there is an input; one that is given is a tensor."""
    return n.constant(n.hint, np.array(n.maybe(0) is not None))
