"""Between which numbers the finite elements of a float tensor are proved to lie.

Of what quotients are divided by: extremes, sums and roots of what is never negative, with a
constant that keeps them from 0. An element may also be infinite or NaN.
"""

from __future__ import annotations

import math

from stagefuse.compiler.graph import Graph, Map, Node, Reduce, Ref, Scalar, View
from stagefuse.dsl.dtypes import DType

DEPTH = 20
"""Operands of operands that are looked at."""
LARGEST = {"f16": 65504.0, "bf16": (2 - 2.0**-7) * 2.0**127, "f32": (2 - 2.0**-23) * 2.0**127}
Range = tuple[float, float]


def float_range(graph: Graph, ref: Ref, depth: int = DEPTH) -> Range:
    """The least and the greatest finite element, by what makes it; rounding moves either by 2^-8
    of itself at most, which is not counted."""
    dtype = graph.type(ref).dtype
    low, high = _every(dtype)
    node = graph.nodes[ref.node]
    if depth and dtype.is_float:
        a, b = _made(graph, node, depth - 1)
        low, high = max(low, a), min(high, b)
    return low, high


def _every(dtype: DType) -> Range:
    most = LARGEST.get(dtype.name, math.inf)
    return -most, most


def _made(graph: Graph, node: Node, depth: int) -> Range:
    match node.primitive:
        case Scalar(value=value) if math.isfinite(value):
            return float(value), float(value)
        case View(guard=()) | Map(fn="cast") if graph.type(node.operands[0]).dtype.is_float:
            return float_range(graph, node.operands[0], depth)
        case Reduce(kind="max" | "min"):
            return float_range(graph, node.operands[0], depth)
        case Reduce(kind="sum"):
            low, high = float_range(graph, node.operands[0], depth)
            return 0.0 if low >= 0 else -math.inf, 0.0 if high <= 0 else math.inf
        case Map(fn=fn):
            return _map(graph, node, fn, depth)
    return -math.inf, math.inf


def _map(graph: Graph, node: Node, fn: str, depth: int) -> Range:
    if fn not in ("abs", "sqrt", "exp", "add", "mul", "div", "maximum", "minimum"):
        return -math.inf, math.inf
    ranges = [float_range(graph, ref, depth) for ref in node.operands]
    low, high = ranges[0]
    if fn == "abs":
        return max(0.0, low, -high), max(-low, high)
    if fn == "sqrt":
        return math.sqrt(max(low, 0.0)), math.sqrt(max(high, 0.0))
    if fn == "exp":
        return 0.0, math.inf
    other = ranges[1]
    if fn == "maximum":
        return max(low, other[0]), max(high, other[1])
    if fn == "minimum":
        return min(low, other[0]), min(high, other[1])
    if fn == "add":
        return low + other[0], high + other[1]
    if fn == "mul" and node.operands[0] == node.operands[1]:
        least = 0.0 if low <= 0 <= high else min(low * low, high * high)
        return least, max(low * low, high * high)
    if low >= 0 and other[0] >= 0 and fn == "mul":
        return low * other[0], high * other[1]
    if low >= 0 and other[0] > 0 and fn == "div":
        return low / other[1], high / other[0]
    return -math.inf, math.inf
