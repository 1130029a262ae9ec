"""Pointwise kernels for a GPU that read across the rows they write, by way of shared memory.

A warp takes a square. Rows of it in shared memory are one element longer than it is, so that its
columns lie in different banks.
"""

from __future__ import annotations

from stagefuse.compiler.lower.blocks import Parallel
from stagefuse.compiler.lower.squares import Squares, in_squares
from stagefuse.compiler.lower.values import Lowering

from .packing import lower_pointwise

SQUARES = Squares(32, 1, 9, 8, whole=True)
"""Squares of eight warps lie in shared memory, and two f32 take 67 KB of it."""


def lower_elements(low: Lowering) -> Parallel:
    """A pointwise kernel, in squares if that helps."""
    return in_squares(low, lower_pointwise(low), SQUARES)
