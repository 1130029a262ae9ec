"""What is known while importing: constants, and arithmetic of sizes.

Shape, Gather, Concat and their like run here on arrays of numbers or of sizes, so that a Reshape
finds its shape. Bulk arithmetic of weights is left to the compiler, which folds it too.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeAlias

import numpy as np

from stagefuse.dsl.dims import Expr, as_expr, const, divide, floordiv, maximum, minimum
from stagefuse.dsl.dtypes import from_numpy

from .body import require_sane
from .node import Node
from .reading import _NUMPY

Array: TypeAlias = "np.ndarray[Any, Any]"
MAX_KNOWN = 4096
"""Elements of a result that is folded here; larger ones become tensors of the program."""
MAX_SIZES = 64
"""The same of a tensor of sizes that has several dimensions."""


def fold(node: Node) -> list[Array] | None:
    """The results of a node whose inputs are all known; None leaves it to the language."""
    if node.op == "Shape":
        return [_shape(node)]
    if node.op == "Size":
        total = const(1)
        for size in node.val(0).shape:
            total = total * size
        return [tidy(np.array(total, object))]
    arrays = [v.known for v in node.inputs if v is not None]
    rule = RULES.get(node.op)
    if rule is None or any(a is None or a.size > MAX_KNOWN for a in arrays):
        return None
    if node.op == "Transpose" and arrays[0] is not None and arrays[0].dtype.kind == "f":
        return None  # a weight: it may be read as it is too, and is then stored once
    try:
        with np.errstate(all="ignore"):
            found = rule(node, *(a for a in arrays if a is not None))
    except (TypeError, ValueError, IndexError, ArithmeticError, Unfolded):
        return None
    results = found if isinstance(found, list) else [found]
    if any(r.size > (MAX_SIZES if is_symbolic(r) and r.ndim > 1 else MAX_KNOWN) for r in results):
        return None
    return [tidy(r) for r in results]


class Unfolded(Exception):
    """A rule that does not hold for these operands."""


def tidy(found: Any) -> Array:
    """Sizes that are numbers become numbers."""
    array: Array = np.asarray(found)
    if array.dtype != object:
        return array
    require_sane([as_expr(v) for v in array.reshape(-1)])
    whole = [as_expr(v).as_int() for v in array.reshape(-1)]
    if any(n is None for n in whole):
        return array
    return np.array(whole, np.int64).reshape(array.shape)


def is_symbolic(array: Array) -> bool:
    return bool(array.dtype == object)


def _shape(node: Node) -> Array:
    shape = node.val(0).shape
    cut = slice(node.attr("start", 0), node.attr("end", None))
    return tidy(np.array([*shape[cut]], object).reshape(-1))


def _binary(numbers: Callable[..., Any], sizes: Callable[..., Any] | None) -> Callable[..., Any]:
    def rule(node: Node, a: Array, b: Array) -> Array:
        if not is_symbolic(a) and not is_symbolic(b):
            return np.asarray(numbers(a, b)).astype(np.result_type(a, b), copy=False)
        if sizes is None:
            raise Unfolded
        facts = node.body.frame.recorder.facts
        apply = np.frompyfunc(lambda x, y: sizes(_expr(x), _expr(y), facts), 2, 1)
        found: Array = np.asarray(apply(a, b), object)
        return found

    return rule


def _expr(value: Any) -> Expr:
    return value if isinstance(value, Expr) else as_expr(int(value))


def _truncated(a: Array, b: Array) -> Array:
    if a.dtype.kind not in "iu":
        return np.asarray(a / b)
    if np.any(b == 0):
        raise Unfolded
    quotient = np.abs(a) // np.abs(b)
    return np.asarray(np.where((a < 0) != (b < 0), -quotient, quotient))


def _divided(a: Expr, b: Expr, facts: Any) -> Expr:
    """Sizes divide towards zero, which for positive ones is down."""
    if not facts.is_positive(b):
        raise Unfolded
    exact, rest = divide(a, b)
    if not rest.terms or facts.is_nonneg(a):
        return floordiv(a, b, facts) if rest.terms else exact
    if not facts.is_nonneg(-a):
        raise Unfolded
    return -floordiv(-a, b, facts)


def _remainder(node: Node, a: Array, b: Array) -> Array:
    """With the sign of the divisor, as that of the language's sizes."""
    if node.attr("fmod", 0) or "f" in (a.dtype.kind, b.dtype.kind):
        raise Unfolded
    if not is_symbolic(b) and np.any(b == 0):
        raise Unfolded
    return np.asarray(_MOD(node, a, b))


def _size_remainder(a: Expr, b: Expr, facts: Any) -> Expr:
    if not facts.is_positive(b):
        raise Unfolded
    return a - b * floordiv(a, b, facts)


_MOD = _binary(np.mod, _size_remainder)


def _power(node: Node, a: Array, b: Array) -> Array:
    """Of one number: a root that makes a size. Others are left to the language."""
    if a.size != 1 or b.size != 1 or is_symbolic(a) or is_symbolic(b):
        raise Unfolded
    return np.asarray(np.power(a, b)).astype(a.dtype)


def _compared(name: str) -> Callable[..., Any]:
    functions: dict[str, Callable[..., Any]] = {
        "Equal": np.equal, "Less": np.less, "Greater": np.greater,
        "LessOrEqual": np.less_equal, "GreaterOrEqual": np.greater_equal,
    }  # fmt: skip

    def decide(facts: Any, a: Expr, b: Expr) -> bool:
        if name == "Equal":
            yes, no = facts.prove_eq(a, b), facts.prove_lt(a, b) or facts.prove_lt(b, a)
        else:
            low, high = (a, b) if name.startswith("Less") else (b, a)
            strict = not name.endswith("OrEqual")
            yes = facts.prove_lt(low, high) if strict else facts.prove_le(low, high)
            no = facts.prove_le(high, low) if strict else facts.prove_lt(high, low)
        if not yes and not no:
            raise Unfolded
        return bool(yes)

    def rule(node: Node, a: Array, b: Array) -> Array:
        if not is_symbolic(a) and not is_symbolic(b):
            return np.asarray(functions[name](a, b))
        facts = node.body.frame.recorder.facts
        apply = np.frompyfunc(lambda x, y: decide(facts, _expr(x), _expr(y)), 2, 1)
        found: Array = np.asarray(apply(a, b)).astype(bool)
        return found

    return rule


def _gather(node: Node, x: Array, ids: Array) -> Array:
    return np.asarray(np.take(x, ids.astype(np.int64), node.attr("axis", 0)))


def _axes(node: Node, rest: tuple[Array, ...]) -> list[int] | None:
    given = node.attr("axes")
    if given is None and rest:
        given = rest[0].reshape(-1).tolist()
    return None if given is None else [int(a) for a in given]


def _unsqueeze(node: Node, x: Array, *rest: Array) -> Array:
    axes = _axes(node, rest) or []
    rank = x.ndim + len(axes)
    wanted = {a % rank for a in axes}
    if len(wanted) != len(axes):
        raise ValueError("an axis is there twice")
    source = iter(x.shape)
    return x.reshape([1 if n in wanted else next(source) for n in range(rank)])


def _squeeze(node: Node, x: Array, *rest: Array) -> Array:
    axes = _axes(node, rest)
    return np.squeeze(x, None if axes is None else tuple(axes))


def _concat(node: Node, *parts: Array) -> Array:
    kind = object if any(map(is_symbolic, parts)) else None
    return np.concatenate([p.astype(kind) if kind else p for p in parts], node.attr("axis", 1))


def _reshape(node: Node, x: Array, shape: Array) -> Array:
    if node.attr("allowzero", 0):
        raise Unfolded
    sizes = [x.shape[n] if int(d) == 0 else int(d) for n, d in enumerate(shape)]
    return x.reshape(sizes)


def _slice(node: Node, x: Array, *rest: Array) -> Array:
    if node.opset < 10:
        starts, ends = node.attr("starts"), node.attr("ends")
        axes, steps = node.attr("axes"), None
    else:
        starts, ends, axes, steps = (*(r.tolist() for r in rest), None, None, None, None)[:4]
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    cuts = [slice(None)] * x.ndim
    for axis, start, end, step in zip(axes, starts, ends, steps, strict=True):
        stop: Any = end
        if step < 0:
            start = max(start + x.shape[axis], 0) if start < 0 else start
            stop = None if end < -x.shape[axis] else end
        cuts[axis] = slice(start, stop, step)
    return x[tuple(cuts)]


def _cast(node: Node, x: Array, *like: Array) -> Array:
    if node.op == "CastLike":
        if node.val(1).held:
            raise Unfolded
        wanted: Any = np.dtype(np.int64) if is_symbolic(like[0]) else like[0].dtype
    else:
        wanted = np.dtype(_NUMPY.get(node.attr("to"), np.void))
    if is_symbolic(x):
        if wanted.name not in ("int64", "int32"):
            raise Unfolded
        return x
    if x.dtype.kind == "f" and wanted.kind in "iu":
        if not np.all(np.isfinite(x)) or np.any(np.abs(x) > 1e9):
            raise Unfolded
    if from_numpy(wanted) is None:
        raise Unfolded
    return x.astype(wanted)


def _constant_of_shape(node: Node, shape: Array) -> Array:
    sizes = [int(d) for d in shape]
    if math.prod(sizes) > MAX_KNOWN or is_symbolic(shape):
        raise Unfolded
    value = node.attr("value")
    return np.full(sizes, 0.0 if value is None else value.reshape(-1)[0],
                   np.float32 if value is None else value.dtype)  # fmt: skip


def _range(node: Node, start: Array, limit: Array, delta: Array) -> Array:
    if any(map(is_symbolic, (start, limit, delta))) or delta == 0:
        raise Unfolded
    count = max(0, math.ceil((limit.item() - start.item()) / delta.item()))
    if count > MAX_KNOWN:
        raise Unfolded
    return np.asarray(start + np.arange(count) * delta).astype(start.dtype)


def _expand(node: Node, x: Array, shape: Array) -> Array:
    sizes = [int(d) for d in shape]
    if math.prod(sizes) > MAX_KNOWN:
        raise Unfolded
    return np.array(np.broadcast_to(x, np.broadcast_shapes(x.shape, tuple(sizes))))


def _tile(node: Node, x: Array, repeats: Array) -> Array:
    counts = [int(r) for r in repeats]
    if math.prod(counts) * x.size > MAX_KNOWN:
        raise Unfolded
    return np.tile(x, counts)


def _one_hot(node: Node, ids: Array, depth: Array, values: Array) -> Array:
    """Also of sizes: PyTorch writes the repeats of `repeat_interleave` so."""
    count, axis = int(depth.reshape(-1)[0]), node.attr("axis", -1)
    if is_symbolic(ids) or ids.size * count > MAX_KNOWN:
        raise Unfolded
    at = ids.astype(np.int64)[..., None]
    hot = np.where(at < 0, at + count, at) == np.arange(count)
    return np.moveaxis(np.where(hot, values[1], values[0]), -1, axis)


def _where(node: Node, c: Array, a: Array, b: Array) -> Array:
    return np.asarray(np.where(c, a, b))


def _reduced(fn: Callable[..., Any]) -> Callable[..., Any]:
    def rule(node: Node, x: Array, *rest: Array) -> Array:
        axes = _axes(node, rest)
        if axes is None and node.attr("noop_with_empty_axes", 0):
            return x
        keep = bool(node.attr("keepdims", 1))
        found = fn(x, axis=None if axes is None else tuple(axes), keepdims=keep)
        return np.asarray(found, object if is_symbolic(x) else x.dtype)

    return rule


def _split(node: Node, x: Array, *rest: Array) -> list[Array]:
    axis = node.attr("axis", 0)
    given = node.attr("split") if not rest else rest[0].tolist()
    if given is None:
        size = -(-x.shape[axis] // len(node.outputs))
        given = [size] * (len(node.outputs) - 1)
    else:
        given = given[:-1]
    return list(np.split(x, np.cumsum(given).tolist(), axis))


def _unary(fn: Callable[..., Any]) -> Callable[..., Any]:
    def rule(node: Node, x: Array) -> Array:
        if is_symbolic(x) and node.op not in ("Neg", "Identity"):
            raise Unfolded
        return np.asarray(fn(x))

    return rule


def _clip(node: Node, x: Array, *_: Array) -> Array:
    """The bounds are attributes before opset 11, then inputs."""
    for index, (bound, rule) in enumerate((("min", "Max"), ("max", "Min")), 1):
        given, limit = node.attr(bound), node.maybe(index)
        if limit is not None:
            x = RULES[rule](node, x, limit.known)
        elif given is not None:
            x = RULES[rule](node, x, np.asarray(given, np.float32))
    return x


def _identity(node: Node, x: Array, *_: Array) -> Array:
    return x


RULES: dict[str, Callable[..., Any]] = {
    "Add": _binary(np.add, lambda a, b, f: a + b),
    "Sub": _binary(np.subtract, lambda a, b, f: a - b),
    "Mul": _binary(np.multiply, lambda a, b, f: a * b),
    "Div": _binary(_truncated, _divided),
    "Mod": _remainder, "Pow": _power,
    "Max": _binary(np.maximum, maximum), "Min": _binary(np.minimum, minimum),
    "Equal": _compared("Equal"), "Less": _compared("Less"), "Greater": _compared("Greater"),
    "LessOrEqual": _compared("LessOrEqual"), "GreaterOrEqual": _compared("GreaterOrEqual"),
    "Gather": _gather, "Unsqueeze": _unsqueeze, "Squeeze": _squeeze, "Concat": _concat,
    "Reshape": _reshape, "Slice": _slice, "Cast": _cast, "CastLike": _cast,
    "ConstantOfShape": _constant_of_shape, "Range": _range, "Expand": _expand, "Tile": _tile,
    "OneHot": _one_hot, "Where": _where, "Clip": _clip,
    "ReduceProd": _reduced(np.prod), "ReduceSum": _reduced(np.sum),
    "ReduceMax": _reduced(np.max), "ReduceMin": _reduced(np.min), "Split": _split,
    "Neg": _unary(np.negative), "Not": _unary(np.logical_not), "Abs": _unary(np.abs),
    "Floor": _unary(np.floor), "Ceil": _unary(np.ceil), "Sqrt": _unary(np.sqrt),
    "Round": _unary(np.round), "Sign": _unary(np.sign),
    "Relu": _unary(lambda x: np.maximum(x, 0)), "Identity": _identity,
    "Transpose": lambda node, x: np.transpose(x, node.attr("perm")),
    "And": _binary(np.logical_and, None), "Or": _binary(np.logical_or, None),
}  # fmt: skip

__all__ = ["MAX_KNOWN", "RULES", "fold", "tidy"]
