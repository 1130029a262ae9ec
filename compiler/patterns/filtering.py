"""Minimal filtering: two results of a filter of three taps by four products instead of six.

The results are A^T ((G g) * (B^T d)) for taps g and four elements d; along two axes, four results
take 16 products instead of 36. What is done to elements and results costs little where a window
has many channels and the result has many: those are then sums over the channels alone, one matrix
product for each of the 4 or 16 *positions*. The taps are transformed while compiling.

Rounding. With absolute values in place of all numbers, M = |A|^T (|G||g| * |B|^T|d|) bounds a
result's error: it is below (C + 4) u M along one axis and (C + 7) u M along two, for sums of C
products and the unit roundoff u, to first order. Those sums round C times, those of taps once,
those of elements once along each axis and those of results twice. M is of the same four (or 4 x 4)
elements: a large one also blurs the results beside it whose windows do not have it.

Sources: S. Winograd, Arithmetic Complexity of Computations, 1980; A. Lavin and S. Gray, Fast
Algorithms for Convolutional Neural Networks, 2015.
"""

from __future__ import annotations

from dataclasses import replace
from itertools import product
from math import prod
from typing import Any

import numpy as np

from stagefuse.compiler.graph import Constant, Contract, Graph, Node, Weight
from stagefuse.compiler.interpret import index_values
from stagefuse.dsl.dims import const, floordiv
from stagefuse.dsl.dtypes import F32
from stagefuse.dsl.frozen import frozen

from .panel_width import LANES, panels_time
from .windows import Axis, Digits, Windows, windows_of

TAPS, PLACES, RESULTS = 3, 4, 2
OF_ELEMENTS = ((1, 0, -1, 0), (0, 1, 1, 0), (0, -1, 1, 0), (0, 1, 0, -1))
"""B^T: of four elements, what is multiplied at each of four places."""
OF_TAPS = ((1.0, 0.0, 0.0), (0.5, 0.5, 0.5), (0.5, -0.5, 0.5), (0.0, 0.0, 1.0))
"""G."""
OF_PRODUCTS = ((1, 1, 1, 0), (0, 1, -1, -1))
"""A^T: of four products, each of two results."""
LARGEST = 2.0**58
"""Weights up to here, and elements, have products whose sums stay finite."""
LEAST_DEPTH, LEAST_ROWS = 16, 16
"""With fewer products in a sum, or fewer rows of the matrix, transforms are most of the time."""
BEFORE, AFTER = 8.0, 2.5
"""Cycles to make a vector of what is multiplied, and to take one of the products up again."""
GAIN = 0.8
"""The time that filtering takes at most, of that without."""


@frozen
class Filtering:
    """A convolution by minimal filtering. `plain` are its own windows; those of `windows` are four
    places wide, and two apart, along the axes that are `filtered`. Taps along another axis are
    summed as channels are."""

    plain: Windows
    windows: Windows
    filtered: tuple[bool, ...]

    @property
    def positions(self) -> int:
        """Matrix products."""
        return prod(PLACES for yes in self.filtered if yes)

    @property
    def digits(self) -> Digits:
        """The digits of k that are summed over at a position."""
        moved = {a.shifts[0][0] for a in self._moved()}
        return tuple(d for d in self.plain.digits if d[0] not in moved)

    @property
    def depth(self) -> int:
        """Products that are summed at a position."""
        return prod(size.as_int() or 0 for _, size, _ in self.digits)

    def transformed(self, contract: Contract, shape: tuple[int, ...], stored: Any) -> Any:
        """A product's matrix, transformed: [batch..., positions, rows, depth]. `shape` is the
        product's; the matrix lies in `stored`."""
        batch = [shape[a] for a in contract.batch]
        rows = prod(shape[a] for a in contract.rows)
        grid = np.indices(batch)
        at = {f"i{a}": grid[n] for n, a in enumerate(contract.batch)}
        base = np.broadcast_to(index_values(contract.base, at), batch)[..., None, None]
        row = np.arange(rows)[:, None] * index_values(contract.row_stride, {})
        digits = self.plain.digits
        sizes = [size.as_int() or 0 for _, size, _ in digits]
        places = (base + row + np.arange(prod(sizes))).reshape(*batch, rows, *sizes)
        found = stored.reshape(-1)[places].astype(np.float64)
        names, moving = [name for name, _, _ in digits], len(batch) + 1
        for axis in self._moved():
            ((name, step),) = axis.shifts
            own = moving + names.index(name)
            taps = np.flip(found, own) if step < 0 else found
            found = np.moveaxis(np.tensordot(np.array(OF_TAPS), taps, (1, own)), 0, own)
        moved = [axis.shifts[0][0] for axis in self._moved()]
        order = [len(batch) + 1 + names.index(n) for n in moved]
        order += [len(batch), *(moving + names.index(n) for n, _, _ in self.digits)]
        found = found.transpose(*range(len(batch)), *order)
        return found.reshape(*batch, self.positions, rows, self.depth)

    def _moved(self) -> list[Axis]:
        """The plain windows' axes that are filtered."""
        return [a for a, yes in zip(self.plain.axes, self.filtered, strict=True) if yes]


def filtering_of(graph: Graph, anchor: int) -> Filtering | None:
    """How a product of constant weights is filtered, if it can be and is quicker for it."""
    node = graph.nodes[anchor]
    assert isinstance(node.primitive, Contract)
    stored = graph.nodes[node.operands[0].node].primitive
    if not isinstance(stored, Weight | Constant) or node.type.dtype != F32:
        return None
    windows = windows_of(graph, anchor)
    if windows is None or not _is_known(graph, node, windows):
        return None
    sizes = {name: size.as_int() for name, size, _ in windows.digits}
    can = [(False, True) if _has_taps(axis, sizes) else (False,) for axis in windows.axes]
    ways = [_filtering(windows, filtered) for filtered in product(*can) if any(filtered)]
    times = {_time(node, way): way for way in ways if way.depth >= LEAST_DEPTH}
    plain = panels_time(_columns(windows)) * _rows(node) * (node.primitive.depth.as_int() or 0) / 2
    if not times or _rows(node) < LEAST_ROWS or min(times) >= GAIN * plain:
        return None
    return times[min(times)]


def _filtering(windows: Windows, filtered: tuple[bool, ...]) -> Filtering:
    axes = tuple(_wider(a) if yes else a for a, yes in zip(windows.axes, filtered, strict=True))
    return Filtering(windows, replace(windows, axes=axes), filtered)


def _is_known(graph: Graph, node: Node, windows: Windows) -> bool:
    """Whether all sizes are known, but for that of a batch of images."""
    product = node.primitive
    assert isinstance(product, Contract)
    sizes = [node.type.shape[a] for a in (*product.batch, *product.rows)]
    sizes += graph.type(node.operands[0]).shape
    sizes += [*(a.size for a in windows.axes), *(a.extent for a in windows.axes)]
    sizes += [size for _, size, _ in windows.digits]
    return all(size.as_int() for size in sizes)


def _has_taps(axis: Axis, sizes: dict[str, int | None]) -> bool:
    """Whether three adjacent elements are seen along an axis, one further from place to place."""
    if axis.step != 1 or len(axis.shifts) != 1:
        return False
    ((name, step),) = axis.shifts
    return abs(step) == 1 and sizes[name] == TAPS


def _wider(axis: Axis) -> Axis:
    """The windows of two results each along an axis; they see four elements."""
    return replace(
        axis, size=floordiv(axis.size + (RESULTS - 1), const(RESULTS)), step=RESULTS,
        first=axis.first + axis.low, shifts=((axis.shifts[0][0], 1),), low=0, last=PLACES - 1,
    )  # fmt: skip


def _rows(node: Node) -> int:
    assert isinstance(node.primitive, Contract)
    return prod(node.type.shape[a].as_int() or 0 for a in node.primitive.rows)


def _time(node: Node, found: Filtering) -> float:
    """Cycles of two vectors by a row of the matrix that filtering takes."""
    rows, columns = _rows(node), _columns(found.windows)
    time = panels_time(columns) * rows * found.depth / 2
    return found.positions * (time + columns / LANES * (AFTER * rows + BEFORE * found.depth))


def _columns(windows: Windows) -> int:
    """Columns of an image's windows, counted flat with the gap between rows."""
    *lead, wide = (axis.size.as_int() or 0 for axis in windows.axes)
    return (lead[0] - 1) * (windows.axes[-1].pitch or wide) + wide if lead else wide
