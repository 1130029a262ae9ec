"""Tensor maps of kernels: what tensor copies know of a buffer, over the kernel's dimensions.

A map is a parameter of 128 bytes, which the runtime makes when it knows where the buffer lies.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from stagefuse.dsl.dims import Expr, const
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen

MAP_BYTES = 128
MAP_ALIGNMENT = 64


@frozen
class TensorMap:
    """The elements of `buffer` from `offset` on as an array of `sizes`, `strides` elements apart,
    outermost dimension first; the last one is contiguous and has no stride. Copies move boxes of
    `box` elements, whose rows are swizzled in `swizzle` bytes; beyond the sizes there are zeros.
    With `steps` they move columns of pixels, of which `box` has the pixels and their channels, as
    `pixels` says."""

    buffer: str
    offset: Expr
    sizes: tuple[Expr, ...]
    strides: tuple[Expr, ...]
    box: tuple[int, ...]
    swizzle: int = 128
    lower: tuple[int, ...] = ()
    upper: tuple[int, ...] = ()
    steps: tuple[int, ...] = ()


Loops = Sequence[tuple[str, Expr]]


def in_steps(offset: Expr, loops: Loops) -> list[tuple[str, Expr, Expr]] | None:
    """The loops that an offset moves with, as (index, extent, step); None if it does not do so in
    steps."""
    found = []
    for name, extent in loops:
        step = offset.coefficient(name)
        if step is None or step.symbols() & {n for n, _ in loops}:
            return None
        if step != const(0):
            found.append((name, extent, step))
    return found


def are_steps(strides: Iterable[Expr], facts: Facts) -> bool:
    """Whether a map can go by these: along each dimension it goes on, not back, as through what is
    flipped (`cuTensorMapEncodeTiled` takes unsigned strides)."""
    return all(facts.is_nonneg(stride) for stride in strides)


def start_of(offset: Expr, loops: Loops) -> Expr:
    """An offset where all loops begin."""
    return offset.substitute({name: 0 for name, _ in loops})
