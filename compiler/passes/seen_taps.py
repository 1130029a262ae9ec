"""Has sums over windows leave out what lies outside an image."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import field
from itertools import product
from typing import Any, ClassVar, NamedTuple, TypeAlias

import numpy as np

from stagefuse.compiler.graph import Constant, Graph, Node, Reduce, Ref, View, Weight
from stagefuse.compiler.graph_builder import Builder
from stagefuse.compiler.patterns.contract import axes_of, factors_of
from stagefuse.compiler.patterns.convolved import folded
from stagefuse.compiler.patterns.panel_width import panels_time
from stagefuse.dsl.dims import Expr, const, sym
from stagefuse.dsl.dtypes import F32, F64, DType
from stagefuse.dsl.frozen import frozen

from .record import Pass

LONGEST = 1 << 16
"""Places of an image, at most, of which each is looked at."""
MOST = 64
"""Taps that are told apart."""
GAIN, ADD = 0.85, 16
"""The ratio of times up to which there is a product for each tap; cycles to add a vector of it to
the others, where one of a product takes one a channel."""

Range: TypeAlias = tuple[int, int]
"""The first place at which a tap sees an image, and the one behind the last."""


class _Tap(NamedTuple):
    """An axis of taps of a domain, the axis of the places that it moves, the elements of an image
    from one tap to the next, and where each tap sees the image."""

    axis: int
    place: int
    step: int
    seen: tuple[Range, ...]


class _Sum(NamedTuple):
    """The sum over some axes of a domain of what windows see times weights, and its dtype."""

    dtype: DType
    windows: Ref
    weights: Ref
    domain: tuple[Expr, ...]
    axes: tuple[int, ...]
    taps: tuple[_Tap, ...]


@frozen
class SeenTaps(Pass):
    """Sums of products of windows by constant weights, as `load` reads them, leave out taps that
    see nothing but the zeros around an image.

    Where each place is seen by one tap, as in a transposed convolution of a single place, the sum
    is over the channels alone. Where windows reach so far that most taps see a part of the places,
    each of these is a product of its own, and they are added. Weights must be finite: a zero times
    one is then a zero. Sizes of images and windows must be known.
    """

    name: ClassVar[str] = "seen_taps"
    breaks: ClassVar[tuple[str, ...]] = ("views-folded",)
    load: Callable[[str, str], np.ndarray[Any, Any]] = field(repr=False)

    def run(self, graph: Graph) -> Graph:
        b, changed = Builder(graph.facts), False
        new: dict[Ref, Ref] = {}
        for node in graph.nodes.values():
            with b.at(node.span, node.stack, node.label):
                operands = [new[ref] for ref in node.operands]
                found = self._sum(b, node, operands)
                if found is None:
                    made = b.add(node.primitive, operands, node.types)
                else:
                    made, changed = (_made(b, found),), True
            new.update({Ref(node.id, i): ref for i, ref in enumerate(made)})
        b.graph.results = tuple(new[ref] for ref in graph.results)
        return b.graph.live() if changed else graph

    def _sum(self, b: Builder, node: Node, operands: Sequence[Ref]) -> _Sum | None:
        """What a node sums, where something is to be left out."""
        reduce = node.primitive
        if not isinstance(reduce, Reduce) or reduce.kind != "sum" or not node.type.dtype.is_float:
            return None
        factors = factors_of(b, operands[0])
        if factors is None or b.type(operands[0]).dtype != node.type.dtype:
            return None
        domain = b.type(operands[0]).shape
        for u, v in (factors, factors[::-1]):
            if taps := _taps(b.graph, u, domain, reduce.axes):
                s = _Sum(node.type.dtype, u, v, domain, reduce.axes, taps)
                return s if _leaves_out(b.graph, s) and self._is_finite(b.graph, v) else None
        return None

    def _is_finite(self, graph: Graph, ref: Ref) -> bool:
        """Whether a value is a view of finite constants."""
        node = graph.nodes[ref.node]
        while isinstance(node.primitive, View):
            node = graph.nodes[node.operands[0].node]
        if isinstance(node.primitive, Weight):
            values = self.load(node.primitive.weights, node.primitive.key)
        elif isinstance(node.primitive, Constant):
            values = np.frombuffer(node.primitive.data, node.type.dtype.numpy)
        else:
            return False
        return bool(np.isfinite(values.astype(np.float32, copy=False)).all())


def _taps(graph: Graph, ref: Ref, domain: Sequence[Expr], axes: Sequence[int]) -> tuple[_Tap, ...]:
    """The axes of taps of windows, if all that bounds them are ends of images along places; none
    where they are no windows."""
    view = graph.nodes[ref.node].primitive
    if not isinstance(view, View) or not view.guard or view.fill != 0:
        return ()
    names = {name: axis for axis, name in enumerate(view.symbols)}
    guards: dict[tuple[int, int], list[tuple[int, int, int]]] = {}
    for guard in view.guard:
        moved = sorted(guard.symbols())
        if len(moved) != 2 or not all(name in names for name in moved):
            return ()
        place, tap = sorted((names[n] for n in moved), key=lambda a: a in axes)
        slopes = [guard.coefficient(view.symbols[a]) for a in (place, tap)]
        a, c = (None if e is None else e.as_int() for e in slopes)
        if a is None or c is None or tap not in axes or place in axes:
            return ()
        rest = guard - sym(view.symbols[place]) * a - sym(view.symbols[tap]) * c
        if (first := rest.as_int()) is None:
            return ()
        guards.setdefault((place, tap), []).append((a, c, first))
    sides = [side for pair in guards for side in pair]
    if len(set(sides)) < len(sides) or any(domain[a].as_int() is None for a in sides):
        return ()
    if math.prod(domain[tap].as_int() or 0 for _, tap in guards) > MOST:
        return ()
    return tuple(
        _Tap(
            tap,
            place,
            max(abs(c) for _, c, _ in found),
            _seen(found, domain[place].as_int() or 0, domain[tap].as_int() or 0),
        )
        for (place, tap), found in sorted(guards.items())
    )


def _seen(guards: Sequence[tuple[int, int, int]], places: int, taps: int) -> tuple[Range, ...]:
    """Where each tap sees an image: `a * place + c * tap + first` must not be negative."""
    found = []
    for tap in range(taps):
        begin, end = 0, places
        for a, c, first in guards:
            rest = c * tap + first
            if a > 0:
                begin = max(begin, -(rest // a))
            else:
                end = min(end, rest // -a + 1)
        found.append((begin, max(end, begin)))
    return tuple(found)


def _size(range_: Range) -> int:
    return range_[1] - range_[0]


def _line(tap: _Tap, places: int) -> tuple[int, int] | None:
    """The slope and the first of the taps that each place is seen by alone, if they lie in a line
    over two places or more; None if not."""
    if not 2 <= places <= LONGEST or sum(map(_size, tap.seen)) != places:
        return None
    seen = sorted((place, n) for n, r in enumerate(tap.seen) for place in range(*r))
    if [place for place, _ in seen] != list(range(places)):
        return None
    first, slope = seen[0][1], seen[1][1] - seen[0][1]
    return (slope, first) if all(n == slope * place + first for place, n in seen) else None


def _kept(tap: _Tap) -> Range:
    """The taps from the first to the last that sees something."""
    seeing = [n for n, r in enumerate(tap.seen) if _size(r)]
    return (seeing[0], seeing[-1] + 1) if seeing else (0, 0)


def _line_of(s: _Sum, tap: _Tap) -> tuple[int, int] | None:
    return _line(tap, s.domain[tap.place].as_int() or 0)


def _leaves_out(graph: Graph, s: _Sum) -> bool:
    """Whether there is something that the sum can do without, and something is left."""
    if not all(_size(_kept(tap)) for tap in s.taps):
        return False
    cut = any(_size(_kept(tap)) < len(tap.seen) for tap in s.taps)
    return cut or any(_line_of(s, tap) for tap in s.taps) or _is_far(graph, s)


def _is_far(graph: Graph, s: _Sum) -> bool:
    """Whether a product for each tap is quicker than one of all of them, by the vectors of columns
    of either: windows that reach far see zeros, and columns between rows are computed for all."""
    depth = math.prod(s.domain[a].as_int() or 0 for a in s.axes)
    taps = math.prod(len(tap.seen) for tap in s.taps)
    channels = depth // taps
    seen_of = {tap.place: tap.seen for tap in s.taps}
    columns = sorted(axes_of(graph, s.windows) - axes_of(graph, s.weights) - set(s.axes))[-2:]
    columns = [a for a in columns if a in seen_of or s.domain[a].as_int() is not None]
    sizes = [s.domain[a].as_int() for a in columns]
    if s.dtype not in (F32, F64) or all(tap.step < 2 for tap in s.taps):
        return False  # adjacent taps may be filtered, and sums of 16 bits are rounded
    if not set(seen_of) <= set(columns) or None in sizes:
        return False
    high, wide = ([1] * (2 - len(sizes)) + [size or 0 for size in sizes])[-2:]
    gap = wide - min(map(_size, seen_of.get(columns[-1], ((0, wide),))))
    whole = panels_time((high - 1) * (wide + gap) + wide) * channels * taps
    rest = math.prod(size or 0 for a, size in zip(columns, sizes, strict=True) if a not in seen_of)
    apart = 0.0
    for ranges in product(*(tap.seen for tap in s.taps)):
        apart += panels_time(rest * math.prod(map(_size, ranges))) * channels
    apart += panels_time(high * wide) * taps * ADD
    return apart < GAIN * whole


def _made(b: Builder, s: _Sum) -> Ref:
    """The sum without what sees nothing."""
    for tap in s.taps:
        if (line := _line_of(s, tap)) is not None:
            return _made(b, _followed(b, s, tap, *line))
    if _is_far(b.graph, s):
        return _apart(b, s)
    at: dict[int, Expr] = {}
    sizes: dict[int, int] = {}
    for tap in s.taps:
        first, end = _kept(tap)
        at[tap.axis] = sym(f"i{tap.axis}") + first
        sizes[tap.axis] = end - first
    return _summed(b, s, at, sizes)


def _followed(b: Builder, s: _Sum, tap: _Tap, slope: int, first: int) -> _Sum:
    """The sum with a single tap for each place, which follows from the place."""
    here = {tap.axis: sym(f"i{tap.place}") * slope + first}
    domain = tuple(const(1) if a == tap.axis else d for a, d in enumerate(s.domain))
    u, v = (_moved(b, x, domain, here) for x in (s.windows, s.weights))
    others = tuple(t for t in s.taps if t != tap)
    return s._replace(windows=u, weights=v, domain=domain, taps=others)


def _apart(b: Builder, s: _Sum) -> Ref:
    """The sum of a product for each tap, of the places at which it sees something."""
    shape = [d for a, d in enumerate(s.domain) if a not in s.axes]
    where = {a: n for n, a in enumerate(a for a in range(len(s.domain)) if a not in s.axes)}
    total: Ref | None = None
    every = product(*(list(enumerate(tap.seen)) for tap in s.taps))
    for chosen in sorted(every, key=lambda c: -math.prod(_size(r) for _, r in c)):
        if not all(_size(r) for _, r in chosen):
            continue
        at, sizes, ranges = dict[int, Expr](), dict[int, int](), dict[int, Range]()
        for tap, (number, seen) in zip(s.taps, chosen, strict=True):
            at |= {tap.axis: const(number), tap.place: sym(f"i{tap.place}") + seen[0]}
            sizes |= {tap.axis: 1, tap.place: _size(seen)}
            ranges[where[tap.place]] = seen
        made = _widened(b, _summed(b, s, at, sizes), shape, ranges)
        total = made if total is None else b.map("add", total, made)
    assert total is not None
    return total


def _widened(b: Builder, x: Ref, shape: Sequence[Expr], ranges: Mapping[int, Range]) -> Ref:
    """A part of a result with zeros around it."""

    def place(*at: Expr) -> list[Expr]:
        return [e - ranges[a][0] if a in ranges else e for a, e in enumerate(at)]

    def guard(*at: Expr) -> list[Expr]:
        ends = ((at[a] - r[0], r[1] - 1 - at[a]) for a, r in sorted(ranges.items()))
        return [e for pair in ends for e in pair]

    return b.view(x, shape, place, guard, 0.0)


def _summed(b: Builder, s: _Sum, at: Mapping[int, Expr], sizes: Mapping[int, int]) -> Ref:
    """The sum over a part of the domain, of other `sizes` along some axes, where elements are `at`
    some places of it."""
    domain = [const(sizes[a]) if a in sizes else d for a, d in enumerate(s.domain)]
    u, v = (_moved(b, x, domain, at) for x in (s.windows, s.weights))
    return b.reduce("sum", b.map("mul", u, v), s.axes, s.dtype)


def _moved(b: Builder, x: Ref, domain: Sequence[Expr], at: Mapping[int, Expr]) -> Ref:
    """A factor over another domain."""
    made = b.view(x, domain, lambda *here: [
        at[a].substitute({f"i{n}": f for n, f in enumerate(here)}) if a in at else e
        for a, e in enumerate(here)
    ])  # fmt: skip
    return folded(b, made)
