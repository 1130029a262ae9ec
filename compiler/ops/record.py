"""What an operation of the language is: one frozen record, from type rule to documentation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from stagefuse.compiler.graph import Ref, flatten_index, split_index
from stagefuse.compiler.graph_builder import Builder
from stagefuse.dsl.dims import Expr, as_expr, const
from stagefuse.dsl.dtypes import DType, in_class
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.signature import OpError, Param
from stagefuse.dsl.types import TensorType

Args: TypeAlias = Mapping[str, Any]
Types: TypeAlias = tuple[TensorType, ...]
Rule: TypeAlias = Callable[[Args, Facts], Types]
Lowering: TypeAlias = Callable[[Builder, Sequence[Ref], Args, Types], list[Ref]]


@frozen
class Op:
    """One operation.

    `rule` gives the result types from the arguments by name; `lowering` builds its primitives
    from the tensor operands in order and the static arguments; `reference` is its meaning over
    wide NumPy arrays (see `compiler.scalar`), by parameter name. `symbol` is how an operator is
    written; `pointwise` says that it may be used element by element in index notation.
    `example` is a call of the reference and its value. `ulp` bounds the error of an
    implementation, in units in the last place of the result; sums have their own bound.
    `demands` are conditions on the sizes that are not proved while compiling.
    """

    name: str
    params: tuple[Param, ...]
    doc: str
    rule: Rule
    lowering: Lowering
    reference: Callable[..., Any]
    example: tuple[str, str] = ("", "")
    ulp: float = 0.0
    user_callable: bool = True
    pointwise: bool = False
    symbol: str | None = None
    scalar: str | None = None
    folding: Callable[..., Any] | None = None
    demands: Callable[[Args, Facts], list[tuple[Expr, str, str]]] | None = None

    def checks(self, args: Args, facts: Facts) -> list[tuple[Expr, str, str]]:
        """What only a call can decide: an expression, "==0" or ">=0", and the message."""
        return [] if self.demands is None else self.demands(args, facts)

    def infer(self, args: Args, facts: Facts) -> Types:
        """The result types. Raises OpError."""
        return self.rule(args, facts)

    def lower(self, b: Builder, refs: Sequence[Ref], attrs: Args, results: Types) -> list[Ref]:
        """The results as references into the graph under construction."""
        return self.lowering(b, refs, attrs, results)

    def fold(self, *numbers: Any) -> Any:
        """The value for literal arguments, or None if it has none."""
        return None if self.folding is None else self.folding(*numbers)


X = Param("x", "tensor")


def require(type: TensorType, classes: Sequence[str], name: str, param: str, help: str) -> None:
    """Raises OpError unless the dtype is of one of the classes."""
    if any(type.dtype.is_bool if c == "bool" else in_class(type.dtype, c) for c in classes):
        return
    wanted = " or ".join({"number": "numbers", "float": "floats", "int": "integers",
                          "bool": "bools"}.get(c, c) for c in classes)  # fmt: skip
    raise OpError(f"{name} takes {wanted}, not {type.dtype}", param, str(type), help=help)


def same_dtype(name: str, operands: Sequence[tuple[str, TensorType]]) -> DType:
    """The one dtype of all operands. Raises OpError if they differ."""
    first, type = operands[0]
    for param, other in operands[1:]:
        if other.dtype != type.dtype:
            raise OpError(
                f"{name} needs one dtype, not {type.dtype} and {other.dtype}",
                param,
                str(other),
                [f"`{first}` is {type} and `{param}` is {other}; nothing converts by itself"],
                f"convert one side, such as `{type.dtype}(...)`",
            )
    return type.dtype


def range_note(exprs: Sequence[Expr], facts: Facts) -> str:
    """What is known of the symbols of some dimensions: `T is in 1..=512`."""
    parts = []
    for name in sorted(frozenset[str]().union(*(e.symbols() for e in exprs))):
        low, high = facts.ranges.get(name, (0, None))
        known = f"any size from {low}" if high is None else f"in {low}..={high}"
        parts.append(f"{name} is {known}")
    return ", ".join(parts)


def difference(a: Expr, b: Expr, where: str, facts: Facts) -> str:
    """Why two dimensions are not the same for all sizes."""
    note = f"{where} is {a} on the left and {b} on the right"
    known = range_note((a, b), facts)
    if not known:
        return note
    return f"{note}; {known}, so they differ for some sizes"


def broadcast_shape(
    name: str, operands: Sequence[tuple[str, TensorType]], facts: Facts
) -> tuple[Expr, ...]:
    """NumPy's common shape, where dimensions are equal for all sizes or literally 1."""
    shape: tuple[Expr, ...] = operands[0][1].shape
    first = operands[0][1]
    for param, type in operands[1:]:
        rank = max(len(shape), type.rank)
        left = (const(1),) * (rank - len(shape)) + shape
        right = (const(1),) * (rank - type.rank) + type.shape
        joined = []
        for axis, (a, b) in enumerate(zip(left, right, strict=True)):
            if a.as_int() != 1 and b.as_int() != 1 and not facts.prove_eq(a, b):
                raise OpError(
                    "these two shapes do not broadcast",
                    param,
                    str(type),
                    [
                        difference(a, b, f"dimension {axis}", facts),
                        f"{name} has {TensorType(first.dtype, shape)} and {type}",
                    ],
                )
            joined.append(b if a.as_int() == 1 else a)
        shape = tuple(joined)
    return shape


def axis_of(axis: int, rank: int, name: str, param: str = "axis") -> int:
    """An axis counted from 0. Raises OpError if the tensor has no such axis."""
    if not -rank <= axis < rank:
        has = "none" if rank == 0 else f"axes 0 to {rank - 1}"
        raise OpError(
            f"axis {axis} is out of range for {name}",
            param,
            f"axis {axis}",
            [f"the tensor has {rank} dimensions: {has}"],
        )
    return axis % rank


def axes_of(axis: Any, rank: int, name: str, param: str = "axis") -> tuple[int, ...]:
    """Axes counted from 0, ascending; None is all of them. Raises OpError."""
    if axis is None:
        return tuple(range(rank))
    given = [axis] if isinstance(axis, int) else list(axis)
    found = [axis_of(a, rank, name, param) for a in given]
    if len(set(found)) != len(found):
        raise OpError(f"an axis is given twice to {name}", param, str(tuple(given)))
    return tuple(sorted(found))


def product(shape: Sequence[Expr]) -> Expr:
    """The number of elements."""
    total = const(1)
    for size in shape:
        total = total * size
    return total


def reshape(b: Builder, x: Ref, shape: Sequence[Expr]) -> Ref:
    """The same elements under another shape, each run of axes that keeps its size by itself.

    Separate runs keep `(T * i0 + i1) // T` out of the index maps, which is i0 only where T > 0.
    """
    own = b.type(x).shape
    if own == tuple(shape):
        return x

    def indices(*at: Expr) -> list[Expr]:
        facts = b.ranges(b.symbols(len(shape)), shape)
        found = [const(0)] * len(own)
        for old, new in _runs(own, shape, b.facts):
            position = flatten_index([at[n] for n in new], [shape[n] for n in new])
            parts = split_index(position, [own[n] for n in old], facts)
            for axis, index in zip(old, parts, strict=True):
                found[axis] = index
        return found

    return b.view(x, shape, indices)


def _runs(
    own: Sequence[Expr], shape: Sequence[Expr], facts: Facts
) -> list[tuple[list[int], list[int]]]:
    """The shortest runs of axes of both shapes with equal products; axes of size 1 are in none."""
    old = [n for n, d in enumerate(own) if d.as_int() != 1]
    new = [n for n, d in enumerate(shape) if d.as_int() != 1]
    runs = []
    while old or new:
        p, q = next(
            (
                (p, total - p)
                for total in range(2, len(old) + len(new) + 1)
                for p in range(max(1, total - len(new)), min(len(old), total - 1) + 1)
                if facts.prove_eq(
                    product([own[n] for n in old[:p]]),
                    product([shape[n] for n in new[: total - p]]),
                )
            ),
            (len(old), len(new)),
        )
        runs.append((old[:p], new[:q]))
        old, new = old[p:], new[q:]
    return runs


def count_as(b: Builder, count: Expr, dtype: DType, shape: Sequence[Expr]) -> Ref:
    """A number of elements as a tensor of a dtype."""
    known = count.as_int()
    if known is not None:
        return b.scalar(known, dtype, shape)
    return b.broadcast(b.cast(b.position((), (), count), dtype), shape)


def dims(values: Sequence[Any]) -> tuple[Expr, ...]:
    return tuple(map(as_expr, values))
