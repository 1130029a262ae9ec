"""Softmax, norms and activations, found by structure where the op means exactly that."""

from __future__ import annotations

import math

import numpy as np

from stagefuse.compiler.graph import Map, Node, Ref, Sort, View
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.dtypes import F16, F32, DType

from .forms import Context, Form, Traced, one
from .model import Tensor
from .products import product
from .quantised import dequantize, quantize


def softmax(c: Context, node: Node) -> Form | None:
    """exp(x - max(x)) over its sum along one axis."""
    if node.primitive != Map("div"):
        return None
    top, bottom = node.operands
    if c.folded(bottom, "sum") is None:
        return None
    summed = c.folded(bottom, "sum")
    assert summed is not None
    inside = c.mapped(top, "exp")
    if summed[0] != top or inside is None:
        return None
    x, axis = _shifted(c, inside[0], summed[1]), _only(c, top, summed[1])
    return None if x is None or axis is None else _along(c, "Softmax", x, axis)


def log_softmax(c: Context, node: Node) -> Form | None:
    """s - log(sum(exp(s))) along one axis, for s = x - max(x)."""
    if node.primitive != Map("sub"):
        return None
    shifted, rest = node.operands
    found = c.traced(rest)
    log = c.mapped(found.root, "log")
    if log is None or found.root == rest:
        return None
    inner = c.traced(log[0])
    total = c.reduced(inner.root, "sum")
    exp = None if total is None else c.mapped(total[0], "exp")
    if total is None or exp is None or exp[0] != shifted or len(total[1]) != 1:
        return None  # of one axis alone, unlike softmax
    x, axis = _shifted(c, shifted, total[1]), total[1][0]
    shape = c.shape(shifted)
    kept = [const(1) if n == axis else d for n, d in enumerate(shape)]
    if x is None or c.shape(found.root) not in (tuple(kept), c.shape(inner.root)):
        return None
    at = [e for n, e in enumerate(found.indices) if len(found.indices) < len(shape) or n != axis]
    wanted = [sym(f"i{n}") for n, d in enumerate(shape) if n != axis and d.as_int() != 1]
    if [e for e in at if e.terms] != wanted:
        return None
    return _along(c, "LogSoftmax", x, axis)


def _shifted(c: Context, ref: Ref, axes: tuple[int, ...]) -> Ref | None:
    """x, where a value is x - max(x) along axes."""
    parts = c.mapped(ref, "sub")
    if parts is None:
        return None
    greatest = c.folded(parts[1], "max", axes)
    return parts[0] if greatest is not None and greatest[0] == parts[0] else None


def _only(c: Context, ref: Ref, axes: tuple[int, ...]) -> int | None:
    """The axis that has more than one element."""
    wide = [a for a in axes if c.shape(ref)[a].as_int() != 1]
    return wide[0] if len(wide) == 1 else None


def _along(c: Context, op: str, x: Ref, axis: int) -> Form:
    shape = c.shape(x)

    def write(tensor: Tensor) -> Tensor:
        whole = c.layout.whole(tensor, shape)
        place = -1 if axis == len(shape) - 1 else axis
        return c.model.node(op, [whole], whole.dtype, shape, axis=place)

    return one([x], write)


def mean(c: Context, node: Node) -> Form | None:
    """A sum over the number of its elements."""
    found = c.reduced(Ref(node.id), "mean") if node.primitive == Map("div") else None
    if found is None:
        return None
    x, axes = found
    return one([x], lambda t: c.folds.reduce("mean", t, c.shape(x), axes, node.type.dtype))


def top(c: Context, node: Node) -> Form | None:
    """The first elements of a sorted axis, or their positions."""
    if not isinstance(node.primitive, View) or node.primitive.guard:
        return None
    (ref,) = node.operands
    inner = c.node(ref)
    if not isinstance(inner.primitive, Sort):
        return None
    view, sort, shape, part = node.primitive, inner.primitive, c.shape(ref), node.type.shape
    others = [[d for n, d in enumerate(s) if n != sort.axis] for s in (part, shape)]
    if len(part) != len(shape) or others[0] != others[1]:
        return None
    same = (i == sym(s) or i == const(0) and d.as_int() == 1
            for i, s, d in zip(view.indices, view.symbols, part, strict=True))  # fmt: skip
    if not all(same):
        return None
    return one(inner.operands, lambda t: c.folds.sort(
        t, shape, sort.axis, sort.descending, part[sort.axis])[ref.result])  # fmt: skip


def kept_reduction(c: Context, node: Node) -> Form | None:
    """A reduction, the reduced axes put back with size 1 or repeated."""
    if not isinstance(node.primitive, View) or node.primitive.guard:
        return None
    found = c.traced(Ref(node.id))
    for kind in ("sum", "prod", "max", "min", "any", "all", "mean"):
        inner = c.reduced(found.root, kind)
        if inner is None:
            continue
        if kind == "sum" and product(c, c.node(found.root)) is not None:
            return None
        if not _puts_back(c, node, found, *inner):
            return None
        return _keeping(c, kind, *inner, c.graph.type(found.root).dtype)
    return None


def _keeping(c: Context, kind: str, x: Ref, axes: tuple[int, ...], result: DType) -> Form:
    shape = c.shape(x)
    return one([x], lambda t: c.folds.reduce(kind, t, shape, axes, result, keep=True))


def _puts_back(c: Context, node: Node, found: Traced, x: Ref, axes: tuple[int, ...]) -> bool:
    shape = c.shape(x)
    if len(node.type.shape) != len(shape):
        return False
    kept = [n for n in range(len(shape)) if n not in axes]
    wanted = [const(0) if shape[n].as_int() == 1 else sym(f"i{n}") for n in kept]
    same = all(node.type.shape[n] == shape[n] for n in kept)
    return same and list(found.indices) == wanted


def layer_norm(c: Context, node: Node) -> Form | None:
    """Mean 0 and variance 1 along the last axis, times a scale, with or without a shift."""
    shift: Ref | None = None
    scaled: Ref | None = Ref(node.id)
    if node.primitive == Map("add"):
        for a, b in (node.operands, node.operands[::-1]):
            if _is_row(c, b) and c.mapped(a, "mul") is not None:
                scaled, shift = a, b
                break
        else:
            return None
    parts = c.mapped(scaled, "mul") if scaled else None
    if parts is None or node.type.dtype != F32:
        return None
    for normed, scale in (parts, parts[::-1]):
        found = _normed(c, normed)
        if found is None or not _is_row(c, scale):
            continue
        x, eps = found
        shape, rows = c.shape(x), [c.traced(r).root for r in (scale, shift) if r is not None]

        def write(*tensors: Tensor, eps: float = eps, shape: tuple[Expr, ...] = shape) -> Tensor:
            whole = c.layout.whole(tensors[0], shape)
            given = [whole, *(c.layout.reshaped(t, shape[-1:]) for t in tensors[1:])]
            return c.model.node("LayerNormalization", given, F32, shape, axis=-1, epsilon=eps)

        return one([x, *rows], write)
    return None


def _is_row(c: Context, ref: Ref) -> bool:
    """Whether a value is a stored row, repeated along all axes but the last."""
    found, shape = c.traced(ref), c.shape(ref)
    own = c.shape(found.root)
    return bool(shape) and own == shape[-1:] and found.indices == (sym(f"i{len(shape) - 1}"),)


def _normed(c: Context, ref: Ref) -> tuple[Ref, float] | None:
    """x and eps, where a value is (x - mean(x)) * rsqrt(mean((x - mean(x)) ** 2) + eps)."""
    parts = c.mapped(ref, "mul")
    if parts is None:
        return None
    for centred, scale in (parts, parts[::-1]):
        gap, root = c.mapped(centred, "sub"), c.traced(scale)
        inverse = c.mapped(root.root, "rsqrt")
        spread = None if inverse is None else c.mapped(inverse[0], "add")
        if gap is None or spread is None:
            continue
        last = len(c.shape(centred)) - 1
        average = c.folded(gap[1], "mean", (last,))
        eps = c.number(spread[1])
        inner = c.traced(spread[0])
        square = c.reduced(inner.root, "mean")
        if average is None or average[0] != gap[0] or eps is None or square is None:
            continue
        indices = tuple(const(0) if d.as_int() == 1 else sym(f"i{n}")
                        for n, d in enumerate(c.shape(centred)[:-1]))  # fmt: skip
        at = (*indices, const(0))
        is_square = c.mapped(square[0], "mul") == (centred, centred) and square[1] == (last,)
        if is_square and root.indices == at and inner.indices in (indices, at):
            return gap[0], float(eps)
    return None


def batch_norm(c: Context, node: Node) -> Form | None:
    """x * s + beta - mean * s for each channel, where s is gamma * rsqrt(variance + eps)."""
    terms = c.mapped(Ref(node.id), "add")
    scaled = None if terms is None else c.mapped(terms[0], "mul")
    if terms is None or scaled is None or node.type.dtype != F32 or len(node.type.shape) < 2:
        return None
    scale, shift = (_channel(c, ref) for ref in (scaled[1], terms[1]))
    parts = None if scale is None else c.mapped(scale, "mul")
    rest = None if shift is None else c.mapped(shift, "sub")
    product_of = None if rest is None else c.mapped(rest[1], "mul")
    if parts is None or rest is None or product_of is None or scale not in product_of:
        return None
    average = product_of[0] if product_of[1] == scale else product_of[1]
    for inverse, gamma in (parts, parts[::-1]):
        inner = c.mapped(inverse, "rsqrt")
        spread = None if inner is None else c.mapped(inner[0], "add")
        eps = None if spread is None else c.number(spread[1])
        if spread is None or eps is None:
            continue
        return _normalized(c, scaled[0], (gamma, rest[0], average, spread[0]), float(eps))
    return None


def _normalized(c: Context, x: Ref, rows: tuple[Ref, Ref, Ref, Ref], eps: float) -> Form:
    shape, row = c.shape(x), c.shape(x)[1:2]

    def write(*tensors: Tensor) -> Tensor:
        given = [c.layout.whole(tensors[0], shape)]
        given += [c.layout.whole(t, row) for t in tensors[1:]]
        return c.model.node("BatchNormalization", given, F32, shape, epsilon=eps)

    return one([x, *rows], write)


def _channel(c: Context, ref: Ref) -> Ref | None:
    """The row that a value repeats along all axes but the second."""
    found, shape = c.traced(ref), c.shape(ref)
    is_row = c.shape(found.root) == shape[1:2] and found.indices == (sym("i1"),)
    return found.root if is_row else None


def gelu(c: Context, node: Node) -> Form | None:
    """x / 2 * (1 + erf(x / sqrt(2))), the factors in any order."""
    if c.model.opset < 20 or node.primitive != Map("mul") or node.type.dtype not in (F32, F16):
        return None
    factors = c.factors(Ref(node.id))
    if len(factors) != 3:
        return None
    half = [f for f in factors if c.number(f) == 0.5]
    rest = [f for f in factors if f not in half]
    if len(half) != 1 or len(rest) != 2:
        return None
    for x, bracket in (rest, rest[::-1]):
        terms = c.mapped(bracket, "add")
        for a, b in (terms, terms[::-1]) if terms else ():
            erf = c.mapped(a, "erf")
            if c.number(b) == 1.0 and erf is not None and _scaled_root(c, erf[0], x):
                return one([x], lambda t: c.maps.op("Gelu", t))
    return None


def _scaled_root(c: Context, ref: Ref, x: Ref) -> bool:
    """Whether a value is x / sqrt(2)."""
    by, name = math.sqrt(0.5), "mul"
    parts = c.mapped(ref, "mul")
    if parts is None:
        parts, by, name = c.mapped(ref, "div"), math.sqrt(2), "div"
    if parts is None:
        return False
    pairs = (parts, parts[::-1]) if name == "mul" else (parts,)
    kind = c.graph.type(x).dtype.numpy
    return any(a == x and c.number(b) == float(np.asarray(by, kind)) for a, b in pairs)


PATTERNS = (softmax, log_softmax, layer_norm, batch_norm, gelu, mean, top, kept_reduction, quantize,
            dequantize)  # fmt: skip
