"""Where the operands of a product lie: its columns in panels, its rows in place or one by one."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from stagefuse.compiler.folded_views import folded_view
from stagefuse.compiler.graph import Ref, View, flatten_index, split_index
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.proofs.bounds import size_of
from stagefuse.dsl.dims import Expr, const, floordiv, sym
from stagefuse.dsl.facts import Facts


def total_of(domain: Sequence[Expr], axes: Sequence[int]) -> Expr:
    return size_of([domain[axis] for axis in axes])


def _split(
    position: Expr, domain: Sequence[Expr], axes: Sequence[int], facts: Facts
) -> dict[int, Expr]:
    parts = split_index(position, [domain[a] for a in axes], facts)
    return dict(zip(axes, parts, strict=True))


def packed(
    b: Builder, v: Ref, domain: Sequence[Expr], batch: Sequence[int], n: Sequence[int],
    k: Sequence[int], width: int, fill: float | int | bool = 0,
) -> Ref:  # fmt: skip
    """The columns in panels: [batch..., panels, K, width], the last one padded with `fill`."""
    columns, depth = total_of(domain, n), total_of(domain, k)
    count = floordiv(columns + (width - 1), width, b.facts)
    shape = [*(domain[x] for x in batch), count, depth, const(width)]
    facts = b.ranges(b.symbols(len(shape)), shape)

    def place(*at: Expr) -> list[Expr]:
        position = at[-3] * width + at[-1]
        found: dict[int, Expr] = dict(zip(batch, at, strict=False))
        found.update(_split(position, domain, n, facts))
        found.update(_split(at[-2], domain, k, facts))
        return [found.get(axis, const(0)) for axis in range(len(domain))]

    def guard(*at: Expr) -> list[Expr]:
        return [columns - 1 - (at[-3] * width + at[-1])]

    return view_of(b, v, shape, place, guard, fill)


def view_of(
    b: Builder, x: Ref, shape: Sequence[Expr], place: Callable[..., Sequence[Expr]],
    guard: Callable[..., Sequence[Expr]] | None, fill: float | int | bool = 0,
) -> Ref:  # fmt: skip
    """A view of x, folded into x if that is one. Where it is not, what is read at the first place
    of an axis that may be empty is guarded."""
    made = b.view(x, shape, place, guard, fill)
    if made == x:
        return x
    node = b.graph.nodes[made.node]
    folded = folded_view(b, node, node.operands)
    if folded:
        return folded[0]
    assert isinstance(node.primitive, View)
    empty = [
        extent - 1
        for index, extent in zip(node.primitive.indices, b.type(x).shape, strict=True)
        if index == const(0) and not b.facts.is_positive(extent)
    ]
    if not empty:
        return made
    return b.view(x, shape, place, lambda *at: [*(guard(*at) if guard else ()), *empty], fill)


def matrix_of(
    b: Builder, u: Ref, domain: Sequence[Expr], batch: Sequence[int], m: Sequence[int],
    k: Sequence[int],
) -> tuple[Ref, Expr, Expr]:  # fmt: skip
    """The rows as (tensor, offset of the batch, row stride): in place if its strides allow."""
    found = in_place(b, u, domain, batch, m, k)
    return rows_of(b, u, domain, batch, m, k) if found is None else found


def in_place(
    b: Builder, u: Ref, domain: Sequence[Expr], batch: Sequence[int], m: Sequence[int],
    k: Sequence[int],
) -> tuple[Ref, Expr, Expr] | None:  # fmt: skip
    """The rows as (tensor, offset of the batch, row stride) where they lie, if they do."""
    node = b.graph.nodes[u.node]
    symbols = b.symbols(len(domain))
    if isinstance(node.primitive, View) and not node.primitive.guard:
        source, indices = node.operands[0], node.primitive.indices
    else:
        source, indices = u, tuple(map(sym, symbols))
    offset = flatten_index(indices, b.type(source).shape)
    row = stride_of(b, offset, domain, m) if m else total_of(domain, k)
    column = stride_of(b, offset, domain, k)
    rest = offset.substitute({f"i{a}": 0 for a in (*m, *k)})
    others = {f"i{a}" for a in range(len(domain)) if a not in batch}
    if row is None or column != const(1) or rest.symbols() & others:
        return None
    return source, rest, row


def rows_of(
    b: Builder, u: Ref, domain: Sequence[Expr], batch: Sequence[int], m: Sequence[int],
    k: Sequence[int], multiple: int = 1,
) -> tuple[Ref, Expr, Expr]:  # fmt: skip
    """The rows stored one after the other, each as long as a multiple of so many elements and
    zeros at its end, as (tensor, offset of the batch, row stride)."""
    rows, depth = total_of(domain, m), total_of(domain, k)
    long = (
        depth if multiple == 1 else floordiv(depth + (multiple - 1), multiple, b.facts) * multiple
    )
    shape = [*(domain[x] for x in batch), rows, long]
    facts = b.ranges(b.symbols(len(shape)), shape)

    def place(*at: Expr) -> list[Expr]:
        found: dict[int, Expr] = dict(zip(batch, at, strict=False))
        found.update(_split(at[-2], domain, m, facts))
        found.update(_split(at[-1], domain, k, facts))
        return [found.get(axis, const(0)) for axis in range(len(domain))]

    guard = None if long == depth else lambda *at: [depth - 1 - at[-1]]
    dense = view_of(b, u, shape, place, guard)
    base = flatten_index([sym(f"i{x}") for x in batch], shape[: len(batch)]) * rows * long
    return dense, base, long


def stride_of(b: Builder, offset: Expr, domain: Sequence[Expr], axes: Sequence[int]) -> Expr | None:
    """The step of the row-major position over `axes`, if the offset is linear in it."""
    step: Expr | None = None
    for axis in reversed(axes):
        slope = offset.coefficient(f"i{axis}")
        if slope is None or any(s.startswith("i") and s[1:].isdigit() for s in slope.symbols()):
            return None
        if step is None:
            step, expected = slope, slope * domain[axis]
        elif not b.facts.prove_eq(slope, expected):
            return None
        else:
            expected = slope * domain[axis]
    return step
