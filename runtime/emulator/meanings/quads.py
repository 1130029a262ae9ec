"""mma.m8n8k4 with f16, as sm_70 has it: four products of a warp, each by two groups of four lanes.

Lanes 4q to 4q+3 and 4q+16 to 4q+19 hold product q. With `t = lane % 4`, and h 1 for a lane of the
second four (PTX ISA, "Matrix Fragments for mma.m8n8k4 with .f16 floating point type"):

- A, element i: row `t + 4h`, column i where it is by rows; row `i + 4h`, column t by columns,
- B, element i: row t, column `i + 4h` by rows; row i, column `t + 4h` by columns,
- C and D in f16, element i: row `t + 4h`, column i; in f32 row `t % 2 + 2 * (i / 2 % 2) + 4h`,
  column `4 * (i / 4) + 2 * (t / 2) + i % 2`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from stagefuse.runtime.emulator.arrays import warps_of
from stagefuse.runtime.emulator.operands import elements, getter, putter
from stagefuse.runtime.emulator.program import Run, Site

from . import effect
from .tensor import give, narrowed, registers, unpacked

if TYPE_CHECKING:
    from stagefuse.runtime.emulator.machine import Group

Array = NDArray[Any]


def _of_quads(words: Array, kind: str) -> Array:
    """Elements `[warp][product][h][t][i]` of registers `[warp][lane][register]`."""
    n = len(words)
    return unpacked(words, kind).reshape(n, 2, 4, 4, -1).transpose(0, 2, 1, 3, 4)


def _a(x: Array, by_rows: bool) -> Array:
    """Matrices `[warp][product][row][k]`."""
    return (x if by_rows else x.swapaxes(3, 4)).reshape(*x.shape[:2], 8, 4)


def _b(x: Array, by_rows: bool) -> Array:
    """Matrices `[warp][product][k][column]`."""
    columns = x.swapaxes(3, 4) if by_rows else x  # [h][column % 4][k]
    return columns.reshape(*x.shape[:2], 8, 4).swapaxes(2, 3)


def _c(x: Array, kind: str) -> Array:
    """Matrices `[warp][product][row][column]`."""
    if kind == "f16":
        return x.reshape(*x.shape[:2], 8, 8)
    parts = x.reshape(*x.shape[:3], 2, 2, 2, 2, 2)  # [h][t / 2][t % 2][i / 4][i / 2 % 2][i % 2]
    return parts.transpose(0, 1, 2, 6, 4, 5, 3, 7).reshape(*x.shape[:2], 8, 8)


def _lanes(matrices: Array, kind: str) -> Array:
    """Elements `[warp][lane][i]` of results, as `_c` has them."""
    n = len(matrices)
    if kind == "f16":
        x = matrices.reshape(n, 4, 2, 4, 8)
    else:  # [h][row / 2 % 2][row % 2][column / 4][column / 2 % 2][column % 2]
        parts = matrices.reshape(n, 4, 2, 2, 2, 2, 2, 2)
        x = parts.transpose(0, 1, 2, 6, 4, 5, 3, 7).reshape(n, 4, 2, 4, 8)
    return x.transpose(0, 2, 1, 3, 4).reshape(n, 32, 8)


@effect("tensor.mma_quads")
def mma_quads(site: Site) -> Run:
    gets = {n: [getter(site, x, "b32") for x in elements(site.operand(n))] for n in "abc"}
    puts = [putter(site, x, "b32") for x in elements(site.operand("d"))]
    before, result = ("f16" if len(x) == 4 else "f32" for x in (gets["c"], puts))
    a_rows, b_rows = (site.word(name) == "row" for name in ("LA", "LB"))

    def run(g: Group) -> None:
        warps = warps_of(g.threads())
        a = _a(_of_quads(registers(g, gets["a"], warps), "f16"), a_rows)
        b = _b(_of_quads(registers(g, gets["b"], warps), "f16"), b_rows)
        c = _c(_of_quads(registers(g, gets["c"], warps), before), before)
        words = narrowed(_lanes(np.matmul(a, b) + c, result), result, False)
        give(g, puts, words, warps)

    return run
