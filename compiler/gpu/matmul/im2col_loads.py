"""Left operands that tensor copies take as columns of pixels: the windows of a convolution.

Copies of `im2col` maps start at a pixel of an image with channels last and go on, along the
innermost axis first, through a bounding box, for as many pixels as a tile has rows; each is moved
by the offsets of a place in the window, and what lies outside of the image is 0 (PTX ISA,
"Tensors: im2col mode"; CUDA driver API, `cuTensorMapEncodeIm2col`). So a stage of the depth needs
one copy, of some channels at one place of the window.
"""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.graph import Contract, split_index
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.lower.product import product_of_group
from stagefuse.compiler.lower.values import Lowering
from stagefuse.compiler.patterns.windows import cuts_of
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen

CORNERS = {3: 1 << 15, 4: 1 << 7, 5: 1 << 4}
"""Corners of a bounding box are at least minus this, and less than this, by rank."""
MOST_STEP = 8
"""Pixels from one that is taken to the next along an axis, at most."""


@frozen
class Pixels:
    """Windows of a tensor of `sizes`, [N][D][H][W][C] or without D or D and H.

    `start` is the image and the pixel, outermost first, at which the window of row `i` begins,
    `moves` is what the depth `k` adds to the pixel, and `channel` the first one it reads. A map's
    bounding box begins `lower` beyond the first pixel and ends `upper` beyond the last, of which
    every `steps`-th is taken.
    """

    sizes: tuple[Expr, ...]
    start: tuple[Expr, ...]
    moves: tuple[Expr, ...]
    channel: Expr
    lower: tuple[int, ...]
    upper: tuple[int, ...]
    steps: tuple[int, ...]


@frozen
class _Axis:
    """An axis of an image: its size, how many places of it windows have, and how far apart."""

    size: int
    places: int
    first: int
    step: int


def pixels_of(
    low: Lowering, shape: Sequence[Expr], indices: Sequence[Expr], guard: Sequence[Expr], stage: int
) -> Pixels | None:
    """The windows of the product of a kernel, if copies can take them: elements at `indices` over
    the row `i` and the depth `k` of a tensor of a `shape`, 0 unless each `guard` is at least 0.
    `stage`: elements of the depth that come at a time."""
    p = product_of_group(low, low.group.anchor)
    assert isinstance(p.primitive, Contract)
    depth, facts = p.depth.as_int(), low.graph.facts
    sizes = [e.as_int() for e in shape[1:]]
    *image, channels = sizes
    if p.batch or depth is None or len(shape) not in CORNERS or channels is None:
        return None
    if depth % stage or channels % stage or None in image:
        return None
    ends = {e for n, x in zip(image, indices[1:-1], strict=True) for e in (x, (n or 0) - 1 - x)}
    if not ends.issuperset(guard):
        return None
    places = [p.domain[a] for a in p.primitive.rows]
    if len(places) == len(image):
        places.insert(0, const(1))
    if len(places) != len(image) + 1:
        return None
    facts = facts.with_ranges({"i": (0, size_of(places) - 1)})
    moved = _moves(indices, depth, stage)
    if moved is None or not _is_image(indices[0], places, facts):
        return None
    moves, least, channel = moved
    axes = [
        _axis(n or 0, place, x.substitute({"k": 0}) + m, places, facts)
        for n, place, x, m in zip(image, range(1, len(places)), indices[1:-1], least, strict=True)
    ]
    found = [a for a in axes if a is not None]
    if len(found) < len(axes) or not _fits(found, len(shape)):
        return None
    rows = [e.substitute({"k": 0}) for e in indices[:-1]]
    start = (rows[0], *(e + m for e, m in zip(rows[1:], least, strict=True)))
    return Pixels(
        tuple(shape), start, tuple(moves), channel, tuple(a.first for a in found),
        tuple(a.first + (a.places - 1) * a.step - (a.size - 1) for a in found),
        (1, *(a.step for a in found), 1),
    )  # fmt: skip


def _moves(
    indices: Sequence[Expr], depth: int, stage: int
) -> tuple[list[Expr], list[int], Expr] | None:
    """What the depth adds to each index of a pixel, from 0 on, how much less that begins at, and
    the channel; None unless each stage is adjacent channels at one place of the window."""
    parts = [e - e.substitute({"k": 0}) for e in indices[1:]]
    parts[-1] = indices[-1]
    if any(e.symbols() - {"k"} for e in parts):
        return None
    cuts = [cuts_of(e, "k") for e in parts]
    if any(found is None or any(cut % stage for cut in found) for found in cuts):
        return None  # else quotients of the depth are the same in all of a stage
    values = [[e.evaluate({"k": k}) for e in parts] for k in range(0, depth, stage)]
    after = [[e.evaluate({"k": k + 1}) for e in parts] for k in range(0, depth, stage)]
    if after != [[*before[:-1], before[-1] + 1] for before in values]:
        return None
    least = [min(v[n] for v in values) for n in range(len(parts) - 1)]
    most = [max(v[n] for v in values) - m for n, m in enumerate(least)]
    if max(most) >= 2 * CORNERS[len(indices)]:
        return None
    return [e - m for e, m in zip(parts[:-1], least, strict=True)], least, parts[-1]


def _is_image(index: Expr, places: Sequence[Expr], facts: Facts) -> bool:
    """Whether an index is the image of row `i`."""
    (image, *_) = split_index(sym("i"), places, facts)
    return "k" not in index.symbols() and facts.prove_eq(index, image)


def _axis(
    size: int, number: int, row: Expr, places: Sequence[Expr], facts: Facts
) -> _Axis | None:
    """The axis of a pixel's index `row` over `i`, if it goes with its own places in steps."""
    count, apart = places[number].as_int(), size_of(places[number + 1 :]).as_int()
    first = row.substitute({"i": 0}).as_int()
    if count is None or apart is None or first is None:
        return None
    step = 1
    if count > 1:
        next_one = facts.simplify(row.substitute({"i": apart})).as_int()
        if next_one is None or not 1 <= next_one - first <= MOST_STEP:
            return None
        step = next_one - first
    place = split_index(sym("i"), places, facts)[number]
    if not facts.prove_eq(facts.simplify(row), facts.simplify(place * step + first)):
        return None
    return _Axis(size, count, first, step)


def _fits(axes: Sequence[_Axis], rank: int) -> bool:
    """Whether a map can have the corners of the axes."""
    most = CORNERS[rank]
    corners = [(a.first, a.first + (a.places - 1) * a.step - (a.size - 1)) for a in axes]
    return all(-most <= c < most for pair in corners for c in pair)
