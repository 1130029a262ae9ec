"""From a map of how likely each point is text to boxes around lines, in NumPy.

The steps and numbers of PP-OCR: points above a threshold, grown by one; groups of them that touch;
the smallest rectangle around each; kept where the map is high inside; grown to take the whole text.
Points are (x, y), rows of pixels go down.
Source: Liao et al., Real-time Scene Text Detection with Differentiable Binarization, 2020.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

Array = np.ndarray[Any, Any]
THRESHOLD, LEAST_SCORE, GROWTH, LEAST_SIDE = 0.3, 0.5, 1.6, 3.0


def text_boxes(found: Array, width: int, height: int) -> Array:
    """Boxes f32 [boxes, 4, 2] in a page of `width` x `height`, in the order of reading.

    `found` is f32 [rows, columns] over the whole page. Corners go round from the top left.
    """
    rows, columns = found.shape
    boxes = []
    for points in groups(grown(found > THRESHOLD)):
        box, side = smallest_rectangle(points)
        if side < LEAST_SIDE or mean_inside(found, box) < LEAST_SCORE:
            continue
        box, side = enlarged(box)
        if side < LEAST_SIDE + 2:
            continue
        box = clockwise(np.round(box / (columns, rows) * (width, height)))
        box = np.clip(box, 0, (width - 1, height - 1))
        across, down = np.linalg.norm(box[0] - box[1]), np.linalg.norm(box[0] - box[3])
        if int(across) > LEAST_SIDE and int(down) > LEAST_SIDE:
            boxes.append(box)
    return np.array(in_reading_order(boxes), np.float32).reshape(-1, 4, 2)


def grown(mask: Array) -> Array:
    """Each point and its neighbours to the right, below, and below on the right."""
    wide = mask.copy()
    wide[1:] |= mask[:-1]
    found = wide.copy()
    found[:, 1:] |= wide[:, :-1]
    return found


def groups(mask: Array) -> Iterator[Array]:
    """The points of each group that touches, corners included, as their runs' ends [points, 2].

    Runs of a row are joined to those of the row above that they touch.
    """
    padded = np.pad(mask, ((0, 0), (1, 1))).astype(np.int8)
    row, edge = np.nonzero(np.diff(padded, axis=1))
    row, first, stop = row[::2], edge[::2], edge[1::2]
    parent = list(range(len(row)))

    def root(run: int) -> int:
        while parent[run] != run:
            parent[run] = run = parent[parent[run]]
        return run

    above = 0
    for run in range(len(row)):
        while row[above] < row[run] - 1 or (row[above] < row[run] and stop[above] < first[run]):
            above += 1
        other = above
        while row[other] < row[run] and first[other] <= stop[run]:
            parent[root(other)] = root(run)
            other += 1
    roots = np.array([root(run) for run in range(len(row))], np.int64)
    for number in np.unique(roots):
        at = roots == number
        ends = np.concatenate([first[at], stop[at] - 1])
        yield np.stack([ends, np.tile(row[at], 2)], 1)


def hull(points: Array) -> Array:
    """The corners of the convex hull, counter-clockwise. Source: Andrew's monotone chain."""
    ordered = sorted({(int(x), int(y)) for x, y in points})

    def half(way: list[tuple[int, int]]) -> list[tuple[int, int]]:
        kept: list[tuple[int, int]] = []
        for x, y in way:
            while len(kept) > 1:
                (ax, ay), (bx, by) = kept[-2:]
                if (bx - ax) * (y - ay) > (by - ay) * (x - ax):
                    break
                kept.pop()
            kept.append((x, y))
        return kept[:-1]

    return np.array(half(ordered) + half(ordered[::-1]) or ordered, float)


def smallest_rectangle(points: Array) -> tuple[Array, float]:
    """The rectangle of least area around points, [4, 2] clockwise, and its shorter side.

    One of its sides lies along a side of the convex hull.
    """
    corners = hull(points)
    sides = np.roll(corners, -1, axis=0) - corners
    length = np.hypot(sides[:, 0], sides[:, 1])
    along = sides[length > 0] / length[length > 0, None] if length.any() else np.array([[1.0, 0.0]])
    across = np.stack([-along[:, 1], along[:, 0]], 1)
    u, v = along @ corners.T, across @ corners.T
    extents = np.stack([u.min(1), u.max(1), v.min(1), v.max(1)], 1)
    area = (extents[:, 1] - extents[:, 0]) * (extents[:, 3] - extents[:, 2])
    best = int(np.argmin(area))
    u0, u1, v0, v1 = extents[best]
    a, c = along[best], across[best]
    box = np.array([a * x + c * y for x, y in ((u0, v0), (u1, v0), (u1, v1), (u0, v1))])
    return clockwise(box), float(min(u1 - u0, v1 - v0))


def clockwise(box: Array) -> Array:
    """The corners of a box from the top left: of the two on the left, the upper one first."""
    by_x = box[np.argsort(box[:, 0], kind="stable")]
    left, right = (pair[np.argsort(pair[:, 1], kind="stable")] for pair in (by_x[:2], by_x[2:]))
    return np.array([left[0], right[0], right[1], left[1]])


def mean_inside(found: Array, box: Array) -> float:
    """The mean of a map over the points inside a box and on its sides."""
    rows, columns = found.shape
    x0, y0 = np.clip(np.floor(box.min(0)).astype(int), 0, (columns - 1, rows - 1))
    x1, y1 = np.clip(np.ceil(box.max(0)).astype(int), 0, (columns - 1, rows - 1))
    y, x = np.mgrid[y0 : y1 + 1, x0 : x1 + 1]
    inside = np.ones(x.shape, bool)
    corners = np.trunc(box - (x0, y0)) + (x0, y0)
    for a, b in zip(corners, np.roll(corners, -1, axis=0), strict=True):
        inside &= (b[0] - a[0]) * (y - a[1]) - (b[1] - a[1]) * (x - a[0]) >= 0
    return float(found[y0 : y1 + 1, x0 : x1 + 1][inside].mean()) if inside.any() else 0.0


def enlarged(box: Array) -> tuple[Array, float]:
    """A rectangle with its sides moved out, and its shorter side.

    The map marks the middle of a line; area over circumference says how much is missing.
    """
    across, down = box[1] - box[0], box[3] - box[0]
    width, height = np.linalg.norm(across), np.linalg.norm(down)
    by = GROWTH * width * height / (2 * (width + height))
    a, d = across / width * by, down / height * by
    grown_by = np.array([-a - d, a - d, a + d, d - a])
    return box + grown_by, float(min(width, height) + 2 * by)


def in_reading_order(boxes: list[Array]) -> list[Array]:
    """From top to bottom; boxes that start within 10 pixels of height, from left to right."""
    ordered = sorted(boxes, key=lambda box: (box[0][1], box[0][0]))
    for last in range(1, len(ordered)):
        for at in range(last, 0, -1):
            upper, lower = ordered[at - 1], ordered[at]
            if abs(lower[0][1] - upper[0][1]) >= 10 or lower[0][0] >= upper[0][0]:
                break
            ordered[at - 1], ordered[at] = lower, upper
    return ordered
