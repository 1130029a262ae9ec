"""Rows whose number depends on data: as many as there can be, with a count of those that are meant.

The positions that a NonMaxSuppression or NonZero finds are followed through ops that treat each
row alone; what would mix the rows that are meant with the others is refused.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import onnx

from stagefuse.dsl.frozen import frozen

from . import control
from .errors import Refused
from .node import Node, Rows, Val
from .record import records

NEED = "an op that takes each row for itself: cut the model before this node, and go on in Python"
WHOLE = 1 << 31
"""Ends of slices from here on mean all."""


@frozen
class _Marked:
    """The input of a node whose rows are counted; `more` are others of the same rows."""

    index: int
    value: Val
    axis: int
    more: tuple[int, ...]


def refuse_branches(proto: onnx.NodeProto, env: dict[str, Val | None]) -> None:
    """Raises Refused where a branch or a loop reads counted rows."""
    graphs = [a.g for a in proto.attribute if a.HasField("g")]
    names = {*proto.input, *(n for g in graphs for n in control.outer_names(g))}
    if graphs and any((v := env.get(n)) is not None and v.rows is not None for n in names):
        raise Refused("a number of rows that depends on data", NEED)


def refuse_size(node: Node) -> None:
    """Raises Refused where the number of rows is asked for as a shape."""
    found = node.maybe(0)
    if node.op not in ("Shape", "Size") or found is None or found.rows is None:
        return
    axes = range(found.rank)[slice(node.attr("start", 0), node.attr("end", None))]
    if node.op == "Size" or found.rows.axis in axes:
        raise Refused("the number of rows, which depends on data, as a size", NEED)


def carried(n: Node, results: Sequence[Val]) -> list[Val]:
    """The results of a node, with the rows of its inputs. Raises Refused."""
    marked = [(k, v) for k, v in enumerate(n.inputs) if v is not None and v.rows is not None]
    if not marked or any(r.rows is not None for r in results):
        return list(results)
    (index, value), others = marked[0], marked[1:]
    if n.op == "Gather" and others:
        (index, value), others = others[0], []  # positions among the rows that are meant
    rows = value.rows
    assert rows is not None
    if any(v.rows is None or v.rows.count != rows.count for _, v in others):
        raise Refused("rows of two numbers that depend on data", NEED)
    rule = RULES.get(n.op)
    if rule is None and n.op in records() and records()[n.op].family == "elementwise":
        rule = _pointwise
    if rule is None:
        raise Refused("a number of rows that depends on data", NEED)
    of = _Marked(index, value, rows.axis, tuple(k for k, _ in others))
    found = []
    for result in results:
        axis = rule(n, of, result)
        count = rows.count
        if n.op == "Slice" and (most := _cut(n, of)) is not None:
            count = n.let("count", f"minimum({count}, {most})").text
        found.append(replace(result, rows=Rows(axis, count)))
    return found


def _sure(holds: bool) -> None:
    if not holds:
        raise Refused("a number of rows that depends on data", NEED)


def _alone(of: _Marked, index: int) -> None:
    _sure(of.index == index and not of.more)


def _pointwise(n: Node, of: _Marked, result: Val) -> int:
    """Counted from the last axis, as operands are broadcast; others have one row, or the same."""
    behind = of.value.rank - of.axis
    for k, v in enumerate(n.inputs):
        if v is None or k == of.index:
            continue
        if k in of.more:
            _sure(v.rows is not None and v.rank - v.rows.axis == behind)
        else:
            _sure(v.rank < behind or v.shape[v.rank - behind].as_int() == 1)
    return result.rank - behind


def _gather(n: Node, of: _Marked, result: Val) -> int:
    _sure(not of.more)
    axis = n.attr("axis", 0) % n.val(0).rank
    if of.index == 1:
        return int(axis + of.axis)
    _sure(axis != of.axis)
    return of.axis if of.axis < axis else of.axis - 1 + n.val(1).rank


def _gather_nd(n: Node, of: _Marked, result: Val) -> int:
    _alone(of, 1)
    _sure(of.axis < of.value.rank - 1 and not n.attr("batch_dims", 0))
    return of.axis


def _gather_elements(n: Node, of: _Marked, result: Val) -> int:
    _sure(of.more == (1,) and n.attr("axis", 0) % of.value.rank != of.axis)
    return of.axis


def _squeeze(n: Node, of: _Marked, result: Val) -> int:
    axes = n.axes()
    _sure(axes is not None)
    gone = {a % of.value.rank for a in axes or ()}
    _sure(of.axis not in gone)
    return of.axis - sum(a < of.axis for a in gone)


def _unsqueeze(n: Node, of: _Marked, result: Val) -> int:
    new = {a % result.rank for a in n.axes() or ()}
    return [a for a in range(result.rank) if a not in new][of.axis]


def _transpose(n: Node, of: _Marked, result: Val) -> int:
    order = n.attr("perm") or list(range(of.value.rank))[::-1]
    return list(order).index(of.axis)


def _slice(n: Node, of: _Marked, result: Val) -> int:
    _alone(of, 0)
    _cut(n, of)
    return of.axis


def _cut(n: Node, of: _Marked) -> int | None:
    """The most rows that a slice keeps, from the first one on; None for all. Raises Refused."""
    if n.opset < 10:
        starts, ends, axes, steps = n.attr("starts"), n.attr("ends"), n.attr("axes"), None
    else:
        texts = ("starts", "ends", "axes", "steps")
        starts, ends, axes, steps = (
            n.ints(k + 1, t) if n.maybe(k + 1) is not None else None for k, t in enumerate(texts)
        )
    places = [a % of.value.rank for a in (axes or range(len(starts)))]
    if of.axis not in places:
        return None
    at = places.index(of.axis)
    _sure(starts[at] == 0 and (steps is None or steps[at] == 1) and ends[at] >= 0)
    return None if ends[at] >= WHOLE else int(ends[at])


def _concat(n: Node, of: _Marked, result: Val) -> int:
    _sure(len(of.more) == len(n.vals()) - 1 and n.attr("axis", 1) % result.rank != of.axis)
    _sure(all(v.rows is not None and v.rows.axis == of.axis for v in n.vals()))
    return of.axis


def _reshape(n: Node, of: _Marked, result: Val) -> int:
    """Rows stay where as many elements are before them as were, and they are as many."""
    before = math.prod(of.value.shape[: of.axis], start=1)
    for k, size in enumerate(result.shape):
        same = n.body.same(math.prod(result.shape[:k], start=1), before)
        if same and n.body.same(size, of.value.shape[of.axis]):
            return k
    raise Refused("a number of rows that depends on data", NEED)


def _product(n: Node, of: _Marked, result: Val) -> int:
    _alone(of, 0)
    _sure(of.axis == of.value.rank - 2 and not n.attr("transA", 0))
    return result.rank - 2


def _along(n: Node, of: _Marked, result: Val) -> int:
    """Ops along another axis, or along all from one on that comes later."""
    _alone(of, 0)
    axis = n.attr("axis", -1 if n.op != "Split" else 0) % of.value.rank
    _sure(axis > of.axis if n.op == "LayerNormalization" else axis != of.axis)
    return of.axis


def _reduced(n: Node, of: _Marked, result: Val) -> int:
    """What reduces other axes."""
    _alone(of, 0)
    axes = [n.attr("axis", 0)] if n.op.startswith("Arg") else n.axes()
    gone = {a % of.value.rank for a in axes or range(of.value.rank)}
    _sure(of.axis not in gone)
    return of.axis if n.attr("keepdims", 1) else of.axis - sum(a < of.axis for a in gone)


def _named(
    names: Iterable[str], rule: Callable[[Node, _Marked, Val], int]
) -> dict[str, Callable[[Node, _Marked, Val], int]]:
    return dict.fromkeys(names, rule)


RULES = {
    "Gather": _gather, "GatherND": _gather_nd, "GatherElements": _gather_elements,
    "Squeeze": _squeeze, "Unsqueeze": _unsqueeze, "Transpose": _transpose, "Slice": _slice,
    "Concat": _concat, "Reshape": _reshape, "Flatten": _reshape, "Expand": _pointwise,
    **_named(("MatMul", "Gemm"), _product),
    **_named(("Softmax", "LogSoftmax", "LayerNormalization", "Split", "TopK"), _along),
    **_named(("ArgMax", "ArgMin", *(f"Reduce{k}" for k in (
        "Sum", "Mean", "Max", "Min", "Prod", "L1", "L2", "SumSquare", "LogSumExp"))), _reduced),
}  # fmt: skip
"""For the ops that take rows for themselves, the axis of a result along which they are."""
