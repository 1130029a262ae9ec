"""Left operands that tensor copies take as columns of pixels: the windows of a convolution.

Copies of `im2col` maps start at a pixel of an image with channels last and go on, along the
innermost axis first, through a bounding box, for as many pixels as a tile has rows; each is moved
by the offsets of a place in the window, and what lies outside of the image is 0 (PTX ISA,
"Tensors: im2col mode"; CUDA driver API, `cuTensorMapEncodeIm2col`). So a stage of the depth needs
one copy, of some channels at one place of the window.
"""

from __future__ import annotations

from collections.abc import Sequence

from stagefuse.compiler.gpu.folds import FoldWriter
from stagefuse.compiler.gpu.ir import Value
from stagefuse.compiler.gpu.tensor_maps import TensorMap
from stagefuse.compiler.graph import Contract, split_index
from stagefuse.compiler.lower.expressions import product_of as size_of
from stagefuse.compiler.lower.product import product_of_group
from stagefuse.compiler.lower.values import Lowering
from stagefuse.compiler.patterns.windows import cuts_of
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen

from .epilogue import ROWS
from .ring import Stage, copy_pixels
from .wgmma_tiles import ROW_BYTES
from .window_rows import Windows

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
    every `steps`-th is taken. A tile has as many columns of pixels as there are `shifts`, which are
    added to the moves of each.
    """

    sizes: tuple[Expr, ...]
    start: tuple[Expr, ...]
    moves: tuple[Expr, ...]
    channel: Expr
    lower: tuple[int, ...]
    upper: tuple[int, ...]
    steps: tuple[int, ...]
    shifts: tuple[tuple[int, ...], ...]


class PixelCopies:
    """The copies of the windows of tiles of so many rows, in boxes of `box` rows and channels;
    the depth goes over a `stretch`."""

    def __init__(
        self, writer: FoldWriter, windows: Pixels, buffer: str, box: tuple[int, int],
        stretch: tuple[Expr, Expr],
    ) -> None:  # fmt: skip
        self.w, self.windows, self.stretch = writer, windows, stretch
        rows, channels = box
        self.rows = rows // len(windows.shifts)
        """Of a column of pixels."""
        inner = [size_of(windows.sizes[n:]) for n in range(1, len(windows.sizes))]
        self.map = writer.tensor_map(
            TensorMap(
                buffer, const(0), windows.sizes, tuple(inner), (self.rows, channels),
                lower=windows.lower, upper=windows.upper, steps=windows.steps,
            )
        )  # fmt: skip
        self.place: list[Value] = []

    def begin_tile(self, tile: Expr) -> None:
        """Finds the image and the pixel at which a tile's first window begins."""
        w, count = self.w, ROWS // len(self.windows.shifts)
        with w.binding(**{**w.bound, "i": tile * count}):
            place = [w.index(e, "i32").to("trunc", "i32") for e in reversed(self.windows.start)]
        self.place = place

    def copy(self, k: Value, stage: Stage) -> None:
        """Starts to copy the windows of a tile at a depth."""
        w, code, windows = self.w, self.w.code, self.windows
        with w.named(k=(k, *self.stretch)):
            channel = w.index(windows.channel, "i32")
            moves = [w.index(e, "i32") for e in reversed(windows.moves)]
        for n, shift in enumerate(windows.shifts):
            halves = [code.fresh("half") for _ in moves]
            for half, move, more in zip(halves, moves, reversed(shift), strict=True):
                code.write("cvt.u16.u32", half, move + more)
            to = stage.start + n * self.rows * ROW_BYTES
            copy_pixels(code, self.map, (channel, *self.place), halves, to, stage.full)


@frozen
class _Axis:
    """An axis of an image: its size, how many places of it windows have, and how far apart."""

    size: int
    places: int
    first: int
    step: int


def pixels_of(
    low: Lowering,
    shape: Sequence[Expr],
    indices: Sequence[Expr],
    guard: Sequence[Expr],
    stage: int,
    pooled: Windows | None = None,
) -> Pixels | None:
    """The windows of the product of a kernel, if copies can take them: elements at `indices` over
    the row `i` and the depth `k` of a tensor of a `shape`, 0 unless each `guard` is at least 0.
    `stage`: elements of the depth that come at a time. Where others pool them, `i` is one of those,
    and columns of pixels are of the first, the second... place of each."""
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
    places, shifts = [p.domain[a] for a in p.primitive.rows], [tuple(0 for _ in image)]
    if pooled is not None:
        places = list(pooled.counts)
        found = _shifts(indices, pooled, facts)
        if found is None:
            return None
        indices, shifts = found
    if len(places) == len(image):
        places.insert(0, const(1))
    if len(places) != len(image) + 1:
        return None
    facts = facts.with_ranges({"i": (0, size_of(places) - 1)})
    moved = _moves(indices, depth, stage, max(map(max, shifts)))
    if moved is None or not _is_image(indices[0], places, facts):
        return None
    moves, least, channel = moved
    axes = [
        _axis(n or 0, place, x.substitute({"k": 0}) + m, places, facts)
        for n, place, x, m in zip(image, range(1, len(places)), indices[1:-1], least, strict=True)
    ]
    taken = [a for a in axes if a is not None]
    if len(taken) < len(axes) or not _fits(taken, len(shape)):
        return None
    rows = [e.substitute({"k": 0}) for e in indices[:-1]]
    start = (rows[0], *(e + m for e, m in zip(rows[1:], least, strict=True)))
    return Pixels(
        tuple(shape), start, tuple(moves), channel, tuple(a.first for a in taken),
        tuple(a.first + (a.places - 1) * a.step - (a.size - 1) for a in taken),
        (1, *(a.step for a in taken), 1), tuple(shifts),
    )  # fmt: skip


def _shifts(
    indices: Sequence[Expr], pooled: Windows, facts: Facts
) -> tuple[list[Expr], list[tuple[int, ...]]] | None:
    """The indices of the first place of the pooling window `i`, and how much further each place
    is along the axes of the image; None if that is not the same in all windows."""
    facts = facts.with_ranges({"i": (0, pooled.count - 1)})
    here = [pooled.at_place(indices, sym("i"), const(n), facts) for n in range(pooled.size)]
    apart = [
        [facts.simplify(e - first).as_int() for e, first in zip(each, here[0], strict=True)]
        for each in here
    ]
    if any(None in x or (x[0], x[-1]) != (0, 0) or min(n or 0 for n in x) < 0 for x in apart):
        return None
    return here[0], [tuple(n or 0 for n in x[1:-1]) for x in apart]


def _moves(
    indices: Sequence[Expr], depth: int, stage: int, shift: int
) -> tuple[list[Expr], list[int], Expr] | None:
    """What the depth adds to each index of a pixel, from 0 on, how much less that begins at, and
    the channel; None unless each stage is adjacent channels at one place of the window. `shift`:
    how much more may be added."""
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
    if max(most) + shift >= 2 * CORNERS[len(indices)]:
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
