"""The part of a tensor that some windows see, copied into scratch: a stripe.

What lies outside the tensor is filled in around it. Phases of a stride lie apart, so that the
columns of a row are adjacent for every shift of the window: counted flat over the stripe, the gap
between its rows included, an element of all windows is a stretch that begins somewhere else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

from stagefuse.compiler.graph import Concat, Map, Ref, View, flatten_index
from stagefuse.compiler.kernel_ir import Alloc, Const, Index, Load, Op, Store, Value
from stagefuse.compiler.patterns.windows import Axis, Windows
from stagefuse.dsl.dims import Expr, const, floordiv, maximum, minimum, mod, sym
from stagefuse.dsl.dtypes import DType

from .expressions import COMBINE, as_dtype, product_of
from .values import Lowering

TOGETHER = 4
"""Phases up to which a loop stores all of them."""
LOOPS = 16
"""For the parts of a concatenation, at most."""


class Stripe:
    """A stripe of `rows` of `wide` columns of windows, `pitch` from row to row.

    There is a plane for each phase of each channel; `above` rows more than those of the windows
    are in it, since they reach beyond their own. Channels may be `joined` in one plane: what that
    is of several windows (max, min, sum), whose identity is what lies outside.
    """

    name: str
    rows: int
    wide: Expr
    pitch: Expr
    plane: Expr
    slack: int

    def __init__(
        self, low: Lowering, windows: Windows, dtype: DType, joined: str | None = None
    ) -> None:
        self.low, self.dtype, self.joined, self.filled = low, dtype, joined, windows
        self.windows = windows = windows.of_one_plane if joined else windows
        self.along = windows.axes[-1]
        self.across = windows.axes[0] if len(windows.axes) > 1 else None
        self.channels = product_of([size for _, size, _ in windows.channels])
        self.phases = self.along.phases * (self.across.phases if self.across else 1)
        self.above = self.across.reach if self.across else 0

    def columns(self, most: int, unknown: int) -> tuple[Expr, Expr]:
        """Columns of a step along the last axis, `most` at most and `unknown` where their number
        is not known; and from row to row of the stripe."""
        along = self.along
        size = along.size.as_int()
        if size is None or size > most:
            wide = const(unknown)
            return wide, wide + along.reach
        pitch = along.pitch
        return along.size, along.size + along.reach if pitch is None else const(pitch)

    def shape(self, rows: int, wide: Expr, pitch: Expr, slack: int) -> None:
        """Decides the sizes; `slack` elements may be read beyond the last plane."""
        self.rows, self.wide, self.pitch, self.slack = rows, wide, pitch, slack
        gap = wide + self.along.reach - pitch
        size = (rows + self.above) * pitch + gap
        self.plane = floordiv(size + 15, 32) * 32 + 16 if size.as_int() is not None else size
        """An odd number of lines: planes lie in different sets of the caches."""

    def steps(self) -> list[tuple[str, Expr]]:
        """The bands of rows and the pieces of a row that are a stripe each, as loops."""
        loops = [("yb", self._bands()), ("xb", self._pieces())]
        return [(name, count) for name, count in loops if count != const(1)]

    def _bands(self) -> Expr:
        if self.across is None:
            return const(1)
        return floordiv(self.across.size + (self.rows - 1), const(self.rows), self.low.facts)

    def _pieces(self) -> Expr:
        return floordiv(self.along.size + (self.wide - 1), self.wide, self.low.facts)

    def part(self) -> tuple[Expr, Expr, Expr, Expr]:
        """The first row and column of a stripe's windows, and how many rows and columns."""
        low, along, across = self.low, self.along, self.across
        x0 = const(0) if self._pieces() == const(1) else sym("xb") * self.wide
        y0 = const(0) if self._bands() == const(1) else sym("yb") * self.rows
        wide, rows = minimum(along.size - x0, self.wide, low.facts), const(1)
        if across is not None:
            rows = minimum(across.size - y0, const(self.rows), low.facts)
        return y0, x0, rows, wide

    def alloc(self) -> None:
        """Scratch for it."""
        self.name = self.low.name("stripe")
        size = self.channels * self.phases * self.plane + self.slack
        self.low.emit(Alloc(self.name, self.dtype, (size,)))

    def place(self, digits: Mapping[str, Expr]) -> Expr:
        """Where an element of all windows begins, from the first window's on."""
        channel = flatten_index(
            [digits[n] for n, _, _ in self.windows.channels],
            [size for _, size, _ in self.windows.channels],
        )
        place, phase = const(0), const(0)
        for axis in self.windows.axes:
            shift = axis.shift().substitute(digits)
            phase = phase * axis.phases + (mod(shift, axis.phases) if axis.phases > 1 else 0)
            whole = axis.whole(shift)
            place = place + (whole if axis is self.along else whole * self.pitch)
        return (channel * self.phases + phase) * self.plane + place

    def fill(self, source: Ref, around: float, seen: Expr | None = None) -> None:
        """Copies what the windows see of a source, `around` elsewhere; of a row no more than is
        `seen`, if that is said."""
        low = self.low
        y0, x0, rows, _ = self.part()
        plane = self._channel()
        at: dict[int, Expr] = {}

        def band(phase: Expr) -> None:
            axis = self.across
            begin, stop = const(0), const(1)
            if axis is not None:
                begin, stop = axis.inside(phase, y0)
                begin = maximum(begin, 0, low.facts)
                stop = minimum(stop, rows + self.above, low.facts)
                at[axis.source] = (y0 + sym("y")) * axis.step + phase + axis.first + axis.low
            first = plane * self.phases + phase * self.along.phases
            if seen is None and not self.joined:
                self._clear_around(first, (begin, stop), x0, around)
            low.loop("y", begin, stop, lambda: self._row(source, at, first, x0))

        def channels(left: list[tuple[str, Expr]]) -> None:
            if left:
                (name, size), *rest = left
                begin, stop = self.filled.inside(name, size)
                if not self.joined:
                    self._clear_planes(name, [n for n, _ in rest], (begin, stop, size), around)
                for start, end in pairwise((begin, *self._cuts(source, name, size), stop)):
                    low.loop(
                        name, maximum(start, begin, low.facts), minimum(end, stop, low.facts),
                        lambda: channels(rest),
                    )  # fmt: skip
                return None
            if seen is not None and not self.joined:
                self._clear_rows(plane * self.phases, rows, seen, around)
            self._phases("v", self.across, band)

        size = self.channels * self.phases * self.plane
        first = const(0) if self.joined else size
        self._clear(first, size + self.slack - first, around)
        channels([(n, size) for n, size, _ in self.filled.channels])

    def _cuts(self, source: Ref, name: str, size: Expr) -> list[Expr]:
        """Where a channel goes from one part of a concatenation to the next: in a loop over the
        channels of each, nothing is chosen."""
        cuts = sorted(cut for cut in self._parts(source, self.windows.indices, name) if cut > 0)
        inside = [cut for cut in cuts if cut < (size.as_int() or 0)]
        count = min(len(inside), LOOPS - 1)
        return [const(inside[len(inside) * (n + 1) // (count + 1)]) for n in range(count)]

    def _parts(self, ref: Ref, at: Sequence[Expr], name: str) -> set[int]:
        """Where parts begin of concatenations that make a value read `at` some place."""
        node = self.low.graph.nodes[ref.node]
        primitive, found = node.primitive, set[int]()
        if node.id not in self.low.group.members:
            return found
        if isinstance(primitive, View):
            here = dict(zip(primitive.symbols, at, strict=True))
            at = [e.substitute(here, self.low.facts) for e in primitive.indices]
        if not isinstance(primitive, Concat):
            inside = [(x, at) for x in node.operands] if isinstance(primitive, Map | View) else []
        else:
            axis, (starts, _) = primitive.axis, self.low.stretches(node)
            before = [start - at[axis] + sym(name) for start in starts]
            found |= {cut for e in before if (cut := e.as_int()) is not None}
            inside = [
                (x, [*at[:axis], at[axis] - start, *at[axis + 1 :]])
                for x, start in zip(node.operands, starts, strict=True)
            ]
        return found.union(*(self._parts(x, place, name) for x, place in inside))

    def _row(self, source: Ref, at: dict[int, Expr], first: Expr, x0: Expr) -> None:
        """Copies what windows see of row `y` of a source, which is `at` some of its indices, into
        the planes from the first on."""
        low, along = self.low, self.along

        def stretch(begin: Expr, stop: Expr, *phases: tuple[Expr, Expr]) -> None:
            def one() -> None:
                for u, turn in phases:
                    x = sym("x") - turn
                    at[along.source] = (x0 + x) * along.step + u + along.first + along.low
                    where = (first + u) * self.plane + sym("y") * self.pitch + x
                    places = [Index(at.get(n, e)) for n, e in enumerate(self.windows.indices)]
                    value = as_dtype(low.value(source, tuple(places), ()), self.dtype.compute)
                    self._store(where, value)

            low.loop("x", begin, stop, one, vector=True)

        def alone(u: Expr) -> None:
            stretch(*self._columns(x0, u), (u, const(0)))

        if along.spread:
            for u in map(const, range(along.phases)):
                alone(u)
        elif along.phases > TOGETHER:
            self._phases("u", along, alone)
        else:
            self._together(x0, stretch)

    def _store(self, where: Expr, value: Value) -> None:
        """Stores an element that windows see, or what it is with those of the channels before."""
        place = (Index(where),)
        if self.joined:
            known = Load(self.name, place, self.dtype)
            value = Op(COMBINE[self.joined], (known, value), self.dtype.compute)
        self.low.emit(Store(self.name, place, value))

    def _channel(self) -> Expr:
        """The flat index of the channels at hand."""
        channels = self.windows.channels
        return flatten_index([sym(n) for n, _, _ in channels], [size for _, size, _ in channels])

    def _columns(self, x0: Expr, phase: Expr) -> tuple[Expr, Expr]:
        """The columns of a row, from `x0` on, at which a phase has elements of the source."""
        begin, stop = self.along.inside(phase, x0)
        begin = maximum(begin, 0, self.low.facts)
        return begin, maximum(minimum(stop, self.pitch, self.low.facts), begin, self.low.facts)

    def _together(self, x0: Expr, stretch: Callable[..., None]) -> None:
        """Runs a body for the columns of a row at which there are elements of the source: for all
        phases where all have one, so that what is read is adjacent, for each alone at the ends.
        Each phase is turned by as many columns as it begins before the source's first, so that all
        begin together with a whole row."""
        facts, along = self.low.facts, self.along
        whole, phases, ends = (along.first + along.low) // along.step, [], []
        for u in range(along.phases):
            turn = (u + along.first + along.low) // along.step - whole
            begin, stop = self._columns(x0, const(u))
            phases.append((const(u), const(turn)))
            ends.append((begin + turn, stop + turn))
        first, last = ends[0]
        for begin, stop in ends[1:]:
            first, last = maximum(first, begin, facts), minimum(last, stop, facts)
        stretch(first, last, *phases)
        for phase, (begin, stop) in zip(phases, ends, strict=True):
            if begin != first:
                stretch(begin, minimum(first, stop, facts), phase)
            if stop != last:
                stretch(maximum(first, last, facts), stop, phase)

    def _clear(self, first: Expr, size: Expr, around: float) -> None:
        """Stores `around` in a stretch of the stripe."""
        low, place = self.low, (Index(first + sym("z")),)
        zero = int(around) if self.dtype.is_int else around
        store = Store(self.name, place, Const(zero, self.dtype.compute))
        low.loop("z", const(0), size, lambda: low.emit(store), vector=True)

    def _clear_around(self, first: Expr, rows: tuple[Expr, Expr], x0: Expr, around: float) -> None:
        """Stores `around` in the planes of all phases along a row from the first one on, but where
        rows of the source will be."""
        low, facts, top = self.low, self.low.facts, rows[0]
        end = maximum(rows[1], top, facts)

        def one_phase(phase: Expr) -> None:
            at = (first + phase) * self.plane
            begin, stop = self._columns(x0, phase)

            def between() -> None:
                place = at + (sym("y") - 1) * self.pitch + stop
                self._clear(place, self.pitch - stop + begin, around)

            self._clear(at, minimum(top * self.pitch + begin, self.plane, facts), around)
            low.loop("y", top + 1, end, between)
            behind = maximum((end - 1) * self.pitch + stop, 0, facts)
            self._clear(at + behind, self.plane - behind, around)

        self._phases("u", self.along, one_phase)

    def _clear_planes(
        self, name: str, inner: list[str], ends: tuple[Expr, Expr, Expr], around: float
    ) -> None:
        """Stores `around` in the planes of a channel before the first that is in the source and
        behind the last, of all channels of other digits inside it."""
        low, (begin, stop, size) = self.low, ends
        sizes = {n: count for n, count, _ in self.windows.channels}
        each = product_of([sizes[n] for n in inner]) * self.phases * self.plane
        first = self._channel().substitute(dict.fromkeys(inner, const(0)))

        def plane() -> None:
            self._clear(first * self.phases * self.plane, each, around)

        for lo, hi in ((const(0), minimum(begin, size)), (maximum(stop, 0), size)):
            if lo != hi:
                low.loop(name, lo, hi, plane)

    def _clear_rows(self, first: Expr, rows: Expr, seen: Expr, around: float) -> None:
        """The same in what is seen of each row, in the planes of a channel from one on."""
        low = self.low

        def row() -> None:
            self._clear((first + sym("v")) * self.plane + sym("y") * self.pitch, seen, around)

        def plane() -> None:
            low.loop("y", const(0), rows + self.above, row)

        low.loop("v", const(0), const(self.phases), plane)

    def _phases(self, name: str, axis: Axis | None, body: Callable[[Expr], None]) -> None:
        if axis is None or axis.phases == 1:
            return body(const(0))
        self.low.loop(name, const(0), const(axis.phases), lambda: body(sym(name)))
