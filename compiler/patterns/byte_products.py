"""Products of 8-bit operands, multiplied as they are stored.

A factor is scale * (code - zero), with a code of 8 bits, and a zero and a scale that are the same
all along the depth; so is what ONNX quantises. Then

    sum (x - p) (y - q) = sum x y - p sum y - q sum x + depth p q,

in i32, whatever wraps, and scales are factors of the sum. GPUs' tensor cores take 8-bit operands
along the depth alone, from rows at multiples of 16 bytes: those that lie otherwise are stored so
first, constants while compiling and others by a kernel. CPUs take integers, from where those of f32
would lie.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np

from stagefuse.compiler.graph import Constant, Graph, Map, Node, Reduce, Ref, Scalar, View, Weight
from stagefuse.compiler.graph_builder import Builder
from stagefuse.dsl.dims import Expr, const, floordiv, sym
from stagefuse.dsl.dtypes import F32, I32, I64, DType
from stagefuse.dsl.frozen import frozen

from .byte_operands import is_byte
from .contract import Sums, axes_of, cast_of, through
from .convolved import convolution_of
from .operand_matrices import in_place, matrix_of, packed, rows_of, total_of, view_of
from .panel_width import panel_width
from .steps import lies_in_chunks

CHUNK = 16
"""Bytes that copies move, of which the start of every row is a multiple."""
LARGEST = 255
"""What a code less its zero is at most."""
Load = Callable[[str, str], Any]
"""A tensor of a weight file, by the file's name in the source and the tensor's key."""


def has_bytes(graph: Graph) -> bool:
    """Whether a graph may have products of 8-bit operands."""
    nodes = graph.nodes.values()
    return any(is_byte(t.dtype) for node in nodes for t in node.types) and any(
        isinstance(node.primitive, Reduce) and node.primitive.kind == "sum" for node in nodes
    )


@frozen
class _Factor:
    """scale * (code - zero), each of one shape; `zero` is an integer of at most 8 bits."""

    code: Ref
    zero: Ref | None = None
    scales: tuple[Ref, ...] = ()


def product_of_bytes(
    b: Builder,
    node: Node,
    s: Sums,
    load: Load | None = None,
    convolves: bool = False,
    on_cpu: bool = False,
) -> Ref | None:
    """The sums as a product of codes and what makes them of it, if both factors have codes. `load`
    reads weights, of which many a zero is 0. `convolves`: whether convolutions are left as they
    are, for the pass `channels_last`. `on_cpu`: a product of integers, for a CPU."""
    u, v = _factor(b, s.left), _factor(b, s.right)
    if u is None or v is None:
        return None
    u, v = (_known(b, x, load, on_cpu) for x in (u, v))
    dtypes = [b.type(x.code).dtype for x in (u, v)]
    scales = (*u.scales, *v.scales)
    if dtypes[0].is_float != dtypes[1].is_float or not _sums_exactly(b, node, s):
        return None
    if any(axes_of(b.graph, scale) & set(s.depth) for scale in scales):
        return None
    if any(zero is not None and not _is_shared(b, zero, s) for zero in (u.zero, v.zero)):
        return None
    multiply = partial(_product, b, node, s, (u.code, v.code))
    if on_cpu:
        if dtypes[0].is_float:
            return None
        multiply = partial(_stored_product, b, node, s, (u.code, v.code))
    if dtypes[0].is_float:
        if u.zero is not None or v.zero is not None or node.type.dtype.bits > 32:
            return None
        total = multiply(F32, convolves)
    elif scales and not node.type.dtype.is_float or not _is_exact(b, node, s, u, v):
        return None
    else:
        shifts = _shifts(b, s, u, v)  # before the product: what follows a product is fused with it
        total = multiply(I32, convolves)
        for fn, shift in shifts:
            total = b.map(fn, total, shift)
    if node.type.dtype.is_float:
        total = b.cast(total, F32)
        for scale in scales:
            total = b.map("mul", total, _at_result(b, scale, s))
    return b.result(total, node.type.dtype)


def _sums_exactly(b: Builder, node: Node, s: Sums) -> bool:
    """Whether products of elements are what is summed: those of narrow integers have wrapped."""
    dtype = b.type(s.left).dtype
    return dtype == node.type.dtype if dtype.is_float else dtype in (I32, I64)


def _is_shared(b: Builder, zero: Ref, s: Sums) -> bool:
    """Whether a zero is the same all along the depth, or is but for where a factor is padded."""
    if not axes_of(b.graph, zero) & set(s.depth):
        return True
    view = b.graph.nodes[zero.node].primitive
    if not isinstance(view, View):
        return False
    moving = {view.symbols[a] for a in s.depth}
    return not any(e.symbols() & moving for e in view.indices)


def _is_exact(b: Builder, node: Node, s: Sums, u: _Factor, v: _Factor) -> bool:
    """Whether a sum in i32 is what was asked for: one that wraps as i32 does, or never does."""
    if node.type.dtype == I32:
        return True
    if node.type.dtype not in (I64, F32):
        return False
    most = b.facts.bounds(total_of(s.domain, s.depth))[1]
    return most is not None and most * _largest(b, u) * _largest(b, v) < 1 << 31


def _largest(b: Builder, x: _Factor) -> int:
    signed = b.type(x.code).dtype.kind == "int"
    return 128 if signed and x.zero is None else LARGEST


# Factors


def _factor(b: Builder, ref: Ref) -> _Factor | None:
    node, dtype = b.graph.nodes[ref.node], b.type(ref).dtype
    if is_byte(dtype):
        return _Factor(ref)
    primitive = node.primitive
    if isinstance(primitive, View):
        inner = _factor(b, node.operands[0])
        return None if inner is None else _seen(b, node, inner)
    if not isinstance(primitive, Map) or not (dtype.is_float or dtype.bits > 8):
        return None
    if primitive.fn == "cast":
        return _converted(b, node)
    if primitive.fn == "sub":
        inner, zero = _factor(b, node.operands[0]), _zero(b, node.operands[1])
        if inner is None or zero is None or inner.zero is not None or inner.scales:
            return None
        return None if b.type(inner.code).dtype.is_float else replace(inner, zero=zero)
    if primitive.fn == "mul" and dtype == F32:
        for this, other in (node.operands, node.operands[::-1]):
            inner = _factor(b, this)
            if inner is not None:
                return replace(inner, scales=(*inner.scales, other))
    return None


def _converted(b: Builder, node: Node) -> _Factor | None:
    """A conversion that changes no value."""
    inner, dtype = _factor(b, node.operands[0]), node.type.dtype
    if inner is None or (inner.scales and dtype != F32):
        return None
    if b.type(inner.code).dtype.is_float and not dtype.is_float:
        return None
    return inner  # 16 bits hold a code less its zero, also those of f16 and bf16


def _seen(b: Builder, view: Node, x: _Factor) -> _Factor | None:
    """A factor through a view, which may pad with zeros."""
    primitive = view.primitive
    assert isinstance(primitive, View)
    if primitive.guard and primitive.fill != 0:
        return None

    def part(ref: Ref, pads: bool) -> Ref:
        type = b.type(ref)
        if not pads and not axes_of(b.graph, ref):  # the same number everywhere
            one, places = ref, [const(0)] * type.rank
            seen = b.graph.nodes[ref.node]
            if isinstance(seen.primitive, View) and not seen.primitive.guard:
                one, places = seen.operands[0], list(seen.primitive.indices)
            return b.view(one, view.type.shape, lambda *_: places)
        if primitive.guard:
            padded = replace(primitive, fill=0.0 if type.dtype.is_float else 0)
            return through(b, replace(view, primitive=padded), ref)
        return through(b, view, ref)

    return _Factor(
        part(x.code, True),
        None if x.zero is None else part(x.zero, True),
        tuple(part(scale, False) for scale in x.scales),
    )


def _zero(b: Builder, ref: Ref) -> Ref | None:
    """An integer of 8 bits that a value is, in i32."""
    node, dtype = b.graph.nodes[ref.node], b.type(ref).dtype
    if dtype.bits == 8 and dtype.is_int:
        return b.cast(ref, I32)
    if isinstance(node.primitive, Scalar):
        value = float(node.primitive.value)
        inside = value == int(value) and -128 <= value <= LARGEST
        return b.scalar(int(value), I32) if inside else None
    if isinstance(node.primitive, View) and not node.primitive.guard:
        inner = _zero(b, node.operands[0])
        return None if inner is None else through(b, node, inner)
    if node.primitive == Map("cast") and (dtype.is_float or dtype.bits > 8):
        return _zero(b, node.operands[0])
    return None


def _known(b: Builder, x: _Factor, load: Load | None, on_cpu: bool) -> _Factor:
    """A factor whose zero is no longer one where it is 0; nor does it change where a factor is
    padded, if `on_cpu` and it is known: codes are padded with it instead."""
    if x.zero is None or (number := _number(b, x.zero, load)) is None:
        return x
    if number == 0:
        return replace(x, zero=None)
    code, zero = b.graph.nodes[x.code.node], b.graph.nodes[x.zero.node]
    if not on_cpu or not isinstance(zero.primitive, View) or not zero.primitive.guard:
        return x
    if not isinstance(code.primitive, View) or not _pad_alike(code.primitive, zero.primitive):
        return x
    kind = np.iinfo(code.type.dtype.numpy)
    if not kind.min <= number <= kind.max:
        return x
    filled = replace(code.primitive, fill=number)
    (code_ref,) = b.add(filled, code.operands, code.types)
    return replace(x, code=code_ref, zero=b.scalar(number, I32, b.type(x.zero).shape))


def _pad_alike(one: View, other: View) -> bool:
    """Whether views are padded at the same places."""
    here = {name: sym(now) for name, now in zip(other.symbols, one.symbols, strict=True)}
    return set(one.guard) == {guard.substitute(here) for guard in other.guard}


def _number(b: Builder, ref: Ref, load: Load | None) -> int | None:
    """The integer that all elements of a constant are, but for those that it is padded with."""
    node = b.graph.nodes[ref.node]
    primitive = node.primitive
    if isinstance(primitive, View) or primitive == Map("cast"):
        padded = isinstance(primitive, View) and primitive.guard and primitive.fill != 0
        return None if padded else _number(b, node.operands[0], load)
    if isinstance(primitive, Scalar):
        return int(primitive.value)
    if isinstance(primitive, Weight) and load is not None:
        found = load(primitive.weights, primitive.key)
    elif isinstance(primitive, Constant):
        found = np.frombuffer(primitive.data, node.type.dtype.numpy)
    else:
        return None
    return int(found.flat[0]) if found.size and (found == found.flat[0]).all() else None


# The product


def _stored_product(
    b: Builder, node: Node, s: Sums, codes: tuple[Ref, Ref], dtype: DType, _: bool
) -> Ref:
    """The sums of products of integers as they are stored."""
    x, y = codes
    width = panel_width(total_of(s.domain, s.columns))
    left, base, row = matrix_of(b, x, s.domain, s.batch, s.rows, s.depth)
    seen = b.graph.nodes[y.node].primitive
    fill = seen.fill if isinstance(seen, View) and seen.guard else 0
    panels = packed(b, y, s.domain, s.batch, s.columns, s.depth, width, fill)
    type = node.type.with_dtype(dtype)
    return b.add(s.contract(base, row, width), (left, panels), (type,))[0]


def _product(
    b: Builder, node: Node, s: Sums, codes: tuple[Ref, Ref], dtype: DType, convolves: bool
) -> Ref:
    """The sums of products of codes."""
    x, y = codes
    width = panel_width(total_of(s.domain, s.columns))
    type = node.type.with_dtype(dtype)

    def made(rows: tuple[Ref, Expr, Expr], panels: Ref) -> Ref:
        left, base, row = rows
        primitive = s.contract(base, row, width)
        return b.add(primitive, (b.cast(left, dtype), panels), (type,))[0]

    if convolves:
        rows = matrix_of(b, x, s.domain, s.batch, s.rows, s.depth)
        plain = made(rows, _packed(b, y, s, dtype, width))
        found = convolution_of(b.graph, b.graph.nodes[plain.node])
        if found is not None and found.is_image:
            return plain  # which comes to have channels last
    rows = _lines(b, x, s, s.rows)
    lying = in_place(b, y, s.domain, s.batch, s.columns, s.depth)
    if lying is not None and _is_aligned(b, *lying[1:]):
        product = made(rows, _packed(b, y, s, dtype, width))
        if lies_in_chunks(b.graph, b.graph.nodes[product.node], CHUNK):
            return product
    lines, _, _ = rows_of(b, y, s.domain, s.batch, s.columns, s.depth, CHUNK)
    return made(rows, panels_of(b, b.cast(lines, dtype), s, width))


def _packed(b: Builder, y: Ref, s: Sums, dtype: DType, width: int) -> Ref:
    """The panels of a right operand where it lies."""
    right = cast_of(b, y, dtype)
    return packed(b, right, s.domain, s.batch, s.columns, s.depth, width)


def _lines(b: Builder, x: Ref, s: Sums, outer: Sequence[int]) -> tuple[Ref, Expr, Expr]:
    """The rows of an operand along the depth, where they lie if they begin at multiples of 16
    bytes."""
    lying = in_place(b, x, s.domain, s.batch, outer, s.depth)
    if lying is not None and _is_aligned(b, *lying[1:]):
        return lying
    return rows_of(b, x, s.domain, s.batch, outer, s.depth, CHUNK)


def _is_aligned(b: Builder, *places: Expr) -> bool:
    return all(b.facts.divides(e, CHUNK) for e in places)


def panels_of(b: Builder, lines: Ref, s: Sums, width: int) -> Ref:
    """The panels of a right operand whose columns are stored one after the other."""
    columns, depth = total_of(s.domain, s.columns), total_of(s.domain, s.depth)
    batch = [s.domain[x] for x in s.batch]
    count = floordiv(columns + (width - 1), width, b.facts)
    return b.view(
        lines,
        [*batch, count, depth, const(width)],
        lambda *at: [*at[:-3], at[-3] * width + at[-1], at[-2]],
        lambda *at: [columns - 1 - (at[-3] * width + at[-1])],
    )


# Zeros


def _shifts(b: Builder, s: Sums, u: _Factor, v: _Factor) -> list[tuple[str, Ref]]:
    """What is to be added to the sums of codes, or subtracted, where zeros are taken off them."""
    found = [
        ("sub", _sum_of(b, s, zero, other))
        for zero, other in ((u.zero, v.code), (v.zero, u.code))
        if zero is not None
    ]
    if u.zero is not None and v.zero is not None:
        found.append(("add", _sum_of(b, s, u.zero, v.zero)))
    return found


def _sum_of(b: Builder, s: Sums, zero: Ref, other: Ref) -> Ref:
    """The sums of the product of two integers over the domain in i32, of which the first mostly is
    the same along the depth; computed for the axes alone along which something changes."""
    first, second = (axes_of(b.graph, x) & set(s.depth) for x in (zero, other))
    if first:
        rest = tuple(a for a in s.depth if a not in first)
        return _sum_along(
            b, replace(s, depth=tuple(sorted(first))), (zero, _summed(b, s, other, rest))
        )
    whole = _sum_along(b, s, (other,)) if second else _times_depth(b, other, s)
    return b.map("mul", _at_result(b, zero, s), whole)


def _summed(b: Builder, s: Sums, x: Ref, rest: tuple[int, ...]) -> Ref:
    """The sums of an integer along the rest of the depth, where a zero is the same: over the
    domain, as those of weights over the channels, of which a padded image sees some."""
    if not rest:
        return x
    others = tuple(a for a in range(len(s.domain)) if a not in rest)
    total = _sum_along(b, replace(s, depth=rest, outer=others), (x,))
    return view_of(b, total, s.domain, lambda *at: [at[a] for a in others], None)


def _times_depth(b: Builder, x: Ref, s: Sums) -> Ref:
    """The sum of an i32 that is the same along the depth."""
    depth, one = total_of(s.domain, s.depth), _at_result(b, x, s)
    shape, known = b.type(one).shape, depth.as_int()
    if known is not None:
        return b.map("mul", one, b.scalar(known, I32, shape))
    return b.map("mul", one, b.cast(b.position(shape, b.symbols(len(shape)), depth), I32))


def _sum_along(b: Builder, s: Sums, factors: Sequence[Ref]) -> Ref:
    used = frozenset[int]().union(*(axes_of(b.graph, x) for x in factors)) | set(s.depth)
    axes = [a for a in range(len(s.domain)) if a in used]

    def place(*at: Expr) -> list[Expr]:
        return [at[axes.index(a)] if a in used else const(0) for a in range(len(s.domain))]

    shape = [s.domain[a] for a in axes]
    small = [view_of(b, x, shape, place, None) for x in factors]
    product = small[0]
    if len(small) > 1:
        product = b.map("mul", *(b.cast(x, I32) for x in small))
    total = b.reduce("sum", product, [axes.index(a) for a in s.depth], I32)
    return b.view(
        total,
        [s.domain[a] for a in s.outer],
        lambda *at: [i for i, a in zip(at, s.outer, strict=True) if a in used],
    )


def _at_result(b: Builder, x: Ref, s: Sums) -> Ref:
    """A value over the domain that is the same along the depth, over the result."""
    shape = [s.domain[a] for a in s.outer]
    where = {a: n for n, a in enumerate(s.outer)}

    def place(*at: Expr) -> list[Expr]:
        return [at[where[a]] if a in where else const(0) for a in range(len(s.domain))]

    return view_of(b, x, shape, place, None)
