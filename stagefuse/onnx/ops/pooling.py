"""Pools over windows, and over whole images."""

from __future__ import annotations

import math

from stagefuse.dsl.dims import Expr, as_expr, floordiv
from stagefuse.onnx.errors import Refused
from stagefuse.onnx.node import Node, Val
from stagefuse.onnx.record import Written, op
from stagefuse.onnx.text import size_text
from stagefuse.onnx.windows import Window, padded, rounded_up, window_of

from .reductions import axis_text


def _pool(n: Node, window: Window, text: str, kind: str) -> str:
    at = ", ".join(["b", "c", *window.reads()])
    return f"{kind}[{', '.join(window.ranges())}] {text}[{at}]"


def _indices(window: Window) -> list[str]:
    return ["b", "c", *window.positions]


def _lowest(value: Val) -> str:
    dtype = value.dtype
    if dtype.is_float:
        return "-math.INF"
    return "0" if dtype.kind == "uint" else str(-(1 << (dtype.bits - 1)))


@op("MaxPool")
def _max_pool(n: Node) -> Written:
    value = n.val(0)
    plain = window_of(n, n.attr("kernel_shape"), value.shape[2:])
    window = rounded_up(n, plain, value.shape[2:])
    if len(n.outputs) < 2 and (call := _library(n, "nn.max_pool", value, window)) is not None:
        n.attr("storage_order")
        return call
    text = padded(n, value, window, _lowest(value))
    order = n.attr("storage_order", 0)
    if len(n.outputs) < 2 or not n.outputs[1]:
        return n.define(n.hint, _indices(window), _pool(n, window, text, "max"))
    return _with_places(n, value, window, text, order)


def _library(n: Node, name: str, value: Val, window: Window) -> str | None:
    """A pool over images with square windows, strides and padding."""
    around = {p for pair in window.pads for p in pair}
    steps = {(k, s) for k, s in zip(window.size, window.strides, strict=True)}
    padding = next(iter(around)).as_int() if len(around) == 1 else None
    even = len(steps) == 1 and set(window.dilations) == {1} and padding is not None
    if value.rank != 4 or not even or not value.dtype.is_float:
        return None
    ((size, stride),) = steps
    more = f", stride={stride}" if stride != size else ""
    return f"{name}({n.x(0)}, {size}{more}{f', padding={padding}' if padding else ''})"


def _with_places(n: Node, value: Val, window: Window, text: str, order: int) -> Written:
    """The greatest elements, and where they are in the whole tensor as one row."""
    reads = ", ".join(["b", "c", *window.reads()])
    windows = n.define("windows", [*_indices(window), *window.ranges()], f"{text}[{reads}]")
    axes = tuple(range(2 + window.rank, 2 + 2 * window.rank))
    best = n.let(n.hint, f"max({windows.text}, axis={axis_text(axes)})")
    tap = n.let("tap", f"argmax({windows.text}, axis={axis_text(axes)})").text
    at, rest = "", [*_indices(window)]
    spatial = value.shape[2:]
    places = []
    for k in range(window.rank):
        inner = math.prod(window.size[k + 1 :])
        step = f"{tap}[{', '.join(rest)}] // {inner} % {window.size[k]}"
        start = window.pads[k][0]
        places.append(f"({window.positions[k]} * {window.strides[k]} - {start}"
                      f" + {step} * {window.dilations[k]})")  # fmt: skip
    if order:
        places, spatial = places[::-1], spatial[::-1]
    at = f"(b * {value.shape[1]} + c)"
    for place, size in zip(places, spatial, strict=True):
        at = f"({at} * ({size}) + {place})"
    return [best, n.define("places", _indices(window), at)]


@op("AveragePool")
def _average_pool(n: Node) -> Written:
    """The mean of what is inside; with `count_include_pad` of the padding too."""
    value = n.val(0)
    plain = window_of(n, n.attr("kernel_shape"), value.shape[2:])
    window = rounded_up(n, plain, value.shape[2:])
    counted = bool(n.attr("count_include_pad", 0))
    whole = not window.is_padded or (counted and window.pads == plain.pads)
    if whole and (call := _library(n, "nn.avg_pool", value, window)) is not None:
        return call
    text = padded(n, value, window)
    if whole:
        return n.define(n.hint, _indices(window), _pool(n, window, text, "mean"))
    total = n.define("total", _indices(window), _pool(n, window, text, "sum")).text
    zero = (as_expr(0), as_expr(0))
    edges = plain.pads if counted else (zero,) * window.rank
    counts = [_counts(window, axis, value.shape[2 + axis], edges[axis])
              for axis in range(window.rank)]  # fmt: skip
    inside = n.let("inside", f"{value.dtype}({' * '.join(counts)})").text
    return f"{total} / {inside}"


def _counts(window: Window, axis: int, size: Expr, edges: tuple[Expr, Expr]) -> str:
    """How many elements of each window are inside along an axis, which begins and ends so much
    before and behind the input: the taps that are not beyond its end, less those before it."""
    step, before, after = window.dilations[axis], *window.pads[axis]
    count = floordiv(size + before + after - window.extents[axis], window.strides[axis]) + 1
    start = f"iota({size_text(count)}) * {window.strides[axis]}"

    def up_to(place: Expr) -> str:
        more = size_text(place + (step - 1))
        return f"({more} - {start})" if step == 1 else f"(({more} - {start}) // {step})"

    first, last = before - edges[0], before + size + edges[1]
    text = f"minimum({up_to(last)}, {window.size[axis]}) - maximum({up_to(first)}, 0)"
    return f"({text})[:{', None' * (window.rank - 1 - axis)}]"


@op("LpPool")
def _lp_pool(n: Node) -> Written:
    value, p = n.val(0), n.attr("p", 2)
    window = rounded_up(n, window_of(n, n.attr("kernel_shape"), value.shape[2:]), value.shape[2:])
    text = padded(n, value, window)
    powers = n.let("powers", f"abs({text}) ** {float(p)}").text
    total = n.define("total", _indices(window), _pool(n, window, powers, "sum")).text
    return f"{total} ** {1.0 / p!r}"


def _spatial(n: Node) -> str:
    rank = n.val(0).rank
    if rank < 3:
        raise Refused("a tensor without spatial axes")
    return f"axis={axis_text(tuple(range(2, rank)))}, keepdims=True"


@op("GlobalAveragePool")
def _global_average(n: Node) -> str:
    return f"mean({n.x(0)}, {_spatial(n)})"


@op("GlobalMaxPool")
def _global_max(n: Node) -> str:
    return f"max({n.x(0)}, {_spatial(n)})"


@op("GlobalLpPool")
def _global_lp(n: Node) -> str:
    p = n.attr("p", 2)
    return f"sum(abs({n.x(0)}) ** {float(p)}, {_spatial(n)}) ** {1.0 / p!r}"
