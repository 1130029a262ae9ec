"""Sums of products as MatMul or Conv."""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.graph import Node, Reduce
from stagefuse.dsl.dims import Expr, const

from .forms import Context, Form, Traced, one
from .layout import Labels
from .model import Tensor
from .windows import axes_of, convolution


def product(c: Context, node: Node) -> Form | None:
    """A sum of products of two values along axes that both have."""
    if not isinstance(node.primitive, Reduce) or node.primitive.kind != "sum":
        return None
    operands = c.mapped(node.operands[0], "mul")
    if operands is None or c.graph.type(node.operands[0]).dtype != node.type.dtype:
        return None
    a, b = (c.traced(ref, 1) for ref in operands)
    axes = node.primitive.axes
    return convolution(c, node, a, b, axes) or _matmul(c, node, a, b, axes)


def _matmul(c: Context, node: Node, a: Traced, b: Traced, axes: tuple[int, ...]) -> Form | None:
    shape = c.shape(node.operands[0])
    left, right = axes_of(c, a, shape), axes_of(c, b, shape)
    if left is None or right is None:
        return None
    if any(n is None and c.shape(t.root)[k].as_int() != 1
           for t, labels in ((a, left), (b, right)) for k, n in enumerate(labels)):  # fmt: skip
        return None
    if not set(axes) <= set(left) & set(right):
        return None
    out = [n for n in range(len(shape)) if n not in axes]
    batch = [n for n in out if n in left and n in right]
    rows, columns = (
        [n for n in out if n in left and n not in batch],
        [n for n in out if n in right and n not in batch],
    )
    if not rows and not columns:
        return None  # products of elements, not of matrices
    if columns and (not rows or columns[0] < rows[0]):
        a, b, left, right, rows, columns = b, a, right, left, columns, rows

    def write(x: Tensor, y: Tensor) -> Tensor:
        first = _arranged(c, x, c.shape(a.root), left)
        second = _arranged(c, y, c.shape(b.root), right)
        return _multiplied(c, first, second, (batch, rows, columns, list(axes)), shape, out)

    return one([a.root, b.root], write)


def _arranged(
    c: Context, x: Tensor, shape: tuple[Expr, ...], labels: Labels
) -> tuple[Tensor, list[int]]:
    """A whole operand without its axes of size 1, and what its axes are."""
    x = c.layout.whole(x, shape)
    names = [n for n in labels if n is not None]
    spare = [k for k, n in enumerate(labels) if n is None]
    if spare:
        x = c.layout.reshaped(x, [d for k, d in enumerate(shape) if k not in spare])
    return x, names


def _multiplied(
    c: Context,
    left: tuple[Tensor, list[int]],
    right: tuple[Tensor, list[int]],
    groups: tuple[list[int], list[int], list[int], list[int]],
    shape: Sequence[Expr],
    out: list[int],
) -> Tensor:
    """MatMul of operands whose axes are in the groups batch, rows, columns and depth."""
    batch, rows, columns, depth = groups
    x, y = left[0], right[0]
    x = c.layout.transposed(x, [left[1].index(n) for n in (*batch, *rows, *depth)])
    y = c.layout.transposed(y, [right[1].index(n) for n in (*batch, *depth, *columns)])
    head = [shape[n] for n in batch]
    m, n, k = ([shape[a] for a in group] for group in (rows, columns, depth))
    free = not batch and len(rows) >= 1  # leading axes of the left side may be many
    if not free and len(rows) != 1 or len(depth) != 1:
        x = c.layout.reshaped(x, [*head, *(m if free else [_count(m)]), _count(k)])
    if len(columns) != 1 or len(depth) != 1:
        y = c.layout.reshaped(y, [*head, _count(k), _count(n)])
    middle = m if free else [_count(m)]
    dtype = x.dtype
    made = c.model.node("MatMul", [x, y], dtype, [*head, *middle, _count(n)])
    order = [*batch, *rows, *columns]
    made = c.layout.reshaped(made, [shape[a] for a in order])
    return c.layout.placed(made, [out.index(a) for a in order], len(out))


def _count(sizes: Sequence[Expr]) -> Expr:
    total = const(1)
    for size in sizes:
        total = total * size
    return total
