"""Rearrangements: each element of the result is one of the operand's, or a fill value."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from stagefuse.compiler.graph import Ref
from stagefuse.compiler.graph_builder import Builder
from stagefuse.dsl.dims import Atom, Expr, as_expr, const, expr_of, floordiv, sym
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.numpy_later import np
from stagefuse.dsl.signature import OpError, Param
from stagefuse.dsl.types import TensorType

from .creation import check_number, check_shape, rounded
from .record import (
    Args,
    Op,
    Types,
    X,
    axes_of,
    axis_of,
    difference,
    dims,
    product,
    range_note,
    reshape,
    same_dtype,
)

XS = Param("xs", "tensors", group="x")
AXIS = Param("axis", "int", 0)


# reshape


def _reshape_rule(args: Args, facts: Facts) -> Types:
    x, shape = args["x"], dims(args["shape"])
    missing = [n for n, d in enumerate(shape) if d.as_int() == -1]
    if len(missing) > 1:
        raise OpError("only one size of `reshape` can be -1", "shape")
    total = product(x.shape)
    if missing:
        shape = _inferred(x, shape, missing[0], facts)
    check_shape(shape, "`reshape`", facts)
    if not facts.prove_eq(total, product(shape)):
        raise _sizes_differ(x, shape, facts)
    return (TensorType(x.dtype, shape),)


def _inferred(x: TensorType, shape: Sequence[Expr], at: int, facts: Facts) -> tuple[Expr, ...]:
    """The shape with -1 replaced by what is left. Where a size is 0, nothing is left to find."""
    known = product([d for n, d in enumerate(shape) if n != at])
    if known.as_int() == 0:
        raise OpError("-1 has no answer beside a size of 0", "shape")
    positive = {
        name: (1, facts.ranges.get(name, (0, None))[1])
        for name in known.symbols() | product(x.shape).symbols()
        if facts.bounds(sym(name))[0] == 0
    }
    halves = _whole_quotients(known, facts)
    positive |= {f"{atom}": (1, None) for atom in halves.values()}
    apart = {name: sym(f"{atom}") * atom.args[1] for name, atom in halves.items()}
    left = floordiv(
        product(x.shape).substitute(apart), known.substitute(apart), facts.with_ranges(positive)
    ).substitute({f"{atom}": expr_of(atom) for atom in halves.values()})
    if not facts.prove_eq(left * known, product(x.shape)):
        note = f"{product(x.shape)} elements are not a multiple of {known} for all sizes"
        raise OpError(
            "`reshape` cannot find the size for -1",
            "shape",
            notes=[note, *_known((product(x.shape), known), facts)],
        )
    return (*shape[:at], left, *shape[at + 1 :])


def _whole_quotients(known: Expr, facts: Facts) -> dict[str, Atom]:
    """The quotients in a product by what divides a size, by the size: T // 2 of an even T."""
    atoms = [atom for monomial, _ in known.terms for atom, _ in monomial if atom.kind == "//"]
    return {
        name: atom
        for atom in atoms
        for name in atom.args[0].symbols()
        if atom.args[0] == sym(name) and facts.prove_eq(sym(name), expr_of(atom) * atom.args[1])
    }


def _known(exprs: Sequence[Expr], facts: Facts) -> list[str]:
    note = range_note(exprs, facts)
    return [note] if note else []


def _sizes_differ(x: TensorType, shape: tuple[Expr, ...], facts: Facts) -> OpError:
    want, have = product(shape), product(x.shape)
    return OpError(
        "`reshape` keeps the number of elements",
        "shape",
        str(TensorType(x.dtype, shape)),
        [f"{x} has {have} elements, the shape asks for {want}", *_known((want, have), facts)],
        "one size can be -1: it is what is left",
    )


def _lower_reshape(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    return [reshape(b, refs[0], results[0].shape)]


# transpose and flip


def _perm(args: Args, rank: int) -> tuple[int, ...]:
    given = args.get("perm")
    return tuple(reversed(range(rank))) if given is None else tuple(p % rank for p in given)


def _transpose_rule(args: Args, facts: Facts) -> Types:
    x, given = args["x"], args.get("perm")
    if given is not None:
        order = [axis_of(p, x.rank, "`transpose`", "perm") for p in given]
        if sorted(order) != list(range(x.rank)):
            raise OpError(
                "`transpose` names each axis once",
                "perm",
                str(tuple(given)),
                [f"the tensor is {x}"],
                f"give {x.rank} axes",
            )
    return (TensorType(x.dtype, tuple(x.shape[p] for p in _perm(args, x.rank))),)


def _lower_transpose(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    return [b.transpose(refs[0], _perm(attrs, results[0].rank))]


def _flip_rule(args: Args, facts: Facts) -> Types:
    axes_of(args.get("axis"), args["x"].rank, "`flip`")
    return (args["x"],)


def _lower_flip(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    shape = results[0].shape
    axes = axes_of(attrs.get("axis"), len(shape), "`flip`")

    def indices(*at: Expr) -> list[Expr]:
        return [shape[n] - 1 - i if n in axes else i for n, i in enumerate(at)]

    return [b.view(refs[0], shape, indices)]


# broadcast_to


def _broadcast_rule(args: Args, facts: Facts) -> Types:
    x, shape = args["x"], check_shape(args["shape"], "`broadcast_to`", facts)
    if len(shape) < x.rank:
        raise OpError("`broadcast_to` cannot drop dimensions", "shape", notes=[f"x is {x}"])
    for back, (have, want) in enumerate(zip(reversed(x.shape), reversed(shape), strict=False)):
        if have.as_int() != 1 and not facts.prove_eq(have, want):
            note = difference(have, want, f"dimension {len(shape) - 1 - back}", facts)
            raise OpError(
                "this tensor does not broadcast to that shape",
                "shape",
                str(TensorType(x.dtype, shape)),
                [f"x is {x}", note],
            )
    return (TensorType(x.dtype, shape),)


def _lower_broadcast(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    return [b.broadcast(refs[0], results[0].shape)]


# concat, stack, split


def _equal_shapes(types: Sequence[TensorType], skip: int | None, name: str, facts: Facts) -> None:
    first = types[0]
    for number, type in enumerate(types[1:], 1):
        if type.rank != first.rank:
            raise OpError(
                f"{name} needs tensors of one rank",
                "xs",
                notes=[f"the first is {first}, number {number + 1} is {type}"],
            )
        for axis, (a, b) in enumerate(zip(first.shape, type.shape, strict=True)):
            if axis != skip and not facts.prove_eq(a, b):
                where = f"dimension {axis} of the first and of number {number + 1}"
                note = f"{where} differ: {a} and {b}"
                raise OpError(
                    f"{name} needs equal shapes{' beside its axis' * (skip is not None)}",
                    "xs",
                    f"{first} and {type}",
                    [note, *_known((a, b), facts)],
                )


def _listed(args: Args, name: str) -> list[TensorType]:
    types = list(args["xs"])
    if not types:
        raise OpError(f"{name} needs at least one tensor", "xs")
    same_dtype(name, [("xs", t) for t in types])
    return types


def _concat_rule(args: Args, facts: Facts) -> Types:
    types = _listed(args, "`concat`")
    first = types[0]
    axis = axis_of(args.get("axis", 0), first.rank, "`concat`")
    _equal_shapes(types, axis, "`concat`", facts)
    size = sum((t.shape[axis] for t in types), const(0))
    return (TensorType(first.dtype, (*first.shape[:axis], size, *first.shape[axis + 1 :])),)


def _lower_concat(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    return [b.concat(refs, attrs.get("axis", 0))]


def _stack_rule(args: Args, facts: Facts) -> Types:
    types = _listed(args, "`stack`")
    first = types[0]
    axis = axis_of(args.get("axis", 0), first.rank + 1, "`stack`")
    _equal_shapes(types, None, "`stack`", facts)
    shape = (*first.shape[:axis], const(len(types)), *first.shape[axis:])
    return (TensorType(first.dtype, shape),)


def _lower_stack(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    axis = attrs.get("axis", 0) % results[0].rank
    shape = results[0].shape
    flat = (*shape[:axis], const(1), *shape[axis + 1 :])
    return [b.concat([reshape(b, ref, flat) for ref in refs], axis)]


def _cuts(args: Args, extent: Expr, facts: Facts) -> list[tuple[Expr, Expr]]:
    """Start and size of each part: equal parts for a number, else between the positions."""
    given = args["sections"]
    if isinstance(given, int | Expr):
        count = as_expr(given).as_int()
        if count is None or count < 1:
            raise OpError("`split` needs a number of parts known while compiling", "sections")
        size = floordiv(extent, count, facts)
        if not facts.prove_eq(facts.simplify(size * count), extent):
            raise OpError(
                f"`split` into {count} needs a size that {count} divides", "x",
                notes=[f"the size is {extent}", *_known((extent,), facts)],
                help=None if extent.as_int() is not None
                else f"state it: `where {extent} % {count} == 0`",
            )  # fmt: skip
        return [(size * n, size) for n in range(count)]
    bounds = [const(0), *(_cut(p, extent) for p in given), extent]
    parts = list(zip(bounds[:-1], bounds[1:], strict=True))
    for low, high in parts:
        if not facts.prove_le(low, high):
            raise OpError(
                "`split` needs rising positions within the axis",
                "sections",
                notes=[f"{low} is not at most {high} for all sizes", *_known((low, high), facts)],
            )
    return [(low, high - low) for low, high in parts]


def _cut(position: Any, extent: Expr) -> Expr:
    expr = as_expr(position)
    known = expr.as_int()
    return expr + extent if known is not None and known < 0 else expr


def _split_rule(args: Args, facts: Facts) -> Types:
    x = args["x"]
    axis = axis_of(args.get("axis", 0), x.rank, "`split`")
    sizes = [size for _, size in _cuts(args, x.shape[axis], facts)]
    return tuple(
        TensorType(x.dtype, (*x.shape[:axis], size, *x.shape[axis + 1 :])) for size in sizes
    )


def _lower_split(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    axis = attrs.get("axis", 0) % results[0].rank
    parts = []
    start = const(0)
    for result in results:
        parts.append(_slice(b, refs[0], result.shape, axis, start))
        start = start + result.shape[axis]
    return parts


def _slice(b: Builder, x: Ref, shape: Sequence[Expr], axis: int, start: Expr) -> Ref:
    return b.view(x, shape, lambda *at: [i + start if n == axis else i for n, i in enumerate(at)])


# pad


def _widths(args: Args, rank: int) -> list[tuple[Expr, Expr]]:
    pairs = [(as_expr(a), as_expr(b)) for a, b in args["widths"]]
    return pairs * rank if len(pairs) == 1 else pairs


def _pad_rule(args: Args, facts: Facts) -> Types:
    x = args["x"]
    widths = _widths(args, x.rank)
    if len(widths) != x.rank:
        raise OpError(
            "`pad` needs one pair for each dimension",
            "widths",
            f"{len(widths)} pairs",
            [f"the tensor is {x}"],
        )
    for pair in widths:
        for width in pair:
            if not facts.is_nonneg(width):
                raise OpError(
                    "`pad` cannot take away", "widths", str(width), _known((width,), facts),
                    "slice instead: `x[1:]`" if width.as_int() is not None
                    else f"state it: `where {width} >= 0`",
                )  # fmt: skip
    check_number(args.get("value", 0), x.dtype, "value")
    shape = tuple(before + d + after for d, (before, after) in zip(x.shape, widths, strict=True))
    return (TensorType(x.dtype, shape),)


def _lower_pad(b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
    type = b.type(refs[0])
    widths = _widths(attrs, type.rank)

    def indices(*at: Expr) -> list[Expr]:
        return [i - before for i, (before, _) in zip(at, widths, strict=True)]

    def guard(*at: Expr) -> list[Expr]:
        inside: list[Expr] = []
        for i, d in zip(indices(*at), type.shape, strict=True):
            inside += [i, d - 1 - i]
        return inside

    value = rounded(attrs.get("value", 0), type.dtype)
    return [b.view(refs[0], results[0].shape, indices, guard, value)]


def _pad(x: Any, widths: Any, value: Any = 0) -> Any:
    return np.pad(np.asarray(x), list(widths), constant_values=value) if np.ndim(x) else x


def _split(x: Any, sections: Any, axis: int = 0) -> Any:
    cuts = sections if isinstance(sections, int) else list(sections)
    return np.split(np.asarray(x), cuts, axis)


def _transpose(x: Any, perm: Any = None) -> Any:
    return np.transpose(np.asarray(x), perm)


def _concat(xs: Any, axis: int = 0) -> Any:
    return np.concatenate([np.asarray(x) for x in xs], axis)


def _stack(xs: Any, axis: int = 0) -> Any:
    return np.stack([np.asarray(x) for x in xs], axis)


OPS = (
    Op("reshape", (X, Param("shape", "dims")),
       "The same elements in row-major order under another shape; one size can be -1.",
       _reshape_rule, _lower_reshape, lambda x, shape: np.reshape(x, list(shape)),
       ("reshape([1, 2, 3, 4], [2, -1])", "[[1, 2], [3, 4]]")),
    Op("transpose", (X, Param("perm", "ints", None)),
       "The axes in another order: axis n of the result is axis perm[n] of x; without perm they"
       " are reversed.",
       _transpose_rule, _lower_transpose, _transpose,
       ("transpose([[1, 2], [3, 4]], [1, 0])", "[[1, 3], [2, 4]]")),
    Op("flip", (X, Param("axis", "axis", None)), "The elements in reverse along axes, or all.",
       _flip_rule, _lower_flip, lambda x, axis=None: np.flip(x, axis),
       ("flip([1, 2, 3])", "[3, 2, 1]")),
    Op("broadcast_to", (X, Param("shape", "dims")),
       "x repeated along axes where it has size 1, and along new leading axes.",
       _broadcast_rule, _lower_broadcast, lambda x, shape: np.broadcast_to(x, list(shape)),
       ("broadcast_to([1, 2], [2, 2])", "[[1, 2], [1, 2]]")),
    Op("concat", (XS, AXIS), "The tensors one after another along an axis.",
       _concat_rule, _lower_concat, _concat, ("concat([[1], [2, 3]], axis=0)", "[1, 2, 3]")),
    Op("stack", (XS, AXIS), "The tensors side by side along a new axis.",
       _stack_rule, _lower_stack, _stack, ("stack([[1, 2], [3, 4]])", "[[1, 2], [3, 4]]")),
    Op("split", (X, Param("sections", "parts"), AXIS),
       "A tuple of parts along an axis: so many equal ones, or between a list of positions, which "
       "may be sizes.",
       _split_rule, _lower_split, _split, ("split([1, 2, 3, 4], 2)", "([1, 2], [3, 4])")),
    Op("pad", (X, Param("widths", "pairs"), Param("value", "scalar", 0)),
       "x with `value` before and after: one (before, after) for each axis, or one for all.",
       _pad_rule, _lower_pad, _pad, ("pad([1, 2], [(1, 2)])", "[0, 1, 2, 0, 0]")),
)  # fmt: skip
