"""Reductions along axes, and what is normalized by them along an axis."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stagefuse.onnx.node import Node, Val, axis_of
from stagefuse.onnx.record import Written, op


def axis_text(axes: Sequence[int]) -> str:
    """Axes as `axis=` takes them."""
    return str(axes[0]) if len(axes) == 1 else str(tuple(axes))


def reduced(n: Node, function: str, x: str) -> str:
    """A reduction of an expression along the node's axes."""
    axes = n.axes()
    keep = bool(n.attr("keepdims", 1))
    noop = bool(n.attr("noop_with_empty_axes", 0))
    if not axes:
        if noop:
            return x
        return f"{function}({x}{', keepdims=True' if keep else ''})"
    return f"{function}({x}, axis={axis_text(axes)}{', keepdims=True' if keep else ''})"


def _kept(n: Node, text: str) -> str:
    """Back in the dtype of the operand: sums of integers are i64 in the language."""
    dtype = n.val(0).dtype
    return text if dtype.is_float or dtype.name == "i64" else f"{dtype}({text})"


@op("ReduceSum")
def _sum(n: Node) -> str:
    return _kept(n, reduced(n, "sum", n.x(0)))


@op("ReduceProd")
def _prod(n: Node) -> str:
    return _kept(n, reduced(n, "prod", n.x(0)))


@op("ReduceMean")
def _mean(n: Node) -> str:
    text = reduced(n, "mean", n.x(0))
    return text if n.val(0).dtype.is_float else f"{n.val(0).dtype}({text})"


def _extreme(function: str, of_bools: str) -> Callable[[Node], str]:
    def write(n: Node) -> str:
        return reduced(n, of_bools if n.val(0).dtype.is_bool else function, n.x(0))

    return write


op("ReduceMax")(_extreme("max", "any"))
op("ReduceMin")(_extreme("min", "all"))


@op("ReduceSumSquare")
def _sum_square(n: Node) -> str:
    return _kept(n, reduced(n, "sum", f"{n.x(0)} * {n.x(0)}"))


@op("ReduceL1")
def _l1(n: Node) -> str:
    return _kept(n, reduced(n, "sum", f"abs({n.x(0)})"))


@op("ReduceL2")
def _l2(n: Node) -> str:
    x, dtype = n.x(0), n.val(0).dtype
    if dtype.is_float:
        return f"sqrt({reduced(n, 'sum', f'{x} * {x}')})"
    x = n.let("wide", f"f64({x})").text
    return f"{dtype}(sqrt({reduced(n, 'sum', f'{x} * {x}')}))"


@op("ReduceLogSum")
def _log_sum(n: Node) -> str:
    return f"log({reduced(n, 'sum', n.x(0))})"


@op("ReduceLogSumExp")
def _log_sum_exp(n: Node) -> str:
    """Without overflow: the greatest element is taken out first."""
    x, axes, is_noop = n.x(0), n.axes() or [], n.attr("noop_with_empty_axes", 0)
    where = f", axis={axis_text(axes)}" if axes else ""
    if is_noop and not axes:
        return x
    top = n.let("top", f"math.zero_where_infinite(max({x}{where}, keepdims=True))").text
    total = n.let("total", f"log(sum(exp({x} - {top}){where}, keepdims=True)) + {top}")
    return total.text if n.attr("keepdims", 1) else f"sum({total.text}{where})"


def _place(function: str) -> Callable[[Node], str]:
    def write(n: Node) -> str:
        axis, keep = n.attr("axis", 0), ", keepdims=True" if n.attr("keepdims", 1) else ""
        x, last = n.x(0), n.attr("select_last_index", 0)
        if not last:
            return f"{function}({x}, axis={axis}{keep})"
        found = f"{function}(flip({x}, axis={axis}), axis={axis}{keep})"
        return f"{n.val(0).shape[axis] - 1} - {found}"

    return write


op("ArgMax")(_place("argmax"))
op("ArgMin")(_place("argmin"))


def along(n: Node) -> tuple[int, ...]:
    """The axes of a softmax: before opset 13 all from `axis` on, since then that one alone."""
    rank = n.val(0).rank
    axis = n.attr("axis", -1 if n.opset >= 13 else 1)
    axis = axis_of(axis, rank) if rank else 0
    return tuple(range(axis, rank)) if n.opset < 13 else (axis,)


@op("Softmax")
def _softmax(n: Node) -> str:
    axes, x = along(n), n.x(0)
    if len(axes) == 1:
        last = axes[0] == n.val(0).rank - 1
        return f"nn.softmax({x})" if last else f"nn.softmax({x}, axis={axes[0]})"
    e = n.let("e", f"exp({x} - max({x}, axis={axis_text(axes)}, keepdims=True))").text
    return f"{e} / sum({e}, axis={axis_text(axes)}, keepdims=True)"


@op("LogSoftmax")
def _log_softmax(n: Node) -> str:
    axes, x = along(n), n.x(0)
    if len(axes) == 1:
        return f"nn.log_softmax({x}, axis={axes[0]})"
    shifted = n.let("shifted", f"{x} - max({x}, axis={axis_text(axes)}, keepdims=True)").text
    return f"{shifted} - log(sum(exp({shifted}), axis={axis_text(axes)}, keepdims=True))"


@op("Hardmax")
def _hardmax(n: Node) -> Written:
    """1 at the first greatest element, 0 elsewhere."""
    value = n.val(0)
    axes = along(n)
    if len(axes) != 1:
        flat = n.let("flat", f"reshape({n.x(0)}, [{_lead(value, axes[0])}, -1])")
        hot = _one_hot(n, flat, 1)
        return f"reshape({hot}, [{', '.join(map(str, value.shape))}])"
    return _one_hot(n, n.let("x", n.x(0)), axes[0])


def _lead(value: Val, axis: int) -> str:
    return " * ".join(f"({d})" for d in value.shape[:axis]) or "1"


def _one_hot(n: Node, x: Val, axis: int) -> str:
    size = x.shape[axis]
    spread = ", ".join(":" if k == axis else "None" for k in range(x.rank))
    place = f"argmax({x.text}, axis={axis}, keepdims=True)"
    return f"{x.dtype}({place} == iota({size})[{spread}])"
