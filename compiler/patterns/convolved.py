"""Convolutions as products of places by channels: their sources have channels last, their weights
the elements of a window in the order in which they lie there."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

from stagefuse.compiler.folded_views import fold_views
from stagefuse.compiler.graph import (
    Contract,
    Graph,
    Map,
    Node,
    Reduce,
    Ref,
    View,
    flatten_index,
    split_index,
)
from stagefuse.compiler.graph_builder import Builder
from stagefuse.dsl.dims import Expr, const, floordiv, minimum, mod, sym
from stagefuse.dsl.dtypes import F32, I32, DType
from stagefuse.dsl.facts import Facts
from stagefuse.dsl.frozen import frozen
from stagefuse.dsl.types import TensorType

from .byte_operands import codes_of, is_byte
from .contract import axes_of
from .gathered import ADJACENT
from .panel_width import panel_width
from .softmax import factors, plain
from .steps import steps_of
from .windows import Windows, windows_of

T = TypeVar("T")
CHUNK_BYTES = 16
"""What a copy brings at most."""


@frozen
class Convolution:
    """A product whose panels are `windows` of a source with `channels` along an `axis`, which the
    digit `channel` of the depth numbers, if there is more than one. `whole`: whether all channels
    of the source are those of one window. `moves`: whether windows overlap or leave things out;
    `codes`: whether operands of 8 bits are multiplied, which must lie along the depth; `packed`:
    whether places of different images are in a panel, so that it must be stored."""

    windows: Windows
    weights: Ref
    axis: int
    channel: str
    channels: int
    whole: bool
    moves: bool
    codes: bool
    packed: bool

    @property
    def is_image(self) -> bool:
        """Whether windows move, or the places are those of an image, or of several of one axis."""
        several = bool(self.windows.outer) and self.packed
        return self.moves or len(self.windows.axes) > 1 or several

    @property
    def must_move(self) -> bool:
        """Whether channels are to be last in any case."""
        return self.moves or (self.is_image and (self.codes or self.packed))

    @property
    def source(self) -> Ref:
        return self.windows.source

    @property
    def taps(self) -> list[tuple[str, int]]:
        """The digits of the depth that move the window, with their sizes."""
        return [(n, size.as_int() or 0) for n, size, _ in self.windows.digits if n != self.channel]


def has_images(graph: Graph) -> bool:
    """Whether a graph may have convolutions: views along whose axes two indices move, or sums for
    every place of several images."""
    views = (n.primitive for n in graph.nodes.values() if isinstance(n.primitive, View))
    if any(len(e.symbols() & set(v.symbols)) > 1 for v in views for e in v.indices):
        return True
    return any(_is_of_places(graph, node) for node in graph.nodes.values())


def _is_of_places(graph: Graph, node: Node) -> bool:
    """Whether a node is sums of products one of whose factors varies along some image's axes and
    the number of the image, and the other does not."""
    found = [axes_of(graph, plain(graph, factor)) for factor in factors(graph, node)]
    if not found:
        return False
    assert isinstance(node.primitive, Reduce)
    (one, other), depth = found, set(node.primitive.axes)
    last = max((one ^ other) - depth, default=-1)
    return any(last in x and len(x - y - depth) > 1 for x, y in ((one, other), (other, one)))


def convolution_of(graph: Graph, node: Node) -> Convolution | None:
    """A product as a convolution, if it is one of f32 or converted to it, or of 8-bit operands."""
    product = node.primitive
    assert isinstance(product, Contract)
    windows = windows_of(graph, node.id, every=True)
    if windows is None or node.type.dtype not in (F32, I32) or product.depth.as_int() is None:
        return None
    if windows.outside or (windows.guarded and windows.fill != 0):
        return None
    if any(size.as_int() is None for _, size, _ in windows.digits) or len(windows.channels) > 1:
        return None
    found = _channels_of(windows, graph.type(windows.source).shape, product.batch)
    if found is None:
        return None
    axis, channel, count, whole = found
    moves = any(a.shifts or a.step > 1 for a in windows.axes)
    codes = codes_of(graph, node) is not None
    packed = steps_of(graph, node.operands[1], node) is None
    return Convolution(windows, node.operands[0], axis, channel, count, whole, moves, codes, packed)


def _channels_of(
    windows: Windows, shape: Sequence[Expr], batch: Sequence[int]
) -> tuple[int, str, int, bool] | None:
    """The axis of the image that has the channels, the symbol of those of a window ("" if there is
    one), their number, and whether they are all; else they are a group for each product."""
    spatial = {a.source for a in windows.axes}
    channel, count = "", 1
    if windows.channels:
        channel, count = windows.channels[0][0], windows.channels[0][1].as_int() or 0
        places = [n for n, e in enumerate(windows.indices) if channel in e.symbols()]
    else:
        places = [n for n, size in enumerate(shape) if size.as_int() == 1 and n not in spatial][-1:]
    if len(places) != 1 or places[0] in spatial:
        return None
    (axis,) = places
    index, total = windows.indices[axis], shape[axis].as_int()
    rest = index - sym(channel) if channel else index
    if total is None or rest.symbols() - {f"d{a}" for a in batch} or channel in rest.symbols():
        return None
    whole = rest == const(0)
    if not whole and (total % count or _in_groups(rest, count, count) is None):
        return None
    return axis, channel, count, whole


def _in_groups(first: Expr, count: int, padded: int) -> Expr | None:
    """Where a group's channels begin if groups of `count` of them become `padded`; None if `first`
    is not where one of such groups begins."""
    found = const(0)
    for name in sorted(first.symbols()):
        step = first.coefficient(name)
        size = None if step is None else step.as_int()
        if size is None or size % count:
            return None
        first, found = first - sym(name) * size, found + sym(name) * (size // count * padded)
    begin = first.as_int()
    return None if begin is None or begin % count else found + begin // count * padded


def convolve(
    b: Builder, node: Node, found: Convolution, image: Ref, weights: Ref, ready: bool
) -> tuple[Ref, list[int]]:
    """The product of places by channels, and the axes of the former result in the order of the new
    one. `image` is the source with channels last; `ready`: it is stored so in any case."""
    return _Convolving(b, node, found, image, weights, ready).run()


class _Convolving:
    def __init__(
        self, b: Builder, node: Node, found: Convolution, image: Ref, weights: Ref, ready: bool
    ) -> None:
        assert isinstance(node.primitive, Contract)
        self.b, self.node, self.found, self.weights = b, node, found, weights
        self.product, self.domain = node.primitive, node.type.shape
        self.dtype, self.narrow = node.type.dtype, _narrow(b, image)
        self.size = _stored(b, image).itemsize
        self.channels = self._padded(ready)
        self.image = self._image(image)
        self.indices = self._indices()
        self.depth = self.channels
        for _, size in found.taps:
            self.depth *= size
        chunk = CHUNK_BYTES // min(self.size, 2)
        self.whole_depth = -(-self.depth // chunk) * chunk
        self.batch = list(self.product.batch)
        self.sizes = [self.domain[a] for a in self.batch]

    def run(self) -> tuple[Ref, list[int]]:
        b, p = self.b, self.product
        lead = [a for a in range(len(self.domain)) if a not in (*p.batch, *p.rows)]
        order = [*lead, *p.batch, *p.rows]
        where = {axis: place for place, axis in enumerate(order)}
        columns = self._count(p.rows)
        width = panel_width(columns)
        left, base, stride = self._left(where)
        product = Contract(
            tuple(where[a] for a in p.batch), tuple(where[a] for a in p.columns),
            tuple(where[a] for a in p.rows), const(self.whole_depth), base, stride, width,
        )  # fmt: skip
        type = TensorType(self.dtype, tuple(self.domain[a] for a in order))
        return b.add(product, (left, self._panels(columns, width)), (type,))[0], order

    def _count(self, axes: Sequence[int]) -> Expr:
        total = const(1)
        for axis in axes:
            total = total * self.domain[axis]
        return total

    # The image

    def _padded(self, ready: bool) -> int:
        """How many channels a window has: more than there are where copies then bring more at a
        time. Whatever is stored anew anyway gets whole chunks."""
        count = self.found.channels
        if count % ADJACENT == 0 and (ready or not self.found.whole):
            return count
        few = count <= ADJACENT or not self.found.whole
        chunk = ADJACENT if few else CHUNK_BYTES // self.size
        return -(-count // chunk) * chunk

    def _image(self, image: Ref) -> Ref:
        """The image with so many channels in each group, zeros in those that are more."""
        count, padded = self.found.channels, self.channels
        if padded == count:
            return image
        stored = self.b.graph.nodes[image.node].operands[0] if self.narrow else image
        *outer, total = self.b.type(stored).shape
        groups = (total.as_int() or 0) // count

        def place(*at: Expr) -> list[Expr]:
            if groups == 1:
                return list(at)
            group, inside = (f(at[-1], padded, facts_of(at)) for f in (floordiv, mod))
            # what lies beyond is zero, but also of a place there
            return [*at[:-1], group * count + minimum(inside, count - 1, facts_of(at))]

        def guard(*at: Expr) -> list[Expr]:
            return [count - 1 - (at[-1] if groups == 1 else mod(at[-1], padded, facts_of(at)))]

        def facts_of(at: Sequence[Expr]) -> Facts:
            return self.b.ranges(self.b.symbols(len(at)), shape)

        shape = [*outer, const(groups * padded)]
        made = self.b.view(stored, shape, place, guard)
        return self.b.cast(folded(self.b, made), self.dtype)

    def _indices(self) -> list[Expr]:
        """Where elements are in the image, over the symbols of the former result and depth."""
        *found, index = last(self.found.windows.indices, self.found.axis)
        own = sym(self.found.channel) if self.found.channel else const(0)
        first = _in_groups(index - own, self.found.channels, self.channels)
        return [*found, index if first is None else first + own]

    def _digits(self, k: Expr) -> dict[str, Expr]:
        """The digits of the former depth at a place in the new one."""
        taps = [const(size) for _, size in self.found.taps]
        parts = split_index(floordiv(k, self.channels, self.b.facts), taps, self.b.facts)
        found = {name: part for (name, _), part in zip(self.found.taps, parts, strict=True)}
        if self.found.channel:
            found[self.found.channel] = mod(k, self.channels, self.b.facts)
        return found

    def _tail(self, k: Expr) -> list[Expr]:
        """What is at least 0 where a place in the depth is one of a window."""
        if self.whole_depth == self.depth:
            return []
        return [self.depth // self.channels - 1 - floordiv(k, self.channels, self.b.facts)]

    def _left(self, where: dict[int, int]) -> tuple[Ref, Expr, Expr]:
        """The windows as a matrix of places by depth: tensor, offset of the batch, row stride."""
        windows, p = self.found.windows, self.product
        shape = self.b.type(self.image).shape
        rows = self._count(p.columns)
        if not self.found.moves and not windows.guarded and self.channels == self.whole_depth:
            place = flatten_index(self.indices, shape)
            zero = {f"d{a}": 0 for a in p.columns}
            rest = place.substitute({**zero, **({self.found.channel: 0})})
            flat = flatten_index([sym(f"d{a}") for a in p.columns],
                                 [self.domain[a] for a in p.columns])  # fmt: skip
            wanted = rest + flat * shape[-1]
            wanted = wanted + sym(self.found.channel) if self.found.channel else wanted
            if self.b.facts.prove_eq(place, wanted):
                own = {f"d{a}": sym(f"i{where[a]}") for a in p.batch}
                return self.image, rest.substitute(own), shape[-1]

        def at_place(*at: Expr) -> dict[str, Expr]:
            facts = self.b.ranges(self.b.symbols(len(at)), sizes)
            parts = split_index(at[-2], [self.domain[a] for a in p.columns], facts)
            found = {f"d{a}": e for a, e in zip(p.columns, parts, strict=True)}
            found |= {f"d{a}": e for a, e in zip(self.batch, at, strict=False)}
            found |= {f"d{a}": const(0) for a in range(len(self.domain)) if f"d{a}" not in found}
            return found | self._digits(at[-1])

        def place_of(*at: Expr) -> list[Expr]:
            here = at_place(*at)
            *found, channel = (e.substitute(here) for e in self.indices)
            more = const(0) if self.found.channel else mod(at[-1], self.channels)
            return [*found, channel + more]

        def guard(*at: Expr) -> list[Expr]:
            here = at_place(*at)
            facts = self.b.ranges(self.b.symbols(len(at)), sizes)
            found = self._tail(at[-1])
            for a in windows.axes if windows.guarded else ():
                index = facts.simplify(windows.indices[a.source].substitute(here))
                found += [index, a.extent - 1 - index]
            return found

        sizes = [*self.sizes, rows, const(self.whole_depth)]
        left = self.b.view(self.image, sizes, place_of, guard)
        base = flatten_index([sym(f"i{where[a]}") for a in self.batch], self.sizes)
        return left, base * rows * self.whole_depth, const(self.whole_depth)

    # The weights

    def _panels(self, columns: Expr, width: int) -> Ref:
        """The weights in panels, each column as its window lies in the image."""
        b, p, given = self.b, self.product, self.weights
        narrow = _narrow(b, given)
        stored = b.graph.nodes[given.node].operands[0] if narrow else given
        shape = b.type(stored).shape
        channel = self.found.channel

        def place_of(*at: Expr) -> list[Expr]:
            digits, old = self._digits(at[-1]), const(0)
            for name, size, step in self.found.windows.digits:
                # what lies beyond is zero, but also of a place there
                old = old + minimum(digits[name], size - 1, facts_of(at)) * step
            batch = {f"i{a}": e for a, e in zip(self.batch, at, strict=False)}
            flat = p.base.substitute(batch) + at[-2] * p.row_stride + old
            return split_index(flat, shape, facts_of(at))

        def facts_of(at: Sequence[Expr]) -> Facts:
            return b.ranges(b.symbols(len(at)), sizes)

        def guard(*at: Expr) -> list[Expr]:
            found = self._tail(at[-1])
            if self.channels > self.found.channels and channel:
                found.append(self.found.channels - 1 - self._digits(at[-1])[channel])
            elif self.channels > self.found.channels:
                found.append(-mod(at[-1], self.channels, b.facts))
            return found

        sizes = [*self.sizes, columns, const(self.whole_depth)]
        ordered = b.cast(folded(b, b.view(stored, sizes, place_of, guard)), self.dtype)
        count = floordiv(columns + (width - 1), width, b.facts)
        return b.view(
            ordered, [*self.sizes, count, const(self.whole_depth), const(width)],
            lambda *at: [*at[:-3], at[-3] * width + at[-1], at[-2]],
            lambda *at: [columns - 1 - (at[-3] * width + at[-1])],
        )  # fmt: skip


def folded(b: Builder, x: Ref) -> Ref:
    """A view folded into one that it looks at."""
    node = b.graph.nodes[x.node]
    if not isinstance(node.primitive, View):
        return x
    found = fold_views(b, node.primitive, node.operands[0], node.type)
    return b.add(*found)[0] if found else x


def _narrow(b: Builder, x: Ref) -> bool:
    """Whether a value is converted from 16 bits, or from 8."""
    return _stored(b, x) != b.type(x).dtype


def _stored(b: Builder, x: Ref) -> DType:
    """The dtype of 16 or 8 bits that a value is converted from, else its own."""
    node, own = b.graph.nodes[x.node], b.type(x).dtype
    if node.primitive != Map("cast"):
        return own
    dtype = b.type(node.operands[0]).dtype
    return dtype if dtype.bits == 16 or is_byte(dtype) else own


def last(items: Sequence[T], axis: int) -> list[T]:
    """All items, one of them last."""
    return [*items[:axis], *items[axis + 1 :], items[axis]]
